"""What the machine is good at."""

from __future__ import annotations


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether bfloat16 matrices multiply several times faster than float32 ones: on AMX, AVX512-BF16 and GPUs that have it."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))

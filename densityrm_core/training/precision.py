"""In which precision a training computes: float32, or bfloat16 under autocast with float32 weights.

A rule, not a race: what it says depends on the kind of device and on the model's width, on nothing that a busy machine changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from densityrm_core.choices import take
from densityrm_core.hardware import fast_bfloat16

Precision = Literal["fp32", "bf16"]

# From here on bfloat16 is ahead in all of the work by a tenth or more. `python -m benchmarks.precision`, one thread, float32
# seconds / bfloat16 seconds of steps on short and on long rows and of a rollout; AMD EPYC (Zen 4, AVX512-BF16):
# width 128: 0.94, 0.95, 0.92; 192: 0.94, 1.04, 0.91; 256: 1.10, 1.14, 0.96; 384: 1.19, 1.21, 1.11; 576: 1.33, 1.40, 1.23;
# 768: 1.62, 1.57, 1.32. On a processor with AMX float32 was ahead up to 192 and level at 256. In narrow models casts, and the
# compilation of bfloat16 products for every new shape, cost more than the matrices save.
WIDE = 384


def resolve_precision(wanted: Literal["auto", "fp32", "bf16"], device: str, width: int) -> Precision:
    """As wanted; `auto` is bf16 for models of width WIDE and more on devices that multiply bfloat16 in hardware, else fp32."""
    if wanted != "auto":
        return take("precision", wanted)
    return take("precision", "bf16" if width >= WIDE and fast_bfloat16(device) else "fp32")


def computing(precision: Precision, device: str) -> AbstractContextManager[object]:
    """Within, matrices multiply in that precision; weights, sums and losses stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")

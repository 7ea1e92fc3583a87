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

# From here on bfloat16 is ahead in all of a reward model's work: `python -m benchmarks.precision`, one thread, float32 seconds /
# bfloat16 seconds. AMD EPYC (Zen 4, AVX512-BF16), width 128: steps 1.13 and 1.26, rollout 0.90; 192: 1.38, 1.35, 1.10;
# 256: 1.38, 1.54, 1.10; 576: 1.54, 1.63, 1.32. On a processor with AMX float32 was ahead up to 192 and level at 256. Narrower
# models are the small ones, where the casts cost more than the matrices save and float32's results vary less.
WIDE = 256


def resolve_precision(wanted: Literal["auto", "fp32", "bf16"], device: str, width: int) -> Precision:
    """As wanted; `auto` is bf16 for models of width WIDE and more on devices that multiply bfloat16 in hardware, else fp32."""
    if wanted != "auto":
        return take("precision", wanted)
    return take("precision", "bf16" if width >= WIDE and fast_bfloat16(device) else "fp32")


def computing(precision: Precision, device: str) -> AbstractContextManager[object]:
    """Within, matrices multiply in that precision; weights, sums and losses stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")

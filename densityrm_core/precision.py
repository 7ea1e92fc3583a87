"""In which precision a training computes: float32, or bfloat16 under autocast with float32 weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch

from densityrm_core.hardware import fast_bfloat16
from densityrm_core.ranks import Ranks

_CLEARLY = 1.1  # times as fast: below that float32 is kept, whose results vary less


def computing(bfloat16: bool, device: str) -> AbstractContextManager[object]:
    """Within, matrices multiply in bfloat16 if asked for; weights, sums and losses stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16)


def takes_bfloat16(wanted: Literal["auto", "fp32", "bf16"], step: Callable[[bool], None], ranks: Ranks) -> bool:
    """Whether to compute in bfloat16: as wanted, or by timing `step(bfloat16)`, a forward and backward pass, in both.

    Hardware without fast bfloat16 is not timed. Narrow models are often faster in float32 even where there is: below a width of
    about 200 the casts cost more than the matrices save.
    """
    if wanted != "auto":
        return wanted == "bf16"
    if not fast_bfloat16(ranks.device):
        return False
    for bfloat16 in (False, True):
        step(bfloat16)  # kernels are chosen and memory is allocated
    slow, fast = (min(_seconds(step, bfloat16, ranks.device) for _ in range(2)) for bfloat16 in (False, True))
    return ranks.total([slow])[0] > _CLEARLY * ranks.total([fast])[0]


def _seconds(step: Callable[[bool], None], bfloat16: bool, device: str) -> float:
    started = time.perf_counter()
    step(bfloat16)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started

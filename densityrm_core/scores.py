"""Approximate inner products of blocks of unit vectors in the arithmetic that the processor is fastest at.

Integers of 8 bits where there is VNNI, bfloat16 where there is AMX or AVX512-BF16, float32 everywhere. The scores only choose
candidates: what is nearer than a query's k-th neighbour scores at least `lowered(score of the k-th)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_SIGMAS = 6.0  # of a score's error that thresholds are lowered by
_QUANTUM = 127


class Scores(Protocol):
    """One kind of arithmetic; `largest` is the largest component of the base, in absolute value."""

    name: str
    stored: torch.dtype  # of vectors
    dtype: torch.dtype  # of scores, as `multiply` writes them
    compared: torch.dtype  # of scores, as they are compared: the same bytes

    def vectors(self, rows: Floats) -> Tensor:
        """Rows of the base or queries, (m, d), as they are multiplied."""
        ...

    def multiply(self, queries: Tensor, tile: Tensor, out: Tensor) -> None:
        """Scores (b, t) of queries (b, d) and a transposed tile of the base (d, t)."""
        ...

    def lowered(self, kth: npt.NDArray[np.generic]) -> npt.NDArray[np.generic] | None:
        """Thresholds (b,) from the k-th best scores; None if these scores do not compare as numbers of type `compared`."""
        ...


class Int8Scores:
    """Components in units of the largest one / 127. Sums are exact; a component is off by up to half a unit, uniformly.

    So the error of a score has variance (|x|^2 + |y|^2) / 12 in units, for unit vectors 2 (127 / largest)^2 / 12.
    """

    name, stored, dtype, compared = "8-bit integers", torch.int8, torch.int32, torch.int32

    def __init__(self, largest: float) -> None:
        self._scale = np.float32(_QUANTUM / max(largest, 1e-6))
        self._margin = int(np.ceil(_SIGMAS * np.sqrt(2 / 12) * self._scale))

    def vectors(self, rows: Floats) -> Tensor:
        return torch.from_numpy(np.clip(np.rint(rows * self._scale), -_QUANTUM, _QUANTUM).astype(np.int8))

    def multiply(self, queries: Tensor, tile: Tensor, out: Tensor) -> None:
        torch._int_mm(queries, tile, out=out)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  public only inside quantised modules

    def lowered(self, kth: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return (kth.astype(np.int64) - self._margin).clip(-(2**31) + 1).astype(np.int32)


class BFloat16Scores:
    """bfloat16 has 8 bits: components and scores are off by up to 1/512 of themselves. Compared as 16-bit integers of the same
    bits, which order as numbers above zero do; a threshold at or below zero is not usable."""

    name, stored, dtype, compared = "bfloat16", torch.bfloat16, torch.bfloat16, torch.int16
    _MARGIN = 2**-8 + _SIGMAS * 2**-9 / 3**0.5 / 8  # the score's own rounding; that of 2 d components, whose errors average out

    def __init__(self, largest: float) -> None:
        pass

    def vectors(self, rows: Floats) -> Tensor:
        return torch.from_numpy(rows).bfloat16()

    def multiply(self, queries: Tensor, tile: Tensor, out: Tensor) -> None:
        torch.mm(queries, tile, out=out)

    def lowered(self, kth: npt.NDArray[np.generic]) -> npt.NDArray[np.generic] | None:
        threshold = (kth.astype(np.uint16).astype(np.uint32) << 16).view(np.float32) - np.float32(self._MARGIN)
        if (kth.astype(np.int16) <= 0).any() or (threshold <= 0).any():
            return None
        return (threshold.view(np.uint32) >> 16).astype(np.int16)


class Float32Scores:
    """The order of summation is all that is uncertain."""

    name, stored, dtype, compared = "float32", torch.float32, torch.float32, torch.float32

    def __init__(self, largest: float) -> None:
        pass

    def vectors(self, rows: Floats) -> Tensor:
        return torch.from_numpy(rows)

    def multiply(self, queries: Tensor, tile: Tensor, out: Tensor) -> None:
        torch.mm(queries, tile, out=out)

    def lowered(self, kth: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return kth.astype(np.float32) - np.float32(1e-5)


Kind = Callable[[float], Scores]


@lru_cache
def fastest(width: int) -> Kind:
    """The kind that multiplies vectors of this width fastest here, measured once in some 20 ms. All find the same neighbours."""
    rows = np.random.default_rng(0).standard_normal((2048 + 256, width)).astype(np.float32)
    seconds: dict[str, tuple[float, Kind]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kinds = (Float32Scores, BFloat16Scores, Int8Scores) if width > 1 else (Float32Scores,)  # _int_mm is wrong for one column
    for kind in kinds:
        scores: Scores = kind(float(np.abs(rows).max()))
        tile, queries = scores.vectors(rows[:2048]).T, scores.vectors(rows[2048:])
        out = torch.empty(256, 2048, dtype=scores.dtype)
        times: list[float] = []
        for _ in range(4):
            started = time.perf_counter()
            scores.multiply(queries, tile, out)
            out.view(scores.compared).view(256, 32, 64).amax(1)
            times.append(time.perf_counter() - started)
        seconds[scores.name] = (min(times[1:]), kind)
    torch.set_num_threads(threads)
    return min(seconds.values(), key=lambda entry: entry[0])[1]

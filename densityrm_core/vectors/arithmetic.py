"""Approximate inner products of blocks of unit vectors in the arithmetic that the processor is fastest at.

Integers of 8 bits, bfloat16 or float32: `choose_arithmetic` says where which. The scores only choose candidates: what is nearer
than a query's k-th neighbour scores at least `lowered(score of the k-th)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densityrm_core.arrays import Floats
from densityrm_core.choices import take
from densityrm_core.hardware import processor_features

_SIGMAS = 6.0  # of a score's error that thresholds are lowered by
_QUANTUM = 63


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
    """Components in units of the largest one / 63. Sums are exact; a component is off by up to half a unit, uniformly.

    So the error of a score has variance (|x|^2 + |y|^2) / 12 in units, for unit vectors 2 (63 / largest)^2 / 12. It is 63,
    not 127: without VNNI PyTorch adds pairs of products in 16 bits and lets them saturate silently, which seven bits cannot.
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
Arithmetic = Literal["int8", "bfloat16", "float32"]

KINDS: dict[Arithmetic, Kind] = {"int8": Int8Scores, "bfloat16": BFloat16Scores, "float32": Float32Scores}


def choose_arithmetic(wanted: Literal["auto", Arithmetic], width: int) -> Arithmetic:
    """As wanted, else the one that multiplies vectors fastest on processors of this kind. All find the same neighbours.

    Milliseconds of 256 x 2048 products of 384 components with their maxima, one thread: AMD EPYC (Zen 4) float32 4.4, bfloat16
    1.9, int8 1.0; the same held to AVX2: 5.4, 23, 1.9. With AMX bfloat16 was ahead of int8, which PyTorch computes without it.
    """
    able = processor_features()
    if width == 1:
        return take("search", "float32")  # _int_mm is wrong for one column
    if wanted == "auto":
        wanted = "bfloat16" if "amx_bf16" in able else "int8" if "avx2" in able else "float32"
    return take("search", wanted)

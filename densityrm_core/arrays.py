"""The kinds of arrays that pass from module to module, runs of equal values in them, and ids of prompts as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Vectors = npt.NDArray[Any]  # float16 or float32
Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]  # numbers of rows
Codes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]  # ids of prompts, see `id_keys`
Flags = npt.NDArray[np.bool_]


def runs(values: npt.NDArray[Any]) -> tuple[Rows, Rows]:
    """Where every run of equal neighbours starts, and how long it is."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
    return starts, np.diff(np.append(starts, len(values)))


def same_key(keys: Keys) -> Rows:
    """Two ascending rows with one key, shape (2,), or none, shape (0,)."""
    order = np.argsort(keys)
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])[:1]
    return np.sort(np.concatenate([order[again], order[again + 1]]))


def id_keys(ids: pl.Series) -> Keys:
    """The 64 bits that ids of 16 hex digits spell, shape (n,)."""
    return ids.str.decode("hex").bin.reinterpret(dtype=pl.UInt64, endianness="big").to_numpy()


def key_ids(keys: Keys) -> pl.Series:
    """Ids of 16 hex digits that spell 64-bit keys."""
    return pl.Series([f"{key:016x}" for key in keys.tolist()], dtype=pl.String)

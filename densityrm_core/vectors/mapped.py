"""Unit vectors of prompts as a memory-mapped array of half precision: any block can be had, none need be held."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from densityrm_core.arrays import Halves, Keys, Rows, id_keys
from densityrm_core.storage import batches
from densityrm_core.streams import mix64

BLOCK = 16_384  # rows worked on at a time


class VectorsError(ValueError):
    """Prompts and vectors do not belong together; the message says what to make again."""


class Gathering:
    """Takes vectors as they come and puts them where their prompts stand: a memory-mapped array (n, d)."""

    def __init__(self, keys: Keys, file: Path) -> None:
        """Args: keys (n,) of the prompts, distinct (`prompts.id_keys`); file, where the array is, for its owner to remove."""
        self._keys, self._file = keys, file
        self._order = np.argsort(keys)
        self._ordered = keys[self._order]
        self._vectors: Halves | None = None
        self.truncated, self.found = np.zeros(len(keys), np.bool_), np.zeros(len(keys), np.bool_)

    def put(self, keys: Keys, vectors: npt.NDArray[Any], truncated: npt.NDArray[np.bool_]) -> None:
        """Add the vectors (m, d) of some prompts; those that are not among ours are ignored."""
        if self._vectors is None:
            shape = (len(self._keys), vectors.shape[1])
            self._vectors = np.lib.format.open_memmap(self._file, mode="w+", dtype=np.float16, shape=shape)
        if not len(self._keys):
            return
        place = np.minimum(np.searchsorted(self._ordered, keys), len(self._keys) - 1)
        known = self._ordered[place] == keys
        rows = self._order[place[known]]
        self._vectors[rows] = vectors[known]
        self.truncated[rows], self.found[rows] = truncated[known], True

    def vectors(self) -> Halves:
        """The array, once every prompt has its vector. Raises VectorsError, naming the first prompt that has none."""
        if not self.found.all():
            first = f"{int(self._keys[int(self.found.argmin())]):016x}"
            raise VectorsError(f"{int((~self.found).sum()):,} prompts have no embedding, the first is {first}; embed again")
        return np.empty((0, 1), np.float16) if self._vectors is None else self._vectors


def map_vectors(embeddings: Path, keys: Keys, file: Path) -> tuple[Halves, npt.NDArray[np.bool_]]:
    """The vectors of prompts, in the order of their `keys`, and whether each prompt was truncated.

    Args:
        embeddings: a file per tables.PROMPT_EMBEDDINGS, in any order.
        file: see `Gathering`.

    Raises:
        VectorsError: a prompt has no vector; the message names the first one.
    """
    gathering = Gathering(keys, file)
    for batch in batches(embeddings, ["prompt_id", "truncated", "embedding"]):
        gathering.put(id_keys(batch["prompt_id"]), batch["embedding"].to_numpy(), batch["truncated"].to_numpy())
    return gathering.vectors(), gathering.truncated


def blocks(count: int) -> list[slice]:
    """Slices of BLOCK rows that cover `count` rows."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def row_hashes(vectors: Halves, rows: Rows) -> Keys:
    """A 64-bit hash of the bytes of each of some rows, shape of `rows`: equal vectors have equal hashes."""
    hashes = np.empty(len(rows), np.uint64)
    width = vectors.shape[1] * 2
    padded = -(-width // 8) * 8
    positions = (np.arange(padded // 8, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for part in blocks(len(rows)):
        words = np.zeros((part.stop - part.start, padded), np.uint8)
        words[:, :width] = np.ascontiguousarray(vectors[rows[part]] + np.float16(0)).view(np.uint8)  # -0.0 becomes 0.0
        hashes[part] = mix64(words.view(np.uint64) + positions, np.uint64(0)).sum(axis=1, dtype=np.uint64)
    return hashes


def take(vectors: Halves, rows: Rows, file: Path) -> Halves:
    """Some rows as an array of their own, memory-mapped at `file`."""
    if not len(rows):
        return np.empty((0, vectors.shape[1]), np.float16)
    taken = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(len(rows), vectors.shape[1]))
    for part in blocks(len(rows)):
        taken[part] = vectors[rows[part]]
    return cast(Halves, taken)

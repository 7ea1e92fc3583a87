"""Exact nearest neighbours: approximate scores of all pairs choose candidates, float32 inner products decide among them.

A tile of scores is reduced to the maxima of groups of columns while it is in the cache. The k-th largest of a query's maxima is
not above its k-th largest score, so whatever may be among its k nearest scores at least that, less the error of a score, and
lies in a group whose maximum does. The inner product of two vectors is computed in one order of summation, whatever block it is
computed in, so neighbours and cosines are the same bits for any division of the work and any order of the rows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from densityrm_core.scores import Kind, Scores, fastest

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Vectors = npt.NDArray[Any]  # float16 or float32

_GROUP, _TILE = 32, 2048  # columns of a group, of a tile
_SPAN = 32_768  # columns whose scores are held at a time
_QUERIES = 512  # of a block, fewer where memory is short
_CANDIDATES = 1 << 20  # that are looked at at a time
_ROWS = 65_536  # of the base that are converted at a time


class ExactSearch:
    """The k nearest rows of a base, all of them."""

    recall = 1.0

    def __init__(self, base: Vectors, threads: int, max_memory: int, kind: Kind | None = None) -> None:
        """Args: base (n, d) finite unit vectors; max_memory in bytes, kept where `bytes_needed` is within it."""
        self._base = np.empty(base.shape, np.float32) if base.dtype != np.float32 else np.ascontiguousarray(base)
        if base.dtype != np.float32:
            for start in range(0, len(base), _ROWS):
                self._base[start : start + _ROWS] = base[start : start + _ROWS]
        self._largest = float(max(self._base.max(initial=0), -self._base.min(initial=0)))
        self._scores = (kind or fastest(base.shape[1]))(self._largest)
        self._tiles = _tiles(self._base, self._scores)
        self._threads = threads
        span = min(_SPAN, len(self._tiles) * self._tiles[0].shape[1]) if self._tiles else 0
        left = max_memory - bytes_needed(base)
        self._block = int(np.clip(left // max(1, 2 * span * self._scores.dtype.itemsize * threads), 16, _QUERIES))
        self._held = threading.local()
        self.method = f"exact: {self._scores.name} choose, float32 decides"

    def search(self, queries: Vectors, k: int, own: Ints | None = None) -> tuple[Floats, Ints]:
        """Cosines (q, k) and rows (q, k), nearest first, ties by row; see `neighbors.Search`."""
        k, left_out = available(len(self._base), len(queries), k, own)
        cosines, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)

        def work(start: int) -> None:
            part = slice(start, start + self._block)
            asked = finite(queries[part], start, "the queries")
            cosines[part], rows[part] = self._nearest(asked, k, left_out[part])

        with _one_thread_each(), ThreadPoolExecutor(self._threads, initializer=_one_thread) as pool:
            list(pool.map(work, range(0, len(queries), self._block)))
        return cosines, rows

    def _nearest(self, queries: Floats, k: int, own: Ints) -> tuple[Floats, Ints]:
        """The nearest of each of a block of queries: those of the first columns, of the next, and so on."""
        best = np.full((len(queries), k), -2, np.float32), np.full((len(queries), k), -1, np.int64)
        asked, tile = self._scores.vectors(queries), self._tiles[0].shape[1]
        beyond = np.abs(queries).max(axis=1) > self._largest  # what these scores cannot hold: every row is a candidate
        reached: npt.NDArray[Any] | None = None  # the k + 1 largest maxima of groups so far; the query itself may be one
        for first in range(0, len(self._tiles), max(1, _SPAN // tile)):
            tiles = self._tiles[first : first + max(1, _SPAN // tile)]
            scores, maxima = self._scored(asked, tiles, len(self._base) - first * tile)
            reached = maxima if reached is None else np.hstack([reached, maxima])
            if reached.shape[1] > k + 1:
                reached = np.partition(reached, reached.shape[1] - k - 1, axis=1)[:, -k - 1 :]
            threshold = self._thresholds(reached, k, beyond)
            hits = np.flatnonzero(maxima >= threshold[:, np.newaxis])
            for some in range(0, len(hits), _CANDIDATES // _GROUP):
                query, group = np.divmod(hits[some : some + _CANDIDATES // _GROUP], maxima.shape[1])
                found, row = _members(scores, query, group, threshold)
                row += first * tile
                real = row < len(self._base)
                self._decide(queries, found[real], row[real], own, best)
        return best

    def _scored(self, queries: torch.Tensor, tiles: list[torch.Tensor], rows: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Scores (tiles, b, members, groups) and the maxima of groups (b, tiles x groups); columns from `rows` on are filling."""
        count, tile = len(queries), tiles[0].shape[1]
        if not hasattr(self._held, "scores"):
            self._held.scores = torch.empty(min(len(self._tiles), max(1, _SPAN // tile)), self._block, tile, dtype=self._scores.dtype)
        every = self._held.scores[: len(tiles), :count]
        maxima = torch.empty(count, len(tiles), tile // _GROUP, dtype=self._scores.compared)
        with torch.inference_mode():
            for number, columns in enumerate(tiles):
                self._scores.multiply(queries, columns, every[number])
                compared = every[number].view(self._scores.compared)
                if rows < (number + 1) * tile:
                    compared[:, rows - number * tile :] = _lowest(self._scores)
                maxima[:, number] = compared.view(count, _GROUP, -1).amax(1)
        shape = len(tiles), count, _GROUP, tile // _GROUP
        return every.view(self._scores.compared).numpy().reshape(shape), maxima.view(count, -1).numpy()

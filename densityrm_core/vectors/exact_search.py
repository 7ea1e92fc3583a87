"""Exact nearest neighbours: approximate scores of all pairs choose candidates, float32 inner products decide among them.

    queries (b, d)  x  tile of the base (d, t)  ->  scores (b, t)  ->  maxima of groups of 32 columns (b, t / 32)  ->  candidates

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
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt
import torch

from densityrm_core.arrays import Floats, Ints, Vectors
from densityrm_core.vectors.arithmetic import KINDS, Arithmetic, Scores, choose_arithmetic

_GROUP, _TILE = 32, 2048  # columns of a group, of a tile
_SPAN = 32_768  # columns whose scores are held at a time
_QUERIES = 512  # of a block, fewer where memory is short
_CANDIDATES = 1 << 20  # that are looked at at a time
_ROWS = 65_536  # of the base that are converted at a time


class ExactSearch:
    """The k nearest rows of a base, all of them."""

    recall = 1.0

    def __init__(self, base: Vectors, threads: int, max_memory: int, arithmetic: Literal["auto", Arithmetic] = "auto") -> None:
        """Args: base (n, d) unit vectors; max_memory in bytes, kept where `bytes_needed` is within it; arithmetic of the scores.

        Raises:
            ValueError: a vector is not finite.
        """
        self._base = np.empty(base.shape, np.float32) if base.dtype != np.float32 else np.ascontiguousarray(base)
        for start in range(0, len(base), _ROWS):
            rows = finite(base[start : start + _ROWS], start, "the base")
            if base.dtype != np.float32:
                self._base[start : start + _ROWS] = rows
        self._largest = float(max(self._base.max(initial=0), -self._base.min(initial=0)))
        self._scores = KINDS[choose_arithmetic(arithmetic, base.shape[1])](self._largest)
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
            self._held.scores = torch.empty(
                min(len(self._tiles), max(1, _SPAN // tile)), self._block, tile, dtype=self._scores.dtype
            )
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

    def _thresholds(self, reached: npt.NDArray[Any], k: int, beyond: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        """Scores (b,) below which nothing is among the k nearest; the lowest number where scores cannot tell."""
        lowest = np.full(len(reached), _lowest(self._scores), reached.dtype)
        if reached.shape[1] <= k:
            return lowest
        kth = reached.min(axis=1)
        lowered = self._scores.lowered(kth)
        if lowered is None:
            each = [self._scores.lowered(kth[i : i + 1]) for i in range(len(kth))]
            lowered = np.array([low if one is None else one[0] for low, one in zip(lowest, each, strict=True)], reached.dtype)
        return np.where(beyond, lowest, lowered)

    def _decide(self, queries: Floats, query: Ints, row: Ints, own: Ints, best: tuple[Floats, Ints]) -> None:
        """Let the pairs (query, row), ordered by query, into the best so far."""
        if not len(query):
            return
        first, last = int(query[0]), int(query[-1]) + 1
        counts = np.bincount(query - first)
        if last - first > 1 and counts.max() * len(counts) > _CANDIDATES:
            middle = int(np.searchsorted(query, (first + last) // 2))
            self._decide(queries, query[:middle], row[:middle], own, best)
            self._decide(queries, query[middle:], row[middle:], own, best)
            return
        ids = np.full((last - first, int(counts.max())), -1, np.int64)
        ids[query - first, np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)] = row
        ids[ids == own[first:last, np.newaxis]] = -1
        cosines = np.clip(inner_products(queries[first:last], self._base, ids), -1, 1)
        cosines, ids = np.hstack([best[0][first:last], cosines]), np.hstack([best[1][first:last], ids])
        best[0][first:last], best[1][first:last] = best_of(cosines, ids, best[0].shape[1])


def available(count: int, queries: int, k: int, own: Ints | None) -> tuple[int, Ints]:
    """How many neighbours can come back from a base of `count` rows, and the row that each query leaves out, (q,), -1 for none.

    Raises:
        ValueError: there is no other to be a neighbour.
    """
    left_out = np.full(queries, -1, np.int64) if own is None else np.asarray(own, np.int64)
    k = min(k, count - bool((left_out >= 0).any()))
    if k < 1:
        raise ValueError(f"{count} vectors have no {k or 1} others to be neighbours")
    return k, left_out


def finite(rows: Vectors, first: int, name: str) -> Floats:
    """Rows as float32; `first` is the number of the first.

    Raises:
        ValueError: one is not finite; the message gives its number and the `name` of what it is a row of.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise ValueError(f"row {first + int(bad.argmax())} of {name} is not finite")
    return rows


def bytes_needed(base: Vectors) -> int:
    """What a search takes beside its base, buffers of scores left aside: a float32 copy if it is not, and at most as much again
    for the vectors as they are multiplied."""
    return base.size * (4 if base.dtype != np.float32 else 0) + base.size * 4


def inner_products(queries: Floats, base: Floats, ids: Ints) -> Floats:
    """float32 inner products of each query (b, d) with the rows `ids` (b, w) of the base; for ids of -1 anything finite."""
    found = np.zeros(ids.shape, np.float32)
    library: Any = faiss  # its C++ functions are not in its types
    arrays = [library.swig_ptr(array) for array in (found, queries, base, ids)]
    library.fvec_inner_products_by_idx(*arrays, base.shape[1], *ids.shape)
    return found


def best_of(cosines: Floats, ids: Ints, k: int) -> tuple[Floats, Ints]:
    """The k largest of each row (b, w) and their ids, largest first, ties by id; ids of -1 do not count.

    Cosine and id are sorted as one integer: the bits of a float order as the number does once negative ones are inverted.
    """
    bits = (cosines + np.float32(0)).view(np.uint32)
    rising = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    keys = ((~rising).astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64) & np.uint64(0xFFFFFFFF)
    keys[ids < 0] = np.uint64(2**64 - 1)
    if k < keys.shape[1]:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    keys = np.sort(keys, axis=1)
    rising = ~(keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(rising >> np.uint32(31), rising & np.uint32(0x7FFFFFFF), ~rising)
    missing = keys == np.uint64(2**64 - 1)
    found = np.where(missing, np.float32(-2), bits.view(np.float32))
    return found, np.where(missing, -1, (keys & np.uint64(0xFFFFFFFF)).astype(np.int64))


def _members(scores: npt.NDArray[Any], query: Ints, group: Ints, threshold: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """(query, column) of what reaches its threshold in some groups of scores (tiles, b, members, groups); by query."""
    _, _, members, groups = scores.shape
    tile, place = np.divmod(group, groups)
    values = scores[tile, query, :, place]
    hit, member = np.divmod(np.flatnonzero(values >= threshold[query][:, np.newaxis]), members)
    return query[hit], tile[hit] * (members * groups) + member * groups + place[hit]


def _lowest(scores: Scores) -> float:
    """What no score is below, as it is compared."""
    return -np.inf if scores.compared == torch.float32 else torch.iinfo(scores.compared).min


def _tiles(base: Floats, scores: Scores) -> list[torch.Tensor]:
    """The base as transposed tiles (d, t), the last one filled up with zeros."""
    tile = min(_TILE, max(1, -(-len(base) // _GROUP)) * _GROUP)
    tiles: list[torch.Tensor] = []
    for start in range(0, len(base), tile):
        rows = scores.vectors(base[start : start + tile])
        if len(rows) < tile:
            rows = torch.cat([rows, torch.zeros(tile - len(rows), base.shape[1], dtype=scores.stored)])
        tiles.append(rows.T)
    return tiles


def _one_thread() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


@contextlib.contextmanager
def _one_thread_each() -> Generator[None]:
    """Our own threads share the work; the libraries' threads would only get in each other's way."""
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        faiss.omp_set_num_threads(threads[1])

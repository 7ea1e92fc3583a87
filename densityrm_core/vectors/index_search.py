"""Approximate nearest neighbours at scale: a faiss index whose recall is measured against exact search, and raised to a target.

Vectors are assigned to cells; in the cells nearest to a query the codes of what is left beside the cell's centre, 4 bits for
each component, are scanned [Jegou et al. 2011; Andre et al. 2015], and the best are refined with vectors of half precision. What
is missed lies in a cell that was not scanned, or its code misled: the number of cells (`nprobe`) or of refined candidates
(`k_factor`), whichever finds more, is doubled until the recall is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from densityrm_core.arrays import Floats, Ints, Vectors
from densityrm_core.streams import stream
from densityrm_core.vectors.exact_search import ExactSearch, available, best_of, finite, inner_products

Say = Callable[[str], None]

_TRAINED_ON = 48  # vectors for each cell
_BLOCK = 65_536  # rows of the base read at a time
_QUERIES = 4_096  # searched at a time
_SAME = 1e-6  # cosines closer than this are one
_MEASURED = 1_000  # queries whose neighbours are searched exactly
_PROBED_FIRST, _REFINED_FIRST = 4, 2  # cells; candidates by codes for each neighbour wanted
_REFINED_LAST = 256
_STORED = {"SQfp16": 2, "SQ8": 1}  # bytes for each component of the refining copy


def build_index(base: Vectors, k: int, recall: float, threads: int, max_memory: int, say: Say) -> IndexSearch:
    """An index over `base` (n, d), read block by block, that finds the share `recall` of the k nearest.

    The same base gives the same index: samples are drawn by row, and training runs in one order.

    Raises:
        ValueError: a vector is not finite, or no such index fits into `max_memory` bytes.
    """
    for start in range(0, len(base), _BLOCK):  # before the training, which would not say which it is
        finite(base[start : start + _BLOCK], start, "the base")
    faiss.omp_set_num_threads(threads)
    factory = _factory(base, max_memory)
    index: Any = faiss.index_factory(base.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    cells: Any = faiss.extract_index_ivf(index)
    rows = _sample(len(base), cells.nlist * _TRAINED_ON, "training")
    say(f"{factory}: trained on {len(rows):,} of {len(base):,} vectors")
    cells.cp.max_points_per_centroid = _TRAINED_ON
    index.train(np.asarray(base[rows], np.float32))
    for start in range(0, len(base), _BLOCK):
        index.add(np.ascontiguousarray(base[start : start + _BLOCK], np.float32))
        say(f"{min(start + _BLOCK, len(base)):,}/{len(base):,} vectors in the index")
    found = IndexSearch(base, index, factory, threads)
    found.reach(k, recall, threads, say)
    return found


class IndexSearch:
    """A trained index over a base; made by `build_index`."""

    def __init__(self, base: Vectors, index: Any, factory: str, threads: int) -> None:
        self._base, self._index, self._factory, self._threads = base, index, factory, threads
        self._cells: Any = faiss.extract_index_ivf(index)
        self._refined_as_stored = base.dtype == np.float16 and "SQfp16" in factory
        self.recall, self.method = 0.0, factory

    def reach(self, k: int, target: float, threads: int, say: Say) -> None:
        """Scan more cells or refine more codes until the measured recall of the k nearest is `target`, or there are no more."""
        rows = _sample(len(self._base), _MEASURED, "recall")
        queries = np.asarray(self._base[rows], np.float32)
        truth, _ = exact_by_parts(self._base, queries, k, rows, threads)

        def measure(probes: int, refined: int) -> float:
            self._cells.nprobe, self._index.k_factor = probes, refined
            cosines, _ = self.search(queries, k, rows)
            found = float((cosines >= truth[:, -1:] - _SAME).mean())
            say(f"nprobe {probes}, k_factor {refined}: recall {found:.3f}")
            return found

        chosen = _PROBED_FIRST, _REFINED_FIRST
        self.recall = measure(*chosen)
        while self.recall < target:
            probes, refined = chosen
            more: list[tuple[int, int]] = []
            if probes < self._cells.nlist:
                more.append((2 * probes, refined))
            if refined < _REFINED_LAST:
                more.append((probes, 2 * refined))
            if not more:
                break
            self.recall, chosen = max((measure(*each), each) for each in more)
        self._cells.nprobe, self._index.k_factor = chosen
        self.method = f"faiss {self._factory}, nprobe {chosen[0]}, k_factor {chosen[1]}"

    def search(self, queries: Vectors, k: int, own: Ints | None = None) -> tuple[Floats, Ints]:
        """Cosines (q, k) and rows (q, k), nearest first, ties by row; see `neighbors.Search`."""
        k, left_out = available(len(self._base), len(queries), k, own)
        asked = finite(queries, 0, "the queries")
        cosines, rows = np.empty((len(asked), k), np.float32), np.empty((len(asked), k), np.int64)
        for start in range(0, len(asked), _QUERIES):
            part = slice(start, start + _QUERIES)
            found, ids = self._index.search(asked[part], k + 1)  # one more: the query itself may be among them
            ids[ids == left_out[part, np.newaxis]] = -1
            if not self._refined_as_stored:
                found = _cosines(self._base, asked[part], ids)
            cosines[part], rows[part] = best_of(np.clip(found, -1, 1), ids, k)
            short = start + np.flatnonzero((ids >= 0).sum(axis=1) < k)
            if len(short):  # the cells that were scanned hold too few
                cosines[short], rows[short] = exact_by_parts(self._base, asked[short], k, left_out[short], self._threads)
        return cosines, rows


def exact_by_parts(base: Vectors, queries: Floats, k: int, own: Ints, threads: int) -> tuple[Floats, Ints]:
    """Exact search of a few queries in a base that need not fit into memory as float32."""
    best = np.full((len(queries), k), -2, np.float32), np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(base), _BLOCK):
        part = base[start : start + _BLOCK]
        inside = np.where((own >= start) & (own < start + len(part)), own - start, -1)
        wanted = min(k, len(part) - bool((inside >= 0).any()))
        if wanted:
            cosines, rows = ExactSearch(part, threads, 1 << 32).search(queries, wanted, inside)
            best = best_of(np.hstack([best[0], cosines]), np.hstack([best[1], rows + start]), k)
    return best


def _factory(base: Vectors, max_memory: int) -> str:
    count, width = base.shape
    cells = int(2 ** np.clip(round(np.log2(4 * np.sqrt(count))), 2, 16))
    sizes = {kind: count * (-(-width // 2) + bytes_each * width + 8) for kind, bytes_each in _STORED.items()}
    for kind, size in sizes.items():
        if size <= max_memory:
            return f"IVF{cells},PQ{width}x4fsr,Refine({kind})"
    raise ValueError(
        f"an index of {count:,} vectors needs {min(sizes.values()) / 2**30:.1f} GiB; "
        f"raise compute.max_memory_gib from {max_memory / 2**30:.1f}"
    )


def _sample(count: int, wanted: int, name: str) -> Ints:
    rows = stream(0, "index", name).choice(count, min(count, wanted), replace=False)
    return np.sort(rows).astype(np.int64)


def _cosines(base: Vectors, queries: Floats, ids: Ints) -> Floats:
    """float32 inner products with the vectors themselves; only the rows asked for are read."""
    rows, place = np.unique(ids, return_inverse=True)
    some = np.ascontiguousarray(base[np.maximum(rows, 0)], np.float32)
    return inner_products(queries, some, place.reshape(ids.shape).astype(np.int64))

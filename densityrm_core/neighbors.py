"""Vectors -> k nearest neighbours by cosine: exact where that is affordable, by an index of measured recall beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from densityrm_core.exact_search import ExactSearch

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Vectors = npt.NDArray[Any]  # float16 or float32

_EXACT_PRODUCTS = 2e13  # n n d up to which exact search is chosen: 230,000 vectors of 384 dimensions, a minute on two cores
_MEMORY = 4 << 30


class Search(Protocol):
    """A base of vectors that can be asked for the nearest ones. `method` says how, `recall` what share of them is found."""

    method: str
    recall: float

    def search(self, queries: Vectors, k: int, own: Ints | None = None) -> tuple[Floats, Ints]:
        """Cosine and row of the k nearest rows of the base to every query, nearest first, ties by row.

        Args:
            queries: (q, d) unit vectors.
            k: neighbours wanted; the base must have that many, besides the query itself.
            own: (q,) the row of the base that a query itself is, left out of its neighbours by id, not by position: among exact
                copies the query need not come first. -1 for a query that is not in the base.

        Returns:
            cosines (q, k) clipped to [-1, 1], rows (q, k).
        """
        ...


def build_search(
    base: Vectors,
    k: int,
    *,
    search: Literal["auto", "exact", "index"] = "auto",
    recall: float = 0.95,
    threads: int = 2,
    max_memory: int = _MEMORY,
    say: Callable[[str], None] = lambda _: None,
) -> Search:
    """Prepare the search for the k nearest rows of `base`, (n, d) unit vectors, float16 or float32, memory-mapped or not.

    Args:
        search: `exact`, `index` (see `index_search`), or `auto`: exact while n^2 d inner products are a matter of a minute.
        recall: what an index must find of the true neighbours, measured.
        max_memory: bytes that may be taken beside the base.
        say: receives a sentence at every stage of the building of an index.

    Raises:
        ValueError: a vector is not finite, or the index cannot be kept within `max_memory`.
    """
    _require_finite(base)
    count, width = base.shape
    if search == "exact" or (search == "auto" and count * count * width <= _EXACT_PRODUCTS):
        return ExactSearch(base, threads, max_memory)
    from densityrm_core.index_search import build_index

    return build_index(base, k, recall, threads, max_memory, say)


def nearest(queries: Vectors, base: Vectors, k: int, own: Ints | None = None, threads: int = 2) -> tuple[Floats, Ints]:
    """The k nearest rows of `base` to every query, exactly; see `Search.search`. Fewer come back if the base has fewer others.

    Raises:
        ValueError: a vector is not finite, or the base has no other row.
    """
    k = min(k, len(base) - (own is not None and bool((own >= 0).any())))
    if k < 1:
        raise ValueError(f"{len(base)} vectors have no {k or 1} others to be neighbours")
    _require_finite(queries)
    return build_search(base, k, search="exact", threads=threads).search(queries, k, own)


def _require_finite(vectors: Vectors) -> None:
    for start in range(0, len(vectors), 1 << 16):
        bad = ~np.isfinite(vectors[start : start + (1 << 16)]).all(axis=1)
        if bad.any():
            raise ValueError(f"vector {start + int(bad.argmax())} is not finite")

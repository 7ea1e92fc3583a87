"""Vectors -> k nearest neighbours by cosine: exact where that is affordable, by an index of measured recall beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from densityrm_core.arrays import Floats, Ints, Vectors
from densityrm_core.vectors.arithmetic import Arithmetic
from densityrm_core.vectors.exact_search import ExactSearch, bytes_needed
from densityrm_core.vectors.index_search import build_index

_EXACT_PRODUCTS = 1.5e13  # n n d up to which exact search is chosen, on any machine: 200,000 vectors of 384 dimensions
_FEWEST_INDEXED = 1_000  # an index is not worth its training for fewer
_MEMORY = 4 << 30


class Search(Protocol):
    """A base of vectors that can be asked for the nearest ones. `method` says how, `recall` what share of them is found."""

    method: str
    recall: float

    def search(self, queries: Vectors, k: int, own: Ints | None = None) -> tuple[Floats, Ints]:
        """Cosine and row of the k nearest rows of the base to every query, nearest first, ties by row.

        Args:
            queries: (q, d) unit vectors, float16 or float32.
            k: neighbours wanted; fewer come back if the base has fewer others.
            own: (q,) the row of the base that a query itself is, left out of its neighbours by id, not by position: among exact
                copies the query need not come first. -1 for a query that is not in the base.

        Returns:
            cosines (q, k) clipped to [-1, 1], rows (q, k).

        Raises:
            ValueError: a query is not finite, or the base has no other row.
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
    arithmetic: Literal["auto", Arithmetic] = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> Search:
    """Prepare the search for the k nearest rows of `base`, (n, d) unit vectors, float16 or float32, memory-mapped or not.

    Args:
        k: neighbours that will be asked for; an index is measured and tuned for this many.
        search: `exact`, `index` (see `index_search`; fewer than a thousand vectors are searched exactly), or `auto` (see
            `exact_is_affordable`).
        recall: what an index must find of the true neighbours, measured.
        max_memory: bytes that may be taken beside the base.
        arithmetic: in which exact search chooses its candidates (see `scores`); the neighbours are the same.
        say: receives a sentence at every stage of the building of an index.

    Raises:
        ValueError: a vector is not finite, or the search does not fit into `max_memory`.
    """
    small = len(base) < _FEWEST_INDEXED
    if search == "exact" or small or (search == "auto" and exact_is_affordable(base, max_memory)):
        if bytes_needed(base) > max_memory:
            raise ValueError(
                f"exact search of {len(base):,} vectors needs {bytes_needed(base) / 2**30:.1f} GiB; raise compute.max_memory_gib "
                f"from {max_memory / 2**30:.1f}, or set density.search to index"
            )
        return ExactSearch(base, threads, max_memory, arithmetic)
    return build_index(base, k, recall, threads, max_memory, say)


def exact_is_affordable(base: Vectors, max_memory: int) -> bool:
    """Whether searching all of `base` (n, d) exactly, n^2 d products, takes about as long as an index, and fits.

    The same on every machine: an index finds other neighbours than exact search, and so other weights.
    """
    count, width = base.shape
    return count * count * width <= _EXACT_PRODUCTS and bytes_needed(base) <= max_memory


def nearest(queries: Vectors, base: Vectors, k: int, own: Ints | None = None, threads: int = 2) -> tuple[Floats, Ints]:
    """The k nearest rows of `base` to every query, exactly; see `Search.search`.

    Raises:
        ValueError: a vector is not finite, or the base has no other row.
    """
    return ExactSearch(base, threads, _MEMORY).search(queries, k, own)

"""Vectors -> k nearest neighbours by cosine."""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def nearest(queries: Floats, base: Floats, k: int, own: Ints | None = None) -> tuple[Floats, Ints]:
    """Cosine and row of the k nearest rows of `base` to every query, nearest first, ties by row.

    Args:
        queries: (q, d) unit vectors, float32.
        base: (n, d) unit vectors, float32.
        k: neighbours wanted; fewer come back if `base` has fewer others.
        own: (q,) the row of `base` that a query itself is, left out of its neighbours by id, not by position: among exact
            copies the query need not come first. -1 for a query that is not in `base`.

    Returns:
        cosines (q, k) clipped to [-1, 1], rows (q, k).
    """
    exclude = own is not None and bool((own >= 0).any())
    k = min(k, len(base) - exclude)
    if k < 1:
        raise ValueError(f"{len(base)} vectors have no {k or 1} others to be neighbours")
    index = faiss.IndexFlatIP(base.shape[1])
    index.add(np.ascontiguousarray(base))  # pyright: ignore[reportCallIssue]  faiss's Python layer hides the C++ signature
    cosines, rows = index.search(np.ascontiguousarray(queries), min(k + 1, len(base)))  # pyright: ignore[reportCallIssue]
    if own is not None:
        cosines = np.where(rows == own[:, None], np.float32(-np.inf), cosines)
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    cosines, rows = np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)
    return np.clip(cosines, -1, 1), rows

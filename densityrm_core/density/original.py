"""The recipe of the first implementation, as it was, and its validation list beside what can hold.

It took the mean Euclidean distance to the k nearest prompts, called it density, and weighed by its inverse: the larger the
distance, the smaller the weight. So it weighed COMMON prompts up, the opposite of what it was for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arrays import Doubles
from densityrm_core.density.definitions import distances
from densityrm_core.density.tempering import effective_fraction
from densityrm_core.vectors.neighbors import nearest

NEIGHBORS = 10
_CLOSEST = 1e-6


def original_weights(vectors: npt.NDArray[Any], k: int = NEIGHBORS, threads: int = 2) -> Doubles:
    """Weights (n,) of unit vectors (n, d) by the first recipe: w ~ 1 / max(mean_j r_j, 1e-6), summing to 1.

    With at most k prompts it fell back to uniform weights. It dropped the first of k + 1 neighbours as the query itself; here
    that one is left out by its number, which is the same unless vectors are equal.
    """
    count = len(vectors)
    if count < k + 1:
        return np.full(count, 1 / max(count, 1))
    cosines, _ = nearest(vectors, vectors, k, np.arange(count), threads)
    weights = 1 / np.maximum(distances(cosines).mean(axis=1), _CLOSEST)
    return weights / weights.sum()


def checklist(weights: Doubles) -> pl.DataFrame:
    """The original's validation list: what it expected, what the weights (n,) show, and why it cannot hold where it cannot."""
    low, high, count = float(weights.min()), float(weights.max()), len(weights)
    ratio, ess = high / low, effective_fraction(weights)
    bound = (
        f"ESS <= 1 / max^2: a maximum of 0.05 leaves at most 400 effective prompts of {count:,}; read ESS/n = {ess:.2f} instead"
    )
    strength = "it measures near-duplicates and the distance floor, not the strength of reweighting; read ESS/n instead"
    rows = [
        ("weights loaded", "all prompts", f"{count:,} prompts", bool(np.isfinite(weights).all()), ""),
        ("sum", "1", f"{weights.sum():.6f}", abs(weights.sum() - 1) < 1e-6, ""),
        ("minimum", "far below 0.001", f"{low:.2e}", low < 1e-4, "" if low < 1e-4 else f"uniform weights are {1 / count:.1e}"),
        ("maximum", "0.01 to 0.1", f"{high:.2e}", 0.01 <= high <= 0.1, bound),
        ("ratio", "50,000 to 100,000", f"{ratio:,.0f}", 5e4 <= ratio <= 1e5, strength),
    ]
    return pl.DataFrame(
        [
            {"claim": c, "the original expected": e, "here": h, "holds": "yes" if ok else "no", "why": why}
            for c, e, h, ok, why in rows
        ]
    )

"""Distances -> density -> weights, and the numbers that describe them.

Density falls with distance and weight is inverse density, so weight grows with distance: the rarer, the heavier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.optimize import brentq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from densityrm_core import tables
from densityrm_core.experiment import DensitySettings
from densityrm_core.neighbors import nearest

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_NEIGHBORS_FOR_GROUPS = 32
_LARGEST_LOG_RATIO = 500.0  # of two weights: beyond this the smaller would underflow to zero


class DensityError(ValueError):
    """No density or weight can be computed from what was given."""


@dataclass(frozen=True)
class Weighing:
    """`table` per tables.DENSITY_WEIGHTS, and the exponent that reached the target effective sample fraction."""

    table: pl.DataFrame
    exponent: float
    groups: int


def weigh_prompts(prompts: pl.DataFrame, embeddings: pl.DataFrame, settings: DensitySettings) -> Weighing:
    """Density of every prompt among the training prompts, and the sampling weight of every training prompt.

    Near-duplicates are collapsed to one representative first and share its weight, or copies would make each other dense.

    Args:
        prompts: tables.PROMPTS.
        embeddings: tables.PROMPT_EMBEDDINGS of the same prompts, in any order.

    Raises:
        DensityError: fewer than two distinct training prompts, or a prompt without an embedding.
    """
    joined = prompts.join(embeddings.select("prompt_id", "embedding"), on="prompt_id", how="left", maintain_order="left")
    missing = joined.filter(pl.col("embedding").is_null())
    if missing.height:
        raise DensityError(f"{missing.height} prompts have no embedding, the first is {missing['prompt_id'][0]}; embed again")
    vectors = joined["embedding"].to_numpy().astype(np.float32, copy=False)
    train = np.flatnonzero((joined["split"] == "train").to_numpy())
    if len(train) < 2:
        raise DensityError(f"the training split has {len(train)} prompts; density needs at least 2")

    group = near_duplicate_groups(vectors[train], settings.near_duplicate_cosine)
    representatives = np.flatnonzero(group == np.arange(len(group)))
    if len(representatives) < 2:
        raise DensityError("all training prompts are near-duplicates of one another; there is no density to weigh by")
    base = vectors[train[representatives]]
    own = np.full(len(vectors), -1, np.int64)
    own[train] = np.searchsorted(representatives, group)  # a member is measured as its representative is
    queries = vectors.copy()
    queries[train] = vectors[train[group]]
    cosines, _ = nearest(queries, base, settings.neighbors, own)
    log_distance = mean_log_distance(cosines, settings.distance_floor)

    sizes = np.bincount(group, minlength=len(group))[group]
    pairs = joined["pairs"].to_numpy()[train]
    weights, exponent = temper_weights(log_distance[train], sizes, settings, pairs)
    return Weighing(_table(joined, train, group, log_distance, weights), exponent, len(representatives))


def near_duplicate_groups(vectors: npt.NDArray[np.float32], cosine: float) -> Ints:
    """For every row of `vectors` (n, d) the first row of its group: rows linked by a chain of cosines >= `cosine`. Shape (n,)."""
    n = len(vectors)
    similar, rows = nearest(vectors, vectors, min(_NEIGHBORS_FOR_GROUPS, n - 1), np.arange(n))
    near = similar >= cosine
    here = np.repeat(np.arange(n), near.sum(1))
    graph = coo_array((np.ones(len(here), np.int8), (here, rows[near])), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    _, first = np.unique(label, return_index=True)
    return first[label].astype(np.int64)


def mean_log_distance(cosines: npt.NDArray[np.float32], floor: float) -> Doubles:
    """l_i = mean_j log max(r_ij, floor) with r = sqrt(2 - 2 cos), shape (n,): the log of the geometric-mean distance.

    exp(-m l_i) is the log-averaged k-nearest-neighbour density estimate in m dimensions [Loftsgaarden & Quesenberry 1965].
    """
    distance = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * cosines.astype(np.float64)))
    return np.log(np.maximum(distance, floor)).mean(axis=1)


def temper_weights(log_distance: Doubles, group_sizes: Ints, settings: DensitySettings, pairs: Ints) -> tuple[Doubles, float]:
    """w ~ exp(gamma l) / group size, capped, normalised; gamma solved so that the effective sample fraction meets its target.

    The fraction is ESS/n = (sum w)^2 / (n sum w^2) [Kish 1965] over groups, where every group counts once: copies of a prompt
    neither dilute nor add to it. With mass `per_pair` a prompt's weight is multiplied by its number of pairs.

    Returns:
        weights (n,), float64, positive, summing to 1; and gamma >= 0 (0 if all distances are equal).
    """
    distance = log_distance - log_distance.max()
    once = 1.0 / group_sizes

    def group_weights(gamma: float) -> Doubles:
        return _cap(np.exp(gamma * distance), once, settings.max_weight)

    def excess(gamma: float) -> float:
        return effective_fraction(group_weights(gamma), once) - settings.target_ess

    gamma, spread = 0.0, float(np.ptp(distance))
    if spread > 1e-9 and settings.target_ess < 1:
        steepest = _LARGEST_LOG_RATIO / spread
        gamma = cast(float, brentq(excess, 0.0, steepest, xtol=1e-10)) if excess(steepest) < 0 else steepest
    weights = group_weights(gamma) * once
    if settings.mass == "per_pair":
        weights = weights * pairs
    return weights / weights.sum(), gamma


def effective_fraction(weights: Doubles, multiplicity: Doubles | None = None) -> float:
    """Kish's effective sample fraction (sum w)^2 / (n sum w^2); `multiplicity` counts an item that often (default once)."""
    m = np.ones_like(weights) if multiplicity is None else multiplicity
    weights = weights / weights.max()  # the squares of small weights would underflow
    return float((m * weights).sum() ** 2 / (m.sum() * (m * weights**2).sum()))


def describe_weights(table: pl.DataFrame) -> dict[str, float]:
    """Numbers of the training weights (tables.DENSITY_WEIGHTS).

    The effective sample fraction counts near-duplicates as one, as the target does; `_of_prompts` counts every prompt.
    """
    weighed = table.filter(pl.col("weight").is_not_null())
    weights = weighed["weight"].to_numpy()
    groups = weighed.group_by("group", maintain_order=True).agg(pl.col("weight").sum())["weight"].to_numpy()
    top = max(1, len(weights) // 100)
    return {
        "prompts": len(weights),
        "min": float(weights.min()),
        "max": float(weights.max()),
        "max_over_uniform": float(weights.max() * len(weights)),
        "ratio": float(weights.max() / weights.min()),
        "effective_sample_fraction": effective_fraction(groups),
        "effective_sample_fraction_of_prompts": effective_fraction(weights),
        "top_percent_mass": float(np.sort(weights)[-top:].sum()),
    }


def _cap(weights: Doubles, multiplicity: Doubles, cap: float) -> Doubles:
    """Limit every weight to c, where c is `cap` times the mean of the limited weights.

    With the m heaviest limited, c = cap (m c + rest) / n, so c = cap rest / (n - cap m); the right m is the smallest one whose c
    is not exceeded by the next weight.
    """
    order = np.argsort(-weights, kind="stable")
    counted, values = np.cumsum(multiplicity[order]), weights[order]
    rest = np.cumsum((multiplicity[order] * values)[::-1])[::-1]  # summed from the smallest up: no cancellation
    room = counted[-1] - cap * np.concatenate([[0.0], counted[:-1]])
    limit = np.where(room > 0, cap * rest / np.where(room > 0, room, 1.0), np.inf)
    return np.minimum(weights, limit[int((values <= limit * (1 + 1e-12)).argmax())])


def _table(joined: pl.DataFrame, train: Ints, group: Ints, log_distance: Doubles, weights: Doubles) -> pl.DataFrame:
    ids = joined["prompt_id"].to_numpy()
    representative = ids.copy()
    representative[train] = ids[train[group]]
    weight = np.full(len(ids), np.nan)
    weight[train] = weights
    reference = np.sort(-log_distance[train])  # log density of the training prompts

    def cut(parts: int) -> Ints:
        edges = np.quantile(reference, np.arange(1, parts) / parts)
        return 1 + np.searchsorted(edges, -log_distance, side="left").astype(np.int64)

    return tables.DENSITY_WEIGHTS.check(
        joined.select("prompt_id", "split", "pairs").with_columns(
            pl.Series("group", representative, pl.String),
            pl.Series("log_distance", log_distance),
            pl.Series("density", np.exp(-log_distance)),
            pl.Series("decile", cut(10)),
            pl.Series("quartile", cut(4)),
            pl.Series("weight", weight).fill_nan(None),
        )
    )

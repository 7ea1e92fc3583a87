"""Log density -> sampling weights of a given strength, and the numbers that describe weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import polars as pl
from scipy.optimize import brentq

from densityrm_core.arrays import Doubles, Ints
from densityrm_core.settings import DensitySettings

_LARGEST_LOG_RATIO = 500.0  # of two weights: beyond this the smaller would underflow to zero
ESS_TOLERANCE = 0.005  # a target is missed if the effective sample fraction is further away


@dataclass(frozen=True)
class Tempered:
    """Weights (n,), float64, positive, summing to 1; the exponent that made them and the effective sample fraction it reached."""

    weights: Doubles
    exponent: float
    effective_fraction: float


def temper_weights(log_density: Doubles, group_sizes: Ints, settings: DensitySettings, pairs: Ints) -> Tempered:
    """w ~ density^-gamma / group size, capped, mixed with uniform; gamma solved for the target effective sample fraction.

    The fraction is ESS/n = (sum w)^2 / (n sum w^2) [Kish 1965] over groups, where every group counts once: copies of a prompt
    neither dilute nor add to it. It falls as gamma grows, from 1 at gamma = 0, so the root is bracketed and unique. With mass
    `per_pair` a prompt's weight is multiplied by its number of pairs afterwards. The definition `original` fixes gamma = -1 and
    knows neither target, cap nor mix: w ~ 1 / mean distance.

    Args:
        log_density: (n,), natural log.
        group_sizes: number of prompts that share the prompt's group, (n,).
        pairs: preference pairs with the prompt, (n,).

    Returns:
        `exponent` is gamma: 0 if all densities are equal. If the target is out of reach, the steepest weights there are.
    """
    once = 1.0 / group_sizes
    if settings.definition == "original":
        gamma, of_group = -1.0, np.exp(log_density - log_density.max())
    else:
        gamma, of_group = _solve(log_density.min() - log_density, once, settings)
    weights = of_group * once * (pairs if settings.mass == "per_pair" else 1.0)
    return Tempered(weights / weights.sum(), gamma, effective_fraction(of_group, once))


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


def group_share(mass: str) -> pl.Expr:
    """What a prompt's group would weigh if each of its prompts had one pair; of training rows of tables.DENSITY_WEIGHTS."""
    weight = pl.col("weight") / pl.col("pairs") if mass == "per_pair" else pl.col("weight")
    return weight * pl.len().over("group")


def _solve(rarity: Doubles, once: Doubles, settings: DensitySettings) -> tuple[float, Doubles]:
    """gamma and the weight of each prompt's group. Sorted once: the order of weights is that of `rarity` for every gamma."""
    order = np.argsort(-rarity, kind="stable")
    heaviest_first, counted = rarity[order] - rarity[order[0]], once[order]
    total = counted.sum()

    def weights(gamma: float) -> Doubles:
        capped = _cap(np.exp(gamma * heaviest_first), counted, settings.max_weight)
        return (1 - settings.mix) * capped + settings.mix * (counted * capped).sum() / total

    def excess(gamma: float) -> float:
        return effective_fraction(weights(gamma), counted) - settings.target_ess

    gamma, spread = 0.0, float(-heaviest_first[-1])
    if spread > 1e-9 and settings.target_ess < 1:
        steepest = _LARGEST_LOG_RATIO / spread
        gamma = cast(float, brentq(excess, 0.0, steepest, xtol=1e-12)) if excess(steepest) < 0 else steepest
    in_order = np.empty_like(rarity)
    in_order[order] = weights(gamma)
    return gamma, in_order


def _cap(weights: Doubles, multiplicity: Doubles, cap: float) -> Doubles:
    """Limit every weight to c, where c is `cap` times the mean of the limited weights; `weights` are heaviest first.

    With the m heaviest limited, c = cap (m c + rest) / n, so c = cap rest / (n - cap m); the right m is the smallest one whose c
    is not exceeded by the next weight.
    """
    counted = np.cumsum(multiplicity)
    rest = np.cumsum((multiplicity * weights)[::-1])[::-1]  # summed from the smallest up: no cancellation
    room = counted[-1] - cap * np.concatenate([[0.0], counted[:-1]])
    limit = np.where(room > 0, cap * rest / np.where(room > 0, room, 1.0), np.inf)
    return np.minimum(weights, limit[int((weights <= limit * (1 + 1e-12)).argmax())])

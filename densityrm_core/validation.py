"""The validation list of the original experiment: what must hold of weights before anything is trained by them."""

from __future__ import annotations

import numpy as np
import polars as pl

from densityrm_core.density import describe_weights
from densityrm_core.sampling import SystematicSampler, pair_weights

Finding = tuple[bool, dict[str, float]]


def check_weights(weights: pl.DataFrame, prompts: pl.DataFrame, train: pl.DataFrame, mass: str) -> dict[str, Finding]:
    """Each check's outcome and the numbers behind it, by name.

    Args:
        weights: tables.DENSITY_WEIGHTS.
        prompts: tables.PROMPTS.
        train: tables.PREFERENCE_PAIRS, the training split; its prompt_id is enough.
        mass: `per_prompt` or `per_pair`, as the weights were made.
    """
    weighed = weights.filter(pl.col("weight").is_not_null())
    wanted = set(prompts.filter(pl.col("split") == "train")["prompt_id"])
    given = set(weighed["prompt_id"])
    unweighed = train.join(weighed, on="prompt_id", how="anti")
    several = (
        train.join(weighed, on="prompt_id").group_by("prompt_id").agg(pl.col("weight").n_unique()).filter(pl.col("weight") > 1)
    )
    repeated = weights.height - weights["prompt_id"].n_unique()
    values = weighed["weight"].to_numpy()
    proper = len(values) > 0 and bool(np.isfinite(values).all() and (values > 0).all() and abs(values.sum() - 1) < 1e-9)
    outcome: dict[str, Finding] = {
        "every_prompt_has_a_weight": (wanted == given, {"without": len(wanted - given), "unexpected": len(given - wanted)}),
        "every_pair_has_a_weight": (unweighed.is_empty(), {"pairs": train.height, "without": unweighed.height}),
        "one_prompt_one_weight": (several.is_empty() and not repeated, {"prompts_with_several": several.height + repeated}),
        "weights_are_a_distribution": (proper, {"sum": float(values.sum()), **describe_weights(weights)}),
        "rarer_weighs_more": _monotone(weighed, mass),
    }
    sound = proper and unweighed.is_empty() and not repeated
    outcome["sampler_follows_weights"] = _sampled(train, weights) if sound else (False, {"largest_gap": float("nan")})
    return outcome


def _monotone(weighed: pl.DataFrame, mass: str) -> Finding:
    shared = pl.col("weight") * pl.len().over("group")
    intensity = shared / pl.col("pairs") if mass == "per_pair" else shared
    ordered = (
        weighed.select("log_distance", intensity.alias("intensity")).sort("log_distance", "intensity")["intensity"].to_numpy()
    )
    falls = int((ordered[1:] < ordered[:-1] * (1 - 1e-9)).sum())
    return falls == 0, {"prompts": weighed.height, "falls": falls}


def _sampled(train: pl.DataFrame, weights: pl.DataFrame) -> Finding:
    expected = pair_weights(train, weights)
    draws = SystematicSampler(expected, train.height, seed=0).draw(np.arange(train.height))
    gap = np.abs(np.bincount(draws, minlength=train.height) - expected * train.height)
    return bool(gap.max() < 1 + 1e-6), {"draws": train.height, "largest_gap": float(gap.max())}

"""The validation list of the original experiment: what must hold of weights before anything is trained by them."""

from __future__ import annotations

import numpy as np
import polars as pl

from densityrm_core.density.tempering import describe_weights, group_share
from densityrm_core.sampling import SystematicSampler

Finding = tuple[bool, dict[str, float]]


def check_weights(weights: pl.DataFrame, prompts: pl.DataFrame, mass: str) -> dict[str, Finding]:
    """Each check of the prompts' weights: its outcome and the numbers behind it, by name.

    Args:
        weights: tables.DENSITY_WEIGHTS.
        prompts: tables.PROMPTS; prompt_id and split are enough.
        mass: `per_prompt` or `per_pair`, as the weights were made.
    """
    weighed = weights.filter(pl.col("weight").is_not_null())
    wanted = prompts.filter(pl.col("split") == "train").select("prompt_id")
    without = wanted.join(weighed, on="prompt_id", how="anti").height
    unexpected = weighed.join(wanted, on="prompt_id", how="anti").height + weighed.height - weighed["prompt_id"].n_unique()
    values = weighed["weight"].to_numpy()
    proper = len(values) > 0 and bool(np.isfinite(values).all() and (values > 0).all() and abs(values.sum() - 1) < 1e-9)
    return {
        "every_prompt_has_a_weight": (without == unexpected == 0, {"without": without, "unexpected": unexpected}),
        "weights_are_a_distribution": (
            proper,
            {"sum": float(values.sum()), **(describe_weights(weights) if len(values) else {})},
        ),
        "rarer_weighs_more": _monotone(weighed, mass),
    }


def check_pair_weights(pairs: pl.DataFrame) -> dict[str, Finding]:
    """Each check of the pairs' weights (tables.PAIR_WEIGHTS): its outcome and the numbers behind it, by name."""
    train = pairs.filter(pl.col("split") == "train")
    without = train["weight"].null_count()
    unexpected = pairs.height - train.height - pairs.filter(pl.col("split") != "train")["weight"].null_count()
    spread = train.group_by("prompt_id").agg(pl.col("weight").n_unique() > 1)["weight"].sum()
    sound = train.height > 0 and without == 0 and bool((train["weight"] >= 0).all())
    return {
        "every_pair_has_a_weight": (
            without == unexpected == 0,
            {"pairs": train.height, "without": without, "unexpected": unexpected},
        ),
        "one_prompt_one_weight": (spread == 0, {"prompts_with_several": int(spread)}),
        "sampler_follows_weights": _sampled(train["weight"].to_numpy()) if sound else (False, {"largest_gap": float("nan")}),
    }


def _monotone(weighed: pl.DataFrame, mass: str) -> Finding:
    ordered = weighed.select(-pl.col("log_density").alias("rarity"), group_share(mass).alias("intensity")).sort(
        "rarity", "intensity"
    )
    rising = ordered["intensity"].to_numpy()
    falls = int((rising[1:] < rising[:-1] * (1 - 1e-9)).sum())
    return falls == 0, {"prompts": weighed.height, "falls": falls}


def _sampled(weights: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Finding:
    draws = SystematicSampler(weights, len(weights), seed=0).draw(np.arange(len(weights)))
    gap = np.abs(np.bincount(draws, minlength=len(weights)) - weights / weights.sum() * len(weights))
    return bool(gap.max() < 1 + 1e-6), {"draws": len(weights), "largest_gap": float(gap.max())}

"""Reward models beside each other, and on further sets: numbers with intervals, from rows of RM_EVALUATION."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import polars as pl

from densityrm_core.arrays import Doubles
from densityrm_core.measurement.frames import ends, flat, table
from densityrm_core.measurement.reward_models import checked, model_slots, models_of, of_set, resample

MEAN_OF_SUBSETS = "mean of subsets"


def agreement(rows: pl.DataFrame, resamples: int) -> pl.DataFrame:
    """How often two models rank a test pair alike, and whether they are wrong on the same pairs.

    - agreement: share of pairs that both rank alike; a tie ranks either way with one half.
    - kappa: Cohen's (agreement - expected) / (1 - expected) of the labels right and wrong, with
      expected = a b + (1 - a)(1 - b) of the accuracies a and b: what models that err independently would reach [Cohen 1960; error
      consistency: Geirhos et al. 2020, eq. 1]. In the order in which the pairs are labelled, chance agreement would hide it.

    Returns:
        columns model, other, metric, pairs, mean, low, high; pairs that both scored in one seed.
    """
    test = of_set(rows).select("seed", "model", "pair_id", "prompt_id", "correct")
    found: list[dict[str, object]] = []
    for model, other in combinations(models_of(test), 2):
        both = test.filter(pl.col("model") == model).join(
            test.filter(pl.col("model") == other).select("seed", "pair_id", other="correct"),
            on=["seed", "pair_id"],
            maintain_order="left",
        )
        if both.is_empty():
            continue
        a, b = both["correct"].to_numpy(), both["other"].to_numpy()
        columns = np.stack([np.ones_like(a), a, b, a * b + (1 - a) * (1 - b)], axis=-1)
        drawn = resample(both, columns, _alike, resamples)
        pairs = both["pair_id"].n_unique()
        for m, metric in enumerate(("agreement", "kappa")):
            key = {"model": model, "other": other, "metric": metric, "pairs": pairs}
            found.append({**key, **ends(drawn.interval(m))})
    return table(found, {**dict.fromkeys(("model", "other", "metric"), pl.String()), "pairs": pl.Int64()})


def measure_sets(rows: pl.DataFrame, resamples: int) -> pl.DataFrame:
    """Accuracy on the further sets: by subset, and the mean over subsets, in which each counts alike [RewardBench].

    - accuracy: share of pairs ranked right.
    - all_right: share of prompts whose every pair is ranked right: best of n where a row has one chosen reply and several
      rejected ones [RewardBench 2].

    Returns:
        columns set, subset (MEAN_OF_SUBSETS too), model, metric, pairs, mean, low, high.
    """
    further = checked(rows.filter(pl.col("set") != "test"))
    found: list[dict[str, object]] = []
    for (name,), frame in sorted(further.partition_by("set", as_dict=True).items()):
        models, slots = model_slots(frame)
        subsets = sorted(set(frame["src"]))
        places = slots * len(subsets) + np.searchsorted(subsets, frame["src"].to_numpy())
        shape = (len(models), len(subsets), 4)
        prompt = ("seed", "model", "src", "prompt_id")
        first = frame.select(pl.int_range(pl.len()).over(prompt) == 0).to_series().to_numpy().astype(float)
        right = frame.select(pl.col("correct").min().over(prompt) == 1).to_series().to_numpy() * first
        columns = np.stack([frame["correct"].to_numpy(), np.ones(frame.height), right, first], axis=-1)

        def shares(sums: Doubles, shape: tuple[int, ...] = shape) -> Doubles:
            """(..., models, subsets and their mean, 2), flat."""
            sums = sums.reshape(*sums.shape[:-2], *shape)
            by_subset = sums[..., ::2] / sums[..., 1::2]
            return flat(np.concatenate([by_subset, by_subset.mean(-2, keepdims=True)], axis=-2), 3)

        # a slot for every model and subset, though the last model may lack the last subset
        drawn = resample(frame, columns, shares, resamples, places, len(models) * len(subsets))
        for i, model in enumerate(models):
            own = frame.filter(pl.col("model") == model)
            for j, subset in enumerate([*subsets, MEAN_OF_SUBSETS]):
                pairs = own.filter((pl.col("src") == subset) | (subset == MEAN_OF_SUBSETS))["pair_id"].n_unique()
                for m, metric in enumerate(("accuracy", "all_right")):
                    interval = drawn.interval((i * (len(subsets) + 1) + j) * 2 + m)
                    key = {"set": name, "subset": subset, "model": model, "metric": metric, "pairs": pairs}
                    found.append({**key, **ends(interval)})
    return table(found, {**dict.fromkeys(("set", "subset", "model", "metric"), pl.String()), "pairs": pl.Int64()})


def _alike(sums: Doubles) -> Doubles:
    n, a, b, alike = np.moveaxis(sums[..., 0, :], -1, 0)
    a, b, observed = a / n, b / n, alike / n
    expected = a * b + (1 - a) * (1 - b)
    return np.stack([observed, (observed - expected) / (1 - expected)], axis=-1)

"""What reward models and baselines think of the test split and of further sets: the one place that reads the test split for them.

Whatever is chosen - steps, learning rates, the strength of a baseline - is chosen on the training and validation splits, so that
the test split is touched once, here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.evaluation.baselines import Baseline
from densityrm_core.models.folders import load_codec, load_reward_model
from densityrm_core.reward_models.scoring import Report, score_pairs, tokenize_pairs
from densityrm_core.reward_models.train import WATCHED_PAIRS

Rewards = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

_COLUMNS = ("set", "pair_id", "prompt_id", "src", "decile", "quartile", "context", "chosen", "rejected")


class EvaluationError(ValueError):
    """A model cannot be evaluated; the message names it and says what to do."""


def exam_pairs(pairs: pl.LazyFrame, strata: pl.LazyFrame, sets: Sequence[pl.DataFrame] = ()) -> pl.DataFrame:
    """The pairs of the test split with their strata, then those of the further sets, which have none.

    Args:
        pairs: tables.PREFERENCE_PAIRS; only the test split is read.
        strata: tables.PAIR_WEIGHTS.
        sets: pairs of sets.read_set.

    Returns:
        columns set, pair_id, prompt_id, src, decile, quartile, context, chosen, rejected.
    """
    test = pairs.filter(pl.col("split") == "test").with_columns(set=pl.lit("test")).collect()
    of_test = strata.filter(pl.col("split") == "test").select("pair_id", "decile", "quartile").collect()
    test = test.join(of_test, on="pair_id", how="left", maintain_order="left")
    return pl.concat([test.select(_COLUMNS), *(frame.select(_COLUMNS) for frame in sets)])


def watched_pairs(validation: pl.DataFrame, strata: pl.DataFrame, most: int = WATCHED_PAIRS) -> pl.DataFrame:
    """The validation pairs that a training is watched on, in the columns of `exam_pairs`; their set is "validation"."""
    chosen = validation.head(most).with_columns(set=pl.lit("validation"))
    of_chosen = strata.select("pair_id", "decile", "quartile")
    return chosen.join(of_chosen, on="pair_id", how="left", maintain_order="left").select(_COLUMNS)


def evaluate_reward_model(folder: Path, exam: pl.DataFrame, device: str = "cpu", report: Report | None = None) -> pl.DataFrame:
    """A reward model's rewards of every pair: the columns of tables.RM_EVALUATION but seed, model and fingerprint.

    Args:
        folder: the reward model.
        exam: of `exam_pairs`.
        report: called with the number of pairs that are scored, and of all.

    Raises:
        EvaluationError: a reward is not finite.
    """
    codec = load_codec(folder)
    scored = score_pairs(load_reward_model(folder, device), tokenize_pairs(exam, codec), report)
    chosen, rejected = (part.double().numpy() for part in scored)
    if faults := int((~np.isfinite(chosen)).sum() + (~np.isfinite(rejected)).sum()):
        raise EvaluationError(f"{folder}: {faults:,} rewards are not finite numbers; train this reward model again")
    return _rows(exam, (chosen, rejected))


def evaluate_baseline(baseline: Baseline, exam: pl.DataFrame) -> pl.DataFrame:
    """A baseline's rewards of every pair, in the same columns."""
    return _rows(exam, baseline(exam))


def _rows(exam: pl.DataFrame, rewards: Rewards) -> pl.DataFrame:
    margin = pl.col("reward_chosen") - pl.col("reward_rejected")
    return exam.with_columns(pl.Series("reward_chosen", rewards[0]), pl.Series("reward_rejected", rewards[1])).select(
        "set",
        "pair_id",
        "prompt_id",
        "src",
        "decile",
        "quartile",
        "reward_chosen",
        "reward_rejected",
        (0.5 + 0.5 * margin.sign()).alias("correct"),
        pl.col("chosen").str.len_chars().cast(pl.Int64).alias("chars_chosen"),
        pl.col("rejected").str.len_chars().cast(pl.Int64).alias("chars_rejected"),
    )

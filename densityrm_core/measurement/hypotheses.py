"""Paired differences between models and between policies, and the verdicts that follow from their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from densityrm_core.measurement.bootstrap import Interval
from densityrm_core.measurement.frames import bootstrap_column, pair_models, pair_policies

Verdict = Literal["supported", "refuted", "undecided"]
Claim = Literal["confirmed", "compatible", "ruled out", "undefined"]


@dataclass(frozen=True)
class Hypothesis:
    """What became of a claim, and the numbers behind it: None where there are no data."""

    verdict: Verdict
    sentence: str
    difference: Interval | None = None
    baseline: float | None = None
    claim: float | None = None
    relative_gain: Claim | None = None


def verdict(interval: Interval) -> Verdict:
    """Supported if the whole interval lies above zero, refuted if below, else undecided."""
    if interval.low > 0:
        return "supported"
    return "refuted" if interval.high < 0 else "undecided"


def relative_gain(difference: Interval, baseline: float, claim: float = 0.10, excess: Interval | None = None) -> Claim:
    """Whether `difference` is at least `claim` times `baseline`.

    Args:
        difference: interval of the gain over the baseline.
        baseline: what the gain is relative to; at or below zero, or NaN, a relative gain is undefined.
        claim: smallest relative gain, 0.10 for 10 %.
        excess: interval of difference - claim * baseline from paired rows; without it the baseline counts as exact.
    """
    if not baseline > 0:
        return "undefined"
    outcome = verdict(excess or difference.shifted(-claim * baseline))
    claims: dict[Verdict, Claim] = {"supported": "confirmed", "refuted": "ruled out", "undecided": "compatible"}
    return claims[outcome]


def verdict_sentence(
    subject: str,
    difference: Interval,
    baseline: float,
    claim: float = 0.10,
    *,
    excess: Interval | None = None,
    baseline_name: str = "the baseline",
    unit: str = "",
    spec: str = ".3g",
) -> str:
    """One plain sentence: the verdict, the difference with its interval, and what became of the relative claim.

    Args:
        subject: what is claimed, as the subject of the sentence: "A better reward model".
        difference, baseline, claim, excess: as in `relative_gain`.
        baseline_name: what the relative gain is relative to.
        unit: unit of the difference and the baseline.
        spec: format of the numbers.
    """
    unit = f" {unit}" if unit else ""
    outcome = relative_gain(difference, baseline, claim, excess)
    relative = f"a gain of {100 * claim:g} % or more of {baseline_name} ({baseline:{spec}}{unit}) is {outcome}"
    if outcome == "undefined":
        fault = "is not known" if np.isnan(baseline) else f"({baseline:{spec}}{unit}) is not above zero"
        relative = f"a relative gain is undefined, because {baseline_name} {fault}"
    return (
        f"{subject} is {verdict(difference)} at this size: "
        f"the difference is {difference:+{spec}}{unit} ({100 * difference.level:g} % interval), and {relative}."
    )


def reward_model_hypothesis(rm: pl.DataFrame, claim: float, resamples: int) -> Hypothesis:
    """H1: rm_density is right more often than rm_uniform on pairs whose prompt lies in the rare quartile."""
    subject = "A better reward model on rare prompts"
    rare = pair_models(rm).filter(pl.col("quartile") == 1)
    if rare.is_empty():
        reason = "no test pair of a rare prompt was scored by both reward models in one seed"
        return Hypothesis("undecided", f"{subject} is undecided: {reason}.")
    rare = rare.with_columns(excess=pl.col("difference") - claim * pl.col("uniform"))
    difference, excess = (bootstrap_column(rare, c, resamples).scaled(100) for c in ("difference", "excess"))
    baseline = 100 * bootstrap_column(rare, "uniform", 1).mean
    name = "the uniform RM's accuracy there"
    sentence = verdict_sentence(
        subject, difference, baseline, claim, excess=excess, baseline_name=name, unit="points", spec=".1f"
    )
    return Hypothesis(
        verdict(difference), sentence, difference, baseline, claim, relative_gain(difference, baseline, claim, excess)
    )


def policy_hypothesis(cells: pl.DataFrame, claim: float, resamples: int) -> Hypothesis:
    """H2: the judge rewards arm B more than arm A, from `reply_means`.

    Judge rewards have no natural zero, so the relative gain is (B - A) / (A - base).
    """
    subject = "A better policy under the judge"
    paired, base = pair_policies(cells, "b", "a"), pair_policies(cells, "a", "base")
    if paired.is_empty():
        absent = [f"arm {a.upper()}" for a in "ab" if not (cells["policy"] == a).any()]
        reason = f"no evaluation of {' and '.join(absent)}" if absent else "arms A and B share no prompt in any seed"
        return Hypothesis("undecided", f"{subject} is undecided: {reason}.")
    rows = paired.join(base.select("seed", "prompt_id", improvement="difference"), on=["seed", "prompt_id"])
    rows = rows.with_columns(excess=pl.col("difference") - claim * pl.col("improvement"))
    difference = bootstrap_column(paired, "difference", resamples)
    excess = bootstrap_column(rows, "excess", resamples) if len(rows) else None
    baseline = bootstrap_column(rows, "improvement", 1).mean if len(rows) else float("nan")
    name, spec = "arm A's improvement over the base policy", reward_spec(difference.mean, baseline)
    sentence = verdict_sentence(subject, difference, baseline, claim, excess=excess, baseline_name=name, spec=spec)
    return Hypothesis(
        verdict(difference), sentence, difference, baseline, claim, relative_gain(difference, baseline, claim, excess)
    )


def reward_spec(*rewards: float) -> str:
    """Format of judge rewards of this size: three decimals below 10, else one."""
    return ".1f" if any(abs(r) >= 10 for r in rewards) else ".3f"

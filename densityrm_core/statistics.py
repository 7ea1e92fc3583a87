"""Paired hierarchical bootstrap over seeds and prompts, and the verdicts that follow from its intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["supported", "refuted", "undecided"]
Claim = Literal["confirmed", "compatible", "ruled out", "undefined"]

STRATA = {"all": (1, 2, 3, 4), "rare quartile": (1,), "common quartile": (4,)}  # quartiles of the density

_LEVEL = 0.95
_MAX_BLOCKS = 4096  # prompts beyond this many are resampled in blocks
_CHUNK = 2**21  # prompt indices drawn at a time, 16 MiB


@dataclass(frozen=True)
class Hypothesis:
    """What became of a claim, and the numbers behind it: None where there are no data."""

    verdict: Verdict
    sentence: str
    difference: Interval | None = None
    baseline: float | None = None
    claim: float | None = None
    relative_gain: Claim | None = None


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it. Formatting applies to all three numbers: f"{interval:+.1f}"."""

    mean: float
    low: float
    high: float
    level: float = _LEVEL

    def scaled(self, factor: float) -> Interval:
        """The same interval in other units; `factor` must be positive."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor, self.level)

    def shifted(self, by: float) -> Interval:
        """The same interval with `by` added to all three numbers."""
        return Interval(self.mean + by, self.low + by, self.high + by, self.level)

    def __format__(self, spec: str) -> str:
        spec = spec or "+.3g"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, "")


def bootstrap_mean(values: ArrayLike, seeds: ArrayLike, prompts: ArrayLike, resamples: int, seed: int) -> Interval:
    """Mean of `values` with a 95 % percentile interval from resampling seeds and prompts.

    With x_spr the r-th row of prompt p in seed s, the estimate is

        1/S sum_s  (sum_p sum_r x_spr) / (sum_p n_sp),

    so a prompt counts by its rows (accuracy over pairs = sum correct / sum pairs) and every seed counts alike. A resample
    draws S seeds and, independently, P prompts with replacement; a prompt comes with all its rows, and in all seeds alike
    [percentile interval: Efron & Tibshirani 1993, ch. 13; clusters: Cameron, Gelbach & Miller 2008]. For a paired
    difference pass one difference per row: what the two sides share then cancels.

    With few seeds the interval is optimistic: resampling S seeds sees (S - 1)/S of their variance, two thirds for S = 3,
    and with one seed none of it. Beyond 4,096 prompts, prompts are gathered at random into 4,096 blocks, which are
    resampled instead: as wide on average, and bounded in time. A single prompt gives an infinite interval.

    Args:
        values, seeds, prompts: one entry a row, shape (rows,).
        resamples: number of bootstrap resamples.
        seed: of the random generator; equal input and seed give equal output.

    Raises:
        ValueError: no rows, lengths that differ, a value that is not finite, or resamples below 1.
    """
    x = np.asarray(values, dtype=np.float64)
    seed_names, s = np.unique(np.asarray(seeds), return_inverse=True)
    prompt_names, p = np.unique(np.asarray(prompts), return_inverse=True)
    if not (x.ndim == 1 and len(x) == len(s) == len(p) > 0):
        raise ValueError(f"values, seeds and prompts must be as long as each other and not empty: {len(x)}, {len(s)}, {len(p)}")
    if not np.isfinite(x).all():
        raise ValueError(f"values hold {int((~np.isfinite(x)).sum())} entries that are not finite")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")

    rng = np.random.default_rng(np.random.SeedSequence(seed))
    blocks = len(prompt_names)
    if blocks > _MAX_BLOCKS:
        p = (rng.permutation(blocks) % _MAX_BLOCKS)[p]
        blocks = _MAX_BLOCKS
    shape = (len(seed_names), blocks)
    cell = s * blocks + p
    sums = np.bincount(cell, x, blocks * shape[0]).reshape(shape).astype(np.float64)
    counts = np.bincount(cell, minlength=blocks * shape[0]).reshape(shape).astype(np.float64)

    mean = float(np.mean(sums.sum(1) / counts.sum(1)))
    if blocks == 1:
        return Interval(mean, -np.inf, np.inf)
    low, high = np.nanquantile(_resampled_means(sums, counts, resamples, rng), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def bootstrap_column(frame: pl.DataFrame, column: str, resamples: int, seed: int = 0) -> Interval:
    """`bootstrap_mean` of a column of a frame that has `seed` and `prompt_id`."""
    frame = frame.sort("seed", "prompt_id", column)  # float sums depend on the order of rows; the result must not
    return bootstrap_mean(frame[column], frame["seed"], frame["prompt_id"].rank("dense"), resamples, seed)


def bootstrap_strata(frame: pl.DataFrame, column: str, n: int) -> dict[str, Interval | None]:
    """`bootstrap_column` of every stratum of `STRATA`; None where it has no rows."""
    parts = {name: frame.filter(pl.col("quartile").is_in(quartiles)) for name, quartiles in STRATA.items()}
    return {name: bootstrap_column(part, column, n) if len(part) else None for name, part in parts.items()}


def reply_means(policies: pl.DataFrame) -> pl.DataFrame:
    """Means over the sampled completions of a prompt: one row a seed, policy and prompt."""
    keys = ("seed", "policy", "prompt_id", "quartile")
    means = pl.col("judge_reward", "own_reward", "kl", "tokens").mean()
    return policies.filter(pl.col("sample") > 0).sort(*keys, "sample").group_by(*keys).agg(means).sort(keys)


def pair_models(rm: pl.DataFrame) -> pl.DataFrame:
    """Test pairs that both reward models scored in one seed, with `correct`, `uniform` and their `difference`."""
    uniform = rm.filter(pl.col("model") == "rm_uniform").select("seed", "pair_id", uniform="correct")
    density = rm.filter(pl.col("model") == "rm_density")
    return density.join(uniform, on=["seed", "pair_id"]).with_columns(difference=pl.col("correct") - pl.col("uniform"))


def pair_policies(cells: pl.DataFrame, arm: str, reference: str) -> pl.DataFrame:
    """Prompts that both policies answered in one seed, with the `difference` of their judge rewards."""
    other = cells.filter(pl.col("policy") == reference)
    paired = cells.filter(pl.col("policy") == arm).join(
        other.select("seed", "prompt_id", reference="judge_reward"), on=["seed", "prompt_id"], how="left"
    )
    if reference == "base":  # every seed starts from the same base policy, so any seed's evaluation of it will do
        any_seed = other.group_by("prompt_id").agg(any_seed=pl.col("judge_reward").mean())
        paired = paired.join(any_seed, on="prompt_id", how="left").with_columns(pl.coalesce("reference", "any_seed"))
    return paired.drop_nulls("reference").with_columns(difference=pl.col("judge_reward") - pl.col("reference"))


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


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Means of the resamples, shape (resamples,), from totals per seed and prompt, shape (S, P)."""
    n_seeds, n_prompts = sums.shape
    drawn_seeds = _multiplicities(rng, resamples, n_seeds)
    means = np.empty((resamples, n_seeds))
    step = max(1, _CHUNK // n_prompts)
    for start in range(0, resamples, step):
        drawn = _multiplicities(rng, min(step, resamples - start), n_prompts)  # (chunk, P)
        with np.errstate(invalid="ignore"):
            means[start : start + step] = (drawn @ sums.T) / (drawn @ counts.T)
    weights = np.where(np.isnan(means), 0.0, drawn_seeds)  # a seed none of whose prompts was drawn says nothing
    with np.errstate(invalid="ignore"):
        return (weights * np.nan_to_num(means)).sum(1) / weights.sum(1)


def _multiplicities(rng: np.random.Generator, resamples: int, n: int) -> NDArray[np.float64]:
    """How often each of n items is drawn in n draws with replacement, shape (resamples, n)."""
    drawn = rng.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)

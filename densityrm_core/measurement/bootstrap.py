"""Hierarchical bootstrap over seeds and prompts: of a mean, and of whatever follows from sums over rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from densityrm_core.arrays import Doubles

Statistic = Callable[[Doubles], Doubles]

_LEVEL = 0.95
_MAX_BLOCKS = 4096  # prompts beyond this many are resampled in blocks
_CHUNK = 2**21  # prompt indices drawn at a time, 16 MiB


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


@dataclass(frozen=True)
class Bootstrap:
    """Estimates of M statistics and what the resamples gave; a single prompt leaves `draws` without rows."""

    estimate: Doubles  # (M,)
    draws: Doubles  # (resamples, M)

    def interval(self, m: int) -> Interval:
        """Percentile interval of the m-th statistic [Efron & Tibshirani 1993, ch. 13]. NaN where it is undefined."""
        mean, (low, high) = float(self.estimate[m]), self._quantiles(m)
        return Interval(mean, low, high)

    def distance_interval(self, m: int) -> Interval:
        """Interval of a statistic that is a mean distance, never negative, and grows with noise (a calibration error).

        Resampling adds to such a statistic about what sampling had added, so the percentile interval lies too high, and that of
        a perfect model excludes zero. The basic interval 2 estimate - percentiles [Davison & Hinkley 1997, eq. 5.6] takes the
        excess off; it is cut at zero, and reaches at least up to the estimate. On simulated pairs, 400 at a time, it holds the
        truth in 0.91 to 0.94 of the cases, and in 0.85 where the truth is zero.
        """
        mean, (low, high) = float(self.estimate[m]), self._quantiles(m)
        return Interval(mean, max(0.0, 2 * mean - high), max(mean, 2 * mean - low))

    def _quantiles(self, m: int) -> tuple[float, float]:
        if not len(self.draws):
            return -np.inf, np.inf
        column = self.draws[:, m]
        column = column[~np.isnan(column)]
        low, high = np.quantile(column, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]) if len(column) else (np.nan, np.nan)
        return float(low), float(high)


def bootstrap_mean(values: ArrayLike, seeds: ArrayLike, prompts: ArrayLike, resamples: int, seed: int) -> Interval:
    """Mean of `values` with a 95 % percentile interval from resampling seeds and prompts.

    With x_spr the r-th row of prompt p in seed s, the estimate is

        1/S sum_s  (sum_p sum_r x_spr) / (sum_p n_sp),

    so a prompt counts by its rows (accuracy over pairs = sum correct / sum pairs) and every seed counts alike. For a paired
    difference pass one difference per row: what the two sides share then cancels.

    Args:
        values, seeds, prompts: one entry a row, shape (rows,).
        resamples: number of bootstrap resamples.
        seed: of the random generator; equal input and seed give equal output.

    Raises:
        ValueError: no rows, lengths that differ, a value that is not finite, or resamples below 1.
    """
    x = np.asarray(values, dtype=np.float64)
    columns = np.stack([x, np.ones_like(x)], axis=-1)
    return bootstrap_statistic(columns, seeds, prompts, _ratio, resamples, seed).interval(0)


def bootstrap_statistic(
    columns: ArrayLike,
    seeds: ArrayLike,
    prompts: ArrayLike,
    statistic: Statistic,
    resamples: int,
    seed: int,
    slots: ArrayLike = 0,
    n_slots: int = 1,
) -> Bootstrap:
    """Statistics that follow from sums over rows, and their values when seeds and prompts are resampled.

    The estimate is the mean over seeds of statistic(sum of the seed's rows). A resample draws S seeds and, independently, P
    prompts with replacement; a prompt comes with all its rows, and in all seeds alike [clusters: Cameron, Gelbach & Miller
    2008]. A seed in which a statistic is undefined (NaN) says nothing of it.

    With few seeds the interval is optimistic: resampling S seeds sees (S - 1)/S of their variance, two thirds for S = 3,
    and with one seed none of it. Beyond 4,096 prompts, prompts are gathered at random into 4,096 blocks, which are
    resampled instead: as wide on average, and bounded in time. A single prompt gives an infinite interval.

    Args:
        columns: what is summed, shape (rows, K).
        seeds, prompts: one entry a row, shape (rows,).
        statistic: sums, shape (..., n_slots, K), to values, shape (..., M).
        resamples: number of bootstrap resamples.
        seed: of the random generator; equal input and seed give equal output.
        slots: which of `n_slots` things (models, subsets) a row belongs to, shape (rows,); all are resampled alike.

    Raises:
        ValueError: no rows, lengths that differ, a value that is not finite, or resamples below 1.
    """
    x = np.asarray(columns, dtype=np.float64)
    seed_names, s = np.unique(np.asarray(seeds), return_inverse=True)
    prompt_names, p = np.unique(np.asarray(prompts), return_inverse=True)
    if not (x.ndim == 2 and len(x) == len(s) == len(p) > 0):
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
    shape = (len(seed_names), blocks, n_slots)
    cell = (s * blocks + p) * n_slots + np.asarray(slots, dtype=np.int64)
    sums = [np.bincount(cell, column, int(np.prod(shape))) for column in x.T]
    totals = np.stack(sums, axis=-1).reshape(*shape, x.shape[1]).astype(np.float64)

    with np.errstate(invalid="ignore", divide="ignore"):
        by_seed = statistic(totals.sum(1))  # (S, M)
        estimate = _mean_over_seeds(by_seed[None], np.ones((1, len(seed_names))))[0]
        draws = np.empty((0, len(estimate))) if blocks == 1 else _resampled(totals, statistic, resamples, rng)
    return Bootstrap(estimate, draws)


def _ratio(sums: Doubles) -> Doubles:
    return sums[..., 0, :1] / sums[..., 0, 1:]


def _resampled(totals: Doubles, statistic: Statistic, resamples: int, rng: np.random.Generator) -> Doubles:
    """The statistics of the resamples, shape (resamples, M), from totals per seed and prompt, shape (S, P, ...)."""
    n_seeds, n_prompts = totals.shape[:2]
    drawn_seeds = _multiplicities(rng, resamples, n_seeds)
    flat = totals.reshape(n_seeds, n_prompts, -1)
    found: list[Doubles] = []
    step = max(1, _CHUNK // n_prompts)
    for start in range(0, resamples, step):
        drawn = _multiplicities(rng, min(step, resamples - start), n_prompts)  # (chunk, P)
        by_seed = [statistic((drawn @ part).reshape(len(drawn), *totals.shape[2:])) for part in flat]  # S of (chunk, M)
        found.append(_mean_over_seeds(np.stack(by_seed, axis=1), drawn_seeds[start : start + step]))
    return np.concatenate(found)


def _mean_over_seeds(values: Doubles, times: Doubles) -> Doubles:
    """Mean over seeds, each counted `times` (n, S), of values (n, S, M) that may be NaN; shape (n, M)."""
    weights = np.where(np.isnan(values), 0.0, times[:, :, None])  # a seed that says nothing does not count
    return (weights * np.nan_to_num(values)).sum(1) / weights.sum(1)


def _multiplicities(rng: np.random.Generator, resamples: int, n: int) -> Doubles:
    """How often each of n items is drawn in n draws with replacement, shape (resamples, n)."""
    drawn = rng.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)

"""Arms at equal distance from the base policy: their curves of reward against KL, read at the KL that all of them reach.

Arms that trained equally long are not equally far from the base policy, and reward rises with the distance until it falls [Gao
et al. 2023, section 3]; so arms are compared at one KL.

The KL of a step is the mean over its prompts of log pi - log pi_base per sequence, at least 0. Between neighbouring steps
reward is taken to be linear in sqrt(KL), prompt by prompt. A curve need not be monotone, as its KL is an estimate and may fall
again under a penalty: it is read where it first reaches a KL, and what comes later does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from densityrm_core.arrays import Doubles
from densityrm_core.measurement.bootstrap import Interval
from densityrm_core.measurement.frames import bootstrap_column, bootstrap_strata

LEAST_KL = 1e-3  # nats; an arm that stays below has not left the base policy

_REWARDS = ("judge_reward", "own_reward")
_POINTS = 25


@dataclass(frozen=True)
class EqualKl:
    """Arms at the KL that all arms of a seed reach.

    levels: that KL of each seed, in nats; None for a seed in which some arm has not left the base policy, and is left out.
    rewards: judge reward of each arm there. differences: of each arm and arm A, paired by seed and prompt, by stratum.
    """

    levels: dict[int, float | None]
    rewards: dict[str, Interval]
    differences: dict[str, dict[str, Interval | None]]
    prompts: int

    @property
    def seeds(self) -> list[int]:
        return [seed for seed, level in self.levels.items() if level is not None]


def compare_at_equal_kl(curves: pl.DataFrame, resamples: int) -> EqualKl:
    """Judge rewards of all arms where they are equally far from the base policy.

    Args:
        curves: tables.POLICY_CURVES, any seeds; arms of a seed are compared among those that it has.
    """
    levels = {int(seed): common_kl(frame) for (seed,), frame in sorted(curves.partition_by("seed", as_dict=True).items())}
    rows = [
        rewards_at(frame, level)
        for (seed, _), frame in sorted(curves.partition_by("seed", "policy", as_dict=True).items())
        if (level := levels[int(seed)]) is not None
    ]
    if not rows:
        return EqualKl(levels, {}, {}, 0)
    cells = pl.concat(rows)
    arms = sorted(set(cells["policy"]))
    rewards = {arm: bootstrap_column(cells.filter(policy=arm), "judge_reward", resamples) for arm in arms}
    reference = cells.filter(policy="a").select("seed", "prompt_id", reference="judge_reward")
    paired = cells.join(reference, on=["seed", "prompt_id"]).with_columns(difference=pl.col("judge_reward") - pl.col("reference"))
    by_arm = {arm: paired.filter(policy=arm) for arm in arms if arm != "a"}
    differences = {f"{arm}-a": bootstrap_strata(frame, "difference", resamples) for arm, frame in by_arm.items() if len(frame)}
    return EqualKl(levels, rewards, differences, cells["prompt_id"].n_unique())


def common_kl(curves: pl.DataFrame) -> float | None:
    """The largest KL that every arm of one seed reaches, in nats; None if one has not left the base policy."""
    steps = curve_points(curves)
    least = float(np.min(steps.group_by("policy").agg(pl.col("kl").max())["kl"].to_numpy()))
    return least if least >= LEAST_KL else None


def rewards_at(curve: pl.DataFrame, kl: float) -> pl.DataFrame:
    """Rewards of one arm and seed, prompt by prompt, where its curve first reaches a KL.

    With steps s < t the first two neighbours with KL_s < kl <= KL_t,

        r(x) = (1 - w) r_s(x) + w r_t(x),    w = (sqrt kl - sqrt KL_s) / (sqrt KL_t - sqrt KL_s).

    Returns:
        columns seed, policy, prompt_id, quartile, judge_reward, own_reward; prompts that both steps answered.

    Raises:
        ValueError: the curve does not reach `kl`.
    """
    steps = curve_points(curve).sort("step")
    reached = steps["kl"].to_numpy() >= kl
    if not reached.any():
        raise ValueError(f"the curve ends at KL {steps['kl'].max()}, before {kl}")
    t = int(reached.argmax())
    answers = curve.sort("step", "prompt_id", *_REWARDS)
    of_step = answers.group_by("step", "seed", "policy", "prompt_id", "quartile", maintain_order=True).agg(
        pl.col(_REWARDS).mean()
    )
    last = of_step.filter(step=steps["step"][t])
    if not t:
        return last.drop("step")
    low, high = np.sqrt(steps["kl"].to_numpy()[[t - 1, t]])
    w = (np.sqrt(kl) - low) / (high - low)
    first = of_step.filter(step=steps["step"][t - 1]).select("prompt_id", pl.col(_REWARDS).name.prefix("before_"))
    both = last.join(first, on="prompt_id", maintain_order="left")
    mixed = [((1 - w) * pl.col(f"before_{name}") + w * pl.col(name)).alias(name) for name in _REWARDS]
    return both.with_columns(mixed).drop("step", *(f"before_{name}" for name in _REWARDS))


def curve_points(curves: pl.DataFrame) -> pl.DataFrame:
    """Means over the prompts of every step: columns seed, policy, step, kl (at least 0), judge_reward, own_reward."""
    ordered = curves.sort("seed", "policy", "step", "prompt_id", "kl", *_REWARDS)
    means = ordered.group_by("seed", "policy", "step", maintain_order=True).agg(pl.col("kl", *_REWARDS).mean())
    return means.with_columns(pl.col("kl").clip(lower_bound=0))


def mean_curves(curves: pl.DataFrame) -> dict[str, Mapping[str, Doubles]]:
    """Each arm's curve as the mean over its seeds at equal KL, up to the KL that all its seeds reach.

    Returns:
        for each arm `kl`, `judge_reward` and `own_reward`, each (points,).
    """
    found: dict[str, Mapping[str, Doubles]] = {}
    for (policy,), frame in sorted(curves.partition_by("policy", as_dict=True).items()):
        seeds = [part for _, part in sorted(frame.partition_by("seed", as_dict=True).items())]
        furthest = min(float(curve_points(part)["kl"].to_numpy().max()) for part in seeds)
        levels = np.linspace(0, np.sqrt(furthest), _POINTS if furthest > 0 else 1) ** 2
        levels[-1] = furthest  # not a rounding beyond it
        means = np.mean([_along(part, levels) for part in seeds], axis=0)
        found[str(policy)] = {"kl": levels, **dict(zip(_REWARDS, means, strict=True))}
    return found


def _along(curve: pl.DataFrame, levels: Sequence[float] | Doubles) -> Doubles:
    """Mean rewards of one arm and seed where its curve first reaches each KL, (2, levels)."""
    points = curve_points(curve).sort("step")
    kl, rewards = points["kl"].to_numpy(), points.select(_REWARDS).to_numpy()
    found = np.empty((len(_REWARDS), len(levels)))
    for i, level in enumerate(levels):
        t = int((kl >= level).argmax())
        low, high = np.sqrt(kl[[max(t - 1, 0), t]])
        w = (np.sqrt(level) - low) / (high - low) if t else 1.0
        found[:, i] = (1 - w) * rewards[max(t - 1, 0)] + w * rewards[t]
    return found

"""Figures of policies as PNG bytes: judge reward, by decile, against KL, and diversity. Of measurement.policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from densityrm_core.arms import policy_title, reward_model_of
from densityrm_core.arrays import Doubles
from densityrm_core.figures import BLUE, GREEN, GREY, PURPLE, VERMILLION, blank, error_bars, nothing, png, style, titled
from densityrm_core.measurement.equal_kl import curve_points, mean_curves
from densityrm_core.measurement.frames import interval_of
from densityrm_core.measurement.policies import policies_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = {"base": (GREY, "s"), "a": (BLUE, "o"), "b": (VERMILLION, "^"), "c": (GREEN, "D"), "d": (PURPLE, "v")}
_OF_BEST = {"rm_uniform": (BLUE, "*"), "rm_density": (VERMILLION, "*")}
_LABELS = {
    "a": "arm A\nuniform RM,\nuniform prompts",
    "b": "arm B\ndensity RM,\nuniform prompts",
    "c": "arm C\nuniform RM,\ndensity prompts",
    "d": "arm D\ndensity RM,\ndensity prompts",
}
_DIVERSITY = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU (1: all alike)",
    "spread": "spread in a prompt",
    "spread_across": "spread across prompts",
    "entropy": "entropy (nats a token)",
}


def policy_rewards(measured: pl.DataFrame) -> bytes:
    """Judge reward of the sampled completions per policy, with 95 % intervals."""
    rewards = _intervals(measured.filter(by="all", metric="judge_reward"))
    if not rewards:
        return nothing("Judge reward")
    base, arms = rewards.get("base"), [policy for policy in rewards if policy != "base"]
    best = max(rewards, key=lambda policy: rewards[policy][0])
    title = f"Highest judge reward: {_name(best)}, {rewards[best][0]:.3g}"
    if base is not None and best != "base":
        title += f" ({rewards[best][0] - base[0]:+.3g} against base)"
    figure, ax = titled(title)
    if base is not None:
        _base_line(ax, base)
        ax.legend(frameon=False, loc="best")
    for i, arm in enumerate(arms):
        error_bars(ax, [i], rewards[arm][:, None], *_style(arm))
    ax.set_xticks(range(len(arms)), [_LABELS.get(arm, policy_title(arm).replace(", ", ",\n")) for arm in arms], fontsize=8)
    ax.set_xlim(-0.5, max(len(arms), 1) - 0.5)
    ax.set_ylabel("judge reward, 95 % interval")
    return png(figure)


def wins_by_decile(measured: pl.DataFrame) -> bytes:
    """Win rate of every trained policy against the base policy per density decile."""
    wins = measured.filter(metric="wins")
    arms = policies_of(wins.filter(pl.col("policy").is_in(list(_LABELS))))
    if not arms:
        return nothing("Win rate against the base policy")
    rare = {arm: interval_of(wins, stratum="rare quartile", policy=arm) for arm in arms}
    finding = ", ".join(f"{arm.upper()} {100 * i.mean:.0f} %" for arm, i in rare.items() if i)
    figure, ax = titled(
        f"Wins against base on the rarest quarter: {finding}" if finding else "Wins against base by density decile"
    )
    ax.axhline(50, color=GREY, linestyle="--", linewidth=1, label="as good as base")
    for offset, arm in zip(np.linspace(-0.24, 0.24, len(arms)), arms, strict=True):
        own = wins.filter(by="decile", policy=arm).with_columns(x=pl.col("stratum").cast(pl.Float64)).sort("x")
        points = 100 * own.select("mean", "low", "high").fill_null(np.nan).to_numpy().T
        error_bars(ax, own["x"].to_numpy() + offset, points, *_style(arm), _name(arm))
    ax.set_xticks(range(1, 11))
    ax.set_xlabel("density decile of the prompt (1 rarest, 10 commonest)")
    ax.set_ylabel("wins against base (%), 95 % interval")
    ax.figure.legend(*ax.get_legend_handles_labels(), frameon=False, ncols=5, loc="outside lower center", fontsize=9)
    return png(figure)


def reward_against_kl(curves: pl.DataFrame) -> bytes:
    """Rewards against the distance from the base policy, by the judge and by the own reward model. Reads POLICY_CURVES.

    Each arm's mean over its seeds at equal KL, thick, over the seeds' own curves, thin. The x axis is sqrt(KL), in which reward
    rises about linearly while it is not over-optimised [Gao et al. 2023].
    """
    means = mean_curves(curves)
    if not means:
        return nothing("Reward against KL")
    figure = _panels(9.6, 4.2, hspace=0.0, wspace=0.2, top=0.88, bottom=0.13)
    panels = {"judge_reward": "judge reward", "own_reward": "own RM's reward, standardised"}
    for ax, (column, label) in zip(map(style, figure.subplots(1, 2)), panels.items(), strict=True):
        for arm, mean in means.items():
            _draw_curve(ax, arm, mean, curve_points(curves.filter(policy=arm)), column)
        ax.set_xlabel("square root of KL(policy || base) per reply (nats$^{1/2}$)")
        ax.set_ylabel(label)
        ax.legend(frameon=False)
    figure.suptitle(_finding(means), fontsize=11, x=0.01, y=0.97, ha="left")
    return png(figure)


def diversity(measured: pl.DataFrame) -> bytes:
    """Six measures of diversity per policy, with 95 % intervals; the dashed line is the base policy."""
    own = measured.filter(pl.col("by") == "all", pl.col("metric").is_in(list(_DIVERSITY)))
    policies = [policy for policy in policies_of(own.filter(metric="distinct_1")) if policy in _STYLES]
    if not policies:
        return nothing("Diversity of the replies")
    figure = _panels(9.6, 5.4, hspace=0.35, wspace=0.25, top=0.86, bottom=0.06)
    for i, (metric, title) in enumerate(_DIVERSITY.items()):
        found = _intervals(own.filter(metric=metric))
        ax = style(figure.add_subplot(2, 3, i + 1))
        ax.set_title(title, fontsize=10, loc="left")
        if "base" in found:
            ax.axhline(found["base"][0], color=GREY, linestyle="--", linewidth=1)
        for x, policy in enumerate(policies):
            if policy in found:
                error_bars(ax, [x], found[policy][:, None], *_style(policy))
        ax.set_xticks(range(len(policies)), [policy if policy == "base" else policy.upper() for policy in policies])
        ax.set_xlim(-0.5, len(policies) - 0.5)
        ax.set_ylim(bottom=0)
    figure.suptitle(_least_diverse(own, policies), fontsize=11, x=0.01, y=0.97, ha="left")
    return png(figure)


def _panels(width: float, height: float, **margins: float) -> Figure:
    """An empty figure for several plots, placed by hand: to have them placed takes seconds."""
    figure = blank(width, height, layout=None)
    figure.subplots_adjust(left=0.08, right=0.98, **margins)
    return figure


def _draw_curve(ax: Axes, arm: str, mean: Mapping[str, Doubles], points: pl.DataFrame, column: str) -> None:
    color, marker = _style(arm)
    for _, seed in sorted(points.partition_by("seed", as_dict=True).items()):
        ordered = seed.sort("step")
        x, y = np.sqrt(ordered["kl"].to_numpy()), ordered[column].to_numpy()
        ax.plot(x, y, color=color, linewidth=0.7, alpha=0.5, marker=marker, markersize=2.5)
    ax.plot(np.sqrt(mean["kl"]), mean[column], color=color, linewidth=2.2, label=_name(arm))


def _finding(means: Mapping[str, Mapping[str, Doubles]]) -> str:
    """Who is ahead where all arms still are."""
    level = min(float(mean["kl"][-1]) for mean in means.values())
    there = {arm: float(np.interp(np.sqrt(level), np.sqrt(mean["kl"]), mean["judge_reward"])) for arm, mean in means.items()}
    told = ", ".join(f"{arm.upper()} {reward:.3g}" for arm, reward in sorted(there.items(), key=lambda found: -found[1]))
    return f"Judge reward at {level:.2g} nats, which all arms reach: {told}"


def _least_diverse(measured: pl.DataFrame, policies: list[str]) -> str:
    """The policy that says the most alike things, by distinct-2, and what the base policy has."""
    found = _intervals(measured.filter(metric="distinct_2"))
    if not found:
        return "Diversity of the replies"
    least = min((policy for policy in policies if policy in found), key=lambda policy: found[policy][0])
    told = f"Least diverse by distinct-2: {_name(least)}, {found[least][0]:.2f}"
    return told + (f" (base {found['base'][0]:.2f})" if "base" in found and least != "base" else "")


def _base_line(ax: Axes, base: Doubles) -> None:
    ax.axhline(base[0], color=GREY, linestyle="--", linewidth=1.5, label="base policy")
    if np.isfinite(base).all():
        ax.axhspan(base[1], base[2], color=GREY, alpha=0.15, linewidth=0)


def _intervals(measured: pl.DataFrame) -> dict[str, Doubles]:
    """Estimate and ends of each policy, (3,), in the order in which they are shown."""
    found = {policy: interval_of(measured, policy=policy) for policy in policies_of(measured)}
    return {policy: np.array([i.mean, i.low, i.high]) for policy, i in found.items() if i}


def _style(policy: str) -> tuple[str, str]:
    return _STYLES[policy] if policy in _STYLES else _OF_BEST[reward_model_of(policy) or "rm_uniform"]


def _name(policy: str) -> str:
    return "base policy" if policy == "base" else policy_title(policy)

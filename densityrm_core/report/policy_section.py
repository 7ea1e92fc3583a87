"""What the report says of policies: judge reward, wins, over-optimisation, arms at equal KL, and what is left of diversity."""

from __future__ import annotations

from typing import Any

import polars as pl

from densityrm_core.arms import is_best_of
from densityrm_core.measurement.bootstrap import Interval
from densityrm_core.measurement.equal_kl import LEAST_KL, EqualKl, compare_at_equal_kl
from densityrm_core.measurement.frames import bootstrap_strata, interval_of, pair_policies, reply_means
from densityrm_core.measurement.policies import POLICY_METRICS, measure, policies_of
from densityrm_core.report import policy_plots, policy_tables
from densityrm_core.report.document import Block, Drawing, Grid, Picture, Section, Text

_PICTURES = {
    "policy_rewards.png": "Judge reward per arm",
    "wins_by_decile.png": "Win rate against the base policy by density decile",
    "reward_against_kl.png": "Reward against KL",
    "diversity.png": "Diversity of the replies per policy",
}
_GAINS = (
    "Gains over the base policy, by the judge and by the policy's own reward model, are in standard deviations of that judge's "
    "rewards of the base policy. Where the own model's gain exceeds the judge's, the policy has found what its reward model pays "
    "for and the judge does not (over-optimisation)."
)
_DIVERSITY = (
    "Diversity of the sampled replies: distinct-n is the share of different words and word pairs among a prompt's replies, "
    "self-BLEU how alike these are (1: all equal), spread their mean cosine distance, within a prompt and to replies to other "
    "prompts, entropy that of a token. A policy that has collapsed says the same whatever it is asked."
)
_BEST_OF = "Best of n: no training; the reward model picks the best of n replies of the base policy. KL is an upper bound."


def policy_section(policies: pl.DataFrame, curves: pl.DataFrame, diversity: pl.DataFrame, n: int) -> Section:
    """The section on policies; `n` bootstrap resamples.

    Args:
        policies, curves, diversity: tables.POLICY_EVALUATION, POLICY_CURVES, POLICY_DIVERSITY; any may lack seeds or arms.
    """
    if policies.filter(pl.col("sample") > 0).is_empty():
        nothing = Text("No policy has been evaluated yet.")
        return Section((Text("Policies", 2), nothing), {"arms": {}, "differences": {}, "equal_kl": None, "strata": []})
    measured, equal = measure(policies, diversity, n), compare_at_equal_kl(curves, n)
    paired = _differences(reply_means(policies), n)
    drawings: dict[str, Drawing] = {
        "policy_rewards.png": lambda: policy_plots.policy_rewards(measured),
        "wins_by_decile.png": lambda: policy_plots.wins_by_decile(measured),
        "reward_against_kl.png": lambda: policy_plots.reward_against_kl(curves),
        "diversity.png": lambda: policy_plots.diversity(measured),
    }
    table = {
        "arms": _arms(policies, measured),
        "differences": paired,
        "equal_kl": {
            "levels": {str(s): kl for s, kl in equal.levels.items()},
            "rewards": equal.rewards,
            "differences": equal.differences,
        },
        "strata": measured.filter(pl.col("by") != "all").to_dicts(),
    }
    blocks = (Text("Policies", 2), *_blocks(measured, paired, equal), *(Picture(*it) for it in _PICTURES.items()))
    return Section(blocks, table, drawings)


def _blocks(measured: pl.DataFrame, paired: dict[str, dict[str, Interval | None]], equal: EqualKl) -> list[Block]:
    spec = policy_tables.spec_of(measured)
    words, meaning = policy_tables.diversity(measured)
    return [
        _square(measured),
        _grid(policy_tables.overview(measured)),
        *([Text(_BEST_OF)] if any(map(is_best_of, policies_of(measured))) else []),
        *_grids(policy_tables.differences(paired, "judge reward, paired [95 %]", spec), policy_tables.wins_by_stratum(measured)),
        Text(equal_kl_sentence(equal)),
        *_grids(policy_tables.at_equal_kl(equal)),
        Text(_GAINS),
        _grid(policy_tables.gains(measured)),
        Text(_DIVERSITY),
        *_grids(words, meaning),
    ]


def equal_kl_sentence(equal: EqualKl) -> str:
    """Where arms were compared at equal KL, or why not."""
    if not equal.levels:
        return "No curve of judge reward against KL yet, so arms are not compared at equal KL."
    out = ", ".join(str(seed) for seed, level in equal.levels.items() if level is None)
    left_out = (
        f"In seed {out} an arm stayed within {LEAST_KL:g} nats of the base policy, so nothing is compared there." if out else ""
    )
    levels = [level for level in equal.levels.values() if level is not None]
    if not levels:
        return left_out
    span = f"{min(levels):.2f}" if len(levels) == 1 else f"{min(levels):.2f} to {max(levels):.2f}"
    told = (
        f"Arms at equal KL: read where their curves first reach the KL that all arms of a seed reach ({span} nats a reply), on "
        f"{equal.prompts:,} validation prompts, linear in sqrt(KL) between evaluations, paired by prompt."
    )
    return f"{told} {left_out}".strip()


def _arms(policies: pl.DataFrame, measured: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Every metric with its interval, the mean alone where that was always shown, and the seeds."""
    whole = measured.filter(by="all")
    arms: dict[str, dict[str, Any]] = {}
    for policy in policies_of(whole):
        found = {metric: interval_of(whole, policy=policy, metric=metric) for metric in POLICY_METRICS}
        bare = {name: interval.mean if (interval := found[name]) else None for name in ("greedy", "own_reward", "kl", "tokens")}
        arms[policy] = {**found, **bare, "seeds": sorted(set(policies.filter(policy=policy)["seed"]))}
    return arms


def _differences(cells: pl.DataFrame, n: int) -> dict[str, dict[str, Interval | None]]:
    pairs = {f"{arm}-a": pair_policies(cells, arm, "a") for arm in "bcd"}
    return {pair: bootstrap_strata(rows, "difference", n) for pair, rows in pairs.items() if len(rows)}


def _square(measured: pl.DataFrame) -> Grid:
    """The 2 x 2 experiment: judge reward of the four arms."""
    rewards, spec = measured.filter(by="all", metric="judge_reward"), policy_tables.spec_of(measured)

    def cell(arm: str) -> str:
        interval = interval_of(rewards, policy=arm)
        return f"{arm.upper()}: {'-' if interval is None else format(interval, spec)}"

    rows = {"RM uniform": "ac", "RM by 1/density": "bd"}
    header = ("judge reward", "prompts uniform", "prompts by 1/density")
    return Grid(header, tuple((rm, *map(cell, arms)) for rm, arms in rows.items()))


def _grids(*frames: pl.DataFrame) -> list[Grid]:
    return [_grid(frame) for frame in frames if len(frame)]


def _grid(frame: pl.DataFrame) -> Grid:
    return Grid(tuple(frame.columns), tuple(frame.iter_rows()))

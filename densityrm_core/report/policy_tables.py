"""Measurements of policies as tables for a person: one row a policy or stratum, every number with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from densityrm_core.arms import policy_title
from densityrm_core.measurement.bootstrap import Interval
from densityrm_core.measurement.equal_kl import EqualKl
from densityrm_core.measurement.frames import QUARTILES, interval_of
from densityrm_core.measurement.hypotheses import reward_spec
from densityrm_core.measurement.policies import policies_of

_NAMES = {"a": "A: neither", "b": "B: RM", "c": "C: prompts", "d": "D: both"}  # what 1/density sampling is used in


def overview(measured: pl.DataFrame) -> pl.DataFrame:
    """Judge reward, its change against the base policy, win rate, greedy completion, length. Of measurement.policies."""
    spec = spec_of(measured)
    columns = {
        "judge reward [95 %]": ("judge_reward", spec),
        "against base [95 %]": ("change", "+" + spec),
        "wins, % [95 %]": ("wins", "%"),
    }
    plain = {"greedy": ("greedy", spec), "tokens": ("tokens", ".1f")}
    return _a_row_a_policy(measured, columns).hstack(_a_row_a_policy(measured, plain, bare=True)[:, 1:])


def gains(measured: pl.DataFrame) -> pl.DataFrame:
    """What the judge and the policy's own reward model say was gained, in one unit, and the KL it took. Reads `measure`."""
    columns = {
        "gain, judge": ("judge_gain", "+.2f"),
        "gain, own RM": ("own_gain", "+.2f"),
        "own - judge": ("own_less_judge", "+.2f"),
    }
    plain = {"KL, nats": ("kl", ".2f")}
    return _a_row_a_policy(measured, columns).hstack(_a_row_a_policy(measured, plain, bare=True)[:, 1:])


def diversity(measured: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of words, and of meaning and choice: each policy with sampled completions of its own. Reads `measure`."""
    own = measured.filter(pl.col("policy").is_in(measured.filter(metric="distinct_1")["policy"].unique().implode()))
    in_words = {"distinct-1": ("distinct_1", ".2f"), "distinct-2": ("distinct_2", ".2f"), "self-BLEU": ("self_bleu", ".2f")}
    in_meaning = {
        "spread in a prompt": ("spread", ".3f"),
        "spread across": ("spread_across", ".3f"),
        "entropy, nats": ("entropy", ".2f"),
    }
    return _a_row_a_policy(own, in_words), _a_row_a_policy(own, in_meaning)


def wins_by_stratum(measured: pl.DataFrame) -> pl.DataFrame:
    """Win rate against the base policy in % by stratum of the density. Reads `measure`."""
    title, wins = "wins against base, % [95 %]", measured.filter(metric="wins")
    rows = [
        {title: name(policy), **{s: _shown(interval_of(wins, stratum=s, policy=policy), "%") for s in QUARTILES}}
        for policy in policies_of(wins)
    ]
    return _frame(rows, (title, *QUARTILES))


def by_decile(measured: pl.DataFrame, metric: str = "judge_reward") -> pl.DataFrame:
    """A metric by decile of the density: a row a decile, a column a policy. Reads `measure`."""
    part = measured.filter(by="decile", metric=metric)
    spec, policies = "%" if metric == "wins" else spec_of(measured), policies_of(part)
    rows = [
        {"decile": decile, "prompts": f"{prompts:,}",
         **{policy_title(p): _shown(interval_of(part, stratum=decile, policy=p), spec) for p in policies}}
        for decile, prompts in part.group_by("stratum", maintain_order=True).agg(pl.col("prompts").max()).iter_rows()
    ]  # fmt: skip
    return _frame(rows, ("decile", "prompts", *map(policy_title, policies)))


def at_equal_kl(equal: EqualKl) -> pl.DataFrame:
    """The paired differences at equal KL, by stratum."""
    spec = reward_spec(*(i.mean for i in equal.rewards.values()))
    return differences(equal.differences, "at equal KL, paired [95 %]", spec)


def differences(found: Mapping[str, Mapping[str, Interval | None]], title: str, spec: str) -> pl.DataFrame:
    """Paired differences of judge rewards: a row a pair of arms ("b-a"), a column a stratum."""
    rows = [
        {title: pair.upper().replace("-", " - "), **{stratum: _shown(i, "+" + spec) for stratum, i in strata.items()}}
        for pair, strata in found.items()
    ]
    return _frame(rows, (title, *QUARTILES))


def name(policy: str) -> str:
    """A policy and where it uses 1/density sampling."""
    return _NAMES.get(policy, policy_title(policy))


def spec_of(measured: pl.DataFrame) -> str:
    """Format of the judge's rewards."""
    return reward_spec(*measured.filter(by="all", metric="judge_reward")["mean"])


def _a_row_a_policy(measured: pl.DataFrame, columns: Mapping[str, tuple[str, str]], bare: bool = False) -> pl.DataFrame:
    whole = measured.filter(by="all")
    rows = [
        {"1/density in": name(policy)}
        | {title: _shown(interval_of(whole, policy=policy, metric=m), spec, bare) for title, (m, spec) in columns.items()}
        for policy in policies_of(whole)
    ]
    return _frame(rows, ("1/density in", *columns))


def _shown(interval: Interval | None, spec: str, bare: bool = False) -> str:
    if interval is None:
        return "-"
    scaled, spec = (interval.scaled(100), ".1f") if spec == "%" else (interval, spec)
    return format(scaled.mean if bare else scaled, spec)


def _frame(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=dict.fromkeys(columns, pl.String()))

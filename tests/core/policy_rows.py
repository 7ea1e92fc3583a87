"""Rows of the tables on policies, made up by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from densityrm_core.tables import POLICY_CURVES, POLICY_DIVERSITY, POLICY_EVALUATION

_DEFAULTS = {"seed": 0, "policy": "base", "prompt_id": "p", "decile": 1, "quartile": 1, "completion": "x", "judge_reward": 0.0,
             "own_reward": None, "rm_uniform_reward": 0.0, "rm_density_reward": 0.0, "kl": 0.0, "entropy": 1.0, "tokens": 5,
             "sample": 1, "fingerprint": "f"}  # fmt: skip


def evaluation(rows: Sequence[Mapping[str, object]]) -> pl.DataFrame:
    """POLICY_EVALUATION; what a row does not say is as above, and equal for all."""
    return POLICY_EVALUATION.check(POLICY_EVALUATION.frame([_DEFAULTS | dict(row) for row in rows]))


def samples(policy: str, rewards: Mapping[str, Sequence[float]], seed: int = 0, **more: object) -> list[dict[str, object]]:
    """Sampled completions of a policy: the judge's rewards of each prompt's."""
    return [
        {"seed": seed, "policy": policy, "prompt_id": prompt, "sample": i + 1, "judge_reward": reward, **more}
        for prompt, values in rewards.items()
        for i, reward in enumerate(values)
    ]


def curve(policy: str, points: Sequence[tuple[int, float, Mapping[str, float]]], seed: int = 0) -> pl.DataFrame:
    """POLICY_CURVES of an arm: step, KL and each prompt's judge reward; the own reward is twice that."""
    rows = [
        {"seed": seed, "policy": policy, "step": step, "prompt_id": prompt, "decile": 1, "quartile": 1, "kl": kl,
         "own_reward": 2 * reward, "judge_reward": reward, "tokens": 5, "fingerprint": "f"}
        for step, kl, rewards in points for prompt, reward in rewards.items()
    ]  # fmt: skip
    return POLICY_CURVES.check(POLICY_CURVES.frame(rows))


def diversity_of(rows: pl.DataFrame, value: float = 0.5) -> pl.DataFrame:
    """POLICY_DIVERSITY that goes with rows of POLICY_EVALUATION."""
    keys = ("seed", "policy", "prompt_id", "decile", "quartile", "fingerprint")
    columns = ("distinct_1", "distinct_2", "self_bleu", "spread", "spread_across", "entropy")
    own = rows.filter(~pl.col("policy").str.starts_with("best_of")).select(keys).unique().sort(keys)
    return POLICY_DIVERSITY.check(
        own.with_columns(pl.lit(value).alias(column) for column in columns).select(POLICY_DIVERSITY.schema.names())
    )


def curves_of(rows: pl.DataFrame) -> pl.DataFrame:
    """POLICY_CURVES that go with rows of POLICY_EVALUATION: from the base policy to where each arm ended."""
    arms = rows.filter(pl.col("policy").is_in(list("abcd")) & (pl.col("sample") > 0))
    end = arms.group_by("seed", "policy", "prompt_id", "decile", "quartile", "fingerprint").agg(
        pl.col("kl", "own_reward", "judge_reward").mean(), pl.col("tokens").first()
    )
    start = end.with_columns(kl=0.0, own_reward=0.0, judge_reward=-1.0, step=pl.lit(0, pl.Int64))
    both = pl.concat([start, end.with_columns(step=pl.lit(50, pl.Int64))])
    return POLICY_CURVES.check(both.select(POLICY_CURVES.schema.names()).sort(pl.all()))

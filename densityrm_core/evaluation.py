"""What policies write for held-out prompts, row by row, with the density stratum of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch

from densityrm_core import tables
from densityrm_core.decoding import Decoding
from densityrm_core.judge import Judge
from densityrm_core.likelihood import log_probs
from densityrm_core.models import load_causal_lm, load_codec, load_reward_model
from densityrm_core.packing import pack
from densityrm_core.prompts import id_keys
from densityrm_core.rewarder import RewardScale
from densityrm_core.rollout import sample_completions
from densityrm_core.scoring import score_groups
from densityrm_core.settings import EvaluationSettings, GrpoSettings
from densityrm_core.streams import stream_seed, unit_intervals
from densityrm_core.tokens import Codec

_PROMPTS_AT_A_TIME = 32


def held_out_prompts(pairs: pl.DataFrame, weights: pl.DataFrame, count: int, split: str = "test") -> pl.DataFrame:
    """At most `count` prompts of a split with a context each, the same for every arm and seed.

    Returns:
        columns prompt_id, prompt, context, decile, quartile.
    """
    chosen = pairs.filter(pl.col("split") == split).unique("prompt_id", keep="first", maintain_order=True)
    order = pl.Series("order", unit_intervals(id_keys(chosen["prompt_id"]), 0, "evaluation"))
    return (
        chosen.with_columns(order)
        .sort("order")
        .head(count)
        .join(weights.select("prompt_id", "decile", "quartile"), on="prompt_id", how="left", maintain_order="left")
        .select("prompt_id", "prompt", "context", "decile", "quartile")
    )


@dataclass(frozen=True)
class PolicyExam:
    """What all policies of a seed are asked, and who judges them. `report(done, of)` counts prompts."""

    base: Path
    prompts: pl.DataFrame  # of held_out_prompts
    judge: Judge
    evaluation: EvaluationSettings
    grpo: GrpoSettings
    seed: int
    device: str = "cpu"
    report: Callable[[int, int], None] = lambda done, of: None


@dataclass(frozen=True)
class OwnReward:
    """The reward model that an arm was trained on, and the scale it saw."""

    model: Path
    scale: RewardScale


def evaluate_policy(policy: Path, own: OwnReward | None, exam: PolicyExam) -> pl.DataFrame:
    """Greedy and sampled replies of a policy: the columns of tables.POLICY_EVALUATION but seed, policy and fingerprint."""
    codec = load_codec(exam.base)
    model = load_causal_lm(policy, exam.device).eval()
    base = load_causal_lm(exam.base, exam.device).eval()
    reward_model = load_reward_model(own.model, exam.device).eval() if own else None
    frames: list[pl.DataFrame] = []
    for start in range(0, exam.prompts.height, _PROMPTS_AT_A_TIME):
        asked = exam.prompts.slice(start, _PROMPTS_AT_A_TIME)
        contexts = asked["context"].to_list()
        prompts = [codec.prompt(context) for context in contexts]
        groups = _replies(model, prompts, codec, exam, start)
        size = len(groups[0])
        text = [codec.text(reply) for group in groups for reply in group]
        repeated = [context for context in contexts for _ in range(size)]
        own_reward = own.scale.standardise(score_groups(reward_model, prompts, groups)).tolist() if own else [None] * len(text)
        frames.append(
            asked.select(pl.all().exclude("prompt", "context").repeat_by(size).explode()).with_columns(
                pl.Series("sample", list(range(size)) * len(prompts), pl.Int64),
                pl.Series("completion", text, pl.String),
                pl.Series("judge_reward", exam.judge(repeated, text), pl.Float64),
                pl.Series("own_reward", own_reward, pl.Float64),
                pl.Series("kl", _divergence(model, base, prompts, groups, codec, exam.grpo.temperature), pl.Float64),
                pl.Series("tokens", [len(reply) for group in groups for reply in group], pl.Int64),
            )
        )
        exam.report(start + asked.height, exam.prompts.height)
    return pl.concat(frames)


def with_key(frame: pl.DataFrame, table: tables.Table, **key: str | int) -> pl.DataFrame:
    """`frame` with the constant columns `key` added, in the table's order."""
    columns = [pl.lit(value, table.schema[name]).alias(name) for name, value in key.items()]
    return table.check(frame.with_columns(columns).select(table.schema.names()))


def _replies(model: Any, prompts: list[list[int]], codec: Codec, exam: PolicyExam, start: int) -> list[list[list[int]]]:
    seed = stream_seed(exam.seed, "policy evaluation", start)
    sampling = Decoding(exam.grpo.max_new_tokens, exam.grpo.temperature)
    greedy = sample_completions(model, prompts, codec.eos, 1, replace(sampling, temperature=0), seed).groups
    sampled = sample_completions(model, prompts, codec.eos, exam.evaluation.samples, sampling, seed).groups
    return [one + several for one, several in zip(greedy, sampled, strict=True)]


@torch.no_grad()
def _divergence(
    model: Any, base: Any, prompts: Sequence[list[int]], groups: Sequence[list[list[int]]], codec: Codec, temperature: float
) -> list[float]:
    batch = pack(list(zip(prompts, groups, strict=True)), model.device)
    gap = log_probs(model, batch, temperature) - log_probs(base, batch, temperature)
    return torch.zeros(len(batch.ends), device=gap.device).index_add_(0, batch.branch, gap).tolist()

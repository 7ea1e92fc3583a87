"""Group relative policy optimization [Shao et al. 2024] against a frozen reward model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from densityrm_core.checkpoints import key_of
from densityrm_core.decoding import Decoding
from densityrm_core.likelihood import log_probs
from densityrm_core.models import load_causal_lm, load_codec, load_reward_model, read_card
from densityrm_core.packing import pack
from densityrm_core.rollout import sample_completions
from densityrm_core.sampling import make_sampler
from densityrm_core.scoring import score_groups
from densityrm_core.settings import GrpoSettings, SamplingSettings
from densityrm_core.streams import stream_seed
from densityrm_core.tokens import Codec
from densityrm_core.training import Part, Plan, Watch, optimize

_SCALE_PROMPTS, _SCALE_SAMPLES = 64, 4
_KL_WINDOW = 10
_ADVANTAGE_EPSILON = 1e-4


@dataclass(frozen=True)
class RewardScale:
    """The reward model's mean and spread on completions of the base policy, so that all arms see one scale."""

    mean: float
    std: float

    def standardise(self, rewards: Tensor) -> Tensor:
        return (rewards - self.mean) / self.std


@dataclass(frozen=True)
class TrainedPolicy:
    model: Any
    codec: Codec
    scale: RewardScale
    steps: int
    stopped_by_kl: bool


def train_policy(
    base: Path,
    reward_model: Path,
    prompts: pl.DataFrame,
    settings: GrpoSettings,
    seed: int,
    watch: Watch,
    device: str = "cpu",
    sampling: SamplingSettings = SamplingSettings(),
) -> TrainedPolicy:
    """A policy started from the base model, trained on completions that it samples itself, step by step.

    Args:
        base: folder of the base model, which is also the reference policy.
        reward_model: folder of the reward model.
        prompts: the columns `context` and `weight` (sampling weight, any scale), one row a prompt.
        seed: decides the order of the prompts and the sampled tokens.
        sampling: how prompts are drawn by their weights.
    """
    codec = load_codec(base)
    policy, reference = load_causal_lm(base, device), load_causal_lm(base, device).eval().requires_grad_(False)
    judge = load_reward_model(reward_model, device).requires_grad_(False)
    contexts = [codec.prompt(context) for context in prompts["context"].to_list()]
    scale = reward_scale(reference, judge, contexts, codec, settings, seed)
    sampler = make_sampler(prompts["weight"].to_numpy(), stream_seed(seed, "grpo", "prompts"), sampling)
    memory: dict[str, list[float]] = {"divergence": []}

    def parts_at(step: int) -> Iterator[Part]:
        chosen = [contexts[i] for i in sampler.batch(step, settings.prompts_per_step)]
        decoding = Decoding(settings.max_new_tokens, settings.temperature)
        seeds = stream_seed(seed, "grpo", "rollout", step)
        groups = sample_completions(policy, chosen, codec.eos, settings.group_size, decoding, seeds).groups
        reward = scale.standardise(score_groups(judge, chosen, groups))
        batch = pack(list(zip(chosen, groups, strict=True)), policy.device)
        with torch.no_grad():
            reference_log_probs = log_probs(reference, batch, settings.temperature)
        policy.train()
        current = log_probs(policy, batch, settings.temperature)
        advantage = group_advantages(reward.view(-1, settings.group_size)).flatten()
        loss = grpo_loss(current, reference_log_probs, advantage.to(current.device)[batch.branch], settings.kl_coefficient)
        kl = (current.detach() - reference_log_probs).sum().item() / len(reward)
        memory["divergence"].append(kl)
        lengths = torch.bincount(batch.branch).float()
        unfinished = sum(completion[-1] != codec.eos for group in groups for completion in group) / len(reward)
        yield (
            loss / len(reward),
            {
                "reward/mean": reward.mean().item(),
                "reward/std_in_group": reward.view(-1, settings.group_size).std(1).mean().item(),
                "kl/sequence": kl,
                "completions/tokens": lengths.mean().item(),
                "completions/unfinished": unfinished,
            },
        )

    def past_budget() -> bool:
        recent = memory["divergence"][-_KL_WINDOW:]
        return settings.kl_budget is not None and len(recent) == _KL_WINDOW and sum(recent) / _KL_WINDOW > settings.kl_budget

    plan = Plan(
        settings.steps,
        settings.prompts_per_step * settings.group_size,
        settings.learning_rate,
        settings.warmup,
        0.0,
        settings.max_grad_norm,
        settings.log_every,
    )
    asked = str(contexts), prompts["weight"].to_numpy().tobytes()
    key = key_of(policy, judge, settings.model_dump_json(), sampling.model_dump_json(), seed, *asked)
    steps = optimize(policy, plan, watch, parts_at, finished=past_budget, checkpoints=watch.checkpoints(key), memory=memory)
    return TrainedPolicy(policy, codec, scale, steps, past_budget())


def grpo_loss(current: Tensor, reference: Tensor, advantage: Tensor, kl_coefficient: float) -> Tensor:
    """Sum over tokens of -ratio * advantage + beta * KL, on policy [Shao et al. 2024, eq. 3 and 4].

    The completions were sampled from the very policy that is updated, once, so the ratio is exactly 1 and carries the gradient
    only. KL is the k3 estimate exp(d) - d - 1 with d = log ref - log pi, times the same ratio, without which its gradient is
    not that of the KL [Schulman 2020; Tang & Munos 2025].

    Args:
        current, reference, advantage: one value a completion token, shape (tokens,), float32.
    """
    ratio = (current - current.detach()).exp()
    gap = reference - current
    return (-ratio * advantage + kl_coefficient * ratio * (gap.exp() - gap - 1)).sum()


def group_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group [Shao et al. 2024, section 4.1.2]; rewards (prompts, group)."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + _ADVANTAGE_EPSILON)


def reward_scale(
    base: Any, reward_model: Any, contexts: list[list[int]], codec: Codec, settings: GrpoSettings, seed: int
) -> RewardScale:
    """Mean and standard deviation of the reward over completions of the base policy."""
    chosen = contexts[:_SCALE_PROMPTS]
    seed = stream_seed(seed, "grpo", "scale")
    decoding = Decoding(settings.max_new_tokens, settings.temperature)
    groups = sample_completions(base, chosen, codec.eos, _SCALE_SAMPLES, decoding, seed).groups
    rewards = score_groups(reward_model, chosen, groups)
    return RewardScale(rewards.mean().item(), max(rewards.std().item(), 1e-6))


def reward_scale_of(policy: Path) -> RewardScale:
    """The scale a trained policy saw its rewards on, from its folder."""
    card = read_card(policy)
    return RewardScale(float(card["reward_mean"]), float(card["reward_std"]))

"""The objective of group relative policy optimization, as functions of rewards and log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from densityrm_core.settings import GrpoSettings

_EPSILON = 1e-4  # in standard deviations of the reward; far smaller ones would turn rounding into advantages


def group_advantages(rewards: Tensor, scale: Literal["std", "none", "batch"] = "std") -> Tensor:
    """What a completion's reward is above its group's mean, in units of `scale`.

    `std` divides by the group's standard deviation [Shao et al. 2024, section 4.1.2], `none` by nothing [Liu et al. 2025, eq. 5],
    `batch` by the standard deviation of all rewards [Liu et al. 2025b].

    Args:
        rewards: (prompts, group), float32; NaN where a completion has none: it takes no part.

    Returns:
        (prompts, group), 0 where a completion has no reward.
    """
    gap, deviation = within_groups(rewards)
    if scale == "none":
        return gap
    if scale == "batch":
        return gap / (rewards[rewards.isfinite()].std() + _EPSILON)
    return gap / (deviation[:, None] + _EPSILON)


def within_groups(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Each reward less its group's mean, (prompts, group), and every group's standard deviation, (prompts,).

    What is not finite takes no part: its difference is 0. A group of one reward has the deviation 0.
    """
    present = rewards.isfinite()
    gap = (rewards - rewards.where(present, torch.nan).nanmean(1, keepdim=True)).where(present, 0)
    return gap, (gap.square().sum(1) / (present.sum(1) - 1).clamp(min=1)).sqrt()


def completion_weights(lengths: Tensor, average: Literal["completion", "token", "constant"], longest: int) -> Tensor:
    """What each token of a completion counts in the loss, (completions,), float32.

    `completion`: 1 / (n |o_i|) [Shao et al. 2024, eq. 3]; `token`: 1 / sum_j |o_j| [Yu et al. 2025, eq. 8]; `constant`:
    1 / (n longest) [Liu et al. 2025, listing 1].

    Args:
        lengths: tokens |o_i| of all n completions of the step.
    """
    lengths = lengths.float()
    if average == "token":
        return torch.full_like(lengths, 1 / float(lengths.sum()))
    if average == "constant":
        return torch.full_like(lengths, 1 / (len(lengths) * longest))
    return 1 / (len(lengths) * lengths)


def penalised(rewards: Tensor, lengths: Tensor, unfinished: Tensor, longest: int) -> Tensor:
    """Rewards less the soft punishment of overlong completions [Yu et al. 2025, eq. 13].

    It rises from 0 to 1 over the last fifth of the allowed length, and is 1 where a completion was cut off. All (completions,).
    """
    margin = max(1, longest // 5)
    punishment = ((lengths - (longest - margin)) / margin).clamp(0, 1)
    return rewards - torch.where(unfinished, torch.ones_like(rewards), punishment)


@dataclass(frozen=True)
class Sampled:
    """What is known of T completion tokens before the policy is updated; `branch` is the number of a token's completion."""

    branch: Tensor  # (T,) int64
    old: Tensor  # (T,) log-probabilities under the policy that the step began with
    reference: Tensor | None  # (T,) under the reference policy
    advantage: Tensor  # (completions,)
    weight: Tensor  # (completions,) of `completion_weights`


def policy_loss(
    current: Tensor, entropy: Tensor | None, sampled: Sampled, settings: GrpoSettings, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum over tokens of -min(rho A, clip(rho) A) + beta KL - c H, and what was clipped.

    rho is pi / pi_old of the token [Shao et al. 2024, eq. 3], or its geometric mean over the completion [Zheng et al. 2025,
    eq. 7]. KL is the k3 estimate exp(d) - d - 1 with d = log ref - log pi [Schulman 2020], times the token's ratio, without
    which its gradient is not that of the KL [Tang & Munos 2025].

    Args:
        current: log-probabilities (T,), float32; they carry the gradient.
        entropy: of every token's distribution (T,), with an entropy bonus c.
        beta: weight of the KL penalty.
    """
    of_token = sampled.weight[sampled.branch]
    log_ratio = current - sampled.old
    ratio = (log_ratio if settings.ratio == "token" else _means(log_ratio, sampled)).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    advantage = sampled.advantage[sampled.branch]
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    objective = gain
    if beta and sampled.reference is not None:
        gap = sampled.reference - current
        objective = objective - beta * log_ratio.exp() * (gap.exp() - gap - 1)
    if entropy is not None:
        objective = objective + settings.entropy_bonus * entropy
    cut = (gain < ratio * advantage).float().mean().item()
    return -(of_token * objective).sum(), {"train/clipped": cut}


def _means(of_token: Tensor, sampled: Sampled) -> Tensor:
    """The mean over each token's completion, (T,); summed in one order on every device, which index_add on CUDA does not."""
    lengths = torch.bincount(sampled.branch, minlength=len(sampled.weight))
    sums = torch.segment_reduce(of_token, "sum", lengths=lengths)
    return (sums / lengths)[sampled.branch]

"""What a policy learns from in a step: completions it sampled, their rewards, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densityrm_core.models.packing import Ids, Packed, pack, split_by_tokens
from densityrm_core.policies.decoding import Decoding, prompt_keys
from densityrm_core.policies.engines import Engine
from densityrm_core.policies.loss import completion_weights, group_advantages, penalised, within_groups
from densityrm_core.policies.questions import Questions
from densityrm_core.policies.rewards import Rewarder
from densityrm_core.sampling import Sampler
from densityrm_core.settings import GrpoSettings
from densityrm_core.streams import stream_seed
from densityrm_core.training.loop import TrainingError

_NO_SPREAD = 1e-5  # standardised reward: equal completions of a packed row may differ in the last bits


@dataclass(frozen=True)
class Batch:
    """Completions that are computed together, (completions,), in packed order."""

    packed: Packed
    advantage: Tensor
    weight: Tensor  # of every token of a completion in the loss of the step
    sampled: Tensor  # (tokens,) log-probabilities as they were sampled


@dataclass(frozen=True)
class Experience:
    """The batches of one step, none if nothing can be learnt from its completions, and what it was like."""

    batches: list[Batch]
    metrics: dict[str, float]

    @property
    def completions(self) -> int:
        """How many completions count."""
        return sum(len(batch.weight) for batch in self.batches)


@dataclass(frozen=True)
class _Group:
    """A prompt, its completions, and their rewards: NaN where a completion does not count."""

    prompt: Ids
    replies: list[list[int]]
    log_probs: list[list[float]]
    rewards: Tensor  # (group,) as the reward model gave them
    counted: Tensor  # (group,) as they are learnt from

    @property
    def spread(self) -> bool:
        """Whether there is anything to prefer."""
        counted = self.counted[self.counted.isfinite()]
        return len(counted) > 1 and bool(counted.max() - counted.min() > _NO_SPREAD)


class Collector:
    """Asks prompts and makes an experience of the answers; step s is a function of (seed, s) and the policy."""

    def __init__(
        self,
        engine: Engine,
        rewarder: Rewarder,
        questions: Questions,
        samplers: tuple[Sampler, Sampler],
        settings: GrpoSettings,
        seed: int,
    ) -> None:
        """Args: samplers, of the prompts of a step, and of those that take the place of groups without a spread."""
        self._engine, self._rewarder, self._questions = engine, rewarder, questions
        self._sampler, self._further = samplers
        self._settings, self._seed = settings, seed
        self._decoding = Decoding(settings.max_new_tokens, settings.temperature)

    def collect(self, step: int, device: Any = "cpu") -> Experience:
        """The experience of a step (from 0).

        Raises:
            TrainingError: not one completion has a finite reward.
        """
        settings = self._settings
        asked = self._ask(self._sampler.batch(step, settings.prompts_per_step).tolist(), step, 0)
        groups = [group for group in asked if group.spread]
        for number in range(settings.resample_rounds):
            missing = settings.prompts_per_step - len(groups)
            if not missing:
                break
            further = self._further.batch(step * settings.resample_rounds + number, settings.prompts_per_step)
            asked += self._ask(further[:missing].tolist(), step, number + 1)
            groups = [group for group in asked if group.spread]
        return Experience(self._batches(groups, device), self._metrics(asked, len(groups), step))

    def _ask(self, numbers: list[int], step: int, round_: int) -> list[_Group]:
        contexts = [self._questions.contexts[i] for i in numbers]
        prompts = [self._questions.prompts[i] for i in numbers]
        keys = prompt_keys(prompts, stream_seed(self._seed, "grpo", "rollout", step, round_))
        rollout = self._engine.sample(prompts, self._settings.group_size, self._decoding, keys)
        rewards = self._rewarder.rewards(contexts, prompts, rollout.groups).view(len(prompts), -1)
        return [
            _Group(prompt, replies, values, given, self._counted(replies, given))
            for prompt, replies, values, given in zip(prompts, rollout.groups, rollout.log_probs, rewards, strict=True)
        ]

    def _counted(self, replies: list[list[int]], rewards: Tensor) -> Tensor:
        """Rewards that are learnt from: overlong completions punished or left out, infinite ones left out."""
        rewards = torch.where(rewards.isfinite(), rewards, torch.nan)
        if self._settings.overlong == "keep":
            return rewards
        unfinished = torch.tensor([self._unfinished(reply) for reply in replies])
        if self._settings.overlong == "mask":
            return rewards.masked_fill(unfinished, torch.nan)
        lengths = torch.tensor([len(reply) for reply in replies])
        return penalised(rewards, lengths, unfinished, self._settings.max_new_tokens)

    def _unfinished(self, reply: list[int]) -> bool:
        return reply[-1] != self._rewarder.policy.eos

    def _batches(self, groups: list[_Group], device: Any) -> list[Batch]:
        if not groups:
            return []
        counted = torch.stack([group.counted for group in groups])
        advantages = group_advantages(counted, self._settings.advantage)
        present = counted.isfinite()
        lengths = torch.tensor([[len(reply) for reply in group.replies] for group in groups])
        weights = torch.zeros(lengths.shape)
        weights[present] = completion_weights(lengths[present], self._settings.loss_average, self._settings.max_new_tokens)
        kept = [row.nonzero().flatten().tolist() for row in present]
        branches = [(group.prompt, [group.replies[i] for i in rows]) for group, rows in zip(groups, kept, strict=True)]
        batches: list[Batch] = []
        for part in split_by_tokens(branches, self._settings.tokens_per_batch):
            rows = torch.tensor(list(part))
            sampled = [value for number in part for i in kept[number] for value in groups[number].log_probs[i]]
            batches.append(
                Batch(
                    pack([branches[number] for number in part], device),
                    advantages[rows][present[rows]].to(device),
                    weights[rows][present[rows]].to(device),
                    torch.tensor(sampled, device=device),
                )
            )
        return batches

    def _metrics(self, asked: list[_Group], used: int, step: int) -> dict[str, float]:
        rewards = torch.stack([group.rewards for group in asked])
        finite = rewards.isfinite()
        if not finite.any():
            raise TrainingError(
                f"at step {step + 1} the reward model gave no completion a finite reward; evaluate it, and train it again"
            )
        replies = [reply for group in asked for reply in group.replies]
        return {
            "reward/mean": rewards[finite].mean().item(),
            "reward/std_in_group": within_groups(rewards)[1].mean().item(),
            "reward/not_finite": float((~finite).sum()),
            "groups/dropped": float(self._settings.prompts_per_step - used),
            "groups/asked": float(len(asked)),
            "completions/tokens": sum(map(len, replies)) / len(replies),
            "completions/unfinished": sum(map(self._unfinished, replies)) / len(replies),
        }

"""How a policy answers a fixed set of held-out prompts while it is trained: a person reads the answers, a budget their KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from densityrm_core.models.likelihood import log_probs
from densityrm_core.models.packing import Ids, pack, split_by_tokens
from densityrm_core.policies.decoding import Decoding, prompt_keys
from densityrm_core.policies.engines import Engine
from densityrm_core.policies.questions import Questions
from densityrm_core.policies.rewards import Rewarder
from densityrm_core.settings import GrpoSettings
from densityrm_core.streams import stream_seed
from densityrm_core.tables import POLICY_COMPLETIONS

_ROWS = "completions"
_ONE_SIDED = 1.645  # standard errors below which 95 % of a normal distribution lie


class PolicyWatch:
    """Answers to the watched prompts, one each, kept in the loop's memory so that an interruption loses none.

    The same draws are used every time, so answers differ only as far as the policy does.
    """

    def __init__(
        self,
        asked: pl.DataFrame,
        questions: Questions,
        rewarder: Rewarder,
        settings: GrpoSettings,
        seed: int,
        memory: dict[str, list[Any]],
    ) -> None:
        """Args: asked, columns prompt_id, prompt, decile, quartile, a row for each of `questions`."""
        self._asked, self._questions, self._rewarder, self._settings = asked, questions, rewarder, settings
        self._keys = prompt_keys(questions.prompts, stream_seed(seed, "grpo", "watch"))
        self._decoding = Decoding(settings.max_new_tokens, settings.temperature)
        self._memory = memory
        memory[_ROWS] = []
        self.highest_kl = 0.0  # upper end of the one-sided 95 % interval of the KL a sequence at the last look, in nats

    def look(self, step: int, engine: Engine, policy: Any, reference: Any) -> dict[str, float]:
        """Sample after `step` optimizer steps; means of what is measured, none without watched prompts."""
        if self._asked.is_empty():
            return {}
        groups = engine.sample(self._questions.prompts, 1, self._decoding, self._keys).groups
        answers = [group[0] for group in groups]
        rewards = self._rewarder.rewards(self._questions.contexts, self._questions.prompts, groups)
        kl = sequence_kl(policy, reference, self._questions.prompts, groups, self._settings)
        rows = self._asked.select("prompt_id", "prompt", "decile", "quartile").with_columns(
            step=pl.lit(step, pl.Int64),
            completions_seen=pl.lit(step * self._settings.prompts_per_step * self._settings.group_size, pl.Int64),
            completion=pl.Series([self._rewarder.policy.text(answer) for answer in answers], dtype=pl.String),
            own_reward=pl.Series(rewards.tolist(), dtype=pl.Float64),
            kl=pl.Series(kl.tolist(), dtype=pl.Float64),
            tokens=pl.Series([len(answer) for answer in answers], dtype=pl.Int64),
        )
        self._memory[_ROWS] = [*self._memory[_ROWS], *rows.to_dicts()]
        self.highest_kl = kl.mean().item() + (_ONE_SIDED * kl.std().item() / len(kl) ** 0.5 if len(kl) > 1 else 0.0)
        finite = rewards[rewards.isfinite()]
        return {
            "eval/reward": finite.mean().item() if len(finite) else 0.0,
            "eval/kl": kl.mean().item(),
            "eval/tokens": sum(map(len, answers)) / len(answers),
        }

    @property
    def completions(self) -> pl.DataFrame:
        """All answers so far, per tables.POLICY_COMPLETIONS."""
        return POLICY_COMPLETIONS.frame(self._memory[_ROWS])


@torch.no_grad()
def sequence_kl(
    policy: Any, reference: Any, prompts: Sequence[Ids], groups: list[list[list[int]]], settings: GrpoSettings
) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x) of every completion, (completions,), in nats: its mean is an estimate of the KL (k1)."""
    packed = list(zip(prompts, groups, strict=True))
    parts: list[Tensor] = []
    for part in split_by_tokens(packed, settings.tokens_per_batch):
        batch = pack([packed[number] for number in part], policy.device)
        gap = log_probs(policy, batch, settings.temperature) - log_probs(reference, batch, settings.temperature)
        parts.append(batch.totals(gap).cpu())
    return torch.cat(parts)

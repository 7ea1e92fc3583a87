"""The reward of sampled completions: by a reward model, on the scale of its own validation split, whatever its tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densityrm_core.models.folders import CARD, read_card
from densityrm_core.models.packing import Ids
from densityrm_core.models.tokens import Codec, Message
from densityrm_core.reward_models.scoring import Scorer, load_scorer, score_groups

Context = Sequence[Message]
RewardFunction = Callable[[Sequence[Context], Sequence[str]], Sequence[float]]
SCALE = ("reward_mean", "reward_std")
_LEAST_STD = 1e-6


@dataclass(frozen=True)
class RewardScale:
    """Mean and standard deviation of a reward model's rewards; comparisons fix neither, so arms need a common scale."""

    mean: float
    std: float

    def standardise(self, rewards: Tensor) -> Tensor:
        """(r - mean) / std."""
        return (rewards - self.mean) / max(self.std, _LEAST_STD)

    @property
    def card(self) -> dict[str, float]:
        """As a model's card keeps it."""
        return dict(zip(SCALE, (self.mean, self.std), strict=True))


def scale_of(folder: str | Path) -> RewardScale | None:
    """The scale in the card of a model folder: of a reward model, that of its validation split; None if it has none."""
    card = read_card(folder) if Path(folder, CARD).exists() else {}
    return RewardScale(*(float(card[name]) for name in SCALE)) if all(name in card for name in SCALE) else None


@dataclass(frozen=True)
class Rewarder(ABC):
    """What gives completions of a policy their reward: on a scale, from the policy's own ids or their text."""

    policy: Codec
    scale: RewardScale

    def rewards(self, contexts: Sequence[Context], prompts: Sequence[Ids], groups: Sequence[Sequence[Ids]]) -> Tensor:
        """Standardised reward of every completion, in order, (completions,), float32, on the CPU; may be NaN.

        Args:
            contexts, prompts: what was asked, as turns and as the policy's ids.
            groups: completions of every prompt, as the policy's ids.
        """
        return self.scale.standardise(self._raw(contexts, prompts, groups))

    def on(self, scale: RewardScale) -> Rewarder:
        """The same on another scale."""
        return replace(self, scale=scale)

    @property
    @abstractmethod
    def identity(self) -> Any:
        """What a checkpoint's key takes of it."""

    @abstractmethod
    def _raw(self, contexts: Sequence[Context], prompts: Sequence[Ids], groups: Sequence[Sequence[Ids]]) -> Tensor: ...

    def _texts(self, group: Sequence[Ids]) -> list[str]:
        return [self.policy.text(reply) for reply in group]


@dataclass(frozen=True)
class ModelRewarder(Rewarder):
    """A frozen reward model.

    Where it shares the policy's tokenizer it reads the policy's own ids, else the text again in its own. Either way a completion
    that was cut off is closed by end-of-sequence, as every reply is that a reward model was trained on.
    """

    scorer: Scorer
    same_tokens: bool

    @property
    def identity(self) -> Any:
        """The reward model: a key is made of its weights."""
        return self.scorer.model

    def _raw(self, contexts: Sequence[Context], prompts: Sequence[Ids], groups: Sequence[Sequence[Ids]]) -> Tensor:
        if self.same_tokens:
            closed = [[self.scorer.codec.closed(reply) for reply in group] for group in groups]
            return score_groups(self.scorer.model, prompts, closed)
        read = [self.scorer.group(context, self._texts(group)) for context, group in zip(contexts, groups, strict=True)]
        return score_groups(self.scorer.model, [prompt for prompt, _ in read], [replies for _, replies in read])


@dataclass(frozen=True)
class FunctionRewarder(Rewarder):
    """A function of contexts and replies, of which a checkpoint's key knows no more than its name."""

    function: RewardFunction

    @property
    def identity(self) -> Any:
        """The function's name: another function of that name is taken for the same."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    def _raw(self, contexts: Sequence[Context], prompts: Sequence[Ids], groups: Sequence[Sequence[Ids]]) -> Tensor:
        repeated = [context for context, group in zip(contexts, groups, strict=True) for _ in group]
        return torch.tensor(self.function(repeated, [text for group in groups for text in self._texts(group)]))


def load_rewarder(source: Path | RewardFunction, policy: Codec, device: str = "cpu") -> Rewarder:
    """A function, or the reward model in a folder, for completions in the tokens of `policy`.

    It is on the scale of its card, if that has one.

    Raises:
        ModelError: the folder holds no reward model.
    """
    unscaled = RewardScale(0.0, 1.0)
    if not isinstance(source, Path):
        return FunctionRewarder(policy, unscaled, source)
    scorer = load_scorer(source, device)
    scorer.model.requires_grad_(False)
    return ModelRewarder(policy, scale_of(source) or unscaled, scorer, same_tokens(scorer.codec, policy))


def same_tokens(one: Codec, other: Codec) -> bool:
    """Whether two codecs make the same ids of the same text, and allow prompts of the same length."""
    return (
        one.max_prompt_tokens == other.max_prompt_tokens
        and one.eos == other.eos
        and one.tokenizer.chat_template == other.tokenizer.chat_template
        and _rules(one) == _rules(other)
    )


def _rules(codec: Codec) -> str:
    backend: Any = codec.tokenizer.backend_tokenizer
    return backend.to_str()

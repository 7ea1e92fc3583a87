"""Rewards under a trained model, by the tokens and rows of training: of pairs, of groups of replies, of any conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jinja2 import TemplateError
from torch import Tensor

from densityrm_core.models.folders import (
    CARD,
    ModelError,
    load_codec,
    load_reward_model,
    load_tokenizer,
    most_tokens,
    read_config,
)
from densityrm_core.models.packing import Group, Ids, pack, rewards, split_by_tokens
from densityrm_core.models.tokens import CHAT_TEMPLATE, Codec, Message

Report = Callable[[int, int], None]  # groups that are scored, and all

_TOKENS_AT_A_TIME = 8192
_LONGEST = 8192  # tokens of prompt and reply together, where neither a card nor the model says less

_HEAD = "ForSequenceClassification"


@dataclass(frozen=True)
class PreferenceTokens:
    """A pair as ids: what both replies answer, and the two replies."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def group(self) -> Group:
        """The prompt and its two branches, chosen first."""
        return self.prompt, [self.chosen, self.rejected]


def tokenize_pairs(pairs: pl.DataFrame, codec: Codec) -> list[PreferenceTokens]:
    """Ids of every row of `pairs` (tables.PREFERENCE_PAIRS), in order."""
    columns = (pairs[name].to_list() for name in ("context", "chosen", "rejected"))
    return [PreferenceTokens(codec.prompt(x), codec.reply(c), codec.reply(r)) for x, c, r in zip(*columns, strict=True)]


def score_pairs(model: Any, pairs: Sequence[PreferenceTokens], report: Report | None = None) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and of rejected, in order; each (pairs,), float32, on the CPU."""
    chosen, rejected = _score(model, [pair.group for pair in pairs], report).view(-1, 2).unbind(1)
    return chosen, rejected


def score_groups(model: Any, prompts: Sequence[Ids], groups: Sequence[Sequence[Ids]]) -> Tensor:
    """Rewards of groups of replies to prompts, (sum of group sizes,), float32, on the CPU."""
    return _score(model, list(zip(prompts, groups, strict=True)))


def _score(model: Any, groups: list[Group], report: Report | None = None) -> Tensor:
    training = model.training
    model.eval()
    found = [torch.zeros(0)]
    with torch.no_grad():
        for part in split_by_tokens(groups, _TOKENS_AT_A_TIME):
            found.append(rewards(model, pack([groups[i] for i in part], model.device)).cpu())
            if report:
                report(part[-1] + 1, len(groups))
    model.train(training)
    return torch.cat(found)


class ConversationError(ValueError):
    """A conversation that the model's chat template does not take."""


@dataclass(frozen=True)
class Scorer:
    """A reward model in evaluation mode with its codec, and what a person should know of how it reads."""

    model: Any
    codec: Codec
    notes: tuple[str, ...] = ()

    def group(self, context: Sequence[Message], replies: Sequence[str]) -> Group:
        """Ids of a context and of replies to it, as in training: a reply is text as given, closed by end-of-sequence.

        Raises:
            ConversationError: the chat template refuses the context, or makes no token of it.
        """
        return context_ids(self.codec, context), [self.codec.reply(reply) for reply in replies]

    def rewards(self, groups: Sequence[Group]) -> list[list[float]]:
        """Rewards of the replies of every group, in order; the same reply twice has the same reward to the last bit."""
        flat = iter(score_groups(self.model, [prompt for prompt, _ in groups], [replies for _, replies in groups]).tolist())
        found: list[list[float]] = []
        for _, replies in groups:
            first: dict[tuple[int, ...], float] = {}
            found.append([first.setdefault(tuple(reply), reward) for reply, reward in zip(replies, flat, strict=False)])
        return found

    def score(self, contexts: Sequence[Sequence[Message]], replies: Sequence[str]) -> list[float]:
        """Reward of one reply to every context. Raises ConversationError."""
        groups = [self.group(context, [reply]) for context, reply in zip(contexts, replies, strict=True)]
        return [reward for (reward,) in self.rewards(groups)]


def context_ids(codec: Codec, context: Sequence[Message]) -> list[int]:
    """Ids of a context that anyone may have written.

    Raises:
        ConversationError: the chat template refuses the context, or makes no token of it.
    """
    try:
        prompt = codec.prompt(context)
    except TemplateError as error:
        raise ConversationError(f"the model's chat template does not take this prompt: {error}") from None
    if not prompt:
        raise ConversationError("the model's chat template makes no token of this prompt")
    return prompt


def load_scorer(folder: str | Path, device: str = "cpu") -> Scorer:
    """The reward model in a Hugging Face folder. One that densityrm did not write is cut to lengths that its config allows.

    Raises:
        ModelError: the folder holds no decoder with one scalar head.
    """
    _check_config(folder)
    model = load_reward_model(folder, device).eval()
    if not hasattr(model, "score"):
        raise ModelError(f"{folder}: a {type(model).__name__} has no head `score` at the last token; only decoders are read here")
    if Path(folder, CARD).exists():
        return Scorer(model, load_codec(folder))
    tokenizer = load_tokenizer(folder)
    most = min(_LONGEST, most_tokens(tokenizer, model.config, _LONGEST))
    codec = Codec(tokenizer, most // 2, most - most // 2)
    notes = [
        f"{folder} has no {CARD}: prompts keep their last {codec.max_prompt_tokens:,} tokens, "
        f"replies their first {codec.max_reply_tokens:,}"
    ]
    if tokenizer.chat_template == CHAT_TEMPLATE:
        notes.append(f"{folder} has no chat template: turns are written as <|user|>...<|assistant|>...")
    return Scorer(model, codec, tuple(notes))


def _check_config(folder: str | Path) -> None:
    """Raise ModelError for what transformers would load without a word, but with a head that nobody trained."""
    config = read_config(folder)
    classes: list[str] = config.architectures or []
    if not any(name.endswith(_HEAD) for name in classes):
        raise ModelError(
            f"{folder} is no reward model: it holds a {', '.join(classes) or 'model of no known class'}, not a …{_HEAD}"
        )
    if config.num_labels != 1:
        raise ModelError(f"{folder} is no reward model: it has {config.num_labels} labels, and a reward is one")

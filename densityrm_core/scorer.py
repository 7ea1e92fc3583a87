"""A reward model ready to score conversations: one of ours, or any decoder with a scalar head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from densityrm_core.models.folders import (
    CARD,
    ModelError,
    load_codec,
    load_reward_model,
    load_tokenizer,
    most_tokens,
    read_config,
)
from densityrm_core.models.packing import Group
from densityrm_core.models.tokens import CHAT_TEMPLATE, Codec, Turn
from densityrm_core.scoring import score_groups

_LONGEST = 8192  # tokens of prompt and reply together, where neither a card nor the model says less
_HEAD = "ForSequenceClassification"


class ConversationError(ValueError):
    """A conversation that the model's chat template does not take."""


@dataclass(frozen=True)
class Scorer:
    """A reward model in evaluation mode with its codec, and what a person should know of how it reads."""

    model: Any
    codec: Codec
    notes: tuple[str, ...] = ()

    def group(self, context: Sequence[Turn], replies: Sequence[str]) -> Group:
        """Ids of a context and of replies to it, as in training: a reply is text as given, closed by end-of-sequence.

        Raises:
            ConversationError: the chat template refuses the context, or makes no token of it.
        """
        return prompt_ids(self.codec, context), [self.codec.reply(reply) for reply in replies]

    def rewards(self, groups: Sequence[Group]) -> list[list[float]]:
        """Rewards of the replies of every group, in order; the same reply twice has the same reward to the last bit."""
        flat = iter(score_groups(self.model, [prompt for prompt, _ in groups], [replies for _, replies in groups]).tolist())
        found: list[list[float]] = []
        for _, replies in groups:
            first: dict[tuple[int, ...], float] = {}
            found.append([first.setdefault(tuple(reply), reward) for reply, reward in zip(replies, flat, strict=False)])
        return found

    def score(self, contexts: Sequence[Sequence[Turn]], replies: Sequence[str]) -> list[float]:
        """Reward of one reply to every context. Raises ConversationError."""
        groups = [self.group(context, [reply]) for context, reply in zip(contexts, replies, strict=True)]
        return [reward for (reward,) in self.rewards(groups)]


def prompt_ids(codec: Codec, context: Sequence[Turn]) -> list[int]:
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

"""A conversation with policies: language models that are asked the same, each going on from its own replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from densityrm_core.models.folders import (
    CARD,
    ModelError,
    fit_to_tokenizer,
    load_causal_lm,
    load_codec,
    load_tokenizer,
    most_tokens,
    read_config,
)
from densityrm_core.models.tokens import CHAT_TEMPLATE, Codec, Message
from densityrm_core.policies.decoding import Decoding
from densityrm_core.policies.rollout import sample_completions
from densityrm_core.reward_models.scoring import ConversationError, Scorer, context_ids
from densityrm_core.streams import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 8192  # tokens of prompt and reply together, where neither a card nor the model says
_LONGEST_REPLY = 512  # of a model without a card
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_REWARD_HEAD = "ForSequenceClassification"


@dataclass(frozen=True)
class Reply:
    """What a policy said. reward: by the reward model, if there is one."""

    text: str
    finished: bool  # False where it was cut off at the most tokens that a reply may have
    reward: float | None = None


@dataclass(frozen=True)
class Policy:
    """A language model in evaluation mode with its codec, and what a person should know of how it reads."""

    model: Any
    codec: Codec
    ends: tuple[int, ...]  # tokens that end a reply, the usual one first
    notes: tuple[str, ...] = ()

    def reply(self, context: Sequence[Message], decoding: Decoding, seed: int) -> Reply:
        """A reply to a context, the same for the same seed.

        Raises:
            ConversationError: the chat template does not take the context.
        """
        prompt = context_ids(self.codec, context)
        rollout = sample_completions(self.model, [prompt], self.ends[0], 1, decoding, seed)
        written = rollout.groups[0][0]
        length = next((place for place, token in enumerate(written) if token in self.ends), len(written))
        return Reply(self.codec.text(written[:length]), finished=length < len(written))


class Conversation:
    """What was said so far, by each of several policies. A question that fails or is interrupted leaves it as it was."""

    def __init__(
        self, policies: Sequence[Policy], decodings: Sequence[Decoding], seed: int, scorer: Scorer | None = None
    ) -> None:
        """Args: seed, with the number of a question it decides all draws, the same for every policy."""
        self._policies, self._decodings, self._scorer = policies, decodings, scorer
        self._seed, self._asked = seed, 0
        self._system: list[Message] = []
        self.reset()

    def ask(self, text: str) -> list[Reply]:
        """Every policy's reply to one more turn of the user. Raises ConversationError."""
        return self._ask(text, self._turns)

    def retry(self) -> list[Reply]:
        """Other replies to the last question, in place of the former. Raises ConversationError."""
        if not self._turns[0]:
            raise ConversationError("nothing was asked yet")
        return self._ask(self._turns[0][-2]["content"], [turns[:-2] for turns in self._turns])

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self._turns: list[list[Message]] = [[] for _ in self._policies]

    def instruct(self, text: str) -> None:
        """Set the turn of the system, which stands before all others; without text there is none."""
        self._system = [{"role": "system", "content": text}] if text else []

    def _ask(self, text: str, before: list[list[Message]]) -> list[Reply]:
        asked: list[list[Message]] = [[*turns, {"role": "user", "content": text}] for turns in before]
        seed = stream_seed(self._seed, "chat", self._asked)
        replies: list[Reply] = []
        for policy, decoding, turns in zip(self._policies, self._decodings, asked, strict=True):
            context = [*self._system, *turns]
            replies.append(self._rewarded(context, policy.reply(context, decoding, seed)))
        self._turns = [[*turns, {"role": "assistant", "content": r.text}] for turns, r in zip(asked, replies, strict=True)]
        self._asked += 1
        return replies

    def _rewarded(self, context: Sequence[Message], reply: Reply) -> Reply:
        if self._scorer is None:
            return reply
        return Reply(reply.text, reply.finished, self._scorer.score([context], [reply.text])[0])


def load_policy(folder: str | Path, device: str = "cpu", max_new_tokens: int | None = None) -> Policy:
    """The language model in a Hugging Face folder.

    Args:
        max_new_tokens: of a reply. By default what the folder's card says, or half of what the model can read, at most 512.

    Raises:
        ModelError: the folder holds no decoder that writes text, or one that cannot write as much.
    """
    _check_config(folder)
    model = load_causal_lm(folder, device).eval()
    broken = next((name for name, weights in model.named_parameters() if not weights.isfinite().all()), None)
    if broken:
        raise ModelError(f"{folder}: {broken} is not finite, so the model writes nothing; its training diverged")
    ours = Path(folder, CARD).exists()
    whole = load_codec(folder) if ours else _whole_codec(model, load_tokenizer(folder))
    fit_to_tokenizer(model, whole.tokenizer)
    codec = _codec(folder, model, whole, max_new_tokens or whole.max_reply_tokens)
    notes: list[str] = []
    if not ours or codec.max_prompt_tokens < whole.max_prompt_tokens:
        notes.append(
            f"{folder}: a conversation keeps its last {codec.max_prompt_tokens:,} tokens, "
            f"replies have {codec.max_reply_tokens:,} at most"
        )
    if not ours and codec.tokenizer.chat_template == CHAT_TEMPLATE:
        notes.append(f"{folder} has no chat template: turns are written as <|user|>...<|assistant|>...")
    return Policy(model, codec, (codec.eos,) if ours else _ends(model, codec), tuple(notes))


def _check_config(folder: str | Path) -> None:
    """Raise ModelError for what transformers would load without a word, but with a head that nobody trained."""
    classes: list[str] = read_config(folder).architectures or []
    if any(name.endswith(_REWARD_HEAD) for name in classes):
        raise ModelError(f"{folder} is a reward model, which writes nothing; give a policy, and this one as the reward model")
    if not any(name.endswith(_HEADS) for name in classes):
        raise ModelError(
            f"{folder} is no language model: it holds a {', '.join(classes) or 'model of no known class'}, not a …{_HEADS[0]}"
        )


def _whole_codec(model: Any, tokenizer: PreTrainedTokenizerBase) -> Codec:
    """All that a model can read, where no card says what it was trained on."""
    most = most_tokens(tokenizer, model.config, _LONGEST)
    return Codec(tokenizer, most, max(1, min(_LONGEST_REPLY, most // 2)))


def _codec(folder: str | Path, model: Any, whole: Codec, reply: int) -> Codec:
    """A codec for replies of so many tokens, and for as much of the conversation as the model can read besides."""
    most = most_tokens(whole.tokenizer, model.config, whole.max_prompt_tokens + reply)
    if reply >= most:
        raise ModelError(f"{folder}: the model reads {most:,} tokens, so a reply can have {most - 1:,} at most, not {reply:,}")
    return Codec(whole.tokenizer, min(whole.max_prompt_tokens, most - reply), reply)


def _ends(model: Any, codec: Codec) -> tuple[int, ...]:
    """What ends a reply of a model that others made: often not end-of-sequence, but what its template writes behind a turn."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = {codec.eos, *([declared] if isinstance(declared, int) else declared or [])}
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        rendered = str(codec.tokenizer.apply_chat_template(said, tokenize=False))
    except TemplateError:
        rendered = ""
    ids: Any = codec.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    usual = next((token for token in reversed(ids) if token in ends), codec.eos)
    return (usual, *(ends - {usual}))

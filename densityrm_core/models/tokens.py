"""Text -> token ids: one way for training, scoring, rollout and serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

# For tokenizers without a chat template of their own
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Codec:
    """The only place where text becomes ids and ids become text.

    A context is rendered by the tokenizer's chat template up to the point where the assistant speaks; a reply is tokenized on
    its own and closed by end-of-sequence. What is too long loses the beginning of its context and the end of its reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_reply_tokens: int) -> None:
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            raise ValueError("the tokenizer needs an end-of-sequence token and a padding token of its own")
        self.tokenizer = tokenizer
        self.max_prompt_tokens, self.max_reply_tokens = max_prompt_tokens, max_reply_tokens
        self.eos, self.pad = _id(tokenizer.eos_token_id), _id(tokenizer.pad_token_id)
        self.truncated = 0

    def prompt(self, context: Sequence[Message]) -> list[int]:
        """Ids of a context, its last `max_prompt_tokens`."""
        text = self.tokenizer.apply_chat_template([dict(turn) for turn in context], tokenize=False, add_generation_prompt=True)
        ids = self._encode(str(text))
        self.truncated += len(ids) > self.max_prompt_tokens
        return ids[-self.max_prompt_tokens :]

    def reply(self, text: str) -> list[int]:
        """Ids of a reply, at most `max_reply_tokens` of them, the last always end-of-sequence."""
        ids = self._encode(text)
        self.truncated += len(ids) >= self.max_reply_tokens
        return self.closed(ids)

    def closed(self, ids: Sequence[int]) -> list[int]:
        """A reply's ids, at most `max_reply_tokens` of them, closed by end-of-sequence if they are not."""
        written = ids[:-1] if ids and ids[-1] == self.eos else ids
        return [*written[: self.max_reply_tokens - 1], self.eos]

    def text(self, ids: Sequence[int]) -> str:
        """Text of the ids of a reply, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False)
        return list(encoded["input_ids"])


def _id(token: Any) -> int:
    return int(token)

"""What every source shares: pairs, rejects and their reasons, and the reading of one raw row's fields."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast


class SourceError(ValueError):
    """A source cannot be read as configured; the message names the file, the row and what to do."""


class Reason(NamedTuple):
    meaning: str
    malformed: bool = False
    label: str = ""  # put before the detail where the detail alone does not say what happened


REASONS = {
    "broken_json": Reason("the row is not one JSON object in valid UTF-8", malformed=True, label="broken JSON: "),
    "missing_column": Reason("a required field is absent", malformed=True),
    "wrong_type": Reason("a field has another type than the format promises", malformed=True),
    "bad_turn_order": Reason("the context does not run from a user turn to a user turn, or no reply ends the conversation"),
    "contexts_differ": Reason("the two conversations part before the last reply"),
    "empty_prompt": Reason("the first user turn has no text"),
    "empty_reply": Reason("a reply has no text"),
    "identical_replies": Reason("both replies are the same text"),
    "tied_scores": Reason("both replies have the same score"),
    "equal_scores": Reason("answers of equal score: neither is preferred"),
    "over_question_cap": Reason("the question has more answer pairs than `max_pairs_per_question`"),
    "too_few_answers": Reason("the question has fewer than two answers"),
}


class MalformedError(Exception):
    """A raw row breaks its format."""

    def __init__(self, reason: Literal["broken_json", "missing_column", "wrong_type"], detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Turn(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """One preference. `context` is oldest first and ends with the user; texts are stripped."""

    context: tuple[Turn, ...]
    chosen: str
    rejected: str
    score_chosen: float | None = None
    score_rejected: float | None = None

    @property
    def prompt(self) -> str:
        return first_user_text(self.context)


@dataclass(frozen=True)
class Reject:
    """What could not become a pair. `raw` is the row as read unless a shorter text identifies it."""

    reason: str
    detail: str
    pairs: int = 1
    raw: str | None = None


_NAMESPACE = uuid.UUID("5f0c7d0a-6f0e-5c57-9a35-2f6d1f2b8a11")
_LONE_SURROGATE_OR_NUL = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
_FLOAT32_MAX = 3.4028234e38


def pair_id(pair: Pair) -> str:
    """uuid5 of context, chosen and rejected: the same content has the same id."""
    content = [[list(turn) for turn in pair.context], pair.chosen, pair.rejected]
    return str(uuid.uuid5(_NAMESPACE, json.dumps(content, ensure_ascii=False)))


def comparison_key(pair: Pair) -> int:
    """64 bits that two pairs share if they compare the same replies to the same context, whichever was preferred."""
    content = [[list(turn) for turn in pair.context], *sorted((pair.chosen, pair.rejected))]
    return int.from_bytes(hashlib.blake2b(json.dumps(content, ensure_ascii=False).encode(), digest_size=8).digest())


def prompt_id(prompt: str) -> str:
    """First 16 hex digits of the MD5 of the prompt's UTF-8 bytes."""
    return hashlib.md5(prompt.encode(), usedforsecurity=False).hexdigest()[:16]


def first_user_text(context: tuple[Turn, ...]) -> str:
    return next((turn.content for turn in context if turn.role == "user"), "")


def context_fault(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> Reject | None:
    """Why two conversations share no usable context, or None. Precedence: order, difference, prompt."""
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1].role != "assistant":
            return Reject("bad_turn_order", f"{side} does not end with a reply")
    context, other = chosen[:-1], rejected[:-1]
    if context != other:
        same = next((i for i, (a, b) in enumerate(zip(context, other, strict=False)) if a != b), min(len(context), len(other)))
        return Reject("contexts_differ", f"the conversations differ from turn {same + 1} on")
    if not context or context[0].role != "user" or context[-1].role != "user":
        return Reject("bad_turn_order", "the context must start and end with the user: " + " ".join(t.role for t in context))
    return None if first_user_text(context) else Reject("empty_prompt", "the first user turn has no text")


def reply_fault(chosen: str, rejected: str) -> Reject | None:
    """Why two replies make no preference, or None."""
    empty = [side for side, text in (("chosen", chosen), ("rejected", rejected)) if not text]
    if empty:
        return Reject("empty_reply", " and ".join(empty) + (" has" if len(empty) == 1 else " have") + " no text")
    return Reject("identical_replies", "chosen and rejected are the same text") if chosen == rejected else None


def decode(line: bytes) -> dict[str, Any]:
    """One JSON object from one line. Raises MalformedError."""
    try:
        text = line.decode()
        row = json.loads(text)
        if _LONE_SURROGATE_OR_NUL.search(text):
            check_text(json.dumps(row, ensure_ascii=False))
    except UnicodeDecodeError as error:
        raise MalformedError("broken_json", f"invalid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise MalformedError("broken_json", "nested too deeply") from None
    except ValueError as error:
        raise MalformedError("broken_json", str(error)) from None
    if not isinstance(row, dict):
        raise MalformedError("wrong_type", f"the row must be an object, not {_kind(row)}")
    return cast(dict[str, Any], row)


def check_text(text: str) -> None:
    r"""Raise MalformedError where the JSON text holds what no UTF-8 table can store: a lone surrogate or an escaped NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedError("broken_json", "a \\u escape is half of a surrogate pair") from None
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise MalformedError("broken_json", "a text holds a NUL character")


def text_field(row: dict[str, Any], name: str, where: str = "") -> str:
    """Stripped text of a required field. Raises MalformedError."""
    value = _required(row, name, where)
    if not isinstance(value, str):
        raise MalformedError("wrong_type", f"'{where}{name}' must be a text, not {_kind(value)}")
    return value.strip()


def number_field(row: dict[str, Any], name: str, where: str = "") -> float:
    """A required finite number that fits a float32. Raises MalformedError."""
    value = _required(row, name, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MalformedError("wrong_type", f"'{where}{name}' must be a number, not {_kind(value)}")
    if not abs(value) <= _FLOAT32_MAX:  # NaN too
        raise MalformedError("wrong_type", f"'{where}{name}' must be a finite number of float32 size")
    return float(value)


def objects_field(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A required list of objects. Raises MalformedError."""
    value = _required(row, name, "")
    if not isinstance(value, list):
        raise MalformedError("wrong_type", f"'{name}' must be a list, not {_kind(value)}")
    for i, item in enumerate(cast(list[Any], value)):
        if not isinstance(item, dict):
            raise MalformedError("wrong_type", f"'{name}[{i}]' must be an object, not {_kind(item)}")
    return cast(list[dict[str, Any]], value)


def _required(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise MalformedError("missing_column", f"column '{where}{name}' is missing")
    return row[name]


def _kind(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "str": "a text", "bool": "a truth value", "NoneType": "null"}
    return names.get(type(value).__name__, "a number" if isinstance(value, (int, float)) else type(value).__name__)

"""Rewards for rows of conversations: read one by one, scored in batches of tokens, given back in the order they came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from densityrm_core.models.packing import Group, tokens_of
from densityrm_core.reward_models.scoring import ConversationError, Scorer
from densityrm_core.sources.files import RawRow
from densityrm_core.sources.rows import REASONS, MalformedError, objects_field, text_field

_BATCH_TOKENS, _BATCH_ROWS = 32_768, 512  # what is held in memory at a time, whichever is reached first
_COLUMNS = ("reward", "reward_chosen", "reward_rejected", "margin", "error")


@dataclass
class Tally:
    """What became of the rows so far. `wins` counts pairs whose chosen reply scores higher, a tie as half."""

    rows: int = 0
    errors: int = 0
    pairs: int = 0
    wins: float = 0.0


@dataclass(frozen=True)
class _Row:
    """One row as it will be written; `group` is empty where there is nothing to score, and `fields` then say why."""

    origin: str
    fields: dict[str, Any]
    names: tuple[str, ...] = ()
    group: Group | None = None


def score_rows(rows: Iterable[RawRow], scorer: Scorer, tally: Tally) -> Iterator[dict[str, Any]]:
    """Every row with its rewards, in order and none left out; memory does not grow with their number.

    A row has `prompt`, a text (one user turn) or a list of {role, content}, and either `chosen` and `rejected`, and gets
    `reward_chosen`, `reward_rejected` and `margin`; or `response` (or `completion`), and gets `reward`. A reply is a text or a
    list of one assistant turn. An empty text is scored as it is. A row that cannot be scored gets `error`, its place and what is
    wrong, and, where it is no JSON object, its text as `raw`. Columns of an earlier scoring are replaced.

    Args:
        tally: counted up as rows are given back.
    """
    batch: list[_Row] = []
    size = 0
    for raw in rows:
        row = _read(raw, scorer)
        batch.append(row)
        size += tokens_of(row.group) if row.group else 0
        if size >= _BATCH_TOKENS or len(batch) == _BATCH_ROWS:
            yield from _scored(batch, scorer, tally)
            batch, size = [], 0
    yield from _scored(batch, scorer, tally)


def _scored(batch: list[_Row], scorer: Scorer, tally: Tally) -> Iterator[dict[str, Any]]:
    rewards = iter(scorer.rewards([row.group for row in batch if row.group]))
    for row in batch:
        fields = {**row.fields, **_columns(row, next(rewards))} if row.group else row.fields
        tally.rows += 1
        tally.errors += "error" in fields
        if "margin" in fields:
            tally.pairs += 1
            tally.wins += (fields["margin"] > 0) + 0.5 * (fields["margin"] == 0)
        yield fields


def _columns(row: _Row, rewards: list[float]) -> dict[str, Any]:
    if not all(map(math.isfinite, rewards)):
        return {"error": f"{row.origin}: the model's reward is not finite"}
    columns = dict(zip(row.names, rewards, strict=True))
    return columns | {"margin": rewards[0] - rewards[1]} if len(rewards) == 2 else columns


def _read(raw: RawRow, scorer: Scorer) -> _Row:
    fields: dict[str, Any] = {"raw": raw.text}
    try:
        fields = {name: value for name, value in raw.fields().items() if name not in _COLUMNS}
        context, replies = _context(fields), _replies(fields)
        return _Row(raw.origin, fields, tuple(replies), scorer.group(context, list(replies.values())))
    except MalformedError as error:
        fault = REASONS[error.reason].label + error.detail
    except ConversationError as error:
        fault = str(error)
    return _Row(raw.origin, {**fields, "error": f"{raw.origin}: {fault}"})


def _context(fields: dict[str, Any]) -> list[dict[str, str]]:
    if isinstance(fields.get("prompt"), list):
        turns = _turns(fields, "prompt")
        if not turns or turns[-1]["role"] == "assistant":
            raise MalformedError("wrong_type", "'prompt' must end with a turn that the reply answers")
        return turns
    return [{"role": "user", "content": _text(fields, "prompt")}]


def _replies(fields: dict[str, Any]) -> dict[str, str]:
    """Name of the reward -> reply."""
    if "chosen" in fields or "rejected" in fields:
        return {f"reward_{side}": _reply(fields, side) for side in ("chosen", "rejected")}
    name = next((name for name in ("response", "completion") if name in fields), None)
    if name is None:
        raise MalformedError("missing_column", "there is neither 'chosen' and 'rejected', nor 'response' (or 'completion')")
    return {"reward": _reply(fields, name)}


def _reply(fields: dict[str, Any], name: str) -> str:
    if not isinstance(fields.get(name), list):
        return _text(fields, name)
    turns = _turns(fields, name)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise MalformedError("wrong_type", f"'{name}' must be a text or one turn of the assistant")
    return turns[0]["content"]


def _turns(fields: dict[str, Any], name: str) -> list[dict[str, str]]:
    return [
        {key: _text(turn, key, f"{name}[{i}].") for key in ("role", "content")}
        for i, turn in enumerate(objects_field(fields, name))
    ]


def _text(fields: dict[str, Any], name: str, where: str = "") -> str:
    """A text as given, white space and all."""
    text_field(fields, name, where)
    return cast(str, fields[name])

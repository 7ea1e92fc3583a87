"""nanochat's `pairs_all.jsonl`: `prompt`, `chosen`, `rejected`; ours add `context` where a conversation came before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from densityrm_core.settings import SourceSettings
from densityrm_core.sources.rows import Pair, Reject, Turn, context_fault, number_field, objects_field, reply_fault, text_field

SRC = "nanochat"  # of rows that do not say where they come from
PAIRS_FILE = "pairs_all.jsonl"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FILES = re.compile(r"\.(jsonl(\.gz|\.zst)?|parquet)$|[*?\[]")


def parse(row: dict[str, Any], settings: SourceSettings) -> Iterator[Pair | Reject]:
    """The pair of one row, or why there is none. Precedence: context, tied scores, empty reply, identical replies.

    `context`, `score_chosen` and `score_rejected` may be absent or null. Newer files have the conversation as `prefix.messages`
    instead of `prompt`. Ids in the row are not read: content decides them.

    Raises:
        MalformedError: a column is missing or has another type.
    """
    context = _context(row)
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    scores = [None if row.get(name) is None else number_field(row, name) for name in ("score_chosen", "score_rejected")]
    fault = context_fault((*context, Turn("assistant", chosen)), (*context, Turn("assistant", rejected)))
    if not fault and "prompt" in row and context[0].content != text_field(row, "prompt"):
        fault = Reject("contexts_differ", "'prompt' is not the first turn of 'context'")
    if not fault and scores[0] is not None and scores[0] == scores[1]:
        fault = Reject("tied_scores", f"both score {scores[0]:g}")
    fault = fault or reply_fault(chosen, rejected)
    yield fault or Pair(context, chosen, rejected, *scores)


def source_of(row: dict[str, Any]) -> str:
    """The row's own `src` where that is a name of letters, digits, `_` and `-`, else "nanochat"."""
    src = row.get("src")
    return src if isinstance(src, str) and _NAME.fullmatch(src) else SRC


def pairs_file(path: str) -> str:
    """What to read of a path that names a nanochat folder (prompts_all.jsonl beside it holds no pairs), a file or a glob."""
    return path if _FILES.search(path) else f"{path.rstrip('/')}/{PAIRS_FILE}"


def _context(row: dict[str, Any]) -> tuple[Turn, ...]:
    prefix = row.get("prefix")
    if "prompt" not in row and isinstance(prefix, dict):
        return _turns(cast(dict[str, Any], prefix), "messages", "prefix.messages")
    prompt = text_field(row, "prompt")
    return (Turn("user", prompt),) if row.get("context") is None else _turns(row, "context", "context")


def _turns(row: dict[str, Any], name: str, where: str) -> tuple[Turn, ...]:
    return tuple(
        Turn(text_field(turn, "role", f"{where}[{i}]."), text_field(turn, "content", f"{where}[{i}]."))
        for i, turn in enumerate(objects_field(row, name))
    )

"""Anthropic HH-RLHF: `chosen` and `rejected` are whole transcripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from densityrm_core.settings import SourceSettings
from densityrm_core.sources.rows import Pair, Reject, Turn, context_fault, reply_fault, text_field

SRC = "hh"

_MARKER = re.compile(r"(?:\r?\n){2}(Human|Assistant):")  # without the blank line, "Human:" is text
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse(row: dict[str, Any], settings: SourceSettings) -> Iterator[Pair | Reject]:
    """The pair of one row, or why there is none: the turns before the last reply must be the same on both sides.

    Raises:
        MalformedError: a column is missing or no text.
    """
    chosen, rejected = (_turns(text_field(row, side)) for side in ("chosen", "rejected"))
    fault = context_fault(chosen, rejected) or reply_fault(chosen[-1].content, rejected[-1].content)
    yield fault or Pair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _turns(transcript: str) -> tuple[Turn, ...]:
    before, *parts = _MARKER.split("\n\n" + transcript)
    if before.strip():
        return ()
    return tuple(Turn(_ROLES[role], text.strip()) for role, text in zip(parts[::2], parts[1::2], strict=True))

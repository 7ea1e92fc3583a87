"""HuggingFaceH4 ultrafeedback_binarized: `chosen` and `rejected` are message lists, each with a score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from densityrm_core.settings import SourceSettings
from densityrm_core.sources.rows import Pair, Reject, Turn, context_fault, number_field, objects_field, reply_fault, text_field

SRC = "ultrafeedback"


def parse(row: dict[str, Any], settings: SourceSettings) -> Iterator[Pair | Reject]:
    """The pair of one row, or why there is none. Precedence: context, tied scores, empty reply, identical replies.

    Raises:
        MalformedError: a column is missing or has another type.
    """
    chosen, rejected = (_messages(row, side) for side in ("chosen", "rejected"))
    scores = number_field(row, "score_chosen"), number_field(row, "score_rejected")
    fault = context_fault(chosen, rejected)
    if not fault and scores[0] == scores[1]:
        fault = Reject("tied_scores", f"both score {scores[0]:g}")
    fault = fault or reply_fault(chosen[-1].content, rejected[-1].content)
    yield fault or Pair(chosen[:-1], chosen[-1].content, rejected[-1].content, *scores)


def _messages(row: dict[str, Any], side: str) -> tuple[Turn, ...]:
    return tuple(
        Turn(text_field(message, "role", f"{side}[{i}]."), text_field(message, "content", f"{side}[{i}]."))
        for i, message in enumerate(objects_field(row, side))
    )

"""Raw rows -> frames of pairs and rejects, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from densityrm_core.settings import SourceSettings
from densityrm_core.sources import hh_rlhf, nanochat_pairs, stack_exchange, ultrafeedback
from densityrm_core.sources.files import RawRow
from densityrm_core.sources.rows import REASONS, MalformedError, Pair, Reject, comparison_key, pair_id, prompt_id
from densityrm_core.tables import REJECTS, SOURCE_PAIRS

SourceName = Literal["hh_rlhf", "ultrafeedback", "stack_exchange", "nanochat"]

_Row = dict[str, Any]


@dataclass(frozen=True)
class _Format:
    """How the rows of a source are read, and what their pairs are called: `src`, or what the row itself says."""

    src: str
    parse: Callable[[_Row, Any], Iterator[Pair | Reject]]  # the row, and the settings of its source
    source_of: Callable[[_Row], str] | None = None


_FORMATS: dict[SourceName, _Format] = {
    "hh_rlhf": _Format(hh_rlhf.SRC, hh_rlhf.parse),
    "ultrafeedback": _Format(ultrafeedback.SRC, ultrafeedback.parse),
    "stack_exchange": _Format(stack_exchange.SRC, stack_exchange.parse),
    "nanochat": _Format(nanochat_pairs.SRC, nanochat_pairs.parse, nanochat_pairs.source_of),
}


@dataclass(frozen=True)
class Parsed:
    """What some raw rows gave. `candidates == pairs.height + rejects["pairs"].sum()`."""

    pairs: pl.DataFrame  # tables.SOURCE_PAIRS
    rejects: pl.DataFrame  # tables.REJECTS
    rows: int
    candidates: int
    malformed: int  # rows that break their format
    first_malformed: str  # row and reason of the first of them
    objects: int  # rows that at least begin as an object does


def parse_rows(name: SourceName, settings: SourceSettings, rows: Sequence[RawRow]) -> Parsed:
    """Every row as pairs and rejects; no row raises."""
    source = _FORMATS[name]
    pairs: list[dict[str, object]] = []
    rejects: list[dict[str, object]] = []
    candidates = malformed = objects = 0
    first = ""
    for raw in rows:
        src, items = _items(raw, source, settings)
        objects += raw.begins_as_object
        for item in items:
            if isinstance(item, Pair):
                candidates += 1
                pairs.append(pair_row(item, src, raw.origin))
            else:
                candidates += item.pairs
                rejects.append(_reject_row(item, src, raw))
                if REASONS[item.reason].malformed:
                    malformed += 1
                    first = first or f"{raw.origin.rpartition(':')[2]}: {REASONS[item.reason].label}{item.detail}"
    return Parsed(SOURCE_PAIRS.frame(pairs), REJECTS.frame(rejects), len(rows), candidates, malformed, first, objects)


def _items(raw: RawRow, source: _Format, settings: SourceSettings) -> tuple[str, list[Pair | Reject]]:
    src = source.src
    try:
        fields = raw.fields()
        src = source.source_of(fields) if source.source_of else src
        return src, list(source.parse(fields, settings))
    except MalformedError as error:
        return src, [Reject(error.reason, error.detail)]


def pair_row(pair: Pair, src: str, origin: str) -> dict[str, object]:
    """A pair as a row of tables.SOURCE_PAIRS."""
    return {
        "pair_id": pair_id(pair),
        "prompt_id": prompt_id(pair.prompt),
        "prompt": pair.prompt,
        "context": [turn._asdict() for turn in pair.context],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "score_chosen": pair.score_chosen,
        "score_rejected": pair.score_rejected,
        "src": src,
        "origin": origin,
        "comparison": comparison_key(pair),
    }


def _reject_row(reject: Reject, src: str, raw: RawRow) -> dict[str, object]:
    return {
        "src": src,
        "origin": raw.origin,
        "reason": reject.reason,
        "detail": reject.detail,
        "pairs": reject.pairs,
        "raw": raw.text if reject.raw is None else reject.raw,
    }

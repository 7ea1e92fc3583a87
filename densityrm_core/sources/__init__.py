"""Where preference pairs come from: raw rows of three data sets, or of the planted world, as canonical pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import polars as pl

from densityrm_core.experiment import PLANTED, PlantedSettings, SourceSettings
from densityrm_core.sources import hh_rlhf, stack_exchange, ultrafeedback
from densityrm_core.sources.files import RawRow, raw_rows
from densityrm_core.sources.planted import planted_file
from densityrm_core.sources.rows import REASONS, MalformedError, Pair, Reject, SourceError, pair_id, prompt_id
from densityrm_core.tables import REJECTS, SOURCE_PAIRS, Table

__all__ = ["REASONS", "SourceError", "SourceName", "SourceRead", "read_source"]

SourceName = Literal["hh_rlhf", "ultrafeedback", "stack_exchange"]

_SOURCES = {"hh_rlhf": hh_rlhf, "ultrafeedback": ultrafeedback, "stack_exchange": stack_exchange}
_CHUNK = 4096  # rows held as Python objects at a time


@dataclass(frozen=True)
class SourceRead:
    """What one source gave. `candidates == pairs.height + rejects["pairs"].sum()`."""

    pairs: pl.DataFrame
    rejects: pl.DataFrame
    rows_read: int
    candidates: int


def read_source(name: SourceName, settings: SourceSettings, planted: PlantedSettings, raw_dir: Path) -> SourceRead:
    """Every row of a source as canonical pairs and rejects.

    Args:
        raw_dir: where the planted rows are written, in the source's raw format, if `settings.path` is "planted".

    Raises:
        SourceError: the path names nothing readable, or more rows are malformed than `settings.max_malformed`.
    """
    if not settings.enabled:
        return SourceRead(SOURCE_PAIRS.empty(), REJECTS.empty(), 0, 0)
    source = _SOURCES[name]
    path = str(planted_file(name, planted, raw_dir)) if settings.path == PLANTED else settings.path
    pairs, rejects = _Frames(SOURCE_PAIRS), _Frames(REJECTS)
    malformed = _MalformedCount(f"sources.{name}.max_malformed", settings.max_malformed)
    rows_read = candidates = 0
    for raw in islice(raw_rows(path, f"sources.{name}.path"), settings.max_rows):
        rows_read += 1
        for item in _parsed(raw, source.parse, settings):
            if isinstance(item, Pair):
                candidates += 1
                pairs.add(_pair_row(item, source.SRC, raw.origin))
            else:
                candidates += item.pairs
                malformed.count(item, raw.origin)
                rejects.add(_reject_row(item, source.SRC, raw))
    malformed.check()
    return SourceRead(pairs.frame(), rejects.frame(), rows_read, candidates)


def _parsed(
    raw: RawRow, parse: Callable[[dict[str, Any], SourceSettings], Iterator[Pair | Reject]], settings: SourceSettings
) -> Iterable[Pair | Reject]:
    try:
        return list(parse(raw.fields(), settings))
    except MalformedError as error:
        return [Reject(error.reason, error.detail)]


def _pair_row(pair: Pair, src: str, origin: str) -> dict[str, object]:
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
    }


def _reject_row(reject: Reject, src: str, raw: RawRow) -> dict[str, object]:
    text = raw.text if reject.raw is None else reject.raw
    return {
        "src": src,
        "origin": raw.origin,
        "reason": reject.reason,
        "detail": reject.detail,
        "pairs": reject.pairs,
        "raw": text,
    }


class _MalformedCount:
    """Counts malformed rows and remembers the first."""

    def __init__(self, key: str, allowed: int) -> None:
        self.key, self.allowed, self.rows, self.first = key, allowed, 0, ""

    def count(self, reject: Reject, origin: str) -> None:
        if REASONS[reject.reason].malformed:
            label = "broken JSON: " if reject.reason == "broken_json" else ""
            self.first = self.first or f"{origin}: {label}{reject.detail}"
            self.rows += 1

    def check(self) -> None:
        if self.rows > self.allowed:
            raise SourceError(
                f"{self.first} (the first of {self.rows} malformed rows, {self.allowed} allowed). "
                f"Repair the file, or raise {self.key} to keep such rows as rejects."
            )


class _Frames:
    """Rows of a table, moved into frames chunk by chunk."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.rows: list[dict[str, object]] = []
        self.chunks: list[pl.DataFrame] = []

    def add(self, row: dict[str, object]) -> None:
        self.rows.append(row)
        if len(self.rows) >= _CHUNK:
            self._flush()

    def frame(self) -> pl.DataFrame:
        self._flush()
        return self.table.check(pl.concat(self.chunks))

    def _flush(self) -> None:
        self.chunks.append(self.table.frame(self.rows))
        self.rows = []

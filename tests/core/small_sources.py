"""Reading sources and making small ones, for tests."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from densityrm_core.pairs.selection import Taken
from densityrm_core.settings import NanochatSettings, PlantedSettings, SourceSettings, StackExchangeSettings
from densityrm_core.sources import Folders, SourceName, read_source
from densityrm_core.sources.parsing import pair_row
from densityrm_core.sources.rows import Pair, Turn
from densityrm_core.storage import write_frame
from densityrm_core.tables import SOURCE_PAIRS

SETTINGS: dict[str, type[SourceSettings]] = {"stack_exchange": StackExchangeSettings, "nanochat": NanochatSettings}


@dataclass(frozen=True)
class Read:
    """A source in memory."""

    pairs: pl.DataFrame
    rejects: pl.DataFrame
    rows_read: int
    candidates: int
    reasons: dict[str, int]


def read(name: SourceName, path: object, planted: PlantedSettings | None = None, **settings: Any) -> Read:
    """A source read into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        wanted = SETTINGS.get(name, SourceSettings)(**{"path": str(path), "enabled": True, **settings})
        source = read_source(name, wanted, planted or PlantedSettings(), Folders(out, out / "raw", out / "shards"))
        return Read(source.pairs.frame(), source.rejects.frame(), source.rows_read, source.candidates, source.reasons)


def source(
    folder: Path, *rows: tuple[str, str, str], src: str = "hh", scores: tuple[float, float] | None = None, **taken: float
) -> Taken:
    """A stored source of (prompt, chosen, rejected) rows."""
    pairs = [Pair((Turn("user", prompt),), chosen, rejected, *(scores or ())) for prompt, chosen, rejected in rows]
    frame = SOURCE_PAIRS.frame([pair_row(pair, src, f"file:{i}") for i, pair in enumerate(pairs, start=1)])
    path = folder / f"{src}.{len(list(folder.glob('*.parquet')))}.parquet"
    return Taken(write_frame(frame, path, SOURCE_PAIRS).path, **taken)

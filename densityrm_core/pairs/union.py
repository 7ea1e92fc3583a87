"""Pairs of all sources -> one table: what the experiment takes, exact duplicates and ties out, split by prompt.

Two passes over the sources: the first one keeps a few 64-bit keys of every row, the second one writes the rows. Memory grows by
some 50 bytes a pair and, where near-duplicates are looked for, 150 bytes a prompt; the texts stay on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arrays import id_keys, key_ids, same_key
from densityrm_core.pairs.prompts import PromptIndex, PromptKeys, collided
from densityrm_core.pairs.selection import CODES, KEPT, LEFT_OUT, Codes, Keys, Taken, apply_knobs, cap_prompts, vote
from densityrm_core.pairs.splits import HELD_OUT, SPLITS, Grouping, group_prompts, known_clusters, splits_of
from densityrm_core.settings import PairsSettings, SplitSettings
from densityrm_core.storage import Stored, batches, table_writer
from densityrm_core.tables import PREFERENCE_PAIRS, REJECTS, SOURCE_PAIRS

Say = Callable[[str], None]


class PairsError(ValueError):
    """The pairs do not make an experiment."""


@dataclass(frozen=True)
class Union:
    """`pairs` per tables.PREFERENCE_PAIRS, `rejects` per tables.REJECTS; `read == pairs.rows + rejects.rows`."""

    pairs: Stored
    rejects: Stored
    read: int
    reasons: dict[str, int]  # rejects behind each reason
    prompts: int
    grouping: Grouping
    splits: pl.DataFrame  # split, pairs, prompts
    shared: dict[tuple[str, ...], int]  # prompts that exactly these sources have in common


def unite_pairs(
    sources: Sequence[Taken],
    settings: PairsSettings,
    splits: SplitSettings,
    out: Path,
    previous: Path | None = None,
    say: Say = lambda text: None,
) -> Union:
    """Write `out`/pairs.parquet and `out`/rejects.parquet: one row for each distinct comparison, each with its split.

    Two rows compare the same thing if context and the set of replies agree. The reply preferred more often wins and the first
    such row is kept; where both are preferred equally often all rows are rejected (selection.LEFT_OUT has all reasons).

    Args:
        previous: the table of pairs that this one will replace: its prompts keep their clusters, and so their splits.
        say: hears of progress, a line at a time.

    Raises:
        PromptError: two different prompts share a 64-bit key or an id; the message names both.
    """
    rows = _first_pass(sources, settings)
    say(f"{len(rows.status):,} pairs of {len(sources)} sources read")
    status = cap_prompts(vote(rows.status, rows.comparisons, rows.pairs), rows.prompts, settings.max_pairs_per_prompt)
    taken = np.flatnonzero(status == KEPT)
    index, collision = rows.texts.index(taken)
    if len(collision):
        raise collided(*(_prompt_at(sources, row) for row in taken[collision]))
    first = taken[index.first]
    collision = same_key(rows.prompts[first])
    if len(collision):
        raise collided(*(_prompt_at(sources, row) for row in first[collision]))
    say(f"{len(taken):,} pairs of {len(first):,} prompts are left")
    known = known_clusters(previous, splits) if previous and previous.exists() else None
    grouping = group_prompts(_prompts_at(sources, first), rows.prompts[first], splits, known, say)
    del rows
    return _second_pass(sources, status, index, grouping, splits, out)


def require_splits(union: Union, splits: Sequence[str], settings: SplitSettings) -> None:
    """Raise PairsError if one of `splits` has no pair: everything downstream would fail less clearly."""
    counts = dict(union.splits.select("split", "pairs").iter_rows())
    empty = [split for split in splits if not counts.get(split)]
    if empty:
        shares = ", ".join(f"splits.{name} ({getattr(settings, name):g})" for name in HELD_OUT)
        raise PairsError(
            f"{union.pairs.rows:,} pairs of {union.prompts:,} prompts leave the split {empty[0]!r} empty: "
            f"read more rows, or change the shares {shares}"
        )


@dataclass(frozen=True)
class _Rows:
    """What is kept of every row, all of shape (rows,)."""

    status: Codes
    comparisons: Keys
    pairs: Keys
    prompts: Keys  # ids
    texts: PromptKeys


def _first_pass(sources: Sequence[Taken], settings: PairsSettings) -> _Rows:
    columns = ["comparison", "pair_id", "prompt_id", "prompt", "score_chosen", "score_rejected"]
    status = [np.zeros(0, dtype=np.uint8)]
    comparisons, pairs, prompts = ([np.zeros(0, dtype=np.uint64)] for _ in range(3))
    texts = PromptKeys()
    for source in sources:
        for batch in batches(source.path, columns):
            ids = id_keys(batch["prompt_id"])
            status.append(apply_knobs(batch, ids, source, settings))
            comparisons.append(batch["comparison"].to_numpy())
            pairs.append(id_keys(batch["pair_id"].str.replace_all("-", "", literal=True).str.slice(0, 16)))
            prompts.append(ids)
            texts.add(batch["prompt"])
    return _Rows(np.concatenate(status), np.concatenate(comparisons), np.concatenate(pairs), np.concatenate(prompts), texts)


def _prompts_at(sources: Sequence[Taken], rows: npt.NDArray[np.int64]) -> Iterator[pl.Series]:
    """Prompts of ascending `rows`, a batch at a time."""
    offset = 0
    for source in sources:
        for batch in batches(source.path, ["prompt"]):
            start, end = np.searchsorted(rows, (offset, offset + batch.height))
            if start < end:
                yield batch["prompt"].gather(rows[start:end] - offset)
            offset += batch.height


def _prompt_at(sources: Sequence[Taken], row: np.int64) -> str:
    return next(_prompts_at(sources, np.array([row])))[0]


def _second_pass(
    sources: Sequence[Taken], status: Codes, index: PromptIndex, grouping: Grouping, splits: SplitSettings, out: Path
) -> Union:
    split = splits_of(grouping.clusters, splits)
    shared = _Shared(len(index.first))
    done = kept_before = 0
    with (
        table_writer(out / "pairs.parquet", PREFERENCE_PAIRS, grouping.metadata) as pairs,
        table_writer(out / "rejects.parquet", REJECTS) as rejects,
    ):
        for source in sources:
            for batch in batches(source.path, SOURCE_PAIRS.schema.names()):
                codes = status[done : (done := done + batch.height)]
                kept = batch.filter(codes == KEPT)
                prompt = index.of_row[kept_before : (kept_before := kept_before + kept.height)]
                shared.add(kept["src"], prompt)
                pairs.write(
                    kept.drop("comparison").with_columns(
                        pl.Series("prompt_index", prompt, pl.UInt32()),
                        key_ids(grouping.clusters[prompt]).alias("cluster"),
                        pl.Series("split", [SPLITS[code] for code in split[prompt]], pl.String()),
                    )
                )
                rejects.write(_as_rejects(batch.filter(codes != KEPT), codes[codes != KEPT]))
    counts = np.bincount(status, minlength=len(LEFT_OUT) + 1)
    return Union(
        pairs=pairs.stored,
        rejects=rejects.stored,
        read=len(status),
        reasons={reason: int(counts[code]) for reason, code in CODES.items() if counts[code]},
        prompts=len(index.first),
        grouping=grouping,
        splits=_split_counts(split, index.counts),
        shared=shared.counts(),
    )


def _as_rejects(rows: pl.DataFrame, codes: Codes) -> pl.DataFrame:
    names = ["", *LEFT_OUT]
    return rows.select(
        "src",
        "origin",
        pl.Series("reason", [names[code] for code in codes], pl.String()),
        pl.format("pair {}", "pair_id").alias("detail"),
        pl.lit(1, pl.Int64).alias("pairs"),
        pl.struct("context", "chosen", "rejected").struct.json_encode().alias("raw"),
    )


def _split_counts(split: Codes, pairs: npt.NDArray[np.int64]) -> pl.DataFrame:
    prompts, total = np.bincount(split, minlength=len(SPLITS)), np.bincount(split, pairs, len(SPLITS)).astype(np.int64)
    return pl.DataFrame({"split": SPLITS, "pairs": total, "prompts": prompts}).sort("split")


class _Shared:
    """Which sources have which prompt."""

    def __init__(self, prompts: int) -> None:
        self._names: list[str] = []
        self._masks = np.zeros(prompts, dtype=np.uint64)

    def add(self, src: pl.Series, prompt: npt.NDArray[np.uint32]) -> None:
        for name in src.unique().sort():
            if name not in self._names:
                self._names.append(name)
            self._masks[prompt[(src == name).to_numpy()]] |= np.uint64(1 << self._names.index(name))

    def counts(self) -> dict[tuple[str, ...], int]:
        """Prompts by the set of sources they are in, largest set first."""
        masks, counts = np.unique(self._masks, return_counts=True)
        sets = {
            tuple(sorted(name for bit, name in enumerate(self._names) if int(mask) >> bit & 1)): int(count)
            for mask, count in zip(masks, counts, strict=True)
        }
        return dict(sorted(sets.items(), key=lambda item: (-len(item[0]), item[0])))

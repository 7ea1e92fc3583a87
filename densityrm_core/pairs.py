"""Canonical pairs of all sources -> one table: exact duplicates and ties out, split by prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from densityrm_core import tables
from densityrm_core.experiment import SplitSettings
from densityrm_core.streams import unit_interval


class PairsError(ValueError):
    """The pairs do not make an experiment."""


@dataclass(frozen=True)
class Union:
    """`pairs` per tables.PREFERENCE_PAIRS, `rejects` per tables.REJECTS; their sum is the number of pairs read."""

    pairs: pl.DataFrame
    rejects: pl.DataFrame
    read: int


def unite_pairs(sources: list[pl.DataFrame], splits: SplitSettings) -> Union:
    """Union of source tables (tables.SOURCE_PAIRS): one row for each distinct comparison, each with its split.

    Two rows compare the same thing if context and the set of replies agree. The reply preferred more often wins and the first
    such row is kept (`duplicate_pair` for the others); where both are preferred equally often the comparison is a tie and all
    its rows are rejected (`contradictory_pair`).
    """
    every = pl.concat(sources).with_row_index("row")
    swapped = pl.col("chosen") > pl.col("rejected")
    ballots = every.with_columns(
        swapped.alias("swapped"),
        pl.col("context").map_elements(_context_key, pl.String).alias("context_key"),
        pl.min_horizontal("chosen", "rejected").alias("first"),
        pl.max_horizontal("chosen", "rejected").alias("second"),
    ).with_columns(pl.when("swapped").then(1).otherwise(-1).sum().over("context_key", "first", "second").alias("balance"))
    wins = pl.col("swapped") == (pl.col("balance") > 0)
    ranked = ballots.with_columns(
        (wins & (pl.col("balance") != 0)).alias("wins"),
    ).with_columns(pl.col("row").filter(pl.col("wins")).min().over("context_key", "first", "second").alias("kept"))
    tied = pl.col("balance") == 0
    kept = ranked.filter((pl.col("row") == pl.col("kept")) & ~tied).sort("row")
    dropped = ranked.filter((pl.col("row") != pl.col("kept")).fill_null(True) | tied).sort("row")
    return Union(
        pairs=with_split(kept.select(tables.SOURCE_PAIRS.schema.names()), splits),
        rejects=dropped.select(
            "src",
            "origin",
            pl.when(tied).then(pl.lit("contradictory_pair")).otherwise(pl.lit("duplicate_pair")).alias("reason"),
            pl.format("pair {}", "pair_id").alias("detail"),
            pl.lit(1, pl.Int64).alias("pairs"),
            pl.struct("context", "chosen", "rejected").struct.json_encode().alias("raw"),
        ),
        read=every.height,
    )


def require_splits(pairs: pl.DataFrame, splits: Sequence[str]) -> None:
    """Raise PairsError if one of `splits` has no pair: everything downstream would fail less clearly."""
    counts = dict(pairs.group_by("split").len().iter_rows())
    empty = [split for split in splits if not counts.get(split)]
    if empty:
        raise PairsError(
            f"{pairs.height} pairs of {pairs['prompt_id'].n_unique()} prompts leave the split {empty[0]!r} empty: "
            f"read more rows, or give it a larger share in splits.{empty[0]}"
        )


def with_split(pairs: pl.DataFrame, splits: SplitSettings) -> pl.DataFrame:
    """Append `split`: a pure function of the normalised prompt and the split seed, so that new rows never move old prompts."""
    prompts = pairs.select("prompt_id", "prompt").unique("prompt_id")
    split = [split_of(prompt, splits) for prompt in prompts["prompt"]]
    assigned = prompts.select("prompt_id").with_columns(pl.Series("split", split, pl.String))
    return pairs.join(assigned, on="prompt_id", how="left", maintain_order="left")


def split_of(prompt: str, splits: SplitSettings) -> str:
    """Split of a prompt. Prompts that differ only in case, punctuation or white space share it."""
    key = " ".join(re.findall(r"\w+", prompt.casefold())) or prompt
    position = unit_interval("split", splits.seed, key)
    for name, share in (("test", splits.test), ("validation", splits.validation), ("judge", splits.judge)):
        if position < share:
            return name
        position -= share
    return "train"


def _context_key(context: pl.Series) -> str:
    return json.dumps([[turn["role"], turn["content"]] for turn in context])

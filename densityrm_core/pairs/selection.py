"""Which pairs an experiment takes: the knobs, one answer for every comparison, and no prompt with too many pairs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from densityrm_core.arrays import Codes, Keys, runs
from densityrm_core.settings import PairsSettings
from densityrm_core.streams import unit_intervals

LEFT_OUT = {
    "long_prompt": "the prompt has more characters than pairs.max_prompt_chars",
    "small_score_gap": "the two scores lie closer than sources.<name>.min_score_gap",
    "source_weight": "sources.<name>.weight takes only a share of the source's prompts, and this is not one of them",
    "duplicate_pair": "the same comparison stands earlier, or more rows prefer the other reply",
    "contradictory_pair": "as many rows prefer the one reply as the other",
    "over_prompt_cap": "the prompt has pairs.max_pairs_per_prompt pairs already",
}
KEPT = 0
CODES = {reason: code for code, reason in enumerate(LEFT_OUT, start=1)}


class Taken(NamedTuple):
    """A source's table (tables.SOURCE_PAIRS) and what is taken of it."""

    path: Path
    weight: float = 1.0
    min_score_gap: float = 0.0


def apply_knobs(batch: pl.DataFrame, ids: Keys, source: Taken, settings: PairsSettings) -> Codes:
    """KEPT, or the code of the first of LEFT_OUT that holds, for every row of a batch of tables.SOURCE_PAIRS. Shape (rows,)."""
    status = np.zeros(batch.height, dtype=np.uint8)
    if source.weight < 1:
        status[unit_intervals(ids, 0, "source weight") >= source.weight] = CODES["source_weight"]
    if source.min_score_gap > 0:
        gap = (batch["score_chosen"] - batch["score_rejected"]).cast(pl.Float64).fill_null(np.inf).to_numpy()
        status[gap < source.min_score_gap] = CODES["small_score_gap"]
    if settings.max_prompt_chars is not None:
        status[batch["prompt"].str.len_chars().to_numpy() > settings.max_prompt_chars] = CODES["long_prompt"]
    return status


def vote(status: Codes, comparisons: Keys, pairs: Keys) -> Codes:
    """Status after every comparison has one answer, or none: rows are grouped by `comparisons`, agree if `pairs` are equal.

    The preference with more rows wins, and its first row stands for all (`duplicate_pair`); as many rows on both sides are a tie
    (`contradictory_pair`).
    """
    rows = np.flatnonzero(status == KEPT)
    order = rows[np.argsort(comparisons[rows], kind="stable")]
    starts, sizes = runs(comparisons[order])
    decided = status.copy()
    if not len(order):
        return decided
    as_first = pairs[order] == np.repeat(pairs[order[starts]], sizes)  # prefers what the first row of the comparison prefers
    votes = np.add.reduceat(as_first.astype(np.int64), starts)
    wins = as_first == np.repeat(2 * votes > sizes, sizes)
    first_winner = np.minimum.reduceat(np.where(wins, np.arange(len(order)), len(order)), starts)
    tied = 2 * votes == sizes
    decided[order] = CODES["duplicate_pair"]
    decided[order[np.repeat(tied, sizes)]] = CODES["contradictory_pair"]
    decided[order[first_winner[~tied]]] = KEPT
    return decided


def cap_prompts(status: Codes, ids: Keys, cap: int | None) -> Codes:
    """Status after no prompt has more than `cap` pairs, the first ones."""
    if cap is None:
        return status
    rows = np.flatnonzero(status == KEPT)
    order = rows[np.argsort(ids[rows], kind="stable")]
    starts, sizes = runs(ids[order])
    number = np.arange(len(order)) - np.repeat(starts, sizes)
    capped = status.copy()
    capped[order[number >= cap]] = CODES["over_prompt_cap"]
    return capped

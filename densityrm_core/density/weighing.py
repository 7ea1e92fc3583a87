"""Vectors -> density of every prompt among the training prompts -> sampling weights.

Density falls with distance and weight is inverse density, so weight grows with distance: the rarer, the heavier.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core import tables
from densityrm_core.arrays import Doubles, id_keys
from densityrm_core.density.collapse import Alike, OpenSearch, Sign, collapse, signatures_from
from densityrm_core.density.definitions import (
    BANDWIDTH,
    bandwidth_of,
    distances,
    log_density,
    needs_bandwidth,
    sample_for_bandwidth,
    stratum,
)
from densityrm_core.density.tempering import ESS_TOLERANCE, Tempered, temper_weights
from densityrm_core.settings import ComputeSettings, DensitySettings
from densityrm_core.storage import Stored, read_frame, table_writer
from densityrm_core.vectors.mapped import Halves, Rows, blocks, map_vectors, take
from densityrm_core.vectors.neighbors import Search, build_search

Say = Callable[[str], None]


class DensityError(ValueError):
    """No density or weight can be computed from what was given."""


@dataclass(frozen=True)
class Points:
    """Prompts as points: columns prompt_id, split, pairs of tables.PROMPTS, and their vectors (n, d) in the same order.

    truncated: whether the encoder saw only the beginning of a prompt, (n,).
    sign: signatures of the texts of ascending rows, asked for where prompts were truncated.
    """

    prompts: pl.DataFrame
    vectors: Halves
    truncated: npt.NDArray[np.bool_]
    sign: Sign


@dataclass(frozen=True)
class Weighing:
    """`table` per tables.DENSITY_WEIGHTS, and how it was made.

    groups: distinct training prompts, near-duplicates counted once; copies: training prompts whose vector another one has.
    neighbors: how many were used. bandwidth: of the kernel, where the definition has one.
    method, recall, seconds: of the search for neighbours.
    tempered: exponent and effective sample fraction reached.
    """

    table: pl.DataFrame
    tempered: Tempered
    groups: int
    copies: int
    neighbors: int
    bandwidth: float
    method: str
    recall: float
    seconds: float

    def target_missed(self, settings: DensitySettings) -> bool:
        """Whether the target effective sample fraction is out of reach."""
        aims = settings.definition != "original"
        return aims and abs(self.tempered.effective_fraction - settings.target_ess) > ESS_TOLERANCE


def read_points(prompts: Path, embeddings: Path, folder: Path) -> Points:
    """Points of a table of prompts and one of embeddings; the vectors are memory-mapped in `folder`.

    Raises:
        VectorsError: a prompt has no embedding.
    """
    frame = read_frame(prompts, ["prompt_id", "split", "pairs"])
    vectors, truncated = map_vectors(embeddings, id_keys(frame["prompt_id"]), folder / "vectors.npy")
    return Points(frame, vectors, truncated, signatures_from(prompts))


def weigh_prompts(
    points: Points, settings: DensitySettings, folder: Path, compute: ComputeSettings | None = None, say: Say = lambda _: None
) -> Weighing:
    """Density of every prompt among the training prompts, and the sampling weight of every training prompt.

    Near-duplicates are collapsed to one representative first and share its weight (not for the definition `original`). Prompts
    of the other splits are only measured: nothing of them enters a weight. Neither the order of prompts nor the size of blocks
    changes anything beyond rounding.

    Args:
        folder: for temporary arrays; nothing that grows with the number of prompts times neighbours is held in memory.
        say: receives a sentence at every stage.

    Raises:
        DensityError: fewer than two distinct training prompts, or a vector that is not finite.
    """
    compute = compute or ComputeSettings()
    _require_finite(points)
    train = np.flatnonzero((points.prompts["split"] == "train").to_numpy())
    if len(train) < 2:
        raise DensityError(f"the training split has {len(train)} prompts; density needs at least 2")
    open_search = _searching(settings, compute, say)
    keys, started = id_keys(points.prompts["prompt_id"]), time.monotonic()
    representative, copies = np.arange(len(points.vectors)), 0
    if settings.definition != "original":
        alike = Alike(settings.near_duplicate_cosine, settings.near_duplicate_jaccard, points.truncated, points.sign)
        groups = collapse(points.vectors, train, keys, alike, open_search, folder)
        representative, copies = groups.representative, groups.copies
    distinct = np.unique(representative[train])
    say(f"{len(train):,} training prompts in {len(distinct):,} groups")
    if len(distinct) < 2:
        raise DensityError("all training prompts are near-duplicates of one another; there is no density to weigh by")

    neighbors = min(settings.neighbors, len(distinct) - 1)
    search = open_search(take(points.vectors, distinct, folder / "distinct.npy"), neighbors)
    log_rho, bandwidth = _densities(points.vectors, train, distinct, keys, search, neighbors, settings)
    log_rho[train] = log_rho[representative[train]]  # a member is measured as its representative is
    seconds = time.monotonic() - started

    sizes = np.bincount(representative[train], minlength=len(representative))[representative[train]]
    tempered = temper_weights(log_rho[train], sizes, settings, points.prompts["pairs"].to_numpy()[train])
    table = _table(points.prompts, train, representative, log_rho, tempered.weights)
    return Weighing(table, tempered, len(distinct), copies, neighbors, bandwidth, search.method, search.recall, seconds)


def store_weights(weighing: Weighing, out: Path) -> Stored:
    """Write the table, with what is needed to measure a prompt that is not in it."""
    with table_writer(out, tables.DENSITY_WEIGHTS, {BANDWIDTH: repr(weighing.bandwidth)}) as writer:
        writer.write(weighing.table)
    return writer.stored


def _require_finite(points: Points) -> None:
    for part in blocks(len(points.vectors)):
        bad = ~np.isfinite(points.vectors[part]).all(axis=1)
        if bad.any():
            prompt = points.prompts["prompt_id"][part.start + int(bad.argmax())]
            raise DensityError(f"prompt {prompt}: its embedding is not finite; materialize prompt_embeddings again")


def _searching(settings: DensitySettings, compute: ComputeSettings, say: Say) -> OpenSearch:
    return partial(
        build_search,
        search=settings.search,
        recall=settings.recall,
        threads=compute.search_threads,
        max_memory=int(compute.max_memory_gib * 2**30),
        arithmetic=compute.search_arithmetic,
        say=say,
    )


def _densities(
    vectors: Halves,
    train: Rows,
    distinct: Rows,
    keys: npt.NDArray[np.uint64],
    search: Search,
    neighbors: int,
    settings: DensitySettings,
) -> tuple[Doubles, float]:
    """Log density of the distinct training prompts and of all prompts of other splits, (n,), NaN elsewhere; and the bandwidth."""

    def cosines(rows: Rows) -> npt.NDArray[np.float32]:
        place = np.minimum(np.searchsorted(distinct, rows), len(distinct) - 1)
        own = np.where(distinct[place] == rows, place, -1)
        return search.search(vectors[rows], neighbors, own)[0]

    bandwidth = 1.0
    if needs_bandwidth(settings):
        sample = distinct[sample_for_bandwidth(keys[distinct])]
        bandwidth = bandwidth_of(distances(cosines(sample))[:, -1])
    found = np.full(len(vectors), np.nan)
    asked = np.setdiff1d(np.arange(len(vectors)), np.setdiff1d(train, distinct, assume_unique=True), assume_unique=True)
    for part in blocks(len(asked)):
        found[asked[part]] = log_density(cosines(asked[part]), settings, bandwidth)
    return found, bandwidth


def _table(prompts: pl.DataFrame, train: Rows, representative: Rows, log_rho: Doubles, weights: Doubles) -> pl.DataFrame:
    weight = np.full(len(log_rho), np.nan)
    weight[train] = weights
    return tables.DENSITY_WEIGHTS.check(
        prompts.select(
            "prompt_id",
            "split",
            "pairs",
            pl.col("prompt_id").gather(representative).alias("group"),
            pl.Series("log_density", log_rho),
            pl.Series("density", np.exp(log_rho)),
            pl.Series("decile", stratum(log_rho, log_rho[train], 10)),
            pl.Series("quartile", stratum(log_rho, log_rho[train], 4)),
            pl.Series("weight", weight).fill_nan(None),
        )
    )

"""What a person wants to know of weights before training by them: numbers, warnings, who is rare, and the original beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from densityrm_core.arrays import Rows, id_keys
from densityrm_core.density.original import NEIGHBORS, checklist, original_weights
from densityrm_core.density.tempering import describe_weights, effective_fraction
from densityrm_core.density.weighing import Points, Weighing
from densityrm_core.settings import DensitySettings
from densityrm_core.storage import batches, rows_at

_EXTREMES = 20  # prompts shown at either end
_FAVOURITES = 10  # of each recipe
_COMPARED = 20_000  # prompts that the original's recipe is tried on
_MANY_COPIES, _DOMINANT, _MANY_TRUNCATED = 0.1, 0.8, 0.05
_PROMPTS_A_NEIGHBOR = 20  # fewer training prompts for each neighbour make density a mean over half the data
_STEEP = 100.0


@dataclass(frozen=True)
class DensityCard:
    """numbers: by name. warnings: sentences that say what to do. The rest are tables to show."""

    numbers: dict[str, float | int | str]
    warnings: list[str]
    rarest: pl.DataFrame
    commonest: pl.DataFrame
    by_source: pl.DataFrame
    checklist: pl.DataFrame
    agreement: str
    favourites: pl.DataFrame


def density_card(weighing: Weighing, points: Points, prompts: Path, settings: DensitySettings, threads: int = 2) -> DensityCard:
    """The card of weights; texts are read from `prompts` (tables.PROMPTS) for the rows that are shown only."""
    table = weighing.table
    train = np.flatnonzero((table["split"] == "train").to_numpy())
    by_source = _by_source(prompts, table)
    agreement, favourites = _beside_the_original(points, table, train, prompts, threads)
    return DensityCard(
        numbers=_numbers(weighing, points, train),
        warnings=find_warnings(weighing, points, by_source, settings),
        rarest=_extremes(table, train, prompts, rare=True),
        commonest=_extremes(table, train, prompts, rare=False),
        by_source=by_source,
        checklist=checklist(table["weight"].drop_nulls().to_numpy()),
        agreement=agreement,
        favourites=favourites,
    )


def find_warnings(weighing: Weighing, points: Points, by_source: pl.DataFrame, settings: DensitySettings) -> list[str]:
    """What is likely not as it should be, and the setting that changes it."""
    train = weighing.table.filter(pl.col("split") == "train")
    found: list[str] = []
    copied = 1 - weighing.groups / train.height
    if copied > _MANY_COPIES:
        found.append(
            f"{copied:.0%} of the training prompts are copies or near-duplicates of another ({weighing.copies:,} have the very "
            "same vector): they share its weight; density.near_duplicate_cosine says from where on, "
            "pairs.max_pairs_per_prompt keeps fewer"
        )
    if weighing.groups < _PROMPTS_A_NEIGHBOR * settings.neighbors:
        found.append(
            f"density.neighbors {settings.neighbors} is many for {weighing.groups:,} distinct training prompts: "
            f"{max(1, weighing.groups // _PROMPTS_A_NEIGHBOR)} would look at a neighbourhood, not at half of the data"
        )
    top = by_source.sort("share of draws", descending=True).row(0, named=True) if by_source.height > 1 else None
    if top and top["share of draws"] > _DOMINANT:
        found.append(
            f"{top['source']} gets {top['share of draws']:.0%} of the draws: sources.<name>.weight takes a smaller share of it"
        )
    if weighing.target_missed(settings):
        reached = weighing.tempered.effective_fraction
        found.append(
            f"density.target_ess {settings.target_ess:g} is out of reach: {reached:.3f} is the nearest that density.max_weight "
            f"{settings.max_weight:g}, density.mix {settings.mix:g} and the distances of these prompts allow"
        )
    if weighing.recall < settings.recall:
        found.append(f"the index finds {weighing.recall:.3f} of the neighbours, density.recall asks for {settings.recall:g}")
    if weighing.tempered.exponent > _STEEP:
        found.append(
            f"the exponent is {weighing.tempered.exponent:.0f}: densities hardly differ, so weights hang on small differences; "
            "raise density.target_ess"
        )
    if settings.definition == "original":
        found.append("density.definition original divides by the distance: it weighs common prompts up, not rare ones")
    elif weighing.tempered.exponent == 0:
        found.append(
            "all weights are equal: nothing is reweighted, because density.target_ess is 1 or all densities are the same"
        )
    truncated = float(points.truncated.mean()) if len(points.truncated) else 0.0
    if truncated > _MANY_TRUNCATED:
        found.append(f"{truncated:.0%} of the prompts were cut before they were embedded: raise embedding.max_tokens")
    return found


def _numbers(weighing: Weighing, points: Points, train: Rows) -> dict[str, float | int | str]:
    return {
        **describe_weights(weighing.table),
        "groups": weighing.groups,
        "exact_copies": weighing.copies,
        "exponent": weighing.tempered.exponent,
        "neighbors": weighing.neighbors,
        "search": weighing.method,
        "recall": weighing.recall,
        "search_seconds": round(weighing.seconds, 1),
        "truncated_prompts": int(points.truncated[train].sum()),
    }


def _extremes(table: pl.DataFrame, train: Rows, prompts: Path, rare: bool) -> pl.DataFrame:
    """The distinct training prompts at one end of the density, most extreme first."""
    distinct = pl.col("group") == pl.col("prompt_id")
    ranked = (
        table.with_row_index("row")
        .filter((pl.col("split") == "train") & distinct)
        .sort("log_density", "prompt_id", descending=[not rare, False])
        .head(_EXTREMES)
    )
    texts = rows_at(prompts, ranked["row"].cast(pl.Int64).to_numpy(), ["prompt", "sources"])
    return pl.DataFrame(
        {
            "times uniform": ranked["weight"] * len(train),
            "decile": ranked["decile"],
            "density": ranked["density"],
            "sources": texts["sources"].list.join(", "),
            "prompt_id": ranked["prompt_id"],
            "prompt": texts["prompt"],
        }
    )


def _by_source(prompts: Path, table: pl.DataFrame) -> pl.DataFrame:
    """Share of the training prompts and of the draws of each source; a prompt of several counts in equal parts for each."""
    parts: list[pl.DataFrame] = []
    start = 0
    for batch in batches(prompts, ["sources"]):
        weights = table[start : start + batch.height]["weight"]
        start += batch.height
        counted = batch.with_columns(weights, part=1 / pl.col("sources").list.len()).filter(pl.col("weight").is_not_null())
        parts.append(
            counted.explode("sources")
            .group_by("sources")
            .agg(pl.col("part").sum().alias("prompts"), (pl.col("weight") * pl.col("part")).sum().alias("draws"))
        )
    total = pl.concat(parts).group_by("sources").agg(pl.col("prompts").sum(), pl.col("draws").sum())
    return total.select(
        pl.col("sources").alias("source"),
        "prompts",
        (pl.col("prompts") / pl.col("prompts").sum()).alias("share of prompts"),
        pl.col("draws").alias("share of draws"),
        (pl.col("draws") / (pl.col("prompts") / pl.col("prompts").sum())).alias("times uniform"),
    ).sort("prompts", "source", descending=[True, False])


def _beside_the_original(
    points: Points, table: pl.DataFrame, train: Rows, prompts: Path, threads: int
) -> tuple[str, pl.DataFrame]:
    """A sentence, and the prompts that each recipe favours side by side."""
    keys = id_keys(table["prompt_id"])[train]
    some = np.sort(train[np.argsort(keys, kind="stable")[:_COMPARED]])
    theirs, ours = original_weights(points.vectors[some], NEIGHBORS, threads), table["weight"].gather(some).to_numpy()
    columns: dict[str, pl.Series] = {}
    for name, weights in (("the original", theirs), ("ours", ours)):
        best = np.argsort(-weights, kind="stable")[:_FAVOURITES]
        texts = rows_at(prompts, some[best], ["prompt"])["prompt"]
        columns[f"{name}: times uniform"] = pl.Series(weights[best] / weights.mean())
        columns[f"{name} favours"] = texts
    varied = len(some) > 2 and np.ptp(theirs) > 0 and np.ptp(ours) > 0
    correlation = cast(float, spearmanr(theirs, ours)[0]) if varied else float("nan")
    sample = f" on a sample of {len(some):,}" if len(some) < len(train) else ""
    sentence = (
        f"The first implementation called the mean distance to {NEIGHBORS} neighbours density and weighed by its inverse: "
        f"that favours common prompts. Rank correlation of its weights with ours{sample}: {correlation:+.2f}; effective sample "
        f"fraction {effective_fraction(theirs):.3f} (hardly any reweighting), ours {effective_fraction(ours):.3f}."
    )
    return sentence, pl.DataFrame(columns)

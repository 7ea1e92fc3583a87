"""Weights of prompts -> the density stratum and the weight of every pair, one meaning of a decile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from densityrm_core.storage import Stored, batches, table_writer
from densityrm_core.tables import PAIR_WEIGHTS


class StrataError(ValueError):
    """Pairs and weights do not belong together; the message names the pair and what to do."""


def weigh_pairs(pairs: Path, weights: pl.DataFrame, out: Path) -> Stored:
    """Write the stratum and the weight of every pair, in the order of the pairs: a prompt's pairs share its weight.

    Args:
        pairs: a file per tables.PREFERENCE_PAIRS.
        weights: tables.DENSITY_WEIGHTS, a row for each prompt in the order that `prompt_index` counts.

    Raises:
        StrataError: a pair's prompt is not where its index says, or a training pair's prompt has no weight.
    """
    share = (weights["weight"] / weights["pairs"]).alias("weight")
    total = (share * weights["pairs"]).sum()
    columns = weights.select("prompt_id", "decile", "quartile").with_columns(share / total)
    with table_writer(out, PAIR_WEIGHTS) as writer:
        for batch in batches(pairs, ["pair_id", "prompt_id", "prompt_index", "split"]):
            index = batch["prompt_index"].to_numpy().astype(np.int64)
            found = columns[np.minimum(index, max(columns.height - 1, 0))] if columns.height else columns.clear(batch.height)
            lost = (batch["split"] == "train") & found["weight"].is_null()
            stray = (found["prompt_id"] != batch["prompt_id"]).fill_null(value=True) | lost
            if stray.any():
                first = batch.row(int(stray.arg_max() or 0), named=True)
                raise StrataError(
                    f"pair {first['pair_id']}: its prompt {first['prompt_id']} has no weight; materialize density_weights again"
                )
            writer.write(batch.drop("prompt_index").hstack(found.drop("prompt_id")))
    return writer.stored


def draws_by_decile(pair_weights: pl.DataFrame) -> pl.DataFrame:
    """Share of the training pairs in each density decile, and share of the draws that go to it: columns decile, pairs, draws."""
    train = pair_weights.filter(pl.col("split") == "train")
    shares = train.group_by("decile").agg((pl.len() / train.height).alias("pairs"), pl.col("weight").sum().alias("draws"))
    return shares.sort("decile")

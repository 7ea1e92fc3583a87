"""Pairs -> unique prompts with their counts."""

from __future__ import annotations

import polars as pl

from densityrm_core import tables


class PromptError(ValueError):
    """The pairs contradict each other about a prompt."""


def unique_prompts(pairs: pl.DataFrame) -> pl.DataFrame:
    """Every prompt of `pairs` (tables.PREFERENCE_PAIRS) once, in order of first appearance, per tables.PROMPTS.

    Raises:
        PromptError: two different prompts share an id, or a prompt is in two splits; the message names both.
    """
    grouped = pairs.group_by("prompt_id", maintain_order=True).agg(
        pl.col("prompt").first(),
        pl.col("split").first(),
        pl.len().cast(pl.Int64).alias("pairs"),
        pl.col("src").unique().sort().alias("sources"),
        pl.col("prompt").unique().alias("texts"),
        pl.col("split").unique().sort().alias("splits"),
    )
    for row in grouped.filter((pl.col("texts").list.len() > 1) | (pl.col("splits").list.len() > 1)).iter_rows(named=True):
        if len(row["texts"]) > 1:
            raise PromptError(f"prompt_id {row['prompt_id']} stands for two prompts: {row['texts'][0]!r} and {row['texts'][1]!r}")
        raise PromptError(f"prompt {row['prompt_id']} is in the splits {' and '.join(row['splits'])}: {row['prompt']!r}")
    return grouped.select(tables.PROMPTS.schema.names())

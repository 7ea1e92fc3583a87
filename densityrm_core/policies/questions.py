"""What policies are asked: prompts to train on, prompts to be watched and examined on, and their ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from densityrm_core.arrays import id_keys
from densityrm_core.models.packing import Ids
from densityrm_core.models.tokens import Codec, Message
from densityrm_core.streams import unit_intervals


@dataclass(frozen=True)
class Questions:
    """The prompts that may be asked: their turns, and their ids as the policy reads them."""

    contexts: Sequence[Sequence[Message]]
    prompts: Sequence[Ids]


def read_questions(prompts: pl.DataFrame, codec: Codec) -> Questions:
    """The prompts of a frame with the column `context`, as a policy with this codec reads them."""
    contexts = prompts["context"].to_list()
    return Questions(contexts, [codec.prompt(context) for context in contexts])


def training_prompts(pairs: pl.DataFrame, weights: pl.DataFrame, by_density: bool) -> pl.DataFrame:
    """The training prompts a policy is asked: one context of each, in order of first appearance.

    Args:
        pairs: tables.PREFERENCE_PAIRS.
        weights: tables.DENSITY_WEIGHTS.
        by_density: whether `weight` is the prompt's density weight or the same for all.

    Returns:
        columns prompt_id, context, weight.
    """
    asked = (
        pairs.filter(pl.col("split") == "train")
        .unique("prompt_id", keep="first", maintain_order=True)
        .select("prompt_id", "context")
        .join(weights.select("prompt_id", "weight"), on="prompt_id", how="left", maintain_order="left")
    )
    if asked["weight"].null_count():
        raise ValueError(f"{asked['weight'].null_count()} training prompts have no weight; materialize density_weights again")
    return asked if by_density else asked.with_columns(weight=pl.lit(1 / asked.height))


def held_out_prompts(pairs: pl.DataFrame, weights: pl.DataFrame, count: int, split: str = "test") -> pl.DataFrame:
    """At most `count` prompts of a held-out split with a context each, the same for every arm and seed.

    Returns:
        columns prompt_id, prompt, context, decile, quartile.
    """
    chosen = pairs.filter(pl.col("split") == split).unique("prompt_id", keep="first", maintain_order=True)
    order = pl.Series("order", unit_intervals(id_keys(chosen["prompt_id"]), 0, "evaluation"))
    return (
        chosen.with_columns(order)
        .sort("order")
        .head(count)
        .join(weights.select("prompt_id", "decile", "quartile"), on="prompt_id", how="left", maintain_order="left")
        .select("prompt_id", "prompt", "context", "decile", "quartile")
    )

"""Rows of an evaluation on their way to a bootstrap, and its intervals on their way back into a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from densityrm_core.arrays import Doubles
from densityrm_core.measurement.bootstrap import Interval, bootstrap_mean

QUARTILES = {"all": (1, 2, 3, 4), "rare quartile": (1,), "common quartile": (4,)}  # quartiles of the density


def bootstrap_column(frame: pl.DataFrame, column: str, resamples: int, seed: int = 0) -> Interval:
    """`bootstrap_mean` of a column of a frame that has `seed` and `prompt_id`."""
    frame = frame.sort("seed", "prompt_id", column)  # float sums depend on the order of rows; the result must not
    return bootstrap_mean(frame[column], frame["seed"], frame["prompt_id"].rank("dense"), resamples, seed)


def bootstrap_strata(frame: pl.DataFrame, column: str, n: int) -> dict[str, Interval | None]:
    """`bootstrap_column` of every stratum of `QUARTILES`; None where it has no rows."""
    parts = {name: frame.filter(pl.col("quartile").is_in(quartiles)) for name, quartiles in QUARTILES.items()}
    return {name: bootstrap_column(part, column, n) if len(part) else None for name, part in parts.items()}


def reply_means(policies: pl.DataFrame) -> pl.DataFrame:
    """Means over the sampled completions of a prompt: one row a seed, policy and prompt."""
    keys = ("seed", "policy", "prompt_id", "quartile")
    means = pl.col("judge_reward", "own_reward", "kl", "tokens", "entropy").mean()
    return policies.filter(pl.col("sample") > 0).sort(*keys, "sample").group_by(*keys).agg(means).sort(keys)


def pair_models(rm: pl.DataFrame) -> pl.DataFrame:
    """Test pairs that both reward models scored in one seed, with `correct`, `uniform` and their `difference`."""
    test = rm.filter(pl.col("set") == "test")
    uniform = test.filter(pl.col("model") == "rm_uniform").select("seed", "pair_id", uniform="correct")
    density = test.filter(pl.col("model") == "rm_density")
    return density.join(uniform, on=["seed", "pair_id"]).with_columns(difference=pl.col("correct") - pl.col("uniform"))


def pair_policies(cells: pl.DataFrame, arm: str, reference: str) -> pl.DataFrame:
    """Prompts that both policies answered in one seed, with the `difference` of their judge rewards."""
    other = cells.filter(pl.col("policy") == reference)
    paired = cells.filter(pl.col("policy") == arm).join(
        other.select("seed", "prompt_id", reference="judge_reward"), on=["seed", "prompt_id"], how="left"
    )
    if reference == "base":  # every seed starts from the same base policy, so any seed's evaluation of it will do
        any_seed = other.group_by("prompt_id").agg(any_seed=pl.col("judge_reward").mean())
        paired = paired.join(any_seed, on="prompt_id", how="left").with_columns(pl.coalesce("reference", "any_seed"))
    return paired.drop_nulls("reference").with_columns(difference=pl.col("judge_reward") - pl.col("reference"))


def flat(values: Doubles, axes: int) -> Doubles:
    """The last `axes` axes as one."""
    return values.reshape(*values.shape[:-axes], -1)


def ends(interval: Interval) -> dict[str, float | None]:
    """The columns mean, low and high of an interval; null where it is undefined."""
    values = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """A frame of `columns` and those of `ends`."""
    schema = {**columns, **dict.fromkeys(("mean", "low", "high"), pl.Float64())}
    return pl.DataFrame(list(rows), schema=schema) if rows else pl.DataFrame(schema=schema)


def interval_of(measured: pl.DataFrame, **key: str) -> Interval | None:
    """The one row of `measured` with these values, as an interval; None if there is none, or if it is undefined."""
    row = measured.filter(**key)
    if row.is_empty() or row["mean"][0] is None:
        return None
    mean, low, high = row.select("mean", "low", "high").row(0)
    return Interval(mean, -np.inf if low is None else low, np.inf if high is None else high)

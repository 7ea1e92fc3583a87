"""Rows of RM_EVALUATION on their way to a bootstrap, and its intervals on their way back into a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from densityrm_core.arrays import Doubles
from densityrm_core.bootstrap import Bootstrap, Interval, Statistic, bootstrap_statistic

NAMES = {  # in the order in which they are shown
    "rm_uniform": "uniform RM",
    "rm_density": "density RM",
    "bag_of_words": "bag of words",
    "longer_reply": "longer reply",
    "shorter_reply": "shorter reply",
}

TEST_SPLIT = "test"  # the set that evaluations of reward models are about, unless said otherwise


class RowsError(ValueError):
    """Rows of an evaluation contradict each other; the message names the pair."""


def of_set(rows: pl.DataFrame, name: str = TEST_SPLIT) -> pl.DataFrame:
    """The rows of one set, the test split if not said otherwise, `checked`."""
    return checked(rows.filter(pl.col("set") == name))


def checked(rows: pl.DataFrame) -> pl.DataFrame:
    """`rows` in an order that depends on nothing but their content: float sums depend on it, and results must not.

    Raises:
        RowsError: a pair occurs twice for a seed, model and subset.
    """
    key = ("seed", "model", "set", "src", "pair_id")
    twice = rows.filter(pl.struct(key).is_duplicated())
    if len(twice):
        first = twice.row(0, named=True)
        raise RowsError(
            f"pair {first['pair_id']} occurs more than once for {first['model']}, seed {first['seed']}, set {first['set']}; "
            "count it once: pass the rows of one evaluation"
        )
    return rows.sort(key)


def models_of(rows: pl.DataFrame) -> list[str]:
    """The models of `rows`, in the order of NAMES."""
    order = list(NAMES)
    return sorted(set(rows["model"]), key=lambda model: (order.index(model) if model in order else len(order), model))


def model_slots(rows: pl.DataFrame) -> tuple[list[str], NDArray[np.int64]]:
    """The models of `rows`, and which of them each row belongs to, (rows,)."""
    models = models_of(rows)
    return models, rows["model"].replace_strict(models, range(len(models)), return_dtype=pl.Int64).to_numpy()


def resample(
    rows: pl.DataFrame,
    columns: Doubles,
    statistic: Statistic,
    resamples: int,
    slots: NDArray[np.int64] | int = 0,
    n_slots: int = 1,
) -> Bootstrap:
    """`bootstrap_statistic` over the seeds and prompts of `rows`."""
    prompts = rows["prompt_id"].rank("dense")
    return bootstrap_statistic(
        columns, rows["seed"], prompts, statistic, resamples, 0, np.broadcast_to(slots, len(rows)), n_slots
    )


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

"""Measurements of reward models as tables for a person: one row a model or stratum, every number with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from densityrm_core.measurement.frames import interval_of
from densityrm_core.measurement.reward_models import NAMES, models_of

COLUMNS = {
    "accuracy": "accuracy, %",
    "log_loss": "log-loss, nats",
    "margin": "margin",
    "ece": "ECE",
    "accuracy_shorter_better": "shorter is better, %",
    "accuracy_longer_better": "longer is better, %",
    "margin_length": "margin ~ length",
    "reward_length": "reward ~ length",
}
_PERCENT = ("accuracy", "accuracy_shorter_better", "accuracy_longer_better")
_SPECS = {"log_loss": ".3f", "ece": ".3f", "margin": ".2f", "margin_length": "+.2f", "reward_length": "+.2f"}


def overview(measured: pl.DataFrame, metrics: Sequence[str] = tuple(COLUMNS)) -> pl.DataFrame:
    """A row a model, a column a metric, over all test pairs. Reads measurement.reward_models.measure."""
    whole = measured.filter(by="all")
    rows = [
        {"model": NAMES.get(model, model), **{COLUMNS[m]: _shown(whole, m, model=model, metric=m) for m in metrics}}
        for model in models_of(whole)
    ]
    return _frame(rows, ("model", *(COLUMNS[m] for m in metrics)))


def by_stratum(measured: pl.DataFrame, by: str) -> pl.DataFrame:
    """Accuracy in %: a row a stratum of `by`, a column a model. Reads measurement.reward_models.measure."""
    part = measured.filter(by=by, metric="accuracy")
    models = models_of(part)
    rows = [
        {
            by: stratum,
            "pairs": f"{pairs:,}",
            **{NAMES.get(m, m): _shown(part, "accuracy", stratum=stratum, model=m) for m in models},
        }
        for stratum, pairs in part.group_by("stratum", maintain_order=True).agg(pl.col("pairs").max()).iter_rows()
    ]
    return _frame(rows, (by, "pairs", *(NAMES.get(m, m) for m in models)))


def alike(agreement: pl.DataFrame) -> pl.DataFrame:
    """A row for each two models: the share of pairs ranked alike, and kappa. Reads measurement.comparison.agreement."""
    keys = agreement.select("model", "other", "pairs").unique(maintain_order=True)
    rows = [
        {
            "models": f"{NAMES.get(model, model)}, {NAMES.get(other, other)}",
            "pairs": f"{pairs:,}",
            "ranked alike, %": _shown(agreement, "accuracy", model=model, other=other, metric="agreement"),
            "kappa of their errors": _shown(agreement, "margin_length", model=model, other=other, metric="kappa"),
        }
        for model, other, pairs in keys.iter_rows()
    ]
    return _frame(rows, ("models", "pairs", "ranked alike, %", "kappa of their errors"))


def sets(measured: pl.DataFrame) -> pl.DataFrame:
    """Accuracy in %: a row a set and subset, a column a model. Reads measurement.comparison.measure_sets.

    Where prompts have several pairs, a second row says of how many prompts every pair is ranked right.
    """
    models = models_of(measured)
    rows: list[dict[str, str]] = []
    for name, subset in measured.select("set", "subset").unique(maintain_order=True).iter_rows():
        part = measured.filter(set=name, subset=subset)
        accuracy, right = (part.filter(metric=metric) for metric in ("accuracy", "all_right"))
        shown = {"accuracy": accuracy} | (
            {} if accuracy["mean"].equals(right["mean"]) else {"all pairs of a prompt right": right}
        )
        for label, frame in shown.items():
            key = {"set": name, "subset": subset, "%": label, "pairs": f"{part['pairs'].max():,}"}
            rows.append(key | {NAMES.get(m, m): _shown(frame, "accuracy", model=m) for m in models})
    return _frame(rows, ("set", "subset", "%", "pairs", *(NAMES.get(m, m) for m in models)))


def _shown(measured: pl.DataFrame, like: str, **key: str) -> str:
    """The interval of a row, formatted as the metric `like`."""
    interval = interval_of(measured, **key)
    if interval is None:
        return "-"
    return format(interval.scaled(100), ".1f") if like in _PERCENT else format(interval, _SPECS[like])


def _frame(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=dict.fromkeys(columns, pl.String()))

"""What the report says of reward models: accuracy beside the baselines, calibration, length bias, agreement, further sets."""

from __future__ import annotations

import polars as pl

from densityrm_core.measurement.bootstrap import Interval
from densityrm_core.measurement.comparison import agreement, measure_sets
from densityrm_core.measurement.frames import QUARTILES, bootstrap_strata, interval_of, pair_models
from densityrm_core.measurement.reward_models import NAMES, RM_METRICS, measure, models_of, reliability
from densityrm_core.report import reward_model_plots, reward_model_tables
from densityrm_core.report.document import Drawing, Grid, Picture, Section, Text

_ROWS = {**NAMES, "difference": "density - uniform"}
_PICTURES = {
    "accuracy_by_decile.png": "Accuracy by density decile",
    "reliability.png": "Predicted probabilities, and how often they come true",
}
_BASELINES = (
    "Longer and shorter reply pick by length alone; bag of words is a logistic regression on the words of the two replies, "
    "fitted on the training split. A reward model that does not beat them has learned nothing of prompts."
)


def reward_model_section(rm: pl.DataFrame, n: int) -> Section:
    """The section on reward models, from rows of RM_EVALUATION that may lack any of them; `n` bootstrap resamples."""
    measured, alike, sets = measure(rm, n), agreement(rm, n), measure_sets(rm, n)
    accuracy, models = _accuracies(rm, n), models_of(measured)
    drawings: dict[str, Drawing] = {}
    if models:
        drawings["accuracy_by_decile.png"] = lambda: reward_model_plots.accuracy_by_decile(measured)
        drawings["reliability.png"] = lambda: reward_model_plots.reliability_diagram(reliability(rm, n), measured)
    table = {
        "accuracy": accuracy,
        "metrics": {m: {x: interval_of(measured, by="all", model=m, metric=x) for x in RM_METRICS} for m in models},
        "agreement": alike.to_dicts(),
        "sets": sets.to_dicts(),
    }
    blocks = (
        Text("Reward models", 2),
        _accuracy_grid(accuracy),
        *([Text(_BASELINES)] if set(models) - {"rm_uniform", "rm_density"} else []),
        *_grids(measured, alike, sets),
        *(Picture(name, caption) for name, caption in _PICTURES.items() if name in drawings),
    )
    return Section(blocks, table, drawings)


def _accuracies(rm: pl.DataFrame, n: int) -> dict[str, dict[str, Interval | None]]:
    """In per cent: both models, their paired difference, and whatever baselines there are."""
    test = rm.filter(pl.col("set") == "test")
    own = {m: bootstrap_strata(test.filter(pl.col("model") == m), "correct", n) for m in NAMES}
    rows = {m: own[m] for m in ("rm_uniform", "rm_density")}
    rows["difference"] = bootstrap_strata(pair_models(rm), "difference", n)
    rows |= {m: strata for m, strata in own.items() if m not in rows and any(strata.values())}
    return {row: {k: i.scaled(100) if i else None for k, i in strata.items()} for row, strata in rows.items()}


def _accuracy_grid(accuracy: dict[str, dict[str, Interval | None]]) -> Grid:
    rows = [
        (_ROWS[row], *("-" if i is None else format(i, "+.1f" if row == "difference" else ".1f") for i in strata.values()))
        for row, strata in accuracy.items()
    ]
    return Grid(("accuracy, % of test pairs [95 %]", *QUARTILES), tuple(rows))


def _grids(measured: pl.DataFrame, alike: pl.DataFrame, sets: pl.DataFrame) -> list[Grid]:
    """Calibration, length bias, agreement of the reward models with each other and with the baselines, and further sets."""
    with_rm = alike.filter(pl.col("model").is_in(["rm_uniform", "rm_density"]))
    tables = (
        reward_model_tables.overview(measured, ("log_loss", "ece", "margin")),
        reward_model_tables.overview(measured, ("accuracy_shorter_better", "accuracy_longer_better", "margin_length")),
        reward_model_tables.alike(with_rm),
        *(
            reward_model_tables.sets(sets.filter(model=model))
            for model in models_of(sets)
            if model in ("rm_uniform", "rm_density")
        ),
    )
    return [Grid(tuple(t.columns), tuple(t.iter_rows())) for t in tables if len(t)]

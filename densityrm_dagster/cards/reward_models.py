"""What the evaluation of reward models shows: the main numbers, tables with intervals, and plots, baselines always beside."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from densityrm_core.experiment import Experiment
from densityrm_core.settings import Settings
from densityrm_core.storage import read_frame
from densityrm_dagster.metadata import markdown_table, plot

if TYPE_CHECKING:
    from densityrm_core.evaluation.sets import EvaluationSet

_NUMBERS = ("accuracy", "log_loss", "ece", "accuracy_shorter_better", "accuracy_longer_better", "margin_length")
_CELL = 160


def measurements(rows: pl.DataFrame, sets: "Sequence[EvaluationSet]", resamples: int) -> tuple[dict[str, Any], list[str]]:
    """The card of RM_EVALUATION rows of one seed, and what the log should say: a line a model and a line a set."""
    from densityrm_core.measurement.comparison import agreement, measure_sets
    from densityrm_core.measurement.reward_models import measure, reliability
    from densityrm_core.report import reward_model_plots, reward_model_tables

    measured, alike, further = measure(rows, resamples), agreement(rows, resamples), measure_sets(rows, resamples)
    card: dict[str, Any] = {
        **_numbers(measured, alike, further),
        "metrics": _table(reward_model_tables.overview(measured)),
        "by_quartile": _table(reward_model_tables.by_stratum(measured, "quartile")),
        "by_source": _table(reward_model_tables.by_stratum(measured, "src")),
        "by_decile": _table(reward_model_tables.by_stratum(measured, "decile")),
        "agreement": _table(reward_model_tables.alike(alike)),
        "accuracy_by_decile": plot(reward_model_plots.accuracy_by_decile(measured)),
        "accuracy_by_source": plot(reward_model_plots.accuracy_by_source(measured)),
        "reliability": plot(reward_model_plots.reliability_diagram(reliability(rows, resamples), measured)),
    }
    if sets:
        card["sets"] = _table(reward_model_tables.sets(further))
        card["set_files"] = dg.MetadataValue.md("\n".join(f"- {found}\n  - " + "\n  - ".join(found.files) for found in sets))
    return card, [*_lines(measured), *(f"evaluation set {found}" for found in sets)]


def validation_plots(
    folder: Path, validation: pl.DataFrame, strata: pl.DataFrame, experiment: Experiment, key: dict[str, Any]
) -> dict[str, Any]:
    """What a trained reward model does on the pairs it was watched on: accuracy by decile, and whether its odds come true.

    Args:
        validation, strata: tables.PREFERENCE_PAIRS of the validation split, tables.PAIR_WEIGHTS.
        key: model and seed, as in tables.RM_EVALUATION.
    """
    from densityrm_core.evaluation.reward_models import evaluate_reward_model, watched_pairs
    from densityrm_core.hardware import pick_device
    from densityrm_core.measurement.reward_models import measure, reliability
    from densityrm_core.models.folders import common_precision
    from densityrm_core.report import reward_model_plots
    from densityrm_core.tables import RM_EVALUATION, with_key

    scored = evaluate_reward_model(folder, watched_pairs(validation, strata), pick_device(experiment.compute.device))
    made_by = {"fingerprint": experiment.fingerprint, "precision": common_precision([folder])}
    rows, n = with_key(scored, RM_EVALUATION, **key, **made_by), experiment.evaluation.bootstrap
    measured = measure(rows, n, name="validation")
    return {
        "validation_by_decile": plot(reward_model_plots.accuracy_by_decile(measured)),
        "validation_reliability": plot(reward_model_plots.reliability_diagram(reliability(rows, n, "validation"), measured)),
    }


def evaluation_text(folder: Path, experiment: Experiment) -> str:
    """What all seeds' evaluations say of reward models and baselines, for a terminal: metrics, then accuracy by stratum."""
    from densityrm_core.measurement.reward_models import measure
    from densityrm_core.report import reward_model_tables

    rows = pl.concat([read_frame(folder / f"{seed}.parquet") for seed in experiment.seeds])
    measured = measure(rows, experiment.evaluation.bootstrap)
    tables = [
        reward_model_tables.overview(measured),
        *(reward_model_tables.by_stratum(measured, by) for by in ("src", "quartile")),
    ]
    return "\n\n".join(markdown_table(table, _CELL) for table in tables) + "\n"


def settings_table(settings: Settings) -> dg.MarkdownMetadataValue:
    """The settings a training was given, with what they mean."""
    fields = type(settings).model_fields
    rows = [{"setting": n, "value": str(getattr(settings, n)), "meaning": f.description or ""} for n, f in fields.items()]
    return dg.MetadataValue.md(markdown_table(pl.DataFrame(rows), _CELL))


def _numbers(measured: pl.DataFrame, alike: pl.DataFrame, further: pl.DataFrame) -> dict[str, float]:
    """Floats that Dagster plots from run to run."""
    from densityrm_core.measurement.comparison import MEAN_OF_SUBSETS

    whole = measured.filter(pl.col("by") == "all", pl.col("metric").is_in(_NUMBERS))
    rare = measured.filter(by="quartile", stratum="1", metric="accuracy")
    between = alike.filter(model="rm_uniform", other="rm_density")
    of_sets = further.filter(subset=MEAN_OF_SUBSETS, metric="accuracy")
    named = [
        *((f"{model}_{metric}", value) for model, metric, value in whole.select("model", "metric", "mean").iter_rows()),
        *((f"{model}_rare_accuracy", value) for model, value in rare.select("model", "mean").iter_rows()),
        *((f"reward_models_{metric}", value) for metric, value in between.select("metric", "mean").iter_rows()),
        *((f"{model}_{name}_accuracy", value) for name, model, value in of_sets.select("set", "model", "mean").iter_rows()),
    ]
    return {name: value for name, value in named if value is not None}


def _lines(measured: pl.DataFrame) -> list[str]:
    from densityrm_core.measurement.frames import interval_of
    from densityrm_core.measurement.reward_models import models_of

    lines: list[str] = []
    for model in models_of(measured):
        whole = interval_of(measured, by="all", model=model, metric="accuracy")
        rare = interval_of(measured, by="quartile", stratum="1", model=model, metric="accuracy")
        lines.append(f"accuracy of {model}: {whole:.3f}" + (f", on the rare quartile {rare:.3f}" if rare else ""))
    return lines


def _table(frame: pl.DataFrame) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(markdown_table(frame, _CELL))

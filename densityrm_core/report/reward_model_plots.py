"""Figures of reward models beside the baselines as PNG bytes, of measurement.reward_models, in several strata."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from densityrm_core.arrays import Doubles
from densityrm_core.figures import BLUE, GREEN, GREY, PURPLE, VERMILLION, blank, error_bars, nothing, png, style, titled
from densityrm_core.measurement.frames import interval_of
from densityrm_core.measurement.reward_models import NAMES, models_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RM = {"rm_uniform": (BLUE, "o"), "rm_density": (VERMILLION, "^")}
_BASELINES = {"bag_of_words": (GREEN, "D"), "longer_reply": (PURPLE, "+"), "shorter_reply": (GREY, "x")}
_SOURCES_SHOWN = 12


def accuracy_by_decile(measured: pl.DataFrame) -> bytes:
    """Accuracy of reward models, with 95 % intervals, and of the baselines per density decile. Reads `measure`."""
    accuracy = measured.filter(metric="accuracy")
    if accuracy.filter(by="decile").is_empty():
        return nothing("Reward model accuracy")
    rare = {m: interval_of(accuracy, by="quartile", stratum="1", model=m) for m in _RM}
    finding = ", ".join(f"{NAMES[m]} {100 * i.mean:.1f} %" for m, i in rare.items() if i)
    figure, ax = titled(f"Accuracy on the rarest quarter: {finding}" if finding else "Accuracy by density decile")
    _draw(ax, accuracy.filter(by="decile").with_columns(x=pl.col("stratum").cast(pl.Float64)), lines=True)
    ax.set_xticks(range(1, 11))
    ax.set_xlabel("density decile of the prompt (1 rarest, 10 commonest)")
    return png(figure)


def accuracy_by_source(measured: pl.DataFrame) -> bytes:
    """Accuracy of reward models, with 95 % intervals, and of the baselines per source, the largest first. Reads `measure`."""
    accuracy = measured.filter(by="src", metric="accuracy")
    if accuracy.is_empty():
        return nothing("Reward model accuracy by source")
    largest = accuracy.group_by("stratum").agg(pl.col("pairs").max()).sort("pairs", "stratum", descending=[True, False])
    largest = largest.head(_SOURCES_SHOWN)
    figure, ax = titled(_source_finding(accuracy, largest["stratum"].to_list()))
    _draw(ax, accuracy.join(largest.with_row_index("x").select("stratum", pl.col("x").cast(pl.Float64)), on="stratum"))
    ax.set_xticks(range(len(largest)), [f"{name}\n{pairs:,} pairs" for name, pairs in largest.iter_rows()])
    ax.set_xlim(-0.5, len(largest) - 0.5)
    return png(figure)


def reliability_diagram(bins: pl.DataFrame, measured: pl.DataFrame) -> bytes:
    """How often what reward models predict with probability p comes true, and the share of predictions in each bin.

    Args:
        bins: of `reliability`.
        measured: of `measure`, for the calibration error.
    """
    models = [model for model in _RM if (bins["model"] == model).any()]
    if not models:
        return nothing("Reliability of the predicted probabilities")
    errors = {m: interval_of(measured, by="all", model=m, metric="ece") for m in models}
    finding = ", ".join(f"{NAMES[m]} {i.mean:.3f}" for m, i in errors.items() if i)
    figure = blank(7.2, 5.2)
    curve, shares = (style(ax) for ax in figure.subplots(2, 1, sharex=True, height_ratios=(3, 1)))
    curve.set_title(f"Expected calibration error: {finding}", fontsize=11, loc="left", wrap=True)
    curve.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="perfect")
    for offset, model in zip((-1, 1), models, strict=False):
        color, marker = _RM[model]
        own = bins.filter(model=model)
        error_bars(curve, 100 * own["predicted"].to_numpy(), _percent(own), color, marker, NAMES[model])
        shares.bar(own["bin"].to_numpy() * 10 - 5 + 2 * offset, 100 * own["share"].to_numpy(), 4, color=color)
    curve.set_ylabel("came true (%), 95 % interval")
    curve.set_xlim(0, 100)
    curve.legend(frameon=False)
    shares.set_xlabel("predicted probability that a reply is preferred (%), each pair in both orders")
    shares.set_ylabel("predictions (%)")
    return png(figure)


def _draw(ax: Axes, accuracy: pl.DataFrame, lines: bool = False) -> None:
    """Baselines as plain marks, reward models with intervals, at the column x."""
    present = models_of(accuracy)
    for model in (m for m in _BASELINES if m in present):
        color, marker = _BASELINES[model]
        own = accuracy.filter(model=model).sort("x")
        x, y, joined = own["x"].to_numpy(), 100 * own["mean"].to_numpy(), "-" if lines else "none"
        ax.plot(x, y, color=color, marker=marker, linestyle=joined, linewidth=1, alpha=0.7, markersize=5, label=NAMES[model])
    for offset, model in zip((-0.12, 0.12), (m for m in _RM if m in present), strict=False):
        own = accuracy.filter(model=model).sort("x")
        error_bars(ax, own["x"].to_numpy() + offset, _percent(own), *_RM[model], NAMES[model])
    ax.axhline(50, color=GREY, linestyle="--", linewidth=1, label="chance")
    ax.set_ylabel("pairs ranked right (%), 95 % interval")
    ax.figure.legend(*ax.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center", fontsize=9)


def _percent(measured: pl.DataFrame) -> Doubles:
    """Estimates, lower and upper ends in per cent, (3, n)."""
    return 100 * measured.select("mean", "low", "high").to_numpy().T


def _source_finding(accuracy: pl.DataFrame, sources: list[str]) -> str:
    """Where the better reward model is furthest above the best baseline, or below it."""
    means = accuracy.filter(pl.col("stratum").is_in(sources)).with_columns(rm=pl.col("model").is_in(list(_RM)))
    best = means.group_by("stratum").agg(
        pl.col("mean").filter("rm").max().alias("rm"), pl.col("mean").filter(~pl.col("rm")).max().alias("baseline")
    )
    gains = best.with_columns(gain=100 * (pl.col("rm") - pl.col("baseline"))).drop_nulls("gain").sort("gain", "stratum")
    if gains.is_empty():
        return "Accuracy by source"
    ends = [gains.row(-1, named=True), *([gains.row(0, named=True)] if len(gains) > 1 else [])]
    told = ", ".join(f"{row['gain']:+.1f} on {row['stratum']}" for row in ends)
    return f"Best RM against the best baseline, points: {told}"

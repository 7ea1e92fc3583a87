"""Figures of the weights: how uneven they are. An empty table gives a figure that says so."""

from __future__ import annotations

import numpy as np
import polars as pl

from densityrm_core.figures import BLUE, GREY, nothing, plain_ticks, png, titled


def weight_histogram(weights: pl.DataFrame) -> bytes:
    """How unevenly training prompts are drawn, relative to uniform sampling. Reads DENSITY_WEIGHTS."""
    w = _training_weights(weights)
    if not len(w):
        return nothing("Sampling weights")
    relative, ess = w * len(w) / w.sum(), w.sum() ** 2 / (len(w) * (w**2).sum())
    figure, ax = titled(f"Effective sample fraction {ess:.2f}; the heaviest prompt: {relative.max():.1f}x its uniform share")
    low, high = relative[relative > 0].min(), relative.max()
    ax.hist(relative, bins=np.geomspace(low / 1.05, high * 1.05, 41).tolist(), color=BLUE)
    ax.axvline(1, color=GREY, linestyle="--", linewidth=1)
    ax.annotate("uniform", (1, 1), (3, -10), xycoords=("data", "axes fraction"), textcoords="offset points", color=GREY)
    ax.set_xscale("log")
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 1.05 <= t <= high * 1.05]
    plain_ticks(ax, ticks, "{:g}x")
    ax.set_xlabel("draws relative to uniform sampling (weight x number of prompts)")
    ax.set_ylabel("training prompts")
    return png(figure)


def lorenz_curve(weights: pl.DataFrame) -> bytes:
    """Share of the draws that go to the lightest share of the prompts. Reads DENSITY_WEIGHTS."""
    w = np.sort(_training_weights(weights))
    if not len(w):
        return nothing("Share of the draws")
    prompts, draws = np.linspace(0, 1, len(w) + 1), np.concatenate([[0], np.cumsum(w) / w.sum()])
    top, ess = 1 - np.interp(0.9, prompts, draws), w.sum() ** 2 / (len(w) * (w**2).sum())
    figure, ax = titled(f"The heaviest tenth of the prompts gets {top:.0%} of the draws, ESS/n = {ess:.2f}")
    shown = np.unique(np.linspace(0, len(w), 1000).astype(int))
    ax.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="uniform sampling")
    ax.plot(100 * prompts[shown], 100 * draws[shown], color=BLUE, linewidth=2, label="by 1/density")
    ax.set_xlabel("training prompts, lightest first (%)")
    ax.set_ylabel("share of the draws (%)")
    ax.legend(frameon=False)
    return png(figure)


def draws_by_decile(shares: pl.DataFrame) -> bytes:
    """Share of the pairs and of the draws in each density decile. Reads the columns decile, pairs, draws."""
    if shares.is_empty():
        return nothing("Draws by density decile")
    rare = shares.row(0, named=True)
    figure, ax = titled(
        f"Decile {rare['decile']}, the rarest: {rare['pairs']:.0%} of the pairs, {rare['draws']:.0%} of the draws"
    )
    deciles = shares["decile"].to_numpy()
    ax.bar(deciles - 0.2, 100 * shares["pairs"].to_numpy(), 0.4, color=GREY, label="of the pairs (drawn uniformly)")
    ax.bar(deciles + 0.2, 100 * shares["draws"].to_numpy(), 0.4, color=BLUE, label="of the draws by 1/density")
    ax.set_xticks(range(1, 11))
    ax.set_xlabel("density decile of the prompt (1 rarest, 10 commonest)")
    ax.set_ylabel("share (%)")
    ax.legend(frameon=False)
    return png(figure)


def _training_weights(weights: pl.DataFrame) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return weights["weight"].drop_nulls().to_numpy()

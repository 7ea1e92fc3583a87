"""A map of prompts: near in meaning, near on paper, coloured by density. As a picture, and as a page to move about in."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arrays import Floats, Rows
from densityrm_core.figures import GREY, nothing, png, titled
from densityrm_core.streams import stream, stream_seed

_COMPONENTS = 50  # that t-SNE is given: what is left out is noise, and it is six times faster
_FEWEST = 50  # prompts worth a t-SNE; fewer are laid out by their two main components
_PERPLEXITY = 30
_TEXT = 120  # characters shown of a prompt
_COLORS = "viridis"  # rarest dark; even in lightness, and told apart with any colour vision
_SHADES = 96  # a palette: thousands of dots compress badly otherwise


@dataclass(frozen=True)
class PromptMap:
    """Which rows are shown, and where: `rows` (m,), ascending, `xy` (m, 2) without unit."""

    rows: Rows
    xy: Floats


def lay_out(vectors: npt.NDArray[Any], rows: Rows, points: int, threads: int = 2) -> PromptMap:
    """Place at most `points` of the `rows` of `vectors` by t-SNE [van der Maaten & Hinton 2008] of their main components."""
    if len(rows) > points:
        rows = np.sort(stream(0, "prompt map").choice(rows, points, replace=False))
    some = np.asarray(vectors[rows], np.float32)
    if len(rows) < 3:
        return PromptMap(rows, np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2))
    from sklearn.decomposition import PCA

    seed = stream_seed(0, "prompt map", "layout") % 2**31
    components = min(_COMPONENTS, *some.shape)
    main = PCA(components, random_state=seed, svd_solver="randomized").fit_transform(some)
    if len(rows) < _FEWEST:
        return PromptMap(rows, np.pad(main, ((0, 0), (0, 1)))[:, :2].astype(np.float32))
    from openTSNE import TSNE

    perplexity = min(_PERPLEXITY, (len(rows) - 1) // 3)
    tsne = TSNE(perplexity=perplexity, n_jobs=threads, random_state=seed, early_exaggeration_iter=150, n_iter=300)
    return PromptMap(rows, np.asarray(tsne.fit(main), np.float32))


def map_png(found: PromptMap, weights: pl.DataFrame) -> bytes:
    """The map as a picture. Reads DENSITY_WEIGHTS, in the order that `found.rows` counts."""
    if not len(found.rows):
        return nothing("Map of the prompts", "there are none, or density.map_points is 0")
    shown = weights[found.rows]
    log_rho = shown["log_density"].to_numpy()
    rare = (shown["decile"] == 1).to_numpy()
    figure, ax = titled(f"{_spread(found.xy, rare)}\n{len(found.rows):,} training prompts, colour by density")
    order = np.argsort(-log_rho, kind="stable")  # rare ones on top
    low, high = np.quantile(log_rho, (0.02, 0.98))  # a few copies would take all the colours
    dots = ax.scatter(
        *found.xy[order].T,
        c=log_rho[order],
        s=np.clip(30_000 / len(order), 2, 20),
        cmap=_COLORS,
        linewidths=0,
        vmin=low,
        vmax=high,
    )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("t-SNE of the prompts' vectors: only neighbourhoods mean something, not distances", color=GREY)
    ax.grid(visible=False)
    ax.figure.colorbar(dots, ax=ax, label="log density (low: rare)", extend="both")
    return png(figure, _SHADES)


def map_html(found: PromptMap, weights: pl.DataFrame, texts: list[str]) -> str:
    """The map as one self-contained page: hover for the prompt, zoom by dragging. `texts` (m,) of the rows shown."""
    import plotly.graph_objects as go

    shown = weights[found.rows]
    train = weights["weight"].count()
    labels = [
        f"{html.escape(' '.join(text.split())[:_TEXT])}<br>decile {decile}, density {density:.3g}, {weight * train:.2f} x uniform"
        for text, decile, density, weight in zip(
            texts, shown["decile"], shown["density"], shown["weight"].fill_null(0), strict=True
        )
    ]
    marker = {"color": shown["log_density"].to_list(), "colorscale": "Viridis", "size": 5, "colorbar": {"title": "log density"}}
    dots = go.Scattergl(
        x=found.xy[:, 0].tolist(), y=found.xy[:, 1].tolist(), mode="markers", marker=marker, text=labels, hoverinfo="text"
    )
    layout = {"title": f"{len(found.rows):,} training prompts by density", "template": "plotly_white"}
    page = go.Figure(dots, layout)
    page.update_xaxes(visible=False)
    page.update_yaxes(visible=False)
    return page.to_html(include_plotlyjs=True, full_html=True, div_id="map")


def _spread(xy: Floats, rare: npt.NDArray[np.bool_]) -> str:
    """How much of the map the rarest tenth covers: cells of a 20 x 20 grid it is found in, of those with any prompt."""
    low, high = xy.min(axis=0), xy.max(axis=0)
    cell = np.minimum((20 * (xy - low) / np.maximum(high - low, 1e-9)).astype(np.int64), 19) @ np.array([20, 1])
    share = len(np.unique(cell[rare])) / len(np.unique(cell))
    return f"The rarest tenth of the prompts is found in {share:.0%} of the map"

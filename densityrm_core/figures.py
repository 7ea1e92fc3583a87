"""What all figures share: colours, size, style, and how one becomes PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008: told apart with any colour vision
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959"


def titled(title: str) -> tuple[Figure, Axes]:
    """A figure of one plot whose title states the finding."""
    figure = blank(7.2, 4.2)
    ax = style(figure.add_subplot())
    ax.set_title(title, fontsize=11, loc="left", wrap=True)
    return figure, ax


def nothing(title: str, reason: str = "nothing to show yet") -> bytes:
    """A figure that says why there is none."""
    figure = blank(7.2, 1.6)
    ax = figure.add_subplot()
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"{title}: {reason}", ha="center", va="center", color=GREY, wrap=True)
    return png(figure)


def blank(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure, in inches; without a layout, its plots are placed by hand."""
    from matplotlib.figure import Figure  # takes half a second to import, and most importers of this module draw nothing

    return Figure(figsize=(width, height), facecolor="white", layout=layout)


def style(ax: Axes) -> Axes:
    """No frame, faint horizontal lines behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E0E0E0", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def plain_ticks(ax: Axes, ticks: Sequence[float], form: str) -> None:
    """These ticks and no others on a logarithmic x axis, as numbers in the format `form`."""
    from matplotlib.ticker import NullLocator

    ax.set_xticks(ticks, [form.format(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def error_bars(ax: Axes, x: ArrayLike, points: ArrayLike, color: str, marker: str, label: str | None = None) -> None:
    """Points with intervals: estimates, lower and upper ends, (3, n); an interval that is not finite is not drawn."""
    mean, *ends = np.asarray(points, dtype=np.float64)
    spread = np.where(np.isfinite(ends).all(0), np.abs(np.asarray(ends) - mean), 0)
    ax.errorbar(np.asarray(x), mean, spread, fmt=marker, color=color, capsize=3, markersize=6, label=label)


def png(figure: Figure, colors: int | None = None) -> bytes:
    """PNG bytes, the same for the same figure; `colors` limits the palette, for figures of many dots."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    if colors:
        from PIL import Image

        picture, buffer = Image.open(buffer).convert("RGB").quantize(colors, dither=Image.Dither.NONE), io.BytesIO()
        picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()

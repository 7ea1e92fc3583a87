"""The curves of a training."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from densityrm_core.figures import BLUE, blank, nothing, png, style


def curves(metrics: pl.DataFrame, names: Sequence[str], x_label: str) -> bytes:
    """Training curves side by side, one panel for each of `names` that METRICS holds."""
    found = [name for name in names if (metrics["metric"] == name).any()]
    if not found:
        return nothing("Training curves", "none of " + ", ".join(names) + " was recorded")
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = blank(max(6.4, 3.6 * columns), 0.6 + 3.0 * rows)
    for i, name in enumerate(found):
        ax = style(figure.add_subplot(rows, columns, i + 1))
        curve = metrics.filter(pl.col("metric") == name).sort("step")
        x, y = curve["step"].to_numpy(), curve["value"].to_numpy()
        ax.plot(x, y, color=BLUE, linewidth=1.5, marker="o" if len(x) < 20 else None, markersize=3)
        ax.set_title(f"{name}: {y[0]:.3g} to {y[-1]:.3g}", fontsize=10, loc="left")
        ax.set_xlabel(x_label)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return png(figure)

"""Figures of a data card as PNG bytes, in the manner of densityrm_core.plots."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from densityrm_core.data_card import BIN_STARTS, DataCard
from densityrm_core.plots import BLUE, GREY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def length_histogram(card: DataCard) -> bytes:
    """Lengths of prompts and replies in characters, on a logarithmic axis."""
    if not card.pairs:
        return _nothing("Lengths")
    figure, ax = _figure(
        f"Half of the pairs have a prompt of at most {card.prompt_chars.median:,} characters;\n"
        f"the chosen reply is the longer one in {100 * card.longer_chosen:.0f} % of the pairs"
    )
    texts = (
        ("prompt", card.prompt_chars, GREY, ":"),
        ("chosen", card.chosen_chars, BLUE, "-"),
        ("rejected", card.rejected_chars, VERMILLION, "--"),
    )
    edges = [0.5, *BIN_STARTS[1:], 2 * BIN_STARTS[-1]]  # length 0, which has no logarithm, stands left of 1
    for name, chars, color, line in texts:
        shares = [100 * count / card.pairs for count in chars.counts]
        ax.stairs(shares, edges, color=color, linestyle=line, linewidth=2, label=f"{name}, median {chars.median:,}")
    filled = [i for _, chars, _, _ in texts for i, count in enumerate(chars.counts) if count]
    ax.set_xscale("log")
    _plain_ticks(ax, edges[min(filled)] / 1.5, edges[max(filled) + 1] * 1.5)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("length (characters; two bins per doubling)")
    ax.set_ylabel("share of the pairs (%)")
    ax.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return _png(figure)


def pairs_per_prompt(card: DataCard) -> bytes:
    """How many pairs share a prompt."""
    if not card.pairs:
        return _nothing("Pairs per prompt")
    single = 100 * card.pairs_per_prompt["1"] / card.prompts
    figure, ax = _figure(
        f"{single:.0f} % of the prompts have a single pair; the most frequent has {card.most_pairs_per_prompt:,}"
    )
    bars = ax.bar(list(card.pairs_per_prompt), list(card.pairs_per_prompt.values()), color=BLUE)
    ax.bar_label(bars, [f"{count:,}" for count in card.pairs_per_prompt.values()], padding=2)
    ax.margins(y=0.1)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("pairs of a prompt")
    ax.set_ylabel("prompts")
    return _png(figure)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = _blank(4.2)
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E0E0E0", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_title(title, fontsize=11, loc="left", wrap=True)
    return figure, ax


def _nothing(title: str) -> bytes:
    figure = _blank(1.6)
    ax = figure.add_subplot()
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"{title}: there are no pairs", ha="center", va="center", color=GREY)
    return _png(figure)


def _blank(height: float) -> Figure:
    from matplotlib.figure import Figure  # takes half a second, and most importers of this module draw nothing

    return Figure(figsize=(7.2, height), facecolor="white", layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _plain_ticks(ax: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import NullLocator

    steps = (1,) if high / low > 1000 else (1, 2, 5)
    decades = range(math.ceil(math.log10(high)) + 1)
    ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
    ax.set_xlim(low, high)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())

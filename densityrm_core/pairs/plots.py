"""Figures of a data card as PNG bytes, in the manner of densityrm_core.density.plots."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from densityrm_core.figures import BLUE, GREY, VERMILLION, nothing, plain_ticks, png, titled
from densityrm_core.pairs.card import BIN_STARTS, DataCard

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def length_histogram(card: DataCard) -> bytes:
    """Lengths of prompts and replies in characters, on a logarithmic axis."""
    if not card.pairs:
        return nothing("Lengths", "there are no pairs")
    figure, ax = titled(
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
    _decade_ticks(ax, edges[min(filled)] / 1.5, edges[max(filled) + 1] * 1.5)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("length (characters; two bins per doubling)")
    ax.set_ylabel("share of the pairs (%)")
    ax.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return png(figure)


def pairs_per_prompt(card: DataCard) -> bytes:
    """How many pairs share a prompt."""
    if not card.pairs:
        return nothing("Pairs per prompt", "there are no pairs")
    single = 100 * card.pairs_per_prompt["1"] / card.prompts
    figure, ax = titled(f"{single:.0f} % of the prompts have a single pair; the most frequent has {card.most_pairs_per_prompt:,}")
    bars = ax.bar(list(card.pairs_per_prompt), list(card.pairs_per_prompt.values()), color=BLUE)
    ax.bar_label(bars, [f"{count:,}" for count in card.pairs_per_prompt.values()], padding=2)
    ax.margins(y=0.1)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("pairs of a prompt")
    ax.set_ylabel("prompts")
    return png(figure)


def _decade_ticks(ax: Axes, low: float, high: float) -> None:
    steps = (1,) if high / low > 1000 else (1, 2, 5)
    decades = range(math.ceil(math.log10(high)) + 1)
    ax.set_xlim(low, high)
    plain_ticks(ax, [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high], "{:,}")

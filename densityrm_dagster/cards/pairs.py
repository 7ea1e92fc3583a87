"""Data cards: what a person wants to know of pairs before trusting them, as metadata of the assets."""

from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from densityrm_core.experiment import Experiment
from densityrm_core.sources import FileRead
from densityrm_core.storage import Stored
from densityrm_dagster.metadata import markdown_table, plot

if TYPE_CHECKING:
    pass

_CARD_COLUMNS = ["prompt_id", "prompt", "context", "chosen", "rejected", "src"]
_FILES_SHOWN = 50


def data_card(pairs: Stored) -> dict[str, Any]:
    """Lengths, turns, pairs per prompt, languages and length bias of stored pairs, as numbers, tables and plots."""
    from densityrm_core.pairs import plots as data_plots
    from densityrm_core.pairs.card import DataCardBuilder

    if not pairs.rows:
        return {}
    builder = DataCardBuilder()
    for batch in pairs.batches(_CARD_COLUMNS):
        builder.add(batch)
    card = builder.card()
    return {
        **card.metadata(),
        "data_card": dg.MetadataValue.md(card.markdown()),
        "lengths": plot(data_plots.length_histogram(card)),
        "pairs_per_prompt": plot(data_plots.pairs_per_prompt(card)),
    }


def files_card(files: tuple[FileRead, ...]) -> dg.MarkdownMetadataValue:
    """The raw files that were read: size, rows, SHA-256 (or what the file system says of the version), revision."""
    if not files:
        return dg.MetadataValue.md("no file was read")
    rows = [
        {
            "file": file.name,
            "MiB": file.size / 2**20,
            "rows": file.rows,
            "sha256": file.identity,
            "revision": file.revision or "-",
            "read": "earlier" if file.reused else "now",
        }
        for file in files
    ]
    more = f"\n\nand {len(rows) - _FILES_SHOWN:,} more files" if len(rows) > _FILES_SHOWN else ""
    return dg.MetadataValue.md(markdown_table(pl.DataFrame(rows[:_FILES_SHOWN]), longest=64) + more)


def reasons_card(reasons: dict[str, int]) -> dg.MarkdownMetadataValue:
    """Rejected pairs by reason, most frequent first."""
    table = pl.DataFrame({"reason": list(_ranked(reasons)), "pairs": list(_ranked(reasons).values())})
    return dg.MetadataValue.md(markdown_table(table) if reasons else "nothing was rejected")


def knobs_card(reasons: dict[str, int], experiment: Experiment) -> dg.MarkdownMetadataValue:
    """Every quality knob, its setting, and how many pairs it removed."""
    sources = experiment.sources.enabled()
    gaps = ", ".join(f"{name} {s.min_score_gap:g}" for name, s in sources.items())
    weights = ", ".join(f"{name} {s.weight:g}" for name, s in sources.items())
    knobs = (
        ("pairs.max_prompt_chars", experiment.pairs.max_prompt_chars, "long_prompt"),
        ("sources.*.min_score_gap", gaps, "small_score_gap"),
        ("sources.*.weight", weights, "source_weight"),
        ("pairs.max_pairs_per_prompt", experiment.pairs.max_pairs_per_prompt, "over_prompt_cap"),
    )
    rows = [
        {"knob": knob, "setting": "off" if value is None else str(value), "pairs removed": reasons.get(reason, 0)}
        for knob, value, reason in knobs
    ]
    return dg.MetadataValue.md(markdown_table(pl.DataFrame(rows), longest=120))


def overlap_card(shared: dict[tuple[str, ...], int]) -> dg.MarkdownMetadataValue:
    """Prompts by the set of sources that have them."""
    rows = [{"sources": " and ".join(names), "prompts": count} for names, count in shared.items()]
    return dg.MetadataValue.md(markdown_table(pl.DataFrame(rows)) if rows else "there are no prompts")


def reasons_in_words(reasons: dict[str, int]) -> str:
    """One line for the log."""
    counts = ", ".join(f"{reason} {count:,}" for reason, count in _ranked(reasons).items())
    return f"{sum(reasons.values()):,} rejects" + (f" ({counts})" if counts else "")


def _ranked(reasons: dict[str, int]) -> dict[str, int]:
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))

"""What the Dagster UI shows of densities and weights."""

from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from densityrm_dagster.metadata import markdown_table, plot

if TYPE_CHECKING:
    from densityrm_core.density.card import DensityCard


_SENTENCE = 160  # characters of a cell that is read


def density_metadata(card: "DensityCard", weights: pl.DataFrame, picture: bytes) -> dict[str, Any]:
    """The card of the weights: warnings first, then who is rare, how unevenly prompts are drawn, and the original beside it."""
    from densityrm_core.density import plots

    warnings = "\n".join(f"- {warning}" for warning in card.warnings) or "none"
    original = f"{card.agreement}\n\n{markdown_table(card.favourites)}\n\n{markdown_table(card.checklist, _SENTENCE)}"
    return {
        "warnings": dg.MetadataValue.md(warnings),
        **card.numbers,
        "map": plot(picture),
        "histogram": plot(plots.weight_histogram(weights)),
        "lorenz": plot(plots.lorenz_curve(weights)),
        "rarest": dg.MetadataValue.md(markdown_table(card.rarest, _SENTENCE)),
        "commonest": dg.MetadataValue.md(markdown_table(card.commonest, _SENTENCE)),
        "by_source": dg.MetadataValue.md(markdown_table(card.by_source)),
        "the_original": dg.MetadataValue.md(original),
    }

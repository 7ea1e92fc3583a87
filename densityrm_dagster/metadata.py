"""What the Dagster UI shows of a value: schema, rows, lineage, plots, report cards, and a version that follows the content."""

import base64
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from densityrm_core.storage import Stored
from densityrm_core.tables import Table

_PREVIEW_ROWS, _PREVIEW_CHARS = 5, 60


def table_output(
    value: pl.DataFrame | Stored,
    table: Table,
    lineage: Mapping[str, list[tuple[str, str]]] | None = None,
    card: Mapping[str, Any] | None = None,
    name: str = "result",
) -> dg.Output[pl.DataFrame | Stored]:
    """A table with its row count, schema, first rows, column lineage, `card`, and a data version that is a hash of its content.

    `lineage` maps a column to the (asset, column) pairs it is made from.
    """
    if isinstance(value, Stored):
        rows, head, content = value.rows, next(value.batches(), table.empty()), value.sha256
    else:
        rows, head, content = value.height, value, content_hash(value)
    columns = [
        dg.TableColumn(c.name, str(head.schema[c.name]), c.meaning, dg.TableColumnConstraints(nullable=c.nullable))
        for c in table.columns
    ]
    metadata: dict[str, Any] = {
        "dagster/row_count": rows,
        "dagster/column_schema": dg.TableSchema(columns),
        "first_rows": dg.MetadataValue.md(markdown_table(head.head(_PREVIEW_ROWS))),
        **(card or {}),
    }
    if lineage:
        deps = {
            column: [dg.TableColumnDep(dg.AssetKey(asset), source) for asset, source in sources]
            for column, sources in lineage.items()
        }
        metadata["dagster/column_lineage"] = dg.TableColumnLineage(deps)
    return dg.Output(value, output_name=name, metadata=metadata, data_version=dg.DataVersion(content))


def folder_output(folder: Path, card: Mapping[str, Any]) -> dg.Output[Path]:
    """A folder with a report card, and a data version that is a hash of its files."""
    return dg.Output(folder, metadata=dict(card), data_version=dg.DataVersion(folder_hash(folder)))


def same_columns(asset: str, *columns: str) -> dict[str, list[tuple[str, str]]]:
    """Lineage of columns taken over from `asset` under their own names."""
    return {column: [(asset, column)] for column in columns}


def plot(png: bytes) -> dg.MarkdownMetadataValue:
    """A picture in the UI."""
    return dg.MetadataValue.md(f"![](data:image/png;base64,{base64.b64encode(png).decode()})")


def markdown_table(frame: pl.DataFrame, longest: int = _PREVIEW_CHARS) -> str:
    """A frame as a Markdown table, cells cut to `longest` characters."""
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + " --- |" * frame.width]
    lines += ["| " + " | ".join(_cell(value, longest) for value in row) + " |" for row in frame.iter_rows()]
    return "\n".join(lines)


def content_hash(frame: pl.DataFrame) -> str:
    """SHA-256 of a frame's schema and values."""
    buffer = io.BytesIO()
    frame.rechunk().write_parquet(buffer, compression="uncompressed", statistics=False)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()[:32]


def folder_hash(folder: Path) -> str:
    """SHA-256 of the names and bytes of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _cell(value: Any, longest: int) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= longest else text[: longest - 1] + "…"

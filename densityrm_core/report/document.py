"""A report as blocks of text, tables and figures, and the forms it takes: Markdown, plain text, JSON, files."""

from __future__ import annotations

import base64
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from densityrm_core.files import replacing
from densityrm_core.measurement.bootstrap import Interval

_WIDTH = 110


@dataclass(frozen=True)
class Text:
    """A paragraph; `heading` 1 makes it the title, 2 a section title."""

    text: str
    heading: int = 0


@dataclass(frozen=True)
class Grid:
    """A table of text; every row is as long as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A figure of the report, by file name."""

    name: str
    caption: str


Block = Text | Grid | Picture
Drawing = Callable[[], bytes]


@dataclass(frozen=True)
class Section:
    """A part of the report: its blocks, the same numbers as a table, and what draws its figures, by file name."""

    blocks: tuple[Block, ...]
    table: dict[str, Any]
    drawings: dict[str, Drawing] = field(default_factory=dict[str, Drawing])


@dataclass(frozen=True)
class Document:
    """A report in blocks, the same numbers as a JSON-able `table`, and what draws the figures, by file name."""

    blocks: tuple[Block, ...]
    table: dict[str, Any]
    drawings: dict[str, Drawing] = field(compare=False)

    @cached_property
    def figures(self) -> dict[str, bytes]:
        """PNG images by file name, drawn when they are first asked for: text and numbers do without."""
        return {name: draw() for name, draw in self.drawings.items()}

    @property
    def markdown(self) -> str:
        """Markdown whose images are relative file names."""
        return _markdown(self.blocks, str)

    def embedded(self) -> str:
        """Markdown whose images are data URIs: one string that shows everything."""
        return _markdown(self.blocks, lambda name: "data:image/png;base64," + base64.b64encode(self.figures[name]).decode())

    def terminal(self) -> str:
        """Plain text, at most 110 characters wide."""
        return "\n\n".join(_plain(block) for block in self.blocks if not isinstance(block, Picture)) + "\n"

    def write(self, folder: str | Path) -> Path:
        """Write the figures, report.json and report.md into `folder`, each atomically; return the path of report.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.figures.items():
            _replace(folder / name, data)
        _replace(folder / "report.json", (json.dumps(self.table, indent=2, allow_nan=False) + "\n").encode())
        _replace(folder / "report.txt", self.terminal().encode())
        _replace(folder / "report.md", self.markdown.encode())
        return folder / "report.md"


def _markdown(blocks: Sequence[Block], link: Callable[[str], str]) -> str:
    return "\n\n".join(_markdown_block(block, link) for block in blocks) + "\n"


def _markdown_block(block: Block, link: Callable[[str], str]) -> str:
    match block:
        case Text(text, heading):
            return f"{'#' * heading} {text}".lstrip()
        case Picture(name, caption):
            return f"![{caption}]({link(name)})"
        case Grid(header, rows):
            rule = ("---", *["---:"] * (len(header) - 1))
            return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _plain(block: Text | Grid) -> str:
    if isinstance(block, Text):
        return block.text.upper() if block.heading else textwrap.fill(block.text, _WIDTH)
    widths = [max(map(len, column)) for column in zip(block.header, *block.rows, strict=True)]
    rule = tuple("-" * width for width in widths)
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (block.header, rule, *block.rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def finite(value: Any) -> Any:
    """`value` as JSON knows it: intervals as objects, numbers that are not finite as null."""
    if isinstance(value, Interval):
        return finite({"mean": value.mean, "low": value.low, "high": value.high})
    if isinstance(value, dict):
        return {k: finite(v) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [finite(v) for v in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)

"""Rows of a stored table as a person reads them: a pair as a conversation, a reject with its reason, the rest key by key."""

from __future__ import annotations

import difflib
import random
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import polars as pl

from densityrm_core.sources.rows import REASONS

_INDENT = "  "
_RAW_CHARACTERS = 600  # of a rejected row, unless it is the only one shown
_VALUE_LINES = 6  # of a field in a block of keys and values
_COLOURS = {"bold": "1", "dim": "2", "good": "32", "bad": "31", "user": "36"}
_UNSAFE = {"Cc", "Zl", "Zp"}  # control characters could repaint or retitle the terminal of whoever looks
_BIDIRECTIONAL = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class InspectionError(ValueError):
    """There is nothing to look at; the message says what there is instead."""


def describe_tables(folder: Path) -> str:
    """The tables below `folder`, one a line: name, rows, size.

    Raises:
        InspectionError: there are none.
    """
    files = _tables(folder)
    if not files:
        raise InspectionError(f"{folder}: holds no tables yet; run `densityrm demo`, or materialize an asset, first")
    rows = [(name, f"{_scan_length(path):,}", _size(path.stat().st_size)) for name, path in files.items()]
    header = ("table", "rows", "size")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in [header, *rows])


def inspect_table(
    folder: Path,
    name: str,
    filters: Mapping[str, str] | None = None,
    rows: int = 5,
    width: int = 100,
    seed: int | None = None,
    colour: bool = False,
) -> str:
    """Rows of the table `name` below `folder` as text.

    Args:
        filters: column and the value it must have; all must hold.
        rows: how many of them at most: the first, or with `seed` a random sample of all that match.
        width: of the text, in terminal cells.

    Raises:
        InspectionError: there is no such table or column, or no row matches.
    """
    path = find_table(folder, name)
    filters = filters or {}
    frame = select(path, filters, rows, seed)
    if filters:
        if frame.is_empty():
            raise InspectionError(nothing_matches(path, filters))
        return render(frame, width, colour)
    about = f"{name}: {_scan_length(path):,} rows; columns: {', '.join(frame.columns)}"
    return about if frame.is_empty() else f"{render(frame, width, colour)}\n\n{about}"


def find_table(folder: Path, name: str) -> Path:
    """The file of a table. Raises InspectionError, naming those that exist."""
    files = _tables(folder)
    if name in files:
        return files[name]
    if not files:
        raise InspectionError(f"{folder}: holds no tables yet; run `densityrm demo`, or materialize an asset, first")
    parts = [other for other in files if other.startswith(f"{name}/")]
    close = parts[:1] or difflib.get_close_matches(name, files, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InspectionError(f"there is no table {name!r} in {folder}; {hint}it holds: {', '.join(files)}")


def select(path: Path, filters: Mapping[str, str], rows: int, seed: int | None = None) -> pl.DataFrame:
    """The first `rows` rows that match all `filters`, or with `seed` a random sample of them, in the table's order.

    Memory does not grow with the table, but for row numbers under a seed; a table replaced meanwhile is read as it was when
    opened.

    Raises:
        InspectionError: the table lacks a filter's column, or is no Parquet file.
    """
    with path.open("rb") as file:
        try:
            table = pl.scan_parquet(file)
            columns = table.collect_schema().names()
            for column in filters:
                if column not in columns:
                    raise InspectionError(f"{path.stem} has no column {column!r} to select by; it has: {', '.join(columns)}")
            matches = [pl.col(column).cast(pl.String) == value for column, value in filters.items()]
            if seed is None:
                return table.filter(*matches).head(rows).collect(engine="streaming")
            numbered = table.select(*filters).with_row_index("row") if filters else table.select(pl.row_index("row"))
            found = numbered.filter(*matches).select("row").collect(engine="streaming")["row"]
            drawn = sorted(random.Random(seed).sample(range(len(found)), min(rows, len(found))))
            taken = [table.slice(found[i], 1).collect(engine="streaming") for i in drawn]
            return pl.concat(taken) if taken else table.head(0).collect()
        except pl.exceptions.PolarsError as error:
            raise InspectionError(f"{path}: is no readable table ({error}); materialize it again") from None


def nothing_matches(path: Path, filters: Mapping[str, str]) -> str:
    """What to tell who asked for rows that are not there."""
    total = _scan_length(path)
    if not total:
        return f"{path.stem} is empty"
    wanted = " and ".join(f"{column} = {value!r}" for column, value in filters.items())
    text = f"no row of {path.stem} has {wanted}; the table has {total:,} rows"
    for column in ("reason", "src", "split"):
        if column in filters:
            with path.open("rb") as file:
                counts = pl.scan_parquet(file).group_by(column).len().sort("len", column, descending=[True, False])
                found = cast(list[tuple[str, int]], counts.head(20).collect(engine="streaming").rows())
            text += f"\nvalues of {column}: " + ", ".join(f"{value} ({count:,})" for value, count in found)
    return text


def render(frame: pl.DataFrame, width: int, colour: bool = False) -> str:
    """Rows as text: pairs as conversations, rejects with their reason, other tables as aligned keys and values."""
    page = _Page(max(width, 30), colour)
    columns = set(frame.columns)
    for number, row in enumerate(frame.iter_rows(named=True)):
        if number:
            page.line()
        if {"context", "chosen", "rejected"} <= columns:
            _pair(page, row)
        elif {"reason", "detail", "raw"} <= columns:
            _reject(page, row, None if frame.height == 1 else _RAW_CHARACTERS)
        else:
            _fields(page, row)
    return "\n".join(page.lines)


class _Page:
    def __init__(self, width: int, colour: bool) -> None:
        self.width, self._colour, self.lines = width, colour, cast(list[str], [])

    def paint(self, text: str, style: str) -> str:
        return f"\x1b[{_COLOURS[style]}m{text}\x1b[0m" if self._colour and text else text

    def line(self, text: str = "", style: str = "") -> None:
        self.lines.append(self.paint(text, style) if style else text)

    def rule(self, title: str) -> None:
        self.line(f"{title} {'-' * max(0, self.width - _cells(title) - 1)}", "bold")

    def text(self, label: str, text: str, style: str) -> None:
        """A label and under it the text, indented."""
        self.line(label, style)
        for line in _wrapped(text, self.width - len(_INDENT)):
            self.line(f"{_INDENT}{line}".rstrip())

    def keys(self, values: Mapping[str, str], most_lines: int | None = None) -> None:
        pad = max(map(len, values)) + 2
        for key, value in values.items():
            lines = _wrapped(value, self.width - pad)
            if most_lines and len(lines) > most_lines:
                lines = [*lines[:most_lines], "..."]
            self.line(self.paint(f"{key:<{pad}}", "dim") + lines[0])
            for line in lines[1:]:
                self.line(f"{'':<{pad}}{line}".rstrip())


def _pair(page: _Page, row: dict[str, Any]) -> None:
    page.rule(f"pair {row['pair_id']}")
    for turn in row["context"]:
        page.text(f"{plain(turn['role'])}:", turn["content"], "user" if turn["role"] == "user" else "dim")
    for side, style in (("chosen", "good"), ("rejected", "bad")):
        score = row.get(f"score_{side}")
        page.text(f"{side.upper()}{'' if score is None else f' (score {score:g})'}:", row[side], style)
    shown = {"pair_id", "prompt", "context", "chosen", "rejected", "score_chosen", "score_rejected"}
    page.line()
    page.keys({key: _value(value) for key, value in row.items() if key not in shown})


def _reject(page: _Page, row: dict[str, Any], most: int | None) -> None:
    page.rule(f"{row['reason']} at {plain(row['origin'])}")
    meaning = REASONS[row["reason"]].meaning if row["reason"] in REASONS else ""
    shown = {"meaning": meaning, "detail": row["detail"]}
    shown |= {key: _value(value) for key, value in row.items() if key not in {"reason", "origin", "detail", "raw"}}
    page.keys({key: value for key, value in shown.items() if value})
    raw = cast(str, row["raw"])
    cut = most is not None and len(raw) > most
    page.text("raw:", raw[:most], "dim")
    if cut:
        page.line(f"{_INDENT}... {len(raw) - cast(int, most):,} characters more; select this row alone to see them", "dim")


def _fields(page: _Page, row: dict[str, Any]) -> None:
    page.rule(f"{next(iter(row))} {plain(_value(next(iter(row.values()))))}")
    page.keys({key: _value(value) for key, value in row.items()}, _VALUE_LINES)


def _value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        items = cast(list[object], value)
        shown = ", ".join(_value(item) for item in items[:8])
        return f"[{shown}, ... {len(items)} values]" if len(items) > 8 else f"[{shown}]"
    return str(value)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` terminal cells; the text's own line ends and indentation stay."""
    lines: list[str] = []
    for paragraph in text.expandtabs(4).replace("\r\n", "\n").split("\n"):
        current = ""
        for word in re.findall(r"\s*\S+", plain(paragraph)):
            if current and _cells(current + word) > width:
                lines.append(current)
                current, word = "", word.lstrip()
            while _cells(word) > width:
                head = _head(word, width)
                lines.append(head)
                word = word[len(head) :]
            current += word
        lines.append(current)
    return lines


def _head(word: str, width: int) -> str:
    """As many characters as fit, and at least one."""
    cells = 0
    for i, character in enumerate(word):
        cells += _cells(character)
        if cells > width:
            return word[: max(i, 1)]
    return word


def _cells(text: str) -> int:
    """Terminal cells that `text` takes: two for East Asian wide characters and emoji, none for combining marks."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def plain(text: str) -> str:
    """`text` on one line with everything visible that would steer the terminal."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSAFE or c in _BIDIRECTIONAL else c for c in text
    )


def _tables(folder: Path) -> dict[str, Path]:
    """Tables by name; those of a partitioned asset as asset/partition."""
    files = sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("."))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def _scan_length(path: Path) -> int:
    with path.open("rb") as file:
        try:
            return cast(int, pl.scan_parquet(file).select(pl.len()).collect().item())
        except pl.exceptions.PolarsError as error:
            raise InspectionError(f"{path}: is no readable table ({error}); materialize it again") from None


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

"""The command that says what this machine is, and whether what the experiment needs is here."""

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, TextIO

import typer

from densityrm_core.experiment import Experiment, home, load_experiment
from densityrm_dagster.doctor.examination import Examination, examine, file_name, warnings
from densityrm_dagster.doctor.lines import Line
from densityrm_dagster.terminal import is_terminal

_SIGNS = {"green": "✓", "yellow": "!", "red": "✗"}  # beside its colour, for who does not see it
_CODES = {"green": 32, "yellow": 33, "red": 31, "bold": 1, "dim": 2}
_NARROWEST, _WIDEST = 60, 132


def doctor(
    probe: Annotated[
        bool, typer.Option(help="time some work for a few seconds, to estimate how long the experiment takes")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead")] = False,
) -> None:
    """Say what this machine is, what will be used, and whether what the experiment needs is here.

    Exit code 1 if a line is red.
    """
    experiment, root = load_experiment(), home()
    found = examine(experiment, root, probe)
    if as_json:
        print(json.dumps({"lines": [vars(line) for line in found.lines], "worst": found.worst}, ensure_ascii=False))
    else:
        _show(found, experiment, root)
    raise typer.Exit(1 if found.worst == "red" else 0)


def warn(experiment: Experiment, root: Path) -> None:
    """Say before a run what is not as it should be; the run goes on, and the person decides."""
    lines = warnings(experiment, root)
    paper = _Paper(sys.stderr)
    for line in lines:
        paper.line(line, max(len(line.subject) for line in lines))
    if lines:
        print(file=sys.stderr)


def _show(found: Examination, experiment: Experiment, root: Path) -> None:
    paper = _Paper(sys.stdout)
    print(paper.painted(f"experiment {experiment.name} ({file_name()}), state in {root}", "bold"))
    width = max(len(line.subject) for line in found.lines)
    for section in found.sections:
        print("\n" + paper.painted(section.title, "bold"))
        for line in section.lines:
            paper.line(line, width)
    print("\n" + paper.painted(found.summary, found.worst))


class _Paper:
    """A stream as a person sees it: coloured and wrapped in a terminal, a line a fact in a pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._person = stream, is_terminal(stream)
        self._width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))

    def painted(self, text: str, how: str) -> str:
        return f"\x1b[{_CODES[how]}m{text}\x1b[0m" if self._person else text

    def line(self, line: Line, width: int) -> None:
        """A sign, the subject in a column of `width`, what was found, and below it what to do."""
        sign = _SIGNS[line.colour] if self._person else f"{line.colour:<6}"
        indent = " " * (len(sign) + width + 5)
        first, *others = self._wrapped(line.found, len(indent))
        print(f"  {self.painted(sign, line.colour)} {line.subject:<{width}}  {self._dimmed(first)}", file=self._stream)
        for part in others:
            print(indent + self._dimmed(part), file=self._stream)
        for number, part in enumerate(self._wrapped(line.remedy, len(indent) + 3) if line.remedy else []):
            print(indent + self.painted("   " * bool(number) + "-> " * (not number) + part, line.colour), file=self._stream)

    def _wrapped(self, text: str, indent: int) -> list[str]:
        width = self._width - indent
        return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False) if self._person else [text]

    def _dimmed(self, text: str) -> str:
        """The setting at the end of a line, in brackets, set back."""
        head, opened, setting = text.rpartition("  [")
        return head + self.painted(opened + setting, "dim") if opened and setting.endswith("]") else text

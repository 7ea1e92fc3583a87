"""The command that uses a reward model: conversations in, the same with their rewards out."""

import contextlib
import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from densityrm_core.experiment import home, load_experiment
from densityrm_core.files import replacing
from densityrm_dagster.commands.errors import clear_progress, one_line_errors
from densityrm_dagster.services import tracking_uri
from densityrm_dagster.terminal import is_terminal
from densityrm_dagster.tracking.registry import RegistryError, registered_folder

if TYPE_CHECKING:
    from densityrm_core.reward_models.score_file import Tally
    from densityrm_core.reward_models.scoring import Scorer
    from densityrm_core.sources.files import RawRow

_SAY_EVERY_S = 0.5


def score(
    rows: Annotated[str, typer.Argument(help="file of conversations (.jsonl, .gz, .zst, .parquet), or - for lines from stdin")],
    model: Annotated[str, typer.Option(help="folder of a reward model, models:/<name>/<version> or models:/<name>@<alias>")],
    out: Annotated[
        Path | None, typer.Option(help="file to write, whole or not at all (.jsonl or .jsonl.gz); else stdout")
    ] = None,
) -> None:
    """Add rewards to conversations, one JSON object a line. Exit code 1 if any line could not be scored.

    A line has `prompt`, a text or a list of {role, content}. With `chosen` and `rejected` it gets `reward_chosen`,
    `reward_rejected` and `margin`; with `response` (or `completion`) it gets `reward`.

    Texts become the tokens they would be in training, cut to the same lengths.

    A line that cannot be scored is written too, with `error`: where it stands and what is wrong.
    """
    with one_line_errors():
        lines, write_to = _rows(rows), _destination(out)  # what is wrong here is said before anything heavy is loaded
        with reward_model_folder(model) as folder:
            scorer = ready_scorer(folder)
        from densityrm_core.reward_models.score_file import Tally

        tally, started = Tally(), time.monotonic()
        with write_to as write:
            _score(lines, scorer, tally, write)
        seconds = time.monotonic() - started
    print(_summary(tally, scorer.codec.truncated, seconds), file=sys.stderr)
    raise typer.Exit(1 if tally.errors else 0)


def _score(rows: "Iterator[RawRow]", scorer: "Scorer", tally: "Tally", write: Callable[[bytes], object]) -> None:
    from densityrm_core.reward_models.score_file import score_rows

    said = started = time.monotonic()
    for row in score_rows(rows, scorer, tally):
        write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
        if is_terminal(sys.stderr) and time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            print(f"\r\x1b[K{tally.rows:,} lines, {tally.rows / (said - started):,.0f}/s", end="", file=sys.stderr, flush=True)
    clear_progress()


def ready_scorer(folder: Path) -> "Scorer":
    """The reward model in a folder, torch set up as the experiment says; what is to know of it is said."""
    from densityrm_core.hardware import pick_device
    from densityrm_core.reward_models.scoring import load_scorer
    from densityrm_dagster.tracking.training import set_up_torch

    compute = load_experiment().compute
    set_up_torch(compute)
    scorer = load_scorer(folder, pick_device(compute.device))
    for note in scorer.notes:
        print(f"note: {note}", file=sys.stderr)
    return scorer


def reward_model_folder(model: str) -> contextlib.AbstractContextManager[Path]:
    """Where the weights of a folder, or of a version in MLflow's registry, lie."""
    if not model.startswith("models:"):
        if not Path(model).is_dir():
            raise OSError(f"--model {model}: there is no such folder; give one, or models:/<name>@<alias>")
        return contextlib.nullcontext(Path(model))
    root = home()
    if not (root / "mlflow" / "mlflow.db").exists():
        raise RegistryError(f"{model}: nothing is registered in {root} yet; train a reward model, or set DENSITYRM_HOME")
    return registered_folder(model, tracking_uri(root))


def _rows(source: str) -> "Iterator[RawRow]":
    """Rows of a source that is known to be there."""
    from densityrm_core.sources.files import RawRow, raw_files

    if source == "-":
        lines = enumerate(sys.stdin.buffer, start=1)
        return (RawRow(f"stdin:{number}", line.rstrip(b"\r\n")) for number, line in lines if line.strip())
    files, downloads = raw_files(source, "rows"), home() / "raw" / "hub"
    return (row for file in files for row in file.rows(downloads))


def _destination(out: Path | None) -> contextlib.AbstractContextManager[Callable[[bytes], object]]:
    if out is None:
        return _stdout()
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise OSError(f"--out {out}: lines of JSON are written; give a name that ends in .jsonl or .jsonl.gz")
    return _file(out)


@contextlib.contextmanager
def _stdout() -> Iterator[Callable[[bytes], object]]:
    yield sys.stdout.buffer.write
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def _file(out: Path) -> Iterator[Callable[[bytes], object]]:
    with replacing(out) as file:
        if out.suffix != ".gz":
            yield file.write
            return
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
            yield packed.write


def _summary(tally: "Tally", truncated: int, seconds: float) -> str:
    parts = [f"scored {tally.rows - tally.errors:,} of {tally.rows:,} lines, {tally.rows / max(seconds, 1e-9):,.0f}/s"]
    if tally.pairs:
        parts.append(f"chosen above rejected in {tally.wins / tally.pairs:.1%} of {tally.pairs:,} pairs")
    if truncated:
        parts.append(f"{truncated:,} texts were longer than in training and cut")
    if tally.errors:
        parts.append(f"{tally.errors:,} lines have an `error` instead")
    return "; ".join(parts)

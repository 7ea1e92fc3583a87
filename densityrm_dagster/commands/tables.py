"""The commands that look at the tables and carry pairs to and from nanochat's layout."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from densityrm_core.experiment import home, load_experiment
from densityrm_dagster.commands.errors import one_line_errors
from densityrm_dagster.terminal import is_terminal


def inspect(
    table: Annotated[str | None, typer.Argument(help="name of a table; without it, the tables are listed")] = None,
    prompt_id: Annotated[str | None, typer.Option(help="rows of this prompt")] = None,
    pair_id: Annotated[str | None, typer.Option(help="the row of this pair")] = None,
    reason: Annotated[str | None, typer.Option(help="rejects with this reason")] = None,
    src: Annotated[str | None, typer.Option(help="rows of this source")] = None,
    split: Annotated[str | None, typer.Option(help="rows of this split")] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="how many rows at most")] = 5,
    seed: Annotated[int | None, typer.Option(help="draw the rows at random by this seed instead of taking the first")] = None,
) -> None:
    """Show rows of a table as a person reads them; without a table, list the tables."""
    given = {"prompt_id": prompt_id, "pair_id": pair_id, "reason": reason, "src": src, "split": split}
    filters = {column: value for column, value in given.items() if value is not None}
    with one_line_errors():
        from densityrm_core.pairs.inspection import InspectionError, describe_tables, inspect_table

        if table is None and filters:
            raise InspectionError(f"--{next(iter(filters)).replace('_', '-')} selects rows of a table: name the table first")
        if table is None:
            text = describe_tables(_tables())
        else:
            width = min(shutil.get_terminal_size().columns, 120)
            text = inspect_table(_tables(), table, filters, rows, width, seed, colour=is_terminal(sys.stdout))
    print(text)


def explain(prompt: Annotated[str, typer.Argument(help="id of a prompt, or a text")]) -> None:
    """Show why a prompt weighs what it weighs: its neighbours, distances, density, decile, and how often it is drawn."""
    with one_line_errors():
        from densityrm_core.density.explain import explain, explanation_text
        from densityrm_dagster.tracking.training import set_up_torch

        experiment = load_experiment()
        set_up_torch(experiment.compute)
        text = explanation_text(explain(prompt, _tables(), experiment), min(shutil.get_terminal_size().columns, 140))
    print(text)


def export_nanochat(out: Annotated[Path, typer.Argument(help="folder to write; a former export there is replaced")]) -> None:
    """Write pairs, prompts and density weights as the files nanochat's scripts read."""
    with one_line_errors():
        from densityrm_core.pairs import nanochat_folder as nanochat

        summary = nanochat.export_nanochat(_tables(), out, _progress, load_experiment())
    print(f"pairs    {summary.pairs:,}  ({_counts(summary.sources)})")
    print(f"splits   {_counts(summary.splits)}")
    print(f"prompts  {summary.prompts:,}")
    missing = "not written: the table density_weights is not made yet"
    print(f"weights  {missing if summary.weighed is None else f'{summary.weighed:,} prompts above 0'}")
    print(f"folder   {summary.folder}")


def import_nanochat(folder: Annotated[Path, typer.Argument(help="folder with pairs_all.jsonl, or the file itself")]) -> None:
    """Check that a nanochat folder can be a source, and print what to put into the experiment file."""
    with one_line_errors():
        import yaml

        from densityrm_core.pairs.nanochat_folder import NanochatError, check_nanochat

        summary = check_nanochat(folder, _progress)
        if not summary.pairs:
            why = f": {_counts(summary.rejects)}" if summary.rejects else ""
            raise NanochatError(f"{summary.file}: none of its {summary.rows:,} lines is a pair{why}")
    print(f"# lines    {summary.rows:,}")
    print(f"# pairs    {summary.pairs:,}  ({_counts(summary.sources)})")
    print(f"# rejects  {sum(summary.rejects.values()):,}" + (f"  ({_counts(summary.rejects)})" if summary.rejects else ""))
    source: dict[str, object] = {"path": str(folder.absolute())}
    if summary.malformed:
        source["max_malformed"] = summary.malformed
        print(f"# {summary.malformed:,} lines are malformed, the first is line {' '.join(summary.first_malformed.split())}")
    print("# put into the experiment file; `enabled: false` leaves another source out; real rows need `judge: {kind: model}`")
    print(yaml.safe_dump({"sources": {"nanochat": source}}, sort_keys=False, allow_unicode=True, width=1000), end="")


def _tables() -> Path:
    return home() / load_experiment().name / "tables"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _progress(file: str, rows: int) -> None:
    if is_terminal(sys.stderr):
        print(f"\r\x1b[K{file}: {rows:,} rows", end="", file=sys.stderr, flush=True)

"""What a person can mend is one message on standard error, never a traceback."""

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

from densityrm_core.experiment import ExperimentError
from densityrm_dagster.terminal import is_terminal


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that this project raises on purpose, and the system's, become a line: exit code 2 for the experiment file, else 1.

    A reader that had enough is no error to tell.
    """
    try:
        try:
            yield
        finally:
            clear_progress()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("densityrm_"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ExperimentError) else 1) from None


def clear_progress() -> None:
    """Remove the line of progress, if a person sees one."""
    if is_terminal(sys.stderr):
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

"""What a person sees in the terminal: whether there is one, and during a run one short line an event, no event-log noise."""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import dagster as dg

from densityrm_core.choices import take
from densityrm_core.experiment import ExperimentError


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is at the other end of a stream; DENSITYRM_TERMINAL=yes or no decides it, whatever the stream is.

    Raises:
        ExperimentError: the variable is something else.
    """
    wanted = os.environ.get("DENSITYRM_TERMINAL") or ("yes" if stream.isatty() else "no")
    if wanted not in ("yes", "no"):
        raise ExperimentError(f"DENSITYRM_TERMINAL is {wanted!r}; set it to yes or no, or unset it")
    return take("terminal", wanted) == "yes"


@dg.logger(description="One short line an event.")
def terminal_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """Prints what assets say themselves; Dagster's own events are in the event log, and failures are reported by the caller."""
    logger = logging.Logger("densityrm", level=logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Short())
    handler.addFilter(_said_by_an_asset)
    logger.addHandler(handler)
    return logger


def progress(log: Callable[[str], None], every_s: float = 5.0) -> Callable[[str], None]:
    """`log`, but at most one line every few seconds."""
    said = time.monotonic()

    def say(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= every_s:
            said = time.monotonic()
            log(text)

    return say


def counted(log: Callable[[str], None], what: str, every_s: float = 5.0) -> Callable[[int, int], None]:
    """Says `done` of `total`, how fast, and how long it will take, at most once every few seconds."""
    say, started = progress(log, every_s), time.monotonic()

    def report(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - started, 1e-9)
        say(f"{done:,}/{total:,} {what}  {rate:,.0f}/s  {(total - done) / max(rate, 1e-9):,.0f} s left")

    return report


def _said_by_an_asset(record: logging.LogRecord) -> bool:
    skipped = str(_meta(record).get("orig_message", "")).startswith("Dependencies for step")  # follows from another failure
    return _meta(record).get("dagster_event") is None and not skipped


class _Short(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        meta = _meta(record)
        partition = (meta.get("job_tags") or {}).get("dagster/partition")
        step = (meta.get("step_key") or "").split("__")[0]
        name = f"{step}[{partition}]" if partition is not None else step
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, '%H:%M:%S')}  {name:<26} {level}{meta.get('orig_message') or record.getMessage()}"


def _meta(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "dagster_meta", None) or {}

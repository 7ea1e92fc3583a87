"""What the doctor finds: a line a subject, in three colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Colour = Literal["green", "yellow", "red"]
COLOURS: tuple[Colour, ...] = ("green", "yellow", "red")


@dataclass(frozen=True)
class Line:
    """`remedy` says what to do about a line that is not green."""

    colour: Colour
    subject: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Section:
    """Lines of one kind under a heading."""

    title: str
    lines: Sequence[Line]


def green(subject: str, found: str) -> Line:
    """All is well."""
    return Line("green", subject, found)


def yellow(subject: str, found: str, remedy: str) -> Line:
    """The experiment can run; there is something to know."""
    return Line("yellow", subject, found, remedy)


def red(subject: str, found: str, remedy: str) -> Line:
    """Something will fail."""
    return Line("red", subject, found, remedy)


def size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

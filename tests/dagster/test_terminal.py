"""Whether a person is at the other end."""

import io
import os
import pty
from collections.abc import Iterator

import pytest

from densityrm_core.experiment import ExperimentError
from densityrm_dagster.terminal import is_terminal


@pytest.fixture
def screen() -> Iterator[io.TextIOWrapper]:
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        yield stream
    os.close(controller)


@pytest.mark.takes("terminal=yes")
def test_a_terminal_is_one(screen: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DENSITYRM_TERMINAL", raising=False)
    assert is_terminal(screen)


@pytest.mark.takes("terminal=no")
def test_a_pipe_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DENSITYRM_TERMINAL", raising=False)
    assert not is_terminal(io.StringIO())


@pytest.mark.takes("terminal=yes", "terminal=no")
def test_the_variable_decides_whatever_the_stream_is(screen: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DENSITYRM_TERMINAL", "yes")
    assert is_terminal(io.StringIO())
    monkeypatch.setenv("DENSITYRM_TERMINAL", "no")
    assert not is_terminal(screen)


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DENSITYRM_TERMINAL", "maybe")
    with pytest.raises(ExperimentError, match="DENSITYRM_TERMINAL is 'maybe'; set it to yes or no"):
        is_terminal(io.StringIO())

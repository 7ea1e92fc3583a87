"""A conversation with policies, through a pipe and in a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from ..core.tiny_models import TEXTS, tiny_language_model
from .commands import REPOSITORY

OPTIONS = ["--max-new-tokens", "9", "--seed", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with policies of seeds 0 and 2."""
    home = tmp_path_factory.mktemp("home")
    for seed in ("0", "2"):
        tiny_language_model(home / "planted" / "models" / "grpo_a" / seed)
    return home


def line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "densityrm_dagster", "chat", *arguments]


def variables(home: Path) -> dict[str, str]:
    return {**os.environ, "DENSITYRM_HOME": str(home), "DENSITYRM_EXPERIMENT": "", "TERM": "xterm"}


def test_lines_from_a_pipe_are_answered(home: Path):
    result = subprocess.run(  # noqa: S603  our own
        line("--model", "grpo_a", *OPTIONS),
        cwd=REPOSITORY,
        env=variables(home),
        input=f"{TEXTS[0]}\n{TEXTS[1]}\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n\n") >= 2
    assert result.stderr == "grpo_a/2, temperature 1; --seed 1 repeats this conversation\n"


def test_in_a_wide_terminal_replies_stand_side_by_side(home: Path):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    os.write(controller, f"{TEXTS[0]}\n/quit\n".encode())
    process = subprocess.Popen(  # noqa: S603  our own
        line("--model", "grpo_a/0", "--versus", "grpo_a/2", *OPTIONS),
        cwd=REPOSITORY,
        env=variables(home),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(controller, 2**16):
            shown += part
    except OSError:  # nobody writes any more
        pass
    assert process.wait(60) == 0, shown.decode()
    assert re.search(rb"grpo_a/0 {9,}.*grpo_a/2", shown), shown.decode()

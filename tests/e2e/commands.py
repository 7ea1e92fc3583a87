"""What the end-to-end tests share: a tiny experiment, raw rows of their own, and a command run as a person runs it."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
TINY = {
    "name": "tiny",
    "seeds": [0],
    "planted": {"hh_rows": 120, "ultrafeedback_rows": 120, "stack_exchange_questions": 50},
    "base_model": {"hidden_size": 32, "layers": 1, "steps": 5, "vocab_size": 600},
    "reward_model": {"steps": 5, "evaluate_every": 5},
    "grpo": {"steps": 2},
    "evaluation": {"prompts": 10, "samples": 1, "bootstrap": 100},
}


def demo(folder: Path, settings: object, command: str = "demo") -> "subprocess.CompletedProcess[str]":
    """Run a command on the experiment `settings`, its file and its state in `folder`."""
    return subprocess.run(  # noqa: S603  our own
        _line(command), cwd=REPOSITORY, env=_environment(folder, settings), capture_output=True, text=True, timeout=300
    )


def score(home: Path, *arguments: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "densityrm_dagster", "score", *arguments]
    variables = {**os.environ, "DENSITYRM_HOME": str(home)}
    return subprocess.run(  # noqa: S603  our own
        line, cwd=REPOSITORY, env=variables, input=given, capture_output=True, text=True, timeout=120
    )


def kill_when(said: str, folder: Path, settings: object) -> list[int]:
    """Kill a demo as soon as it has said something; its processes that are still there half a minute later."""
    path = folder.with_name(f"{folder.name}.log")
    with path.open("w") as log:
        process = subprocess.Popen(  # noqa: S603  our own
            _line("demo"), cwd=REPOSITORY, env=_environment(folder, settings), stderr=log, stdout=log
        )
    deadline = time.monotonic() + 300
    while said not in path.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL and said in path.read_text(), path.read_text()
    deadline = time.monotonic() + 30
    while processes_of(folder / "home") and time.monotonic() < deadline:
        time.sleep(0.2)
    return processes_of(folder / "home")


def processes_of(home: Path) -> list[int]:
    """Processes that work on a state folder."""
    mark = f"DENSITYRM_HOME={home}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0") and "zombie" not in (entry / "status").read_text():
                found.append(int(entry.name))
    return found


def _line(command: str) -> list[str]:
    return [sys.executable, "-m", "densityrm_dagster", command]


def _environment(folder: Path, settings: object) -> dict[str, str]:
    path = folder / "experiment.yaml"
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return {**os.environ, "DENSITYRM_EXPERIMENT": str(path), "DENSITYRM_HOME": str(folder / "home")}


def write_rows(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return folder


def only_hh(path: Path) -> dict[str, object]:
    off = {"enabled": False}
    sources = {"hh_rlhf": {"path": str(path)}, "ultrafeedback": off, "stack_exchange": off}
    return {**TINY, "sources": sources, "judge": {"kind": "model"}}


def good_row(i: int) -> str:
    turn = f"\n\nHuman: Question {i}?\n\nAssistant:"
    return json.dumps({"chosen": f"{turn} Yes {i}.", "rejected": f"{turn} No {i}."})


def check_one_clear_message(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    (error,) = clear_messages(result)
    for word in words:
        assert word in error


def clear_messages(result: "subprocess.CompletedProcess[str]") -> list[str]:
    """The lines that say why a command failed."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr + result.stdout
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]

"""The check of a GPU walks the whole of its road on a CPU, and names what fails on it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import parts

REPOSITORY = Path(__file__).parents[1]


def run(*arguments: str) -> tuple[int, list[str], dict[str, Any]]:
    """Exit code, lines, and the last line."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)  # noqa: S603  ours
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    return done.returncode, lines, json.loads(lines[-1])


def test_every_part_holds_on_the_cpu(tmp_path: Path):
    code, lines, found = run("--small", "--cpu", "--out", str(tmp_path / "results.json"))
    assert code == 0, lines
    assert found["failed"] == []
    names = [part.name for part in parts()]
    assert list(found["parts"]) == names
    assert [line.split()[0] for line in lines[:-1]] == names
    assert {"device", "versions", "taken", "seconds"} <= set(found)
    assert {"flex_eager", "spans"} <= set(found["taken"]["attention"])
    assert found["parts"]["resume"]["identical"] and found["parts"]["ranks"]["ranks"] == 2
    assert len(found["parts"]["study"]["accuracy"]["rm_density"]) == 2
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_a_part_that_fails_is_named_and_the_others_go_on():
    code, lines, found = run("--small", "--cpu", "--only", "study", "machine", "--base", "/nowhere/model")
    assert code == 1
    assert found["failed"] == ["study"]
    assert "there is no such folder" in found["parts"]["study"]["failed"]
    machine, study = lines[:2]
    assert machine.startswith("machine    ok") and study.startswith("study      FAILED")

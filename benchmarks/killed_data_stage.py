"""`densityrm read` killed with SIGKILL at random moments, each time in an empty state folder, and then run again.

Keys: `kills`, `identical` (times that all tables were byte for byte those of a run that nobody killed), `leftovers` (unfinished
files that were left in the end), `left_running` (processes that outlived a killed command by more than half a minute).
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

_EXPERIMENT = {"name": "killed", "planted": {"hh_rows": 6000, "ultrafeedback_rows": 6000, "stack_exchange_questions": 12_000}}
_REPOSITORY = Path(__file__).parents[1]
_GRACE_S = 30.0  # a server that is still importing notices only afterwards


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="killed.") as name:
        print(json.dumps(kill_and_compare(Path(name), options.kills, options.seed)))


def kill_and_compare(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """The figures of the module's docstring."""
    experiment = folder / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(_EXPERIMENT), encoding="utf-8")
    started = time.monotonic()
    _read(experiment, folder / "whole").wait()
    whole, took = _tables(folder / "whole"), time.monotonic() - started
    rng = random.Random(seed)
    identical = leftovers = left_running = 0
    for number in range(kills):
        home = folder / f"home{number}"
        moment = rng.uniform(0.0, took)
        process = _read(experiment, home)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        left_running += not _gone(home)
        code = _read(experiment, home).wait()
        tables = _tables(home)
        other = sorted(name for name in whole if tables.get(name) != whole[name])
        same = code == 0 and not other and tables.keys() == whole.keys()
        unfinished = [path for path in home.rglob("*.tmp")]
        identical, leftovers = identical + same, leftovers + len(unfinished)
        print(
            f"killed after {moment:5.1f} of {took:.1f} s: {'same tables' if same else f'DIFFERENT: exit code {code}, {other}'}",
            flush=True,
        )
        shutil.rmtree(home)
    return {"kills": kills, "identical": identical, "leftovers": leftovers, "left_running": left_running}


def _read(experiment: Path, home: Path) -> "subprocess.Popen[bytes]":
    variables = {**os.environ, "DENSITYRM_EXPERIMENT": str(experiment), "DENSITYRM_HOME": str(home)}
    command = [sys.executable, "-m", "densityrm_dagster", "read"]
    return subprocess.Popen(  # noqa: S603  our own command line
        command, cwd=_REPOSITORY, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _tables(home: Path) -> dict[str, str]:
    folder = home / "killed" / "tables"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*")) if path.is_file()}


def _gone(home: Path) -> bool:
    """Whether no process works on `home` any more, soon after its command was killed."""
    deadline = time.monotonic() + _GRACE_S
    mark = f"DENSITYRM_HOME={home}".encode()
    while time.monotonic() < deadline:
        if not any(mark in variables for variables in _environments()):
            return True
        time.sleep(0.2)
    return False


def _environments() -> list[list[bytes]]:
    found: list[list[bytes]] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append((entry / "environ").read_bytes().split(b"\0"))
    return found


if __name__ == "__main__":
    main()

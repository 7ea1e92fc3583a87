"""The same experiment twice, once alone and once beside a busy loop on every processor: does it end in the same bytes?

The last line is a JSON object: `identical`, `files` that were compared, `different` (names of those that differ), `alone_s` and
`beside_s`. Compared is what a person keeps: model folders, Parquet tables, and report.json. Exit code 1 if anything differs.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from densityrm_core.experiment import load_experiment
from densityrm_core.hardware import processors

KEPT = ("models/**/*", "tables/**/*.parquet", "reports/**/report.json")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--experiment", type=Path, default=Path(__file__).parents[1] / "experiments" / "short.yaml")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="same_bytes.") as folder:
        found = twice(asked.experiment, Path(folder))
    print(json.dumps({"experiment": asked.experiment.name, **found}))
    return 0 if found["identical"] else 1


def twice(experiment: Path, folder: Path) -> dict[str, object]:
    """Run the experiment in two homes below `folder`; see the module."""
    alone_s = _demo(experiment, folder / "alone")
    with busy_processors(processors()):
        beside_s = _demo(experiment, folder / "beside")
    name = load_experiment(experiment).name
    alone, beside = (folder / home / name for home in ("alone", "beside"))
    different = differing(alone, beside)
    return {
        "identical": not different,
        "files": len(_hashes(alone)),
        "different": different,
        "alone_s": round(alone_s),
        "beside_s": round(beside_s),
    }


def differing(one: Path, other: Path) -> list[str]:
    """What two states of an experiment do not have in the same bytes, of what a person keeps.

    Raises:
        ValueError: the first holds nothing.
    """
    hashes, others = _hashes(one), _hashes(other)
    if not hashes:
        raise ValueError(f"{one} holds no models, tables or reports")
    return sorted(file for file in hashes.keys() | others.keys() if hashes.get(file) != others.get(file))


@contextlib.contextmanager
def busy_processors(count: int) -> Iterator[None]:
    """Within, loops keep so many processors busy."""
    context = multiprocessing.get_context("spawn")
    loops = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def _demo(experiment: Path, home: Path) -> float:
    """Seconds of `densityrm demo` on the experiment, its state in `home`. Raises CalledProcessError."""
    started = time.monotonic()
    variables = {**os.environ, "DENSITYRM_EXPERIMENT": str(experiment), "DENSITYRM_HOME": str(home)}
    subprocess.run([sys.executable, "-m", "densityrm_dagster", "demo"], env=variables, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _hashes(state: Path) -> dict[str, str]:
    files = {file for pattern in KEPT for file in state.glob(pattern) if file.is_file()}
    return {str(file.relative_to(state)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def _spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    sys.exit(main())

"""Commands that are killed, repeated, or run beside others: nothing is lost, nothing is left, nothing is made twice."""

import contextlib
import gzip
import os
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import polars as pl
import yaml
from mlflow import MlflowClient

from benchmarks.killed_data_stage import kill_and_compare

from .commands import REPOSITORY, TINY, demo, good_row, hh, only_hh


def processes_of(home: Path) -> list[int]:
    """Processes that work on a state folder."""
    mark = f"DENSITYRM_HOME={home}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0") and "zombie" not in (entry / "status").read_text():
                found.append(int(entry.name))
    return found


def test_a_killed_demo_leaves_no_process_and_goes_on_where_it_stopped(tmp_path: Path):
    home, path = tmp_path / "home", tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({**TINY, "reward_model": {"steps": 3000, "evaluate_every": 1000}}))
    variables = {**os.environ, "DENSITYRM_EXPERIMENT": str(path), "DENSITYRM_HOME": str(home)}
    command = [sys.executable, "-m", "densityrm_dagster", "demo"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stderr=log, stdout=log)  # noqa: S603  our own
    deadline = time.monotonic() + 200
    while "rm_uniform[0]" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert processes_of(home) == []
    made = (home / "tiny" / "tables" / "density_weights.parquet").stat().st_mtime_ns

    mirrors = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in mirrors.search_experiments()]
    assert "RUNNING" in {run.info.status for run in mirrors.search_runs(experiments)}

    result = demo(tmp_path, TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {run.info.status for run in mirrors.search_runs(experiments)} == {"FINISHED", "KILLED"}
    with dg.DagsterInstance.from_config(str(home / "tiny" / "dagster")) as instance:
        assert {run.status for run in instance.get_runs()} == {dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS}
    assert (home / "tiny" / "tables" / "density_weights.parquet").stat().st_mtime_ns == made
    assert "base_model[0]" not in result.stderr
    assert not list(home.rglob("*.tmp"))


def test_reading_data_after_a_kill_gives_the_tables_of_a_run_that_nobody_killed(tmp_path: Path):
    """The short version of `python -m benchmarks.killed_data_stage`."""
    outcome = kill_and_compare(tmp_path, kills=1, seed=1)
    assert outcome == {"kills": 1, "identical": 1, "leftovers": 0, "left_running": 0}


def test_changed_raw_rows_change_the_tables_of_the_next_run(tmp_path: Path):
    data = hh(tmp_path, *(good_row(i) for i in range(60)))
    settings = only_hh(data)
    assert demo(tmp_path, settings, command="read").returncode == 0
    again = demo(tmp_path, settings, command="read")
    assert "everything is up to date" in again.stderr
    with gzip.open(data / "more.jsonl.gz", "wt") as file:
        file.write("\n".join(good_row(i) for i in range(60, 90)) + "\n")
    grown = demo(tmp_path, settings, command="read")
    assert "HH-RLHF        90 rows read = 90 pairs + 0 rejects" in grown.stdout
    assert len(pl.read_parquet(tmp_path / "home" / "tiny" / "tables" / "prompts.parquet")) == 90


def test_two_experiments_share_a_home_and_do_not_disturb_each_other(tmp_path: Path):
    data = hh(tmp_path, *(good_row(i) for i in range(60)))
    one, two = ({**only_hh(data), "name": name} for name in ("one", "two"))
    for settings in (one, two):
        assert demo(tmp_path, settings, command="read").returncode == 0
    for settings in (one, two):
        assert "everything is up to date" in demo(tmp_path, settings, command="read").stderr
    tables = [(tmp_path / "home" / name / "tables" / "preference_pairs.parquet").read_bytes() for name in ("one", "two")]
    assert tables[0] == tables[1]

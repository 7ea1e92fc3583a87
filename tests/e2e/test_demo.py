"""One demo, killed while it reads and killed while it trains: it goes on where it stopped, up to the verdict."""

import gzip
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from mlflow import MlflowClient

from benchmarks.same_bytes import busy_processors, differing

from .commands import TINY, demo, kill_when, score

LONG = {**TINY, "reward_model": {"steps": 3000, "evaluate_every": 1000}}


@dataclass(frozen=True)
class Finished:
    """A demo that was killed twice: `result` of the command that finished it, and what the kills had left.

    Args:
        read: tables that were whole when the reading was killed.
        trained: tables that were whole when the training was killed, with the times they were written.
        mirrored: states of the MLflow runs then.
        running: processes that outlived a killed command.
    """

    folder: Path
    result: "subprocess.CompletedProcess[str]"
    read: set[str]
    trained: dict[Path, int]
    mirrored: set[str]
    running: list[int]

    @property
    def state(self) -> Path:
        return self.folder / "home" / "tiny"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("demo")
    tables = folder / "home" / "tiny" / "tables"
    running = kill_when("_pairs[0]", folder, LONG)
    read = {path.stem for path in tables.glob("*.parquet")}
    running += kill_when("rm_uniform[0]", folder, LONG)
    trained = {path: path.stat().st_mtime_ns for path in tables.glob("*.parquet")}
    mirrored = mlflow_states(folder)
    return Finished(folder, demo(folder, TINY), read, trained, mirrored, running)


def mlflow_states(folder: Path) -> set[str]:
    client = MlflowClient(f"sqlite:///{folder / 'home' / 'mlflow' / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.status for run in client.search_runs(experiments)}


def test_the_demo_prints_the_verdict(finished: Finished):
    result = finished.result
    assert result.returncode == 0, result.stderr[-3000:]
    assert "HH-RLHF        120 rows read = " in result.stdout
    assert "at this size" in result.stdout or "supported" in result.stdout
    assert "make up" in result.stdout
    assert "Traceback" not in result.stderr
    assert {path.name for path in finished.folder.iterdir()} == {"experiment.yaml", "home"}


def test_a_killed_demo_leaves_no_process_and_no_unfinished_file(finished: Finished):
    assert finished.running == []
    assert not list(finished.folder.rglob("*.tmp"))


def test_a_killed_demo_goes_on_where_it_stopped(finished: Finished):
    assert finished.state / "tables" / "density_weights.parquet" in finished.trained
    assert {path: path.stat().st_mtime_ns for path in finished.trained} == finished.trained
    assert "base_model[0]" not in finished.result.stderr


def test_runs_of_killed_demos_are_closed_and_the_data_have_a_run_of_their_own(finished: Finished):
    assert "RUNNING" in finished.mirrored
    assert mlflow_states(finished.folder) == {"FINISHED", "KILLED"}
    with dg.DagsterInstance.from_config(str(finished.state / "dagster")) as instance:
        states = [run.status.value for run in reversed(list(instance.get_runs()))]
    assert states == ["FAILURE", "SUCCESS", "FAILURE", "SUCCESS"]  # killed while it reads; read; killed while it trains; trained


def test_a_demo_that_nobody_killed_on_a_busy_machine_ends_in_the_same_bytes(finished: Finished, tmp_path: Path):
    """Tables, models and report.json; `python -m benchmarks.killed_data_stage` kills at random moments."""
    assert "preference_pairs" not in finished.read
    with busy_processors(1):
        assert demo(tmp_path, TINY).returncode == 0
    assert differing(tmp_path / "home" / "tiny", finished.state) == []


def test_a_registered_model_scores_a_file_into_a_file(finished: Finished, tmp_path: Path):
    given, out = tmp_path / "pairs.jsonl.gz", tmp_path / "scored.jsonl"
    with gzip.open(given, "wt") as file:
        file.writelines(json.dumps({"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."}) + "\n" for i in range(600))
    result = score(finished.folder / "home", str(given), "--model", "models:/tiny-rm_density@seed-0", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert pl.read_ndjson(out)["prompt"].to_list() == [f"{i}?" for i in range(600)]
    assert "scored 600 of 600 lines" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl.gz", "scored.jsonl"}

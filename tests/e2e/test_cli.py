"""What a person meets at the command line: one clear message for bad input, the verdict for good."""

import contextlib
import gzip
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml
from mlflow import MlflowClient

from benchmarks.killed_data_stage import kill_and_compare

from ..core.tiny_models import tiny_reward_model

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


def demo(folder: Path, settings: object, command: str = "demo", **environment: str) -> "subprocess.CompletedProcess[str]":
    path = folder / "experiment.yaml"
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    variables = {**os.environ, "DENSITYRM_EXPERIMENT": str(path), "DENSITYRM_HOME": str(folder / "home"), **environment}
    line = [sys.executable, "-m", "densityrm_dagster", command]
    return subprocess.run(line, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)  # noqa: S603  our own


def hh(folder: Path, *lines: str) -> Path:
    data = folder / "hh"
    data.mkdir()
    with gzip.open(data / "rows.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return data


def only_hh(path: Path) -> dict[str, object]:
    off = {"enabled": False}
    sources = {"hh_rlhf": {"path": str(path)}, "ultrafeedback": off, "stack_exchange": off}
    return {**TINY, "sources": sources, "judge": {"kind": "model"}}


def good_row(i: int) -> str:
    turn = f"\n\nHuman: Question {i}?\n\nAssistant:"
    return json.dumps({"chosen": f"{turn} Yes {i}.", "rejected": f"{turn} No {i}."})


def check_one_clear_message(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr + result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-3000:]
    for word in words:
        assert word in errors[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, subprocess.CompletedProcess[str]]":
    """Folder and result of a demo."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder, TINY)


def test_the_demo_prints_the_verdict(finished: "tuple[Path, subprocess.CompletedProcess[str]]"):
    folder, result = finished
    assert result.returncode == 0, result.stderr[-3000:]
    assert "HH-RLHF        120 rows read = " in result.stdout
    assert "at this size" in result.stdout or "supported" in result.stdout
    assert "make up" in result.stdout
    assert "Traceback" not in result.stderr
    assert {path.name for path in folder.iterdir()} == {"experiment.yaml", "home"}


def score(home: Path, *arguments: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "densityrm_dagster", "score", *arguments]
    variables = {**os.environ, "DENSITYRM_HOME": str(home)}
    return subprocess.run(  # noqa: S603  our own
        line, cwd=REPOSITORY, env=variables, input=given, capture_output=True, text=True, timeout=120
    )


def test_a_trained_reward_model_scores_lines_from_stdin_and_keeps_the_broken_ones(tmp_path: Path):
    folder, good = tiny_reward_model(tmp_path), {"prompt": "How?", "chosen": "Oil it.", "rejected": "No."}
    given = "\n".join([json.dumps(good), "{broken", json.dumps({"prompt": "How?", "response": "Oil it."})])
    result = score(tmp_path, "-", "--model", str(folder), given=given)
    first, second, third = map(json.loads, result.stdout.splitlines())
    assert result.returncode == 1
    assert first["margin"] == first["reward_chosen"] - first["reward_rejected"]
    assert second["raw"] == "{broken"
    assert second["error"].startswith("stdin:2: broken JSON")
    assert third["reward"] == pytest.approx(first["reward_chosen"], abs=1e-5)
    assert "scored 2 of 3 lines" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_registered_model_scores_a_file_into_a_file(finished: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path):
    given, out = tmp_path / "pairs.jsonl.gz", tmp_path / "scored.jsonl"
    with gzip.open(given, "wt") as file:
        file.writelines(json.dumps({"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."}) + "\n" for i in range(600))
    result = score(finished[0] / "home", str(given), "--model", "models:/tiny-rm_density@seed-0", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert pl.read_ndjson(out)["prompt"].to_list() == [f"{i}?" for i in range(600)]
    assert "scored 600 of 600 lines" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl.gz", "scored.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-", "--model", "models:/tiny-rm_density/1"], ["models:/tiny-rm_density/1", "nothing is registered", "DENSITYRM_HOME"]),
        (["-", "--model", "nowhere"], ["--model nowhere", "no such folder"]),
        (["nowhere.jsonl", "--model", "nowhere"], ["nowhere.jsonl does not exist"]),
        (["-", "--model", "nowhere", "--out", "scored.parquet"], ["--out scored.parquet", ".jsonl.gz"]),
    ],
)
def test_what_cannot_be_scored_at_all_is_one_message(tmp_path: Path, arguments: list[str], words: list[str]):
    check_one_clear_message(score(tmp_path, *arguments), *words)


def test_a_broken_line_names_its_file_and_row(tmp_path: Path):
    data = hh(tmp_path, good_row(1), '{"chosen": "half a li', good_row(2))
    check_one_clear_message(demo(tmp_path, only_hh(data)), "rows.jsonl.gz:2", "broken JSON", "sources.hh_rlhf.max_malformed")
    state = tmp_path / "home" / "tiny"
    written = [path.name for folder in ("tables", "models") for path in (state / folder).rglob("*")]
    assert not [name for name in written if name.startswith(("hh_rlhf", "preference", "base_model"))]
    assert not list(state.rglob("*.tmp"))


def test_a_missing_column_is_named(tmp_path: Path):
    data = hh(tmp_path, good_row(1), json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b"}))
    check_one_clear_message(demo(tmp_path, only_hh(data)), "rows.jsonl.gz:2", "'rejected'")


def test_a_missing_folder_is_named(tmp_path: Path):
    check_one_clear_message(demo(tmp_path, only_hh(tmp_path / "nowhere")), "nowhere", "sources.hh_rlhf.path")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("reward_model: {learning_rte: 1}", ["experiment.yaml", "reward_model.learning_rte", "did you mean 'learning_rate'"]),
        ("reward_model: {learning_rate: -0.001}", ["experiment.yaml", "reward_model.learning_rate", "greater than 0"]),
        ("sources: {hh_rlhf: {path: '${NO_SUCH_DATA}/hh'}}", ["sources.hh_rlhf.path", "NO_SUCH_DATA"]),
    ],
)
def test_a_wrong_experiment_file_stops_before_anything_is_written(tmp_path: Path, settings: str, words: list[str]):
    check_one_clear_message(demo(tmp_path, settings), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


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


def test_two_commands_at_once_on_one_experiment_are_one_too_many(tmp_path: Path):
    settings = only_hh(hh(tmp_path, *(good_row(i) for i in range(60))))
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda _: demo(tmp_path, settings, command="read"), range(2)))
    assert sorted(result.returncode for result in results) == [0, 1]
    refused = next(result for result in results if result.returncode)
    check_one_clear_message(refused, "another command is at work", "DENSITYRM_HOME")


def test_definitions_load_without_the_heavy_libraries():
    program = "import densityrm_dagster.definitions, sys; assert not {'torch','transformers','faiss','mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)  # noqa: S603  our own program

"""What a person meets at the command line: one clear message for bad input, the verdict for good."""

import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest

from ..core.tiny_models import tiny_reward_model
from .commands import REPOSITORY, TINY, check_one_clear_message, demo, good_row, hh, only_hh


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

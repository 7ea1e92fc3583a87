"""What a person meets at the command line: one clear message for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..core.tiny_models import tiny_reward_model
from .commands import REPOSITORY, check_one_clear_message, clear_messages, demo, good_row, only_hh, score, write_rows


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


def test_every_source_that_cannot_be_read_is_one_message_before_anything_is_trained(tmp_path: Path):
    broken = write_rows(tmp_path / "hh", good_row(1), '{"chosen": "half a li', good_row(2))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lacking = write_rows(tmp_path / "uf", json.dumps({"chosen": turns, "score_chosen": 1, "score_rejected": 0}))
    paths = {"hh_rlhf": broken, "ultrafeedback": lacking, "stack_exchange": tmp_path / "nowhere"}
    sources = {name: {"path": str(path)} for name, path in paths.items()}
    faults = {error.split()[1]: error for error in clear_messages(demo(tmp_path, {**only_hh(broken), "sources": sources}))}

    assert sorted(faults) == ["hh_rlhf_pairs:", "stack_exchange_pairs:", "ultrafeedback_pairs:"]
    for word in ("hh/rows.jsonl.gz:2", "broken JSON", "sources.hh_rlhf.max_malformed"):
        assert word in faults["hh_rlhf_pairs:"]
    for word in ("uf/rows.jsonl.gz:1", "'rejected'"):
        assert word in faults["ultrafeedback_pairs:"]
    for word in ("nowhere", "sources.stack_exchange.path"):
        assert word in faults["stack_exchange_pairs:"]
    state = tmp_path / "home" / "tiny"
    written = [path.name for folder in ("tables", "models") for path in (state / folder).rglob("*")]
    assert not [name for name in written if name.startswith((*paths, "preference", "base_model"))]
    assert not list(state.rglob("*.tmp"))


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


def test_definitions_load_without_the_heavy_libraries():
    program = "import densityrm_dagster.definitions, sys; assert not {'torch','transformers','faiss','mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)  # noqa: S603  our own program

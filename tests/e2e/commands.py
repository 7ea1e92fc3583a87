"""What the end-to-end tests share: a tiny experiment, raw rows of their own, and a command run as a person runs it."""

import gzip
import json
import os
import subprocess
import sys
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

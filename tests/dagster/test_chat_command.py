"""`densityrm chat`: prompts and commands in, replies out, whatever was named and typed."""

import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from densityrm_dagster.commands.main import app
from densityrm_dagster.commands.talk import labels

from ..core.tiny_models import TEXTS, tiny_language_model, tiny_reward_model

PROMPTS = "\n".join([TEXTS[0], "", TEXTS[3] * 5, TEXTS[3] * 5, "/retry", "/reset", TEXTS[0], "/quit", TEXTS[1]])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with policies of seeds 2 and 10, and a reward model."""
    home = tmp_path_factory.mktemp("home")
    models = home / "planted" / "models"
    for seed in ("2", "10"):
        tiny_language_model(models / "grpo_a" / seed)
    tiny_reward_model(models, models / "grpo_a" / "2")
    return home


def chat(home: Path, *arguments: str, given: str | bytes) -> Result:
    options = ["--seed", "1", "--max-new-tokens", "9"]
    environment = {"DENSITYRM_HOME": str(home), "DENSITYRM_EXPERIMENT": ""}
    return CliRunner(env=environment).invoke(app, ["chat", *arguments, *options], input=given)


def test_a_seed_repeats_a_conversation_and_what_was_lost_is_said_once(home: Path):
    first, second = (chat(home, "--model", "grpo_a", given=PROMPTS) for _ in range(2))
    assert first.exit_code == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.count("[…]\n\n") == 5
    assert first.stderr.splitlines() == [
        "grpo_a/10, temperature 1; --seed 1 repeats this conversation",
        "note: grpo_a/10 now reads only the last 48 tokens of the conversation",
    ]


def test_two_models_answer_one_after_the_other_with_their_rewards(home: Path):
    result = chat(home, "--model", "grpo_a", "--versus", "grpo_a/2", "--reward-model", "rm", given=TEXTS[0])
    assert result.exit_code == 0, result.stderr
    heads = re.findall(r"^(grpo_a/\d+)  reward ([+-]\d+\.\d{3})$", result.stdout, re.MULTILINE)
    assert [name for name, _ in heads] == ["grpo_a/10", "grpo_a/2"]
    assert heads[0][1] == heads[1][1]  # the same weights draw the same reply


@pytest.mark.parametrize(
    ("wrong", "fault"), [("/rest", "there is no /rest; /help"), (b"\xff", "no UTF-8"), ("/retry", "nothing was")]
)
def test_a_line_that_cannot_be_answered_is_said_and_the_others_are_answered(home: Path, wrong: str | bytes, fault: str):
    line = wrong if isinstance(wrong, bytes) else wrong.encode()
    result, without = (chat(home, "--model", "grpo_a", given=given + TEXTS[0].encode()) for given in (line + b"\n", b""))
    assert (result.exit_code, result.stdout) == (1, without.stdout)
    assert f"error: {fault}" in result.stderr.replace("this prompt is ", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "grpo_b"], ["--model grpo_b", "no such folder", "holds grpo_a, rm", "DENSITYRM_HOME"]),
        (["--model", "grpo_a/3"], ["--model grpo_a/3", "no such folder"]),
        (["--model", "grpo_a", "--versus", "../grpo_a"], ["--versus ../grpo_a", "no such folder"]),
        (["--model", "rm"], ["rm is a reward model, which writes nothing"]),
        (["--model", "grpo_a", "--reward-model", "grpo_a"], ["grpo_a/10 is no reward model"]),
        (["--model", "grpo_a", "--reward-model", "models:/rm/1"], ["models:/rm/1: nothing is registered"]),
    ],
)
def test_what_cannot_talk_is_one_message(home: Path, arguments: list[str], words: list[str]):
    result = chat(home, *arguments, given="hi")
    (error,) = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (1, "")
    assert error.startswith("error: ")
    for word in words:
        assert word in error


@pytest.mark.parametrize("option", [["--temperature", "nan"], ["--temperature", "0.001"], ["--top-p", "0"], ["--top-k", "-1"]])
def test_a_number_that_is_out_of_range_is_refused_with_its_option(home: Path, option: list[str]):
    result = chat(home, "--model", "grpo_a", *option, given="hi")
    assert result.exit_code == 2
    assert option[0] in result.stderr


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/x/models/grpo_a/0"], ["grpo_a/0"]),
        (["/x/models/grpo_a/0", "/x/models/grpo_b/0"], ["grpo_a/0", "grpo_b/0"]),
        (["/x/models/base_model", "/y/models/base_model"], ["x/models/base_model", "y/models/base_model"]),
        (["/x/base", "/x/base"], ["x/base (1)", "x/base (2)"]),
    ],
)
def test_models_are_called_by_the_end_of_their_path_that_tells_them_apart(folders: list[str], names: list[str]):
    assert labels([Path(folder) for folder in folders]) == names

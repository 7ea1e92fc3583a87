"""A wrong experiment file is one clear message that names the file and the key."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from densityrm_core.experiment import Experiment, ExperimentError, load_experiment

EXPERIMENTS = Path(__file__).parents[3] / "experiments"


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["planted", "sample", "full", "smollm2"])
def test_every_shipped_experiment_loads(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DENSITYRM_DATA", "/data")
    assert load_experiment(EXPERIMENTS / f"{name}.yaml").name == name


def test_the_planted_file_is_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DENSITYRM_EXPERIMENT", raising=False)
    assert load_experiment() == load_experiment(EXPERIMENTS / "planted.yaml")


def test_the_environment_selects_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DENSITYRM_EXPERIMENT", str(write(tmp_path, "name: mine")))
    assert load_experiment().name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward_model: {learning_rat: 1}", r"reward_model\.learning_rat: unknown key; did you mean 'learning_rate'"),
        ("reward_model: {learning_rate: -1}", r"reward_model\.learning_rate: should be greater than 0 \(got -1\)"),
        ("reward_model: {learning_rate: .nan}", r"reward_model\.learning_rate: should be a finite number"),
        ("seeds: []", r"seeds: "),
        ("seeds: [1, 1]", r"must not repeat"),
        ("arms: [e]", r"arms\.0: "),
        ("density: {target_ess: 1.5}", r"density\.target_ess: "),
        ("splits: {test: 0.9, judge: 0.2}", r"splits: validation \+ test \+ judge must stay below 1"),
        ("sources: {hh_rlhf: {path: /data}}", r"judge\.kind: 'planted' knows the truth of planted sources only"),
        ("name: ../up", r"name: "),
        ("just words", r"must hold a mapping"),
        ("a: [", r"is not valid YAML"),
        (
            "sources: {hh_rlhf: {path: '${NO_SUCH_FOLDER}/x'}}",
            r"sources\.hh_rlhf\.path: needs the environment variable NO_SUCH_FOLDER",
        ),
    ],
)
def test_a_wrong_file_names_the_place(text: str, message: str, tmp_path: Path):
    path = write(tmp_path, text)
    with pytest.raises(ExperimentError, match=message) as caught:
        load_experiment(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path):
    with pytest.raises(ExperimentError, match="cannot be read"):
        load_experiment(tmp_path / "none.yaml")


def test_an_experiment_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Experiment().name = "other"  # pyright: ignore[reportAttributeAccessIssue]  the point of the test


def test_the_fingerprint_follows_what_decides_the_outcome():
    plain = Experiment()
    assert plain.fingerprint == Experiment(seeds=(5, 6), name="other").fingerprint
    assert plain.fingerprint != Experiment.model_validate({"density": {"neighbors": 11}}).fingerprint

"""Every trained reward model is a version in MLflow's registry, which predicts rewards and can be had back by its name."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from densityrm_core.experiment import Experiment
from densityrm_core.reward_models.scoring import load_scorer
from densityrm_dagster.build import build_definitions
from densityrm_dagster.metadata import folder_hash
from densityrm_dagster.services import tracking_uri
from densityrm_dagster.tracking.mirror import REWARD_MODELS, MLflowTracker
from densityrm_dagster.tracking.registry import RegistryError, register_reward_model, registered_folder

from ..core.tiny_models import tiny_reward_model
from .conftest import TINY, Run
from .test_mlflow import tracker

FRAME = pd.DataFrame({"prompt": ["How do I brew coffee?", ""], "response": ["Sure: grind it. " * 40, "No."]})


@pytest.fixture
def registered(run: Run, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client of the registry, to which mlflow's own functions speak too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(run.root))
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(None)
    return MlflowClient()


@pytest.mark.parametrize("asset", ["rm_uniform", "rm_density"])
def test_a_materialization_is_a_version_that_names_where_it_comes_from(run: Run, registered: MlflowClient, asset: str):
    metadata, folder = run.metadata(asset), run.root / "tiny" / "models" / asset / "0"
    made = registered.get_model_version_by_alias(f"tiny-{asset}", "seed-0")
    assert metadata["registered_model"].value == f"models:/tiny-{asset}/{made.version}"
    assert str(metadata["registered_model_page"].value).endswith(f"/#/models/tiny-{asset}/versions/{made.version}")
    assert made.run_id == metadata["mlflow_run_id"].value
    assert made.tags["dagster.asset_key"] == asset
    assert made.tags["densityrm.seed"] == "0"
    assert made.tags["densityrm.fingerprint"] == run.experiment.fingerprint
    assert made.tags["densityrm.data_version"] == folder_hash(folder)
    assert run.instance.get_run_by_id(made.tags["dagster.run_id"]) is not None


def test_a_trained_judge_is_a_version_under_its_own_seed_whichever_partition_made_it(run: Run, tmp_path: Path):
    for made in ("tables", "models"):
        shutil.copytree(run.root / "tiny" / made, tmp_path / "tiny" / made)
    experiment = Experiment.model_validate({**TINY, "judge": {"kind": "model", "steps": 3}})
    job = build_definitions(experiment, tmp_path).resolve_job_def("run_experiment")
    result = job.execute_in_process(partition_key="1", asset_selection=[dg.AssetKey("rm_judge")])
    (event,) = result.asset_materializations_for_node("rm_judge")
    client = MlflowClient(tracking_uri(tmp_path))
    (alias, number), *others = client.get_registered_model("tiny-rm_judge").aliases.items()
    assert (alias, others) == ("seed-10000", [])
    assert event.metadata["registered_model"].value == f"models:/tiny-rm_judge/{number}"
    content = client.get_model_version("tiny-rm_judge", str(number)).tags["densityrm.data_version"]
    assert content == folder_hash(tmp_path / "tiny" / "models" / "rm_judge")


def test_a_registered_model_predicts_the_rewards_of_its_folder(run: Run, registered: MlflowClient):
    model = mlflow.pyfunc.load_model("models:/tiny-rm_density@seed-0")
    scorer = load_scorer(run.root / "tiny" / "models" / "rm_density" / "0")
    contexts = [[{"role": "user", "content": prompt}] for prompt in FRAME["prompt"]]
    assert model.predict(FRAME)["reward"].tolist() == pytest.approx(scorer.score(contexts, list(FRAME["response"])), abs=1e-6)
    assert model.metadata.signature.inputs.input_names() == ["prompt", "response"]
    assert model.metadata.signature.outputs.to_dict() == [{"type": "double", "name": "reward", "required": True}]
    assert list(model.input_example.columns) == ["prompt", "response"]


def test_a_frame_without_the_columns_is_refused(registered: MlflowClient):
    model = mlflow.pyfunc.load_model("models:/tiny-rm_density@seed-0")
    with pytest.raises(mlflow.exceptions.MlflowException, match="response"):
        model.predict(FRAME[["prompt"]])


def test_a_version_is_code_and_safetensors_and_holds_the_weights_once(run: Run, registered: MlflowClient):
    with registered_folder("models:/tiny-rm_density@seed-0", tracking_uri(run.root)) as folder:
        files = [path for path in folder.parents[1].rglob("*") if path.is_file()]
        assert folder_hash(folder) == folder_hash(run.root / "tiny" / "models" / "rm_density" / "0")
    assert [path.name for path in files if path.suffix in (".pkl", ".bin", ".pt", ".safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("uri", "fault"),
    [
        ("models:/tiny-rm_density/999", "not found"),
        ("models:/tiny-rm_density@seed-9", "seed-9 not found"),
        ("models:/nobody@seed-0", "name=nobody not found"),
        ("models:/tiny-rm_density", "write models:/<name>/<version> or models:/<name>@<alias>"),
    ],
)
def test_a_model_that_is_not_registered_is_named(run: Run, uri: str, fault: str):
    with pytest.raises(RegistryError, match=uri) as error, registered_folder(uri, tracking_uri(run.root)):
        pass
    assert fault in str(error.value)


def cards(resource: MLflowTracker, folder: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """What registering a folder once for each seed shows."""
    found: list[dict[str, Any]] = []

    @dg.asset
    def trained(context: dg.AssetExecutionContext, mlflow: MLflowTracker) -> None:
        for seed in seeds:
            tags = {"densityrm.experiment": "small", "densityrm.variant": "rm"}
            with mlflow.run(context, REWARD_MODELS, {"seed": seed}, tags) as mirror:
                found.append(register_reward_model(mirror, folder))

    assert dg.materialize([trained], resources={"mlflow": resource}).success
    return found


def test_the_alias_of_a_seed_moves_to_its_newest_version(tmp_path: Path):
    resource, folder = tracker(tmp_path), tiny_reward_model(tmp_path)
    made = [card["registered_model"] for card in cards(resource, folder, [0, 1, 0])]
    assert made == ["models:/small-rm/1", "models:/small-rm/2", "models:/small-rm/3"]
    client = MlflowClient(resource.tracking_uri)
    assert [client.get_model_version_by_alias("small-rm", f"seed-{seed}").version for seed in (0, 1)] == [3, 2]


def test_a_dead_registry_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert cards(tracker(tmp_path, "http://127.0.0.1:9"), tmp_path, [0]) == [{"mlflow_synced": False}]

"""One MLflow run a training, linked both ways, with the status it had; a dead tracker costs a warning."""

import time
from pathlib import Path

import dagster as dg
import pytest
from mlflow import MlflowClient

from densityrm_dagster.tracking.mirror import REWARD_MODELS, MLflowTracker

from .conftest import Run


def client(run: Run) -> MlflowClient:
    return MlflowClient(f"sqlite:///{run.root / 'mlflow' / 'mlflow.db'}")


def tracker(root: Path, uri: str | None = None) -> MLflowTracker:
    return MLflowTracker(
        tracking_uri=uri or f"sqlite:///{root / 'mlflow.db'}",
        artifacts=str(root / "artifacts"),
        ui_url="http://127.0.0.1:5000",
        dagster_url="http://127.0.0.1:3000",
    )


@pytest.mark.parametrize("asset", ["base_model", "rm_uniform", "rm_density", "grpo_a", "grpo_b", "grpo_c"])
def test_a_training_and_its_run_point_at_each_other(run: Run, asset: str):
    metadata = run.metadata(asset)
    mirrored = client(run).get_run(str(metadata["mlflow_run_id"].value))
    assert str(metadata["mlflow_run"].value).endswith(mirrored.info.run_id)
    assert mirrored.data.tags["dagster.asset_key"] == asset
    assert mirrored.data.tags["dagster.run_id"] in mirrored.data.tags["mlflow.note.content"] or "Dagster" in str(
        mirrored.data.tags
    )
    assert mirrored.info.status == "FINISHED"
    assert metadata["mlflow_synced"].value is True


def test_reward_models_line_up_for_comparison(run: Run):
    runs = [client(run).get_run(str(run.metadata(name)["mlflow_run_id"].value)) for name in ("rm_uniform", "rm_density")]
    uniform, density = (r.data for r in runs)
    assert set(uniform.metrics) == set(density.metrics) >= {"train/loss", "eval/accuracy", "final/accuracy", "final/loss"}
    assert {name for name in uniform.params if uniform.params[name] != density.params[name]} == {"variant", "sampling"}
    steps = [[m.step for m in client(run).get_metric_history(r.info.run_id, "eval/accuracy")] for r in runs]
    assert steps[0] == steps[1] == [160, 320]  # pairs seen


def context() -> dg.AssetExecutionContext:
    return dg.build_asset_context(partition_key="0")


@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_ends_as_its_block_did(tmp_path: Path, error: type[BaseException] | None, status: str):
    @dg.asset
    def trained(context: dg.AssetExecutionContext, mlflow: MLflowTracker) -> None:
        try:
            with mlflow.run(context, REWARD_MODELS, {"steps": 1}, {}) as mirror:
                mirror.log(1, {"train/loss": 0.5})
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass

    resource = tracker(tmp_path)
    assert dg.materialize([trained], resources={"mlflow": resource}).success
    found = MlflowClient(resource.tracking_uri)
    (only,) = found.search_runs([found.get_experiment_by_name(REWARD_MODELS).experiment_id])
    assert (only.info.status, only.data.metrics) == (status, {"train/loss": 0.5})


def test_a_dead_tracker_costs_a_warning_and_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    started = time.monotonic()

    @dg.asset
    def trained(context: dg.AssetExecutionContext, mlflow: MLflowTracker) -> dg.MaterializeResult:
        with mlflow.run(context, REWARD_MODELS, {}, {}) as mirror:
            for step in range(1000):
                mirror.log(step, {"train/loss": 0.5})
        return dg.MaterializeResult(metadata=mirror.metadata())

    result = dg.materialize([trained], resources={"mlflow": tracker(tmp_path, "http://127.0.0.1:9")})
    assert result.success
    assert result.asset_materializations_for_node("trained")[0].metadata["mlflow_synced"].value is False
    assert time.monotonic() - started < 60

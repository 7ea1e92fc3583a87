"""Runs of several seeds stand beside each other in MLflow: same metrics, same axis."""

import dagster as dg
from mlflow import MlflowClient

from densityrm_dagster.tracking.mirror import REWARD_MODELS

from .conftest import Run


def test_two_seeds_of_two_reward_models_have_the_same_metrics_at_the_same_steps(run: Run):
    job = run.definitions.resolve_job_def("run_experiment")
    models = [dg.AssetKey("rm_uniform"), dg.AssetKey("rm_density")]
    assert job.execute_in_process(instance=run.instance, partition_key="1", asset_selection=models).success

    client = MlflowClient(f"sqlite:///{run.root / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(REWARD_MODELS)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    newest = {(r.data.params["variant"], r.data.params["seed"]): r for r in reversed(found)}
    compared = [newest[variant, seed] for variant in ("rm_uniform", "rm_density") for seed in "01"]

    names = [set(r.data.metrics) for r in compared]
    assert names[0] >= {"train/loss", "train/accuracy", "eval/accuracy", "eval/loss", "final/accuracy", "final/loss"}
    assert all(other == names[0] for other in names)
    for name in sorted(names[0]):
        steps = [[point.step for point in client.get_metric_history(r.info.run_id, name)] for r in compared]
        assert steps[0] and all(other == steps[0] for other in steps), name

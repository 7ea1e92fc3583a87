"""Changed content re-materializes what hangs on it; the same content again does not. The schedule covers every seed."""

import datetime

import dagster as dg

from densityrm_core.experiment import Experiment
from densityrm_dagster.automation import on_new_content

from .conftest import Run


def test_the_weekly_schedule_runs_every_seed_and_prepares_the_data_once(run: Run):
    schedule = run.definitions.get_schedule_def("weekly_experiment")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_schedule_context(
            instance=instance,
            repository_def=run.definitions.get_repository_def(),
            scheduled_execution_time=datetime.datetime(2026, 1, 5, 3, tzinfo=datetime.UTC),
        )
        requests = schedule.evaluate_tick(context).run_requests
    assert [request.partition_key for request in requests] == ["0", "1"]
    assert requests[0].asset_selection is None
    assert dg.AssetKey("preference_pairs") not in requests[1].asset_selection
    assert dg.AssetKey("hypothesis_report") in requests[1].asset_selection


def test_the_sensor_is_shipped_stopped(run: Run):
    sensor = run.definitions.get_sensor_def("new_content")
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED


def test_jobs_select_their_stages(run: Run):
    def assets(job: str) -> set[str]:
        graph = run.definitions.resolve_job_def(job).asset_layer
        return {key.to_user_string() for key in graph.executable_asset_keys}

    assert "density_weights" in assets("prepare_data") and "base_model" not in assets("prepare_data")
    assert {"base_model", "rm_judge", "rm_uniform", "rm_density", "rm_evaluation"} == assets("train_reward_models")
    evaluated = {"policy_evaluation", "policy_curves", "policy_diversity"}
    assert {"grpo_a", "grpo_b", "grpo_c", *evaluated} == assets("train_policies")
    assert "hypothesis_report" in assets("run_experiment")


def test_only_changed_content_asks_for_a_new_materialization():
    content = {"version": "1"}

    @dg.asset
    def rows() -> dg.Output[int]:
        return dg.Output(1, data_version=dg.DataVersion(content["version"]))

    @dg.asset(automation_condition=on_new_content())
    def table(rows: int) -> dg.Output[int]:
        return dg.Output(2, data_version=dg.DataVersion(content["version"]))

    definitions = dg.Definitions([rows, table])
    with dg.DagsterInstance.ephemeral() as instance:

        def requested(cursor=None):
            outcome = dg.evaluate_automation_conditions(definitions, instance, cursor=cursor)
            return outcome.total_requested, outcome.cursor

        dg.materialize([rows, table], instance=instance)
        _, cursor = requested()
        assert requested(cursor)[0] == 0
        dg.materialize([rows], instance=instance)
        same, cursor = requested(cursor)
        content["version"] = "2"
        dg.materialize([rows], instance=instance)
        changed, cursor = requested(cursor)
        dg.materialize([rows, table], instance=instance)
        settled, _ = requested(cursor)
    assert (same, changed, settled) == (0, 1, 0)


def test_every_asset_of_the_graph_has_a_condition_that_can_be_evaluated(run: Run):
    with dg.DagsterInstance.ephemeral() as instance:
        outcome = dg.evaluate_automation_conditions(run.definitions, instance)
    assert Experiment and outcome.total_requested >= 0

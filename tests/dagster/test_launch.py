"""The launchpad shows the experiment's own fields, and a bad value stops a run before anything trains."""

import dagster as dg
import polars as pl
import pytest

from densityrm_core.experiment import Experiment
from densityrm_core.settings import RewardModelSettings
from densityrm_dagster.launch import chosen, launch_config

from .conftest import Run


def test_the_launchpad_has_the_sections_fields_defaults_and_descriptions():
    settings = RewardModelSettings(steps=77)
    fields = launch_config(settings).to_config_schema().as_field().config_type.fields
    assert set(fields) == set(RewardModelSettings.model_fields)
    assert fields["steps"].default_value == 77
    assert all(fields[name].description == field.description for name, field in RewardModelSettings.model_fields.items())


@pytest.mark.parametrize("asset", ["base_model", "rm_uniform", "rm_density", "rm_judge", "grpo_a", "grpo_b", "grpo_c"])
def test_every_training_asset_can_be_configured(run: Run, asset: str):
    job = run.definitions.resolve_job_def("run_experiment")
    assert job.graph.node_named(asset).definition.config_schema.config_type.fields


def test_a_chosen_value_reaches_the_training(run: Run):
    result = run.again("rm_uniform", run_config={"ops": {"rm_uniform": {"config": {"steps": 4}}}})
    assert result.success
    folder = run.root / "tiny" / "models" / "rm_uniform" / "0"
    assert '"steps": 4' in (folder / "densityrm.json").read_text()
    assert run.again("rm_evaluation").success
    rows = pl.read_parquet(run.root / "tiny" / "tables" / "rm_evaluation" / "0.parquet")
    assert rows["fingerprint"].unique().to_list() == [f"{run.experiment.fingerprint}+launch"]  # left out of the verdict
    assert run.again("rm_uniform", "rm_evaluation").success


def test_a_negative_learning_rate_is_refused_before_anything_trains_and_not_retried(run: Run):
    before = run.metadata("base_model")
    config = {"ops": {"rm_uniform": {"config": {"learning_rate": -1.0}}}}
    result = run.again("base_model", "rm_uniform", run_config=config, raise_on_error=False)
    assert not result.success
    messages = " ".join(str(event.message) + str(event.event_specific_data) for event in result.all_events if event.is_failure)
    assert "ops.rm_uniform.config.learning_rate: should be greater than 0 (got -1.0)" in messages
    assert not [event for event in result.all_events if event.is_step_up_for_retry or event.is_step_start]
    assert run.metadata("base_model") == before


def test_an_unknown_key_is_refused_at_launch(run: Run):
    with pytest.raises(dg.DagsterInvalidConfigError, match="learning_rat"):
        run.again("rm_uniform", run_config={"ops": {"rm_uniform": {"config": {"learning_rat": 1.0}}}})


def test_a_bad_value_is_a_failure_without_retries():
    section = Experiment().reward_model
    config = launch_config(section)(steps=0)
    with pytest.raises(dg.Failure, match=r"config\.steps: should be greater than or equal to 1") as caught:
        chosen(config, section)
    assert not caught.value.allow_retries

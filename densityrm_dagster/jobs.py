"""The jobs a person launches."""

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition  # its return type

from densityrm_core.experiment import Experiment
from densityrm_dagster.groups import OF_POLICIES, arms


def build_jobs(experiment: Experiment) -> dict[str, UnresolvedAssetJobDefinition]:
    """prepare_data, train_reward_models, train_policies and run_experiment, by name."""
    groups = dg.AssetSelection.groups
    policies = dg.AssetSelection.assets(*arms(experiment), *OF_POLICIES)
    return {
        job.name: job
        for job in (
            dg.define_asset_job("prepare_data", groups("pairs", "density"), description="Raw rows to density weights."),
            dg.define_asset_job(
                "train_reward_models",
                groups("models", "reward_models") | dg.AssetSelection.assets("rm_evaluation"),
                description="Base model, judge and both reward models of a seed, and what they are worth.",
            ),
            dg.define_asset_job("train_policies", policies, description="All arms of a seed, and what they are worth."),
            dg.define_asset_job("run_experiment", dg.AssetSelection.all(), description="Raw rows to the verdict, for one seed."),
        )
    }

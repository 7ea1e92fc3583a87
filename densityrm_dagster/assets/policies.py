"""Group policies: the arms of the 2 x 2 experiment, each a row of `densityrm_core.arms`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from densityrm_core.arms import ARMS, Arm
from densityrm_core.experiment import Experiment
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content
from densityrm_dagster.cards.policies import before_and_after
from densityrm_dagster.cards.reward_models import settings_table
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import version
from densityrm_dagster.io_managers import FolderIOManager
from densityrm_dagster.launch import chosen, launch_config
from densityrm_dagster.metadata import folder_output
from densityrm_dagster.partitions import seed_of, seed_partitions
from densityrm_dagster.tracking.mirror import POLICIES, MLflowTracker
from densityrm_dagster.tracking.training import tracked


def policy_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """One policy for each arm that the experiment turns on."""
    return [_policy(ARMS[name], experiment) for name in experiment.arms]


def _policy(arm: Arm, experiment: Experiment) -> dg.AssetsDefinition:
    name, config_class = f"grpo_{arm.name}", launch_config(experiment.grpo)

    @dg.asset(
        name=name,
        description=f"Policy of arm {arm.name.upper()}: GRPO against {arm.reward_model}, prompts sampled {arm.how}.",
        group_name="policies",
        kinds={"pytorch", "huggingface", "mlflow"},
        owners=OWNERS,
        code_version=version(3, experiment.grpo, experiment.sampling, experiment.compute.arithmetic()),
        io_manager_key="folders",
        partitions_def=seed_partitions(experiment),
        automation_condition=on_new_content(),
        ins={
            "preference_pairs": dg.AssetIn(input_manager_key="tables"),
            "density_weights": dg.AssetIn(input_manager_key="tables"),
            "reward_model": dg.AssetIn(arm.reward_model),
        },
        check_specs=[
            dg.AssetCheckSpec("losses_finite", asset=name, blocking=True, description="No loss of the run is NaN or infinite.")
        ],
    )
    def policy(
        context: dg.AssetExecutionContext,
        config: config_class,
        preference_pairs: pl.DataFrame,
        density_weights: pl.DataFrame,
        base_model: Path,
        reward_model: Path,
        experiment: dg.ResourceParam[Experiment],
        folders: dg.ResourceParam[FolderIOManager],
        mlflow: MLflowTracker,
    ) -> Iterator[Any]:
        from densityrm_core.models.folders import save_model
        from densityrm_core.policies.grpo import PolicyTask, train_policy
        from densityrm_core.policies.questions import held_out_prompts, training_prompts

        settings, folder, seed = chosen(config, experiment.grpo), folders.stage(context), seed_of(context)
        asked = training_prompts(preference_pairs, density_weights, by_density=arm.prompts == "density")
        sampling = {"reward_model": arm.reward_model, "prompts": arm.prompts}
        with (
            clear_failures(),
            tracked(
                context, mlflow, experiment, POLICIES, settings, name, "completions", folders.checkpoints(context), **sampling
            ) as training,
        ):
            watched = held_out_prompts(preference_pairs, density_weights, settings.evaluation_prompts, "validation")
            task = PolicyTask(base_model, reward_model, asked, watched, settings, seed, experiment.sampling, experiment.compute)
            trained = train_policy(task, training.watch)
            card = {"settings": settings.model_dump(mode="json"), "seed": seed, **sampling, **trained.card}
            save_model(trained.model, trained.codec, folder, card)
            training.keep(folder, "completions", trained.completions)
            shown = training.finish(folder, trained.metrics, ["reward/mean", "eval/reward", "eval/kl"])
        shown |= {"training_prompts": asked.height, "precision": trained.precision, "settings": settings_table(settings)}
        shown |= {**trained.how_it_went, **before_and_after(trained.completions, trained.kept_step)}
        yield folder_output(folder, shown)
        yield training.losses_finite()

    return policy

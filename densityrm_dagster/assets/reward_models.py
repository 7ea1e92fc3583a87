"""Group reward_models: the same training twice, differing in nothing but the sampler."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.experiment import Experiment
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content
from densityrm_dagster.cards.reward_models import settings_table, validation_plots
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import version
from densityrm_dagster.io_managers import FolderIOManager
from densityrm_dagster.launch import chosen, launch_config
from densityrm_dagster.metadata import folder_output
from densityrm_dagster.partitions import seed_of, seed_partitions
from densityrm_dagster.tracking.mirror import REWARD_MODELS, MLflowTracker
from densityrm_dagster.tracking.training import tracked

if TYPE_CHECKING:
    from densityrm_core.reward_models.train import RewardModelTask, TrainedRewardModel

_SAMPLING = {
    "rm_uniform": ("uniform", "Reward model trained on pairs sampled uniformly."),
    "rm_density": ("density", "Reward model trained on pairs sampled by 1/density of their prompt."),
}


def reward_model_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """The assets of this group."""
    return [_reward_model(name, experiment) for name in _SAMPLING]


def _reward_model(name: str, experiment: Experiment) -> dg.AssetsDefinition:
    sampling, description = _SAMPLING[name]
    config_class = launch_config(experiment.reward_model)

    @dg.asset(
        name=name,
        description=description,
        group_name="reward_models",
        kinds={"pytorch", "huggingface", "mlflow"},
        owners=OWNERS,
        code_version=version(4, experiment.reward_model, experiment.sampling, experiment.compute.arithmetic()),
        io_manager_key="folders",
        partitions_def=seed_partitions(experiment),
        automation_condition=on_new_content(),
        ins={table: dg.AssetIn(input_manager_key="tables") for table in ("preference_pairs", "pair_weights")},
        check_specs=[
            dg.AssetCheckSpec("losses_finite", asset=name, blocking=True, description="No loss of the run is NaN or infinite."),
            dg.AssetCheckSpec("beats_chance", asset=name, description="Accuracy on the validation split is above one half."),
        ],
    )
    def reward_model(
        context: dg.AssetExecutionContext,
        config: config_class,
        preference_pairs: pl.DataFrame,
        pair_weights: pl.DataFrame,
        base_model: Path,
        experiment: dg.ResourceParam[Experiment],
        folders: dg.ResourceParam[FolderIOManager],
        mlflow: MLflowTracker,
    ) -> Iterator[Any]:
        from densityrm_core.models.folders import save_model
        from densityrm_core.reward_models.train import RewardModelTask, train_reward_model

        settings, folder, seed = chosen(config, experiment.reward_model), folders.stage(context), seed_of(context)
        train, validation = (preference_pairs.filter(pl.col("split") == split) for split in ("train", "validation"))
        weights, checkpoints = _sampling_weights(sampling, pair_weights), folders.checkpoints(context)
        with (
            clear_failures(),
            tracked(
                context, mlflow, experiment, REWARD_MODELS, settings, name, "pairs", checkpoints, sampling=sampling
            ) as training,
        ):
            task = RewardModelTask(
                base_model, train, weights, validation, settings, seed, experiment.sampling, experiment.compute
            )
            trained = train_reward_model(task, training.watch)
            card = {"settings": settings.model_dump(mode="json"), "sampling": sampling, "seed": seed, **trained.card}
            save_model(trained.model, trained.codec, folder, card)
            shown = training.finish(folder, trained.metrics, ["train/accuracy", "eval/accuracy"]) | training.register(folder)
        plots = validation_plots(folder, validation, pair_weights, experiment, {"model": name, "seed": seed})
        yield folder_output(folder, shown | plots | _training_card(task, trained))
        yield training.losses_finite()
        yield _beats_chance(trained.metrics["eval/accuracy"], validation.height)

    return reward_model


def _sampling_weights(sampling: str, pair_weights: pl.DataFrame) -> npt.NDArray[np.float64]:
    """Of every training pair, in the order of the table."""
    from densityrm_core.sampling import uniform_weights

    by_density = pair_weights.filter(pl.col("split") == "train")["weight"].to_numpy()
    return by_density if sampling == "density" else uniform_weights(len(by_density))


def _training_card(task: "RewardModelTask", trained: "TrainedRewardModel") -> dict[str, Any]:
    return {
        "settings": settings_table(task.settings),
        "training_pairs": task.pairs.height,
        "truncated_texts": trained.codec.truncated,
        "kept_step": trained.step,
        "precision": trained.precision,
    }


def _beats_chance(accuracy: float, pairs: int) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="beats_chance",
        passed=accuracy > 0.5,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"accuracy": accuracy, "pairs": pairs},
    )

"""Group models: the policy every arm starts from, and the judge that compares them."""

from pathlib import Path

import dagster as dg
import polars as pl

from densityrm_core.experiment import Experiment
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import version
from densityrm_dagster.io_managers import FolderIOManager
from densityrm_dagster.launch import chosen, launch_config
from densityrm_dagster.metadata import folder_output
from densityrm_dagster.tracking.mirror import POLICIES, REWARD_MODELS, MLflowTracker
from densityrm_dagster.tracking.training import tracked

_COMMON = {"group_name": "models", "owners": OWNERS, "io_manager_key": "folders"}
_PAIRS = dg.AssetIn(input_manager_key="tables")
_JUDGE_SEED = 10_000  # a stream of its own, whatever the replicates' seeds are


def model_assets(experiment: Experiment, converted: Path) -> list[dg.AssetsDefinition]:
    """The assets of this group; base models that are no Hugging Face folders yet become some in `converted`."""
    return [_base_model(experiment, converted), _judge(experiment)]


def _base_model(experiment: Experiment, converted: Path) -> dg.AssetsDefinition:
    config_class = launch_config(experiment.base_model)

    @dg.asset(
        **_COMMON,
        code_version=version(4, experiment.base_model, experiment.compute.arithmetic()),
        kinds={"pytorch", "huggingface"},
        ins={"preference_pairs": _PAIRS},
        automation_condition=on_new_content(),
    )
    def base_model(
        context: dg.AssetExecutionContext,
        config: config_class,
        preference_pairs: pl.DataFrame,
        experiment: dg.ResourceParam[Experiment],
        folders: dg.ResourceParam[FolderIOManager],
        mlflow: MLflowTracker,
    ) -> dg.Output[Path]:
        """Tokenizer and language model, tuned on the chosen replies: where every arm starts."""
        from densityrm_core.models.base_model import train_base_model
        from densityrm_core.models.folders import save_model

        settings, folder = chosen(config, experiment.base_model), folders.stage(context)
        train = preference_pairs.filter(pl.col("split") == "train")
        with (
            clear_failures(),
            tracked(
                context, mlflow, experiment, POLICIES, settings, "base", "sequences", folders.checkpoints(context)
            ) as training,
        ):
            trained = train_base_model(train, settings, training.watch, experiment.compute, converted)
            model, codec = trained.model, trained.codec
            save_model(model, codec, folder, {"settings": settings.model_dump(mode="json"), **trained.card})
            final = {"train/loss": training.watch.last("train/loss")} if settings.steps else {}
            card = training.finish(folder, final, ["train/loss"])
        size = {"parameters": model.num_parameters(), "vocabulary": len(codec.tokenizer), "truncated_texts": codec.truncated}
        return folder_output(folder, {**card, **size})

    return base_model


def _judge(experiment: Experiment) -> dg.AssetsDefinition:
    config_class = launch_config(experiment.reward_model.model_copy(update={"steps": experiment.judge.steps}))

    @dg.asset(
        **_COMMON,
        code_version=version(3, experiment.judge, experiment.reward_model, experiment.planted, experiment.compute.arithmetic()),
        kinds={"pytorch", "huggingface"},
        ins={"preference_pairs": _PAIRS},
        automation_condition=on_new_content(),
    )
    def rm_judge(
        context: dg.AssetExecutionContext,
        config: config_class,
        preference_pairs: pl.DataFrame,
        base_model: Path,
        experiment: dg.ResourceParam[Experiment],
        folders: dg.ResourceParam[FolderIOManager],
        mlflow: MLflowTracker,
    ) -> dg.Output[Path]:
        """The gold judge: the planted rule where the truth is known, else a reward model of the judge split."""
        from densityrm_core.evaluation.judge import save_planted_judge
        from densityrm_core.models.folders import save_model
        from densityrm_core.reward_models.train import RewardModelTask, train_reward_model
        from densityrm_core.sampling import uniform_weights

        settings, folder = chosen(config, experiment.reward_model), folders.stage(context)
        if experiment.judge.kind == "planted":
            rule = save_planted_judge(experiment.planted, folder)
            context.log.info("the judge is the planted rule itself: exact, nothing to train")
            return folder_output(folder, {"judge": "planted rule", "rule": dg.MetadataValue.json(rule)})
        pairs = {split: preference_pairs.filter(pl.col("split") == split) for split in ("judge", "validation")}
        checkpoints = folders.checkpoints(context)
        with (
            clear_failures(),
            tracked(
                context, mlflow, experiment, REWARD_MODELS, settings, "rm_judge", "pairs", checkpoints, seed=_JUDGE_SEED
            ) as training,
        ):
            uniform = uniform_weights(pairs["judge"].height)
            task = RewardModelTask(
                base_model, pairs["judge"], uniform, pairs["validation"], settings, _JUDGE_SEED, compute=experiment.compute
            )
            trained = train_reward_model(task, training.watch)
            save_model(trained.model, trained.codec, folder, {"settings": settings.model_dump(mode="json"), **trained.card})
            card = training.finish(folder, trained.metrics, ["train/loss", "eval/loss"]) | training.register(folder)
            return folder_output(folder, {"judge": "reward model", **card})

    return rm_judge

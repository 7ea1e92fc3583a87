"""Group evaluation: what reward models and policies do on held-out prompts, and the verdict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from densityrm_core import tables
from densityrm_core.experiment import Experiment
from densityrm_core.settings import Settings
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import version
from densityrm_dagster.groups import REWARD_MODELS, arms
from densityrm_dagster.io_managers import TABLE
from densityrm_dagster.metadata import same_columns, table_output
from densityrm_dagster.partitions import seed_of, seed_partitions
from densityrm_dagster.terminal import counted
from densityrm_dagster.tracking.training import set_up_torch

_COMMON = {"group_name": "evaluation", "owners": OWNERS, "automation_condition": on_new_content()}
_TABLES = {n: dg.AssetIn(input_manager_key="tables") for n in ("preference_pairs", "density_weights", "pair_weights")}


def evaluation_assets(experiment: Experiment, downloads: Path) -> list[dg.AssetsDefinition]:
    """The assets of this group; sets from the hub are kept under `downloads`."""
    of_policies = [build(experiment) for build in (_policy_evaluation, _policy_curves, _policy_diversity)]
    return [_rm_evaluation(experiment, downloads), *of_policies]


def _rm_evaluation(experiment: Experiment, downloads: Path) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        kinds={"pytorch", "scikitlearn", "parquet"},
        io_manager_key="tables",
        code_version=version(3, experiment.fingerprint, experiment.evaluation.sets),
        metadata={TABLE: tables.RM_EVALUATION.name},
        partitions_def=seed_partitions(experiment),
        ins={name: _TABLES[name] for name in ("preference_pairs", "pair_weights")},
    )
    def rm_evaluation(
        context: dg.AssetExecutionContext,
        preference_pairs: pl.LazyFrame,
        pair_weights: pl.LazyFrame,
        rm_uniform: Path,
        rm_density: Path,
        experiment: dg.ResourceParam[Experiment],
    ) -> dg.Output[pl.DataFrame]:
        """Rewards of both reward models and of the baselines for every test pair, with the density stratum of its prompt."""
        from densityrm_core.evaluation.baselines import fit_baselines
        from densityrm_core.evaluation.reward_models import evaluate_baseline, evaluate_reward_model, exam_pairs
        from densityrm_core.evaluation.sets import read_set
        from densityrm_core.hardware import pick_device
        from densityrm_core.models.folders import common_precision
        from densityrm_core.tables import with_key
        from densityrm_dagster.cards.reward_models import measurements

        set_up_torch(experiment.compute)
        device, made_by = pick_device(experiment.compute.device), dict.fromkeys((rm_uniform, rm_density), experiment.reward_model)
        key: dict[str, Any] = {"seed": seed_of(context), "fingerprint": _fingerprint(context, experiment, made_by)}
        with clear_failures():
            precision = common_precision(made_by)
            sets = [read_set(name, path, downloads) for name, path in experiment.evaluation.sets.items()]
            exam = exam_pairs(preference_pairs, pair_weights, [found.pairs for found in sets])
            answers = {
                name: evaluate_reward_model(folder, exam, device, counted(context.log.info, f"pairs scored by {name}"))
                for name, folder in zip(REWARD_MODELS, made_by, strict=True)
            }
            baselines = {name: evaluate_baseline(it, exam) for name, it in fit_baselines(preference_pairs).items()}
        rows = pl.concat(
            with_key(frame, tables.RM_EVALUATION, model=name, precision=precision if name in answers else None, **key)
            for name, frame in (answers | baselines).items()
        )
        card, told = measurements(rows, sets, experiment.evaluation.bootstrap)
        for line in told:
            context.log.info(line)
        lineage = {
            **same_columns("preference_pairs", "pair_id", "prompt_id", "src"),
            **same_columns("pair_weights", "decile", "quartile"),
            **{f"chars_{side}": [("preference_pairs", side)] for side in ("chosen", "rejected")},
        }
        return table_output(rows, tables.RM_EVALUATION, lineage, card)

    return rm_evaluation


def _policy_evaluation(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        kinds={"pytorch", "parquet"},
        io_manager_key="tables",
        code_version=version(3, experiment.fingerprint, *experiment.arms),
        metadata={TABLE: tables.POLICY_EVALUATION.name},
        partitions_def=seed_partitions(experiment),
        ins={name: _TABLES[name] for name in ("preference_pairs", "density_weights")} | _folders(experiment),
    )
    def policy_evaluation(
        context: dg.AssetExecutionContext,
        preference_pairs: pl.DataFrame,
        density_weights: pl.DataFrame,
        experiment: dg.ResourceParam[Experiment],
        **folder: Path,
    ) -> dg.Output[pl.DataFrame]:
        """Replies of the base policy and of every arm to the same held-out prompts, with the judge's and both models' rewards."""
        from densityrm_core.evaluation.judge import load_judge
        from densityrm_core.evaluation.policies import evaluate_policies, open_exam
        from densityrm_core.hardware import pick_device
        from densityrm_core.models.folders import common_precision
        from densityrm_core.policies.questions import held_out_prompts
        from densityrm_core.tables import with_key
        from densityrm_dagster.cards.policies import evaluation_card

        set_up_torch(experiment.compute)
        device, settings = pick_device(experiment.compute.device), (experiment.evaluation, experiment.grpo)
        asked = held_out_prompts(preference_pairs, density_weights, experiment.evaluation.prompts)
        with clear_failures():
            precision = common_precision(folder.values())
            reward_models, judge = {name: folder[name] for name in REWARD_MODELS}, load_judge(folder["rm_judge"], device)
            exam = open_exam(folder["base_model"], reward_models, asked, judge, settings, seed_of(context), device)
            answers = evaluate_policies({arm: folder[f"grpo_{arm}"] for arm in experiment.arms}, exam, context.log.info)
        key = _key(context, experiment, folder) | {"precision": precision}
        rows = pl.concat(with_key(frame, tables.POLICY_EVALUATION, policy=name, **key) for name, frame in answers.items())
        lineage = same_columns("density_weights", "decile", "quartile") | same_columns("preference_pairs", "prompt_id")
        card = evaluation_card(rows, preference_pairs, experiment.evaluation.bootstrap)
        return table_output(rows, tables.POLICY_EVALUATION, lineage, card)

    return policy_evaluation


def _policy_curves(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        kinds={"pytorch", "parquet"},
        io_manager_key="tables",
        code_version=version(1, experiment.fingerprint, *experiment.arms),
        metadata={TABLE: tables.POLICY_CURVES.name},
        partitions_def=seed_partitions(experiment),
        ins={"preference_pairs": _TABLES["preference_pairs"]} | _folders(experiment),
    )
    def policy_curves(
        context: dg.AssetExecutionContext,
        preference_pairs: pl.LazyFrame,
        experiment: dg.ResourceParam[Experiment],
        **folder: Path,
    ) -> dg.Output[pl.DataFrame]:
        """The judge's reward of what every arm answered while it was trained, beside its KL from the base policy."""
        from densityrm_core.evaluation.curves import judged_curve
        from densityrm_core.evaluation.judge import load_judge
        from densityrm_core.hardware import pick_device
        from densityrm_core.tables import with_key
        from densityrm_dagster.cards.policies import curves_card

        set_up_torch(experiment.compute)
        contexts = preference_pairs.filter(pl.col("split") == "validation").select("prompt_id", "context").collect()
        with clear_failures():
            judge = load_judge(folder["rm_judge"], pick_device(experiment.compute.device))
            curves = {arm: judged_curve(folder[f"grpo_{arm}"], contexts, judge) for arm in experiment.arms}
        key = _key(context, experiment, folder)
        rows = pl.concat(with_key(frame, tables.POLICY_CURVES, policy=arm, **key) for arm, frame in curves.items())
        lineage = same_columns("preference_pairs", "prompt_id")
        return table_output(rows, tables.POLICY_CURVES, lineage, curves_card(rows, experiment.evaluation.bootstrap))

    return policy_curves


def _policy_diversity(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        kinds={"sentence-transformers", "parquet"},
        io_manager_key="tables",
        code_version=version(1, experiment.embedding),
        metadata={TABLE: tables.POLICY_DIVERSITY.name},
        partitions_def=seed_partitions(experiment),
        ins={"policy_evaluation": dg.AssetIn(input_manager_key="tables")},
    )
    def policy_diversity(
        context: dg.AssetExecutionContext, policy_evaluation: pl.DataFrame, experiment: dg.ResourceParam[Experiment]
    ) -> dg.Output[pl.DataFrame]:
        """How different the sampled replies of every policy are, in words and in meaning, within a prompt and across prompts."""
        from densityrm_core.evaluation.diversity import measure_diversity
        from densityrm_core.hardware import pick_device
        from densityrm_core.vectors.encoders import encoder_of_texts
        from densityrm_dagster.cards.policies import diversity_card

        set_up_torch(experiment.compute)
        compute = experiment.compute
        with clear_failures():
            encoder = encoder_of_texts(experiment.embedding, compute.search_threads, pick_device(compute.device))
            if encoder is None:
                context.log.warning("embedding.model is a file of vectors, which cannot embed replies: spreads are left out")
            rows = measure_diversity(policy_evaluation, encoder.encode if encoder else None)
        keys = ("seed", "policy", "prompt_id", "decile", "quartile", "entropy", "fingerprint")
        lineage = same_columns("policy_evaluation", *keys) | {
            column: [("policy_evaluation", "completion")]
            for column in ("distinct_1", "distinct_2", "self_bleu", "spread", "spread_across")
        }
        card = diversity_card(policy_evaluation, rows, experiment.evaluation.bootstrap)
        return table_output(rows, tables.POLICY_DIVERSITY, lineage, card)

    return policy_diversity


def _folders(experiment: Experiment) -> dict[str, dg.AssetIn]:
    """The folders of a seed that a table on policies is made from."""
    names = ("base_model", "rm_judge", *REWARD_MODELS, *arms(experiment))
    return {name: dg.AssetIn(input_manager_key="folders") for name in names}


def _key(context: dg.AssetExecutionContext, experiment: Experiment, folder: Mapping[str, Path]) -> dict[str, Any]:
    """Seed and fingerprint of a table on policies, made from `_folders`."""
    made_by: dict[Path, Settings] = {folder["base_model"]: experiment.base_model}
    made_by |= {folder[name]: experiment.reward_model for name in REWARD_MODELS}
    made_by |= {folder[f"grpo_{arm}"]: experiment.grpo for arm in experiment.arms}
    return {"seed": seed_of(context), "fingerprint": _fingerprint(context, experiment, made_by)}


def _fingerprint(context: dg.AssetExecutionContext, experiment: Experiment, made_by: Mapping[Path, Settings]) -> str:
    """The experiment's fingerprint, or another one if a model was trained with settings chosen at launch: not comparable."""
    from densityrm_core.models.folders import read_card

    other = [folder for folder, section in made_by.items() if read_card(folder)["settings"] != section.model_dump(mode="json")]
    if not other:
        return experiment.fingerprint
    names = ", ".join(str(folder) for folder in other)
    context.log.warning(f"trained with other settings than the experiment file's, so left out of the verdict: {names}")
    return f"{experiment.fingerprint}+launch"

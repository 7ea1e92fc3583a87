"""The graph materializes for one seed, and every asset tells what it is and what it holds."""

import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from mlflow import MlflowClient

from densityrm_core.experiment import Experiment
from densityrm_core.models.folders import read_card
from densityrm_core.vectors.arithmetic import choose_arithmetic
from densityrm_dagster.build import build_definitions

from .conftest import TINY, Run

GRAPH = {
    *("hh_rlhf_pairs", "ultrafeedback_pairs", "stack_exchange_pairs", "preference_pairs"),
    *("prompts", "prompt_embeddings", "density_weights", "pair_weights"),
    *("base_model", "rm_judge", "rm_uniform", "rm_density"),
    *("grpo_a", "grpo_b", "grpo_c", "rm_evaluation", "policy_evaluation", "policy_curves", "policy_diversity"),
    "hypothesis_report",
}
REJECTS = {"hh_rlhf_rejects", "ultrafeedback_rejects", "stack_exchange_rejects", "preference_rejects"}
TRAINED = ["base_model", "rm_uniform", "rm_density", "grpo_a", "grpo_b", "grpo_c"]
REPEATED = ["hh_rlhf_pairs", "hh_rlhf_rejects", "prompts", "base_model", "rm_density"]
EVALUATED = ["rm_evaluation", "policy_evaluation", "policy_curves", "policy_diversity"]
PER_SEED = ["rm_uniform", "rm_density", "grpo_a", "grpo_b", "grpo_c", *EVALUATED]


def specs(run: Run) -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in run.definitions.resolve_all_asset_specs()}


def test_the_whole_graph_materializes_for_one_seed(run: Run):
    assert run.result.success
    made = {event.asset_key.to_user_string() for event in run.result.get_asset_materialization_events() if event.asset_key}
    assert made == GRAPH | REJECTS


def test_the_graph_is_the_designs(run: Run):
    assert set(specs(run)) == GRAPH | REJECTS


def test_arm_d_appears_when_the_experiment_turns_it_on(tmp_path: Path):
    experiment = Experiment.model_validate({**TINY, "arms": ["a", "b", "c", "d"]})
    keys = build_definitions(experiment, tmp_path).resolve_asset_graph().get_all_asset_keys()
    assert dg.AssetKey("grpo_d") in keys


@pytest.mark.parametrize("asset", sorted(GRAPH))
def test_every_asset_says_what_it_is(run: Run, asset: str):
    spec = specs(run)[asset]
    assert spec.description and spec.description.strip()[-1] in ".?"
    assert spec.group_name in {"pairs", "density", "models", "reward_models", "policies", "evaluation"}
    assert spec.owners and spec.kinds and spec.code_version
    assert spec.automation_condition is not None


@pytest.mark.parametrize("asset", sorted(GRAPH))
def test_every_materialization_shows_rows_or_a_card_and_a_content_version(run: Run, asset: str):
    metadata = run.metadata(asset)
    assert {"dagster/row_count", "dagster/column_schema"} <= set(metadata) or {"size_mib", "path"} <= set(metadata)
    record = run.instance.get_latest_data_version_record(dg.AssetKey(asset))
    assert record is not None
    tags = record.asset_materialization.tags or {}
    assert tags["dagster/data_version_is_user_provided"] == "true"


@pytest.mark.parametrize(
    ("asset", "choice", "expected"),
    [
        ("base_model", "precision", "fp32"),
        ("rm_density", "precision", "fp32"),
        ("rm_density", "attention", "spans"),
        ("grpo_a", "rollouts", "transformers"),
        ("density_weights", "search", choose_arithmetic("auto", 384)),
    ],
)
def test_cards_and_mlflow_say_what_the_machine_decided(run: Run, asset: str, choice: str, expected: str):
    metadata = run.metadata(asset)
    assert metadata["hardware"].value[choice] == expected
    params = MlflowClient(f"sqlite:///{run.root / 'mlflow' / 'mlflow.db'}").get_run(metadata["mlflow_run_id"].value).data.params
    assert params[f"hardware.{choice}"] == expected and params["hardware.processor"]


def test_every_model_and_every_row_of_an_evaluation_says_its_precision(run: Run):
    models = run.root / "tiny" / "models"
    cards = [
        read_card(models / name) for name in ("base_model", "rm_uniform/0", "rm_density/0", "grpo_a/0", "grpo_b/0", "grpo_c/0")
    ]
    assert {card["precision"] for card in cards} == {"fp32"}
    rows = pl.read_parquet(run.root / "tiny" / "tables" / "rm_evaluation" / "0.parquet")
    assert set(rows.filter(pl.col("model").str.starts_with("rm_"))["precision"]) == {"fp32"}
    assert set(rows.filter(~pl.col("model").str.starts_with("rm_"))["precision"]) == {None}
    policies = pl.read_parquet(run.root / "tiny" / "tables" / "policy_evaluation" / "0.parquet")
    assert set(policies["precision"]) == {"fp32"}


def test_reward_models_of_two_precisions_are_not_evaluated_together(run: Run):
    card = run.root / "tiny" / "models" / "rm_density" / "0" / "densityrm.json"
    kept = card.read_text()
    card.write_text(kept.replace('"precision": "fp32"', '"precision": "bf16"'))
    try:
        failure = run.again("rm_evaluation", raise_on_error=False).failure_data_for_node("rm_evaluation")
        assert failure is not None and failure.user_failure_data is not None
        assert "models of two precisions are not compared" in (failure.user_failure_data.description or "")
    finally:
        card.write_text(kept)


@pytest.mark.parametrize("asset", PER_SEED)
def test_replicates_are_partitions(run: Run, asset: str):
    partitions = specs(run)[asset].partitions_def
    assert partitions is not None and partitions.get_partition_keys() == ["0", "1"]


@pytest.mark.parametrize("asset", ["preference_pairs", "prompts", "prompt_embeddings", "density_weights", *EVALUATED])
def test_tables_have_column_lineage(run: Run, asset: str):
    lineage = run.metadata(asset)["dagster/column_lineage"].value
    for deps in lineage.deps_by_column.values():
        for dep in deps:
            columns = run.metadata(dep.asset_key.to_user_string())["dagster/column_schema"].value.columns
            assert dep.column_name in {column.name for column in columns}


def test_every_check_passes(run: Run):
    evaluations = run.result.get_asset_check_evaluations()
    names = {evaluation.check_name for evaluation in evaluations}
    assert {"rows_accounted_for", "no_cluster_in_two_splits", "losses_finite", "beats_chance", "every_pair_has_a_weight"} <= names
    blocking_failures = [e.check_name for e in evaluations if not e.passed and e.severity == dg.AssetCheckSeverity.ERROR]
    assert blocking_failures == []


def test_rows_read_are_accounted_for(run: Run):
    for source in ("hh_rlhf", "ultrafeedback", "stack_exchange"):
        metadata = run.metadata(f"{source}_pairs")
        assert metadata["candidate_pairs"].value == metadata["pairs"].value + metadata["rejects"].value > 0


@pytest.mark.parametrize("asset", ["hypothesis_report", "density_weights", *EVALUATED])
def test_pictures_in_the_interface_stay_small(run: Run, asset: str):
    pictures = [v.md_str for v in run.metadata(asset).values() if isinstance(v, dg.MarkdownMetadataValue)]
    images = [part.split(")")[0] for text in pictures for part in text.split("data:image/png;base64,")[1:]]
    assert images and max(map(len, images)) < 100 * 1024 * 4 / 3


def test_every_reward_model_and_baseline_is_evaluated_on_the_same_pairs(run: Run):
    rows = pl.read_parquet(run.root / "tiny" / "tables" / "rm_evaluation" / "0.parquet")
    pairs = rows.group_by("model").agg(pl.col("pair_id").sort().hash().sum())
    assert set(pairs["model"]) == {"rm_uniform", "rm_density", "longer_reply", "shorter_reply", "bag_of_words"}
    assert pairs["pair_id"].n_unique() == 1


def test_the_card_of_reward_models_has_numbers_to_plot_and_tables_to_read(run: Run):
    metadata = run.metadata("rm_evaluation")
    numbers = {name for name, value in metadata.items() if isinstance(value, dg.FloatMetadataValue)}
    assert {"rm_uniform_accuracy", "rm_density_rare_accuracy", "rm_density_ece", "bag_of_words_accuracy"} <= numbers
    assert {"rm_uniform_log_loss", "longer_reply_accuracy", "reward_models_agreement"} <= numbers
    tables = [name for name in ("metrics", "by_source", "by_decile", "agreement") if "bag of words" in metadata[name].md_str]
    assert tables == ["metrics", "by_source", "by_decile", "agreement"]


def test_the_cards_of_policies_have_numbers_to_plot_and_tables_to_read(run: Run):
    evaluation, curves, diversity = (run.metadata(f"policy_{name}") for name in ("evaluation", "curves", "diversity"))
    numbers = {name for card in (evaluation, diversity) for name, v in card.items() if isinstance(v, dg.FloatMetadataValue)}
    assert {"base_judge_reward", "a_wins", "b_kl", "c_entropy", "base_distinct_2", "c_self_bleu", "a_spread_across"} <= numbers
    tables = ("summary", "gains", "wins_by_stratum")
    assert [name for name in tables if "B: RM" not in evaluation[name].md_str] == []
    assert "| a | 0 |" in curves["points"].md_str and "B: RM" in diversity["words"].md_str


def test_the_judge_scores_what_every_arm_answered_from_before_its_training_on(run: Run):
    rows = pl.read_parquet(run.root / "tiny" / "tables" / "policy_curves" / "0.parquet")
    start = rows.filter(pl.col("step") == 0)
    assert set(start["policy"]) == {"a", "b", "c"} and start["kl"].abs().max() < 1e-3
    assert start.group_by("policy").agg(pl.col("prompt_id").sort().hash().sum())["prompt_id"].n_unique() == 1
    pairs = pl.read_parquet(run.root / "tiny" / "tables" / "preference_pairs.parquet")
    assert set(rows["prompt_id"]) <= set(pairs.filter(pl.col("split") == "validation")["prompt_id"])


def test_a_policy_without_its_answers_says_what_to_materialize(run: Run):
    answers = run.root / "tiny" / "models" / "grpo_b" / "0" / "completions.parquet"
    kept = answers.read_bytes()
    answers.unlink()
    try:
        result = run.again("policy_curves", raise_on_error=False)
        failure = result.failure_data_for_node("policy_curves")
        assert failure is not None and failure.user_failure_data is not None
        assert "materialize grpo_b again" in (failure.user_failure_data.description or "")
    finally:
        answers.write_bytes(kept)


def test_the_report_is_written_with_its_figures(run: Run):
    folder = run.root / "tiny" / "reports" / "hypothesis_report"
    assert json.loads((folder / "report.json").read_text())["verdict"] in {"supported", "refuted", "undecided"}
    assert (folder / "report.md").read_text().startswith("# ")
    assert list(folder.glob("*.png"))


def test_models_load_in_a_process_that_never_imports_this_project(run: Run):
    models = run.root / "tiny" / "models"
    program = f"""
import sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
rm = AutoModelForSequenceClassification.from_pretrained({str(models / "rm_density" / "0")!r})
policy = AutoModelForCausalLM.from_pretrained({str(models / "grpo_b" / "0")!r})
tokenizer = AutoTokenizer.from_pretrained({str(models / "grpo_b" / "0")!r})
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "How?"}}], add_generation_prompt=True, return_tensors="pt")
ids = chat["input_ids"] if hasattr(chat, "keys") else chat
assert policy.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
assert rm(ids).logits.shape == (1, 1)
assert not [name for name in sys.modules if name.startswith("densityrm")]
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")  # noqa: S603  our own program


def test_a_policy_is_not_its_reward_model_nor_its_base(run: Run):
    from safetensors.torch import load_file

    models = run.root / "tiny" / "models"
    base, rm, policy = (load_file(models / name / "model.safetensors") for name in ("base_model", "rm_uniform/0", "grpo_a/0"))
    assert "score.weight" in rm and "score.weight" not in policy
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not policy[weight].equal(base[weight]) and not policy[weight].equal(rm[weight])


def test_the_same_inputs_give_the_same_data_versions(run: Run):
    def versions() -> dict[str, str]:
        records = {a: run.instance.get_latest_data_version_record(dg.AssetKey(a)) for a in REPEATED}
        return {a: record.asset_materialization.tags["dagster/data_version"] for a, record in records.items()}

    before = versions()
    assert run.again(*REPEATED).success
    assert versions() == before

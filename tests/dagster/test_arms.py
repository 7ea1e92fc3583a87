"""The arms are one training under different reward models and prompt weights, and nothing else."""

from mlflow import MlflowClient

from densityrm_core.models.folders import read_card
from densityrm_dagster.tracking.mirror import POLICIES

from .conftest import Run

DIFFER = {"variant", "reward_model", "prompts"}


def test_the_resolved_configs_of_the_arms_differ_only_in_reward_model_and_prompts(run: Run):
    client = MlflowClient(f"sqlite:///{run.root / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(POLICIES)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "params.seed = '0'")
    arms = {r.data.params["variant"]: r.data.params for r in found if r.data.params["variant"].startswith("grpo_")}
    assert sorted(arms) == ["grpo_a", "grpo_b", "grpo_c"]
    a = arms["grpo_a"]
    for other in (arms["grpo_b"], arms["grpo_c"]):
        assert set(other) == set(a) >= {"learning_rate", "kl_budget", "group_size", *DIFFER}
        assert {name for name in a if a[name] != other[name]} <= DIFFER
    assert (a["reward_model"], a["prompts"]) == ("rm_uniform", "uniform")
    assert (arms["grpo_b"]["reward_model"], arms["grpo_b"]["prompts"]) == ("rm_density", "uniform")
    assert (arms["grpo_c"]["reward_model"], arms["grpo_c"]["prompts"]) == ("rm_uniform", "density")


def test_the_models_themselves_say_the_same(run: Run):
    cards = [read_card(run.root / "tiny" / "models" / f"grpo_{arm}" / "0") for arm in "abc"]
    assert all(card["settings"] == cards[0]["settings"] and card["seed"] == cards[0]["seed"] for card in cards)
    scales = [(card["reward_mean"], card["reward_std"]) for card in cards]
    assert scales[0] == scales[2] != scales[1]


def test_answers_are_shown_before_and_after_and_kept_as_a_table(run: Run):
    shown = run.metadata("grpo_a")
    assert "rare" in shown["before_and_after"].value
    assert "common" in shown["before_and_after"].value
    client = MlflowClient(f"sqlite:///{run.root / 'mlflow' / 'mlflow.db'}")
    mine = client.get_run(shown["mlflow_run_id"].value)
    assert "completions.json" in [artifact.path for artifact in client.list_artifacts(mine.info.run_id)]
    assert {"eval/reward", "eval/kl", "reward/mean", "kl/sequence"} <= set(mine.data.metrics)

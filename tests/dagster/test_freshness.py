"""What is up to date is not made again; what changed, and all that hangs on it, is."""

import dagster as dg
import pytest

from densityrm_core.experiment import Experiment
from densityrm_dagster.build import build_definitions
from densityrm_dagster.freshness import outdated

from .conftest import TINY, Run

EVALUATED = {"rm_evaluation", "policy_evaluation", "policy_curves", "policy_diversity", "hypothesis_report"}
PER_SEED = {"rm_uniform", "rm_density", "grpo_a", "grpo_b", "grpo_c", *EVALUATED}


def names(run: Run, seed: str = "0", **changes: object) -> set[str]:
    definitions = build_definitions(Experiment.model_validate({**TINY, **changes}), run.root)
    return {key.to_user_string() for key in outdated(run.instance, definitions, seed)}


def test_a_finished_seed_has_nothing_left_to_do(run: Run):
    assert names(run) == set()


def test_a_further_seed_trains_and_evaluates_but_prepares_no_data(run: Run):
    assert names(run, "1") == PER_SEED


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"grpo": {"steps": 4}}, {"rm_uniform", "rm_density", "density_weights", "base_model", "rm_judge"}),
        ({"density": {"target_ess": 0.5}}, {"base_model", "rm_judge", "prompt_embeddings"}),
        ({"reward_model": {"steps": 11, "evaluate_every": 5}}, {"base_model", "density_weights"}),
    ],
)
def test_a_changed_setting_outdates_what_hangs_on_it_and_nothing_else(run: Run, changes: dict[str, object], kept: set[str]):
    found = names(run, **changes)
    assert {"grpo_a", "policy_evaluation", "policy_curves", "policy_diversity", "hypothesis_report"} <= found
    assert not kept & found


@pytest.mark.parametrize("lost", ["hh_rlhf_pairs", "hh_rlhf_rejects"])
def test_what_one_step_makes_is_made_again_together_if_a_part_of_it_is_lost(run: Run, lost: str):
    found = outdated(run.instance, run.definitions, "0", exists=lambda key, _: key.to_user_string() != lost)
    assert {"hh_rlhf_pairs", "hh_rlhf_rejects", "preference_pairs"} <= {key.to_user_string() for key in found}
    assert dg.AssetKey("ultrafeedback_pairs") not in found
    job = run.definitions.resolve_job_def("run_experiment")
    assert job.get_subset(asset_selection=set(found)) is not None  # Dagster refuses half a step


def test_everything_is_outdated_at_first(run: Run):
    with dg.DagsterInstance.ephemeral() as empty:
        assert len(outdated(empty, run.definitions, "0")) == len(run.definitions.resolve_asset_graph().get_all_asset_keys())

"""Policies are asked the same, with the same luck; of n replies of the base policy a reward model takes the one it likes best."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import pytest
import torch

from densityrm_core.evaluation.policies import (
    PolicyEvaluationError,
    PolicyExam,
    best_of_n,
    evaluate_policies,
    evaluate_policy,
    open_exam,
)
from densityrm_core.models.folders import load_causal_lm, load_codec, new_reward_model, save_model
from densityrm_core.pairs.prompts import prompt_ids
from densityrm_core.policies.questions import held_out_prompts
from densityrm_core.policies.rewards import RewardScale
from densityrm_core.policies.rollout import sample_completions
from densityrm_core.settings import EvaluationSettings, GrpoSettings
from densityrm_core.streams import stream_seed
from densityrm_core.tables import POLICY_EVALUATION, with_key

from ..tiny_models import tiny_language_model

GRPO = GrpoSettings(max_new_tokens=6)


def judge(contexts, replies):
    return [float(len(reply)) for reply in replies]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untrained base model, two reward models on it, the second twice as generous, and another policy."""
    root = tmp_path_factory.mktemp("models")
    base = tiny_language_model(root / "base")
    for number, name in enumerate(("rm_uniform", "rm_density")):
        card = {"reward_mean": 0.0, "reward_std": 0.5 if number else 1.0}
        save_model(new_reward_model(base, seed=number), load_codec(base), root / name, card)
    other = load_causal_lm(base)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(3)  # as at a third of the temperature
    save_model(other, load_codec(base), root / "other", {})
    return {name: root / name for name in ("base", "rm_uniform", "rm_density", "other")}


@pytest.fixture(scope="module")
def asked() -> pl.DataFrame:
    prompts = pl.Series("prompt", [f"How do I fix my bicycle number {i}?" for i in range(40)])
    pairs = pl.DataFrame([prompt_ids(prompts), prompts]).with_columns(
        split=pl.lit("test"), context=pl.struct(role=pl.lit("user"), content="prompt").reshape((40, 1)).arr.to_list()
    )
    weights = pairs.select("prompt_id").with_columns(decile=pl.lit(1, pl.Int64), quartile=pl.lit(2, pl.Int64))
    return held_out_prompts(pairs, weights, 37)


def exam(folders: dict[str, Path], asked: pl.DataFrame, **settings: object) -> PolicyExam:
    models = {name: folders[name] for name in ("rm_uniform", "rm_density")}
    return open_exam(folders["base"], models, asked, judge, (EvaluationSettings(**settings), GRPO), seed=3)


def test_the_base_policy_is_at_no_distance_from_itself_and_has_no_own_reward(folders, asked):
    rows = evaluate_policy(None, None, exam(folders, asked, samples=2))
    assert rows.height == 37 * 3 and rows["kl"].abs().max() == 0
    assert rows["own_reward"].null_count() == rows.height


def test_a_policy_with_the_base_policys_weights_says_the_same(folders, asked):
    taken = exam(folders, asked, samples=2)
    base, same = evaluate_policy(None, None, taken), evaluate_policy(folders["base"], "rm_density", taken)
    assert same["completion"].to_list() == base["completion"].to_list()
    assert same["own_reward"].to_list() == same["rm_density_reward"].to_list()


def test_a_surer_policy_has_less_entropy_and_is_at_a_distance(folders, asked):
    taken = exam(folders, asked, samples=3)
    base, other = evaluate_policy(None, None, taken), evaluate_policy(folders["other"], "rm_uniform", taken)
    assert base["entropy"].mean() == pytest.approx(math.log(300), rel=0.02)
    assert other["entropy"].mean() < base["entropy"].mean() - 0.05
    assert other.filter(pl.col("sample") > 0)["kl"].mean() > 0.05


def test_best_of_n_takes_the_reply_that_the_reward_model_ranks_highest(folders, asked):
    taken = exam(folders, asked, samples=1, best_of=5)
    found = best_of_n(taken)
    assert set(found) == {"best_of_5_uniform", "best_of_5_density"}
    uniform, density = found["best_of_5_uniform"], found["best_of_5_density"]
    assert uniform["prompt_id"].to_list() == density["prompt_id"].to_list() == asked["prompt_id"].to_list()
    assert (uniform["rm_uniform_reward"] >= density["rm_uniform_reward"]).all()
    assert (density["rm_density_reward"] >= uniform["rm_density_reward"]).all()
    differ = uniform["completion"] != density["completion"]
    assert differ.any() and (uniform.filter(differ)["rm_uniform_reward"] > density.filter(differ)["rm_uniform_reward"]).any()
    assert uniform["own_reward"].to_list() == uniform["rm_uniform_reward"].to_list()
    assert uniform["kl"].to_list() == pytest.approx([math.log(5) - 4 / 5] * 37)
    assert uniform["judge_reward"].to_list() == [len(reply) for reply in uniform["completion"]]


def test_the_best_reply_is_that_of_a_slow_loop_over_the_same_replies(folders, asked):
    taken = exam(folders, asked.head(6), samples=1, best_of=4)
    rows, rewarders = best_of_n(taken)["best_of_4_density"].to_dicts(), taken.rewarders
    prompts = [taken.codec.prompt(context) for context in taken.prompts["context"].to_list()]
    seed = stream_seed(taken.seed, "best of n", 0)
    groups = sample_completions(taken.base, prompts, taken.codec.eos, 4, taken.sampling, seed).groups
    for row, context, prompt, group in zip(rows, taken.prompts["context"].to_list(), prompts, groups, strict=True):
        scored = {
            name: [rewarder.rewards([context], [prompt], [[reply]]).item() for reply in group]
            for name, rewarder in rewarders.items()
        }
        best = scored["rm_density"].index(max(scored["rm_density"]))
        assert (row["completion"], row["tokens"]) == (taken.codec.text(group[best]), len(group[best]))
        assert row["rm_uniform_reward"] == pytest.approx(scored["rm_uniform"][best], abs=1e-5)


def test_all_policies_together_make_the_table_and_best_of_is_off_unless_asked_for(folders, asked):
    answers = evaluate_policies({"b": folders["other"]}, exam(folders, asked.head(5), samples=1, best_of=2))
    assert list(answers) == ["base", "b", "best_of_2_uniform", "best_of_2_density"]
    rows = pl.concat(
        with_key(f, POLICY_EVALUATION, seed=0, precision="fp32", fingerprint="f", policy=p) for p, f in answers.items()
    )
    assert rows.group_by("policy").len().sort("len")["len"].to_list() == [5, 5, 10, 10]
    assert list(evaluate_policies({}, exam(folders, asked.head(5), samples=1))) == ["base"]


def test_a_reward_that_is_not_finite_names_its_model(folders, asked):
    taken = exam(folders, asked.head(3), samples=1)
    broken = taken.rewarders["rm_density"].on(RewardScale(float("nan"), 1.0))
    taken.rewarders["rm_density"] = broken
    with pytest.raises(PolicyEvaluationError, match="rm_density: 6 rewards are not finite"):
        evaluate_policy(None, None, taken)

"""Policies beside the base policy: win rates, gains in one unit, intervals, strata."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from densityrm_core.arms import best_of_name, in_order, policy_title, reward_model_of
from densityrm_core.measurement.frames import interval_of
from densityrm_core.measurement.policies import measure, prompt_cells, win_rates
from densityrm_core.tables import POLICY_DIVERSITY, POLICY_EVALUATION

from ..policy_rows import diversity_of, evaluation, samples

NO_DIVERSITY = POLICY_DIVERSITY.empty()


def test_a_policy_wins_half_against_itself():
    rng = np.random.default_rng(0)
    rewards = {f"p{i}": rng.integers(0, 4, 4).astype(float).tolist() for i in range(20)}
    assert win_rates(evaluation([*samples("base", rewards), *samples("a", rewards)]))["wins"].mean() == 0.5


def test_win_rate_is_over_all_pairs_of_samples_and_ties_count_half():
    rows = evaluation([*samples("base", {"p": [1, 2]}), *samples("a", {"p": [2, 3, 0]})])
    # 2 beats 1 and ties 2, 3 beats both, 0 beats neither
    assert win_rates(rows).rows() == [(0, "a", "p", pytest.approx((1.5 + 2 + 0) / 6))]


def test_greedy_completions_take_no_part():
    rows = [*samples("base", {"p": [0]}), *samples("a", {"p": [1]}), {"policy": "base", "sample": 0, "judge_reward": 9.0}]
    assert win_rates(evaluation(rows))["wins"].to_list() == [1]


def test_a_seed_without_its_base_policy_is_compared_with_that_of_the_others():
    rows = evaluation([*samples("base", {"p": [1]}), *samples("a", {"p": [2]}, seed=1)])
    assert win_rates(rows).rows() == [(1, "a", "p", 1.0)]


def test_gains_are_in_standard_deviations_of_the_base_policys_rewards():
    base = [
        {"policy": "base", "prompt_id": p, "judge_reward": 10 * x, "rm_uniform_reward": x, "rm_density_reward": 100 * x}
        for p, x in (("p", 1.0), ("q", 3.0))
    ]
    arms = [
        {
            "policy": a,
            "prompt_id": "p",
            "judge_reward": 20.0,
            "rm_uniform_reward": 4.0,
            "rm_density_reward": 500.0,
            "own_reward": 0,
        }
        for a in ("a", "b")
    ]
    cells = prompt_cells(evaluation([*base, *arms]), NO_DIVERSITY)
    deviation = 2**0.5  # of 1 and 3
    own = {row["policy"]: row for row in cells.to_dicts()}
    assert own["a"]["judge_gain"] == pytest.approx(1 / deviation)
    assert own["a"]["own_gain"] == pytest.approx(3 / deviation)  # arm A was trained on rm_uniform
    assert own["b"]["own_gain"] == pytest.approx(4 / deviation)  # arm B on rm_density
    assert own["b"]["own_less_judge"] == pytest.approx(3 / deviation)
    assert own["a"]["change"] == 10
    assert own["base"]["change"] is own["base"]["wins"] is own["base"]["own_gain"] is None


def test_a_judge_that_cannot_tell_the_base_policys_replies_apart_gives_no_gain():
    cells = prompt_cells(evaluation([*samples("base", {"p": [1, 1]}), *samples("a", {"p": [2, 2]})]), NO_DIVERSITY)
    assert cells.filter(policy="a")["judge_gain"].to_list() == [None]


def rows_of(effect: float, seeds=(0, 1)) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    rows = [
        {"seed": s, "policy": p, "prompt_id": f"{i}", "decile": i % 10 + 1, "quartile": i % 4 + 1, "sample": k,
         "judge_reward": i % 7 + (effect * (i % 4 == 0) if p == "a" else 0.0) + rng.normal(0, 0.1), "own_reward": 0.0}
        for s in seeds for p in ("base", "a") for i in range(80) for k in range(3)
    ]  # fmt: skip
    return evaluation(rows)


def test_change_is_paired_by_prompt_and_measured_in_each_stratum():
    measured = measure(rows_of(1.0), NO_DIVERSITY, 300)
    rare, common = (interval_of(measured, stratum=f"{s} quartile", policy="a", metric="change") for s in ("rare", "common"))
    alone = interval_of(measured, by="all", policy="a", metric="judge_reward")
    assert rare.mean == pytest.approx(1, abs=0.1) and common.mean == pytest.approx(0, abs=0.1)
    assert rare.high - rare.low < 0.2 * (alone.high - alone.low)


def test_deciles_are_measured_in_order_with_their_prompts():
    deciles = measure(rows_of(1.0), NO_DIVERSITY, 100).filter(by="decile", policy="a", metric="wins")
    assert deciles["stratum"].to_list() == [str(d) for d in range(1, 11)]
    assert deciles["prompts"].to_list() == [8] * 10


def test_what_is_undefined_is_left_out():
    rows = evaluation(samples("base", {"p": [1.0], "q": [2.0]}))
    measured = measure(rows, diversity_of(rows).with_columns(self_bleu=pl.lit(None, pl.Float64)), 100)
    found = set(measured["metric"])
    assert {"judge_reward", "distinct_1", "entropy"} <= found
    assert not {"self_bleu", "wins", "change", "own_reward", "greedy"} & found


def test_the_order_of_rows_does_not_matter():
    rows = rows_of(0.3)
    shuffled = rows.sample(fraction=1, shuffle=True, seed=1)
    assert measure(rows, diversity_of(rows), 100).equals(measure(shuffled, diversity_of(rows).reverse(), 100))


def test_no_rows_measure_nothing():
    assert measure(POLICY_EVALUATION.empty(), NO_DIVERSITY, 100).is_empty()


def test_policies_say_which_reward_model_is_theirs():
    names = [best_of_name(16, "rm_density"), "d", "base", "a"]
    assert in_order(names) == ["base", "a", "d", "best_of_16_density"]
    assert [reward_model_of(name) for name in in_order(names)] == [None, "rm_uniform", "rm_density", "rm_density"]
    assert policy_title(names[0]) == "best of 16, density"

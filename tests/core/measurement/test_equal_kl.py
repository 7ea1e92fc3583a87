"""Arms are compared where they are equally far from the base policy, prompt by prompt."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from densityrm_core.measurement.equal_kl import common_kl, compare_at_equal_kl, mean_curves, rewards_at
from densityrm_core.report.policy_plots import reward_against_kl
from densityrm_core.report.policy_section import equal_kl_sentence
from densityrm_core.tables import POLICY_CURVES

from ..policy_rows import curve

FAR = curve("a", [(0, 0.0, {"p": 0, "q": 0}), (10, 1.0, {"p": 1, "q": 2}), (20, 4.0, {"p": 3, "q": 2})])
NEAR = curve("b", [(0, 0.0, {"p": 0, "q": 0}), (10, 2.25, {"p": 5, "q": 1})])


def rewards(frame: pl.DataFrame) -> dict[str, float]:
    return dict(frame.select("prompt_id", "judge_reward").iter_rows())


def test_the_common_kl_is_the_largest_that_every_arm_reaches():
    assert common_kl(pl.concat([FAR, NEAR])) == 2.25


def test_reward_is_linear_in_the_root_of_kl_between_evaluations_prompt_by_prompt():
    # sqrt 2.25 lies half way from sqrt 1 to sqrt 4
    assert rewards(rewards_at(FAR, 2.25)) == pytest.approx({"p": 2.0, "q": 2.0})
    assert rewards_at(FAR, 2.25)["own_reward"].to_list() == pytest.approx([4.0, 4.0])


def test_at_an_evaluation_reward_is_that_evaluations():
    assert rewards(rewards_at(FAR, 1.0)) == {"p": 1, "q": 2}
    assert rewards(rewards_at(FAR, 0.0)) == {"p": 0, "q": 0}


def test_a_curve_that_turns_back_is_read_where_it_first_reaches_the_kl():
    back = curve("a", [(0, 0.0, {"p": 0}), (10, 4.0, {"p": 2}), (20, 0.5, {"p": 9}), (30, 4.0, {"p": 7})])
    assert rewards(rewards_at(back, 1.0)) == pytest.approx({"p": 1})
    assert common_kl(back) == 4


def test_a_kl_estimate_below_zero_counts_as_zero():
    noisy = curve("a", [(0, 0.0, {"p": 0}), (10, -0.3, {"p": 1}), (20, 1.0, {"p": 3})])
    assert rewards(rewards_at(noisy, 0.25)) == pytest.approx({"p": 2})


def test_a_kl_beyond_the_curve_is_refused():
    with pytest.raises(ValueError, match=r"ends at KL 4\.0"):
        rewards_at(FAR, 4.1)


def test_differences_are_those_of_arms_at_the_common_kl_not_where_training_ended():
    equal = compare_at_equal_kl(pl.concat([FAR, NEAR]), 200)
    assert equal.levels == {0: 2.25}
    assert equal.rewards["a"].mean == pytest.approx(2) and equal.rewards["b"].mean == 3
    difference = equal.differences["b-a"]["all"]
    assert difference.mean == pytest.approx((5 - 2 + 1 - 2) / 2)
    assert (difference.low, difference.high) == pytest.approx((-1, 3))  # the two prompts' differences: pairing is by prompt


def test_each_seed_has_a_kl_of_its_own():
    other = pl.concat(
        [curve("a", [(0, 0.0, {"p": 0}), (9, 1.0, {"p": 4})], 1), curve("b", [(0, 0.0, {"p": 0}), (9, 9.0, {"p": 3})], 1)]
    )
    equal = compare_at_equal_kl(pl.concat([FAR, NEAR, other]), 100)
    assert equal.levels == {0: 2.25, 1: 1.0}
    assert equal.differences["b-a"]["all"].mean == pytest.approx((1 + (1 - 4)) / 2)


def test_a_seed_in_which_an_arm_never_left_the_base_policy_is_left_out_and_named():
    still = [curve(p, [(0, 0.0, {"p": 0}), (9, kl, {"p": 4})], 1) for p, kl in (("a", 1.0), ("b", 0.0))]
    equal = compare_at_equal_kl(pl.concat([FAR, NEAR, *still]), 100)
    assert equal.levels == {0: 2.25, 1: None} and equal.seeds == [0]
    assert "In seed 1 an arm stayed within 0.001 nats" in equal_kl_sentence(equal)
    alone = compare_at_equal_kl(pl.concat(still), 100)
    assert alone.differences == {} and equal_kl_sentence(alone).startswith("In seed 1")


def test_several_answers_to_a_prompt_count_as_their_mean():
    twice = pl.concat([FAR, FAR.with_columns(judge_reward=pl.col("judge_reward") + 2)])
    assert rewards(rewards_at(twice, 1.0)) == {"p": 2, "q": 3}


def test_the_mean_curve_is_the_mean_of_the_seeds_at_equal_kl():
    short = curve("a", [(0, 0.0, {"p": 1}), (9, 1.0, {"p": 3})], 1)
    mean = mean_curves(pl.concat([FAR, short]))["a"]
    assert (mean["kl"][0], mean["kl"][-1]) == (0, 1)
    assert mean["judge_reward"][0] == pytest.approx(0.5)
    assert mean["judge_reward"][-1] == pytest.approx((1.5 + 3) / 2)
    assert np.all(np.diff(mean["judge_reward"]) > 0)


def test_no_curves_compare_nothing_and_can_be_drawn():
    equal = compare_at_equal_kl(POLICY_CURVES.empty(), 100)
    assert equal.levels == {} and "not compared at equal KL" in equal_kl_sentence(equal)
    assert reward_against_kl(POLICY_CURVES.empty()).startswith(b"\x89PNG")


def test_the_order_of_rows_does_not_matter():
    both = pl.concat([FAR, NEAR])
    assert compare_at_equal_kl(both.sample(fraction=1, shuffle=True, seed=4), 100) == compare_at_equal_kl(both, 100)

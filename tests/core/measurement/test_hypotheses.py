from __future__ import annotations

import time

import numpy as np
import polars as pl
import pytest

from densityrm_core.measurement import bootstrap
from densityrm_core.measurement.bootstrap import Interval, bootstrap_mean
from densityrm_core.measurement.frames import bootstrap_column
from densityrm_core.measurement.hypotheses import relative_gain, verdict, verdict_sentence


def crossed(n_seeds: int, n_prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeds and prompts of a full grid, one row a cell."""
    return np.repeat(np.arange(n_seeds), n_prompts), np.tile(np.arange(n_prompts), n_seeds)


def loop_twin(values, seeds, prompts, resamples, seed):
    """The bootstrap of the docstring, row by row, with the same draws."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    seed_names, prompt_names = sorted(set(seeds)), sorted(set(prompts))
    rows = {(s, p): [v for v, a, b in zip(values, seeds, prompts, strict=True) if (a, b) == (s, p)] for s in seed_names
            for p in prompt_names}  # fmt: skip
    drawn_seeds = rng.integers(0, len(seed_names), (resamples, len(seed_names)))
    drawn_prompts = rng.integers(0, len(prompt_names), (resamples, len(prompt_names)))
    means = []
    for r in range(resamples):
        by_seed = []
        for i in drawn_seeds[r]:
            drawn = [v for j in drawn_prompts[r] for v in rows[seed_names[i], prompt_names[j]]]
            by_seed.append(sum(drawn) / len(drawn))
        means.append(sum(by_seed) / len(by_seed))
    return np.quantile(means, [0.025, 0.975])


def test_bootstrap_equals_a_slow_loop():
    rng = np.random.default_rng(1)
    seeds, prompts = rng.permutation(np.repeat(np.arange(3), 60)), rng.integers(0, 8, 180)
    values = rng.normal(size=180)
    ours = bootstrap_mean(values, seeds, prompts, 150, seed=5)
    assert [ours.low, ours.high] == pytest.approx(loop_twin(values, seeds, prompts, 150, seed=5), abs=1e-12)


def test_estimate_is_the_mean_over_seeds_of_the_mean_over_rows():
    interval = bootstrap_mean([1.0, 1.0, 4.0, 10.0], [0, 0, 0, 1], ["p", "p", "q", "q"], 100, seed=0)
    assert interval.mean == (6 / 3 + 10) / 2


def test_a_prompt_counts_by_its_rows():
    correct = [1.0, 1.0, 1.0, 0.0]
    assert bootstrap_mean(correct, [0] * 4, ["p", "p", "p", "q"], 100, seed=0).mean == 0.75


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    seeds, prompts = crossed(1, 80)
    intervals = [bootstrap_mean(rng.normal(2, 1, 80), seeds, prompts, 300, seed=i) for i in range(300)]
    assert 0.90 <= np.mean([i.low <= 2 <= i.high for i in intervals]) <= 0.98


def test_interval_of_normal_data_is_two_standard_errors_wide():
    seeds, prompts = crossed(1, 400)
    values = np.random.default_rng(3).normal(size=400)
    interval = bootstrap_mean(values, seeds, prompts, 4000, seed=0)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)


def test_pairing_by_prompt_shrinks_the_interval():
    rng = np.random.default_rng(2)
    seeds, prompts = crossed(3, 100)
    difficulty = rng.normal(0, 5, 100)[prompts]
    treated, control = difficulty + rng.normal(0.3, 0.2, 300), difficulty + rng.normal(0, 0.2, 300)
    paired = bootstrap_mean(treated - control, seeds, prompts, 1000, seed=0)
    alone = bootstrap_mean(treated, seeds, prompts, 1000, seed=0)
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_a_prompt_shared_by_the_seeds_is_one_cluster():
    seeds, prompts = crossed(3, 50)
    effect = np.random.default_rng(4).normal(size=50)
    shared = bootstrap_mean(effect[prompts], seeds, prompts, 2000, seed=0)
    single = bootstrap_mean(effect, np.zeros(50), np.arange(50), 2000, seed=0)
    assert shared.high - shared.low == pytest.approx(single.high - single.low, rel=0.1)


def test_seeds_that_disagree_widen_the_interval():
    seeds, prompts = crossed(3, 50)
    interval = bootstrap_mean(seeds.astype(float), seeds, prompts, 1000, seed=0)
    assert (interval.low, interval.mean, interval.high) == (0, 1, 2)


def test_one_seed_resamples_prompts_only():
    interval = bootstrap_mean([0.0, 1.0] * 50, [7] * 100, range(100), 1000, seed=0)
    assert 0.35 < interval.low < 0.5 < interval.high < 0.65


def test_one_prompt_has_no_finite_interval():
    interval = bootstrap_mean([1.0, 2.0], [0, 1], ["p", "p"], 100, seed=0)
    assert (interval.mean, interval.low, interval.high) == (1.5, -np.inf, np.inf)


def test_prompts_that_one_seed_lacks_are_no_error():
    interval = bootstrap_mean([1.0, 1.0, 3.0], [0, 0, 1], ["p", "q", "q"], 500, seed=0)
    assert (interval.low, interval.mean, interval.high) == (1, 2, 3)


def test_equal_seeds_give_equal_intervals():
    seeds, prompts = crossed(3, 40)
    values = np.random.default_rng(0).normal(size=120)
    assert bootstrap_mean(values, seeds, prompts, 200, seed=9) == bootstrap_mean(values, seeds, prompts, 200, seed=9)


def test_order_of_rows_does_not_change_the_interval():
    seeds, prompts = crossed(3, 40)
    frame = pl.DataFrame({"seed": seeds, "prompt_id": [f"{p:x}" for p in prompts], "x": np.sin(np.arange(120))})
    assert bootstrap_column(frame, "x", 200) == bootstrap_column(frame.sample(fraction=1, shuffle=True, seed=1), "x", 200)


def test_blocks_of_prompts_leave_the_width_alone(monkeypatch):
    seeds, prompts = crossed(1, 4000)
    values = np.random.default_rng(5).normal(size=4000)
    whole = bootstrap_mean(values, seeds, prompts, 2000, seed=0)
    monkeypatch.setattr(bootstrap, "_MAX_BLOCKS", 500)
    blocks = bootstrap_mean(values, seeds, prompts, 2000, seed=0)
    assert blocks.high - blocks.low == pytest.approx(whole.high - whole.low, rel=0.12)


def test_two_thousand_resamples_of_three_seeds_and_500_prompts_take_under_a_second():
    seeds, prompts = crossed(3, 500)
    start = time.perf_counter()
    bootstrap_mean(np.ones(1500), seeds, prompts, 2000, seed=0)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("values", "seeds", "message"), [([], [], "not empty"), ([1.0], [0, 1], "long"), ([np.nan], [0], "not finite")]
)
def test_unusable_values_are_refused(values, seeds, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, seeds, seeds, 100, seed=0)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 2, "supported"), (-2, -0.1, "refuted"), (-1, 1, "undecided"), (0, 1, "undecided")]
)
def test_verdict_follows_the_side_of_zero(low, high, expected):
    assert verdict(Interval((low + high) / 2, low, high)) == expected


@pytest.mark.parametrize(
    ("interval", "baseline", "expected"),
    [
        (Interval(3, 2, 4), 10, "confirmed"),
        (Interval(1, 0.5, 1.5), 10, "compatible"),
        (Interval(0.5, 0.2, 0.8), 10, "ruled out"),
        (Interval(3, 2, 4), 0, "undefined"),
        (Interval(3, 2, 4), -1, "undefined"),
    ],
)
def test_relative_gain_compares_the_interval_with_the_claim(interval, baseline, expected):
    assert relative_gain(interval, baseline, 0.10) == expected


def test_excess_from_paired_rows_decides_the_relative_gain():
    assert relative_gain(Interval(3, 2, 4), 10, 0.10, excess=Interval(2, -1, 5)) == "compatible"


def test_interval_reads_as_estimate_and_bounds():
    assert str(Interval(3.1, 0.4, 5.9)) == "+3.1 [+0.4, +5.9]"


def test_sentence_states_verdict_difference_and_claim():
    sentence = verdict_sentence("A better model", Interval(3.1, 0.4, 5.9), 70, unit="points", spec=".1f")
    assert sentence == (
        "A better model is supported at this size: the difference is +3.1 [+0.4, +5.9] points (95 % interval), "
        "and a gain of 10 % or more of the baseline (70.0 points) is ruled out."
    )


def test_sentence_says_why_a_relative_gain_is_undefined():
    assert "undefined, because the baseline (-2) is not above zero" in verdict_sentence("It", Interval(1, 0.5, 2), -2)

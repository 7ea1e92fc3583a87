"""Metrics of reward models: exact on rows whose answer is known, with intervals that hold the truth."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from densityrm_core.measurement.comparison import MEAN_OF_SUBSETS, agreement, measure_sets
from densityrm_core.measurement.frames import interval_of
from densityrm_core.measurement.reward_models import RM_METRICS, RowsError, measure, reliability
from densityrm_core.tables import RM_EVALUATION


def rows(
    margins: Sequence[float],
    lengths: Sequence[tuple[int, int]] = (),
    model: str = "rm_uniform",
    prompts: Sequence[str] = (),
    **constant: object,
) -> pl.DataFrame:
    """A row a margin; the reward of rejected is zero, lengths of chosen and rejected are 10 unless given."""
    n = len(margins)
    margin = np.asarray(margins, dtype=float)
    values = {
        "seed": [0] * n, "model": [model] * n, "set": ["test"] * n, "pair_id": [f"{i:06}" for i in range(n)],
        "prompt_id": list(prompts) or [f"{i:06}" for i in range(n)], "src": ["hh"] * n,
        "decile": [i % 10 + 1 for i in range(n)], "quartile": [i % 4 + 1 for i in range(n)],
        "reward_chosen": margin, "reward_rejected": np.zeros(n), "correct": 0.5 + 0.5 * np.sign(margin),
        "chars_chosen": [c for c, _ in lengths] or [10] * n, "chars_rejected": [r for _, r in lengths] or [10] * n,
        "precision": ["fp32"] * n, "fingerprint": ["f"] * n,
    }  # fmt: skip
    values |= {name: [value] * n for name, value in constant.items()}
    return RM_EVALUATION.check(pl.DataFrame(values, schema=RM_EVALUATION.schema))


def value(frame: pl.DataFrame, metric: str, by: str = "all", stratum: str = "all", model: str = "rm_uniform") -> float | None:
    found = interval_of(measure(frame, 50, [by]), by=by, stratum=stratum, model=model, metric=metric)
    return found.mean if found else None


def drawn(n: int, rng: np.random.Generator, scale: float = 1.0) -> pl.DataFrame:
    """Pairs whose better reply follows the Bradley-Terry model of some rewards, under a model that claims `scale` times those."""
    margin = rng.normal(0, 1, n)
    return rows(scale * np.where(rng.random(n) < 1 / (1 + np.exp(-margin)), margin, -margin))


def test_a_tied_reward_is_half_right():
    assert value(rows([2.0, -1.0, 0.0, 0.0]), "accuracy") == 0.5


def test_log_loss_of_a_coin_is_log_2():
    assert value(rows([0.0, 0.0]), "log_loss") == pytest.approx(np.log(2))


def test_log_loss_is_that_of_the_bradley_terry_probability():
    assert value(rows([2.0, -1.0]), "log_loss") == pytest.approx((np.log(1 + np.exp(-2)) + np.log(1 + np.exp(1))) / 2)


def test_margin_is_the_mean_difference_of_rewards():
    assert value(rows([2.0, -1.0]), "margin") == 0.5


def test_calibration_error_equals_ten_bins_of_both_orders():
    margin = np.random.default_rng(0).normal(0.4, 1.5, 500)
    p, y = np.concatenate([margin, -margin]), np.repeat([1.0, 0.0], 500)
    p = 1 / (1 + np.exp(-p))
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [abs((y - p)[bins == b].sum()) for b in range(10)]
    assert value(rows(margin), "ece") == pytest.approx(sum(gaps) / 1000)


def test_which_reply_is_called_chosen_does_not_make_every_label_1():
    sure_and_half_right = rows([4.0, -4.0] * 10)
    assert value(sure_and_half_right, "ece") == pytest.approx(1 / (1 + np.exp(-4)) - 0.5)


def test_calibrated_model_has_zero_in_its_interval():
    got = interval_of(measure(drawn(400, np.random.default_rng(3)), 300, ["all"]), metric="ece")
    assert got and got.low < 0.01 < got.high


def test_interval_of_the_calibration_error_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth = value(drawn(200_000, rng, 2.5), "ece") or 0
    got = [interval_of(measure(drawn(400, rng, 2.5), 200, ["all"]), metric="ece") for _ in range(100)]
    assert np.mean([bool(i and i.low <= truth <= i.high) for i in got]) >= 0.85


def test_reliability_mirrors_the_lower_half():
    bins = reliability(drawn(1000, np.random.default_rng(0)), 100)
    top, bottom = bins.filter(bin=7).row(0, named=True), bins.filter(bin=4).row(0, named=True)
    assert (bottom["predicted"], bottom["mean"]) == (pytest.approx(1 - top["predicted"]), pytest.approx(1 - top["mean"]))
    assert (bottom["low"], bottom["share"]) == (pytest.approx(1 - top["high"]), top["share"])


def test_shares_of_the_reliability_bins_add_up_to_one():
    assert reliability(drawn(300, np.random.default_rng(0)), 50)["share"].sum() == pytest.approx(1)


def test_calibration_error_is_the_mean_gap_of_the_reliability_bins():
    frame = drawn(500, np.random.default_rng(5))
    bins = reliability(frame, 50)
    assert value(frame, "ece") == pytest.approx((bins["share"] * (bins["mean"] - bins["predicted"]).abs()).sum())


def test_accuracy_where_the_shorter_reply_is_better_leaves_equal_lengths_out():
    frame = rows([1.0, -1.0, 1.0, -1.0], [(1, 2), (1, 2), (2, 1), (2, 2)])
    assert (value(frame, "accuracy_shorter_better"), value(frame, "accuracy_longer_better")) == (0.5, 1)


def test_no_pair_of_unequal_lengths_leaves_length_bias_undefined():
    measured = measure(rows([1.0, -1.0, 0.5]), 50, ["all"])
    assert [interval_of(measured, metric=m) for m in RM_METRICS[4:]] == [None] * 4


def test_reward_and_length_correlate_as_spearman_says():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, (200, 2))
    margin = rng.normal(0.02 * (lengths[:, 0] - lengths[:, 1]), 1)
    frame = rows(margin, [(int(c), int(r)) for c, r in lengths])
    rewards = np.concatenate([margin, np.zeros(200)])
    assert value(frame, "reward_length") == pytest.approx(spearmanr(rewards, lengths.T.ravel()).statistic)
    both = np.concatenate([margin, -margin]), np.concatenate([lengths[:, 0] - lengths[:, 1], lengths[:, 1] - lengths[:, 0]])
    assert value(frame, "margin_length") == pytest.approx(spearmanr(*both).statistic)


def test_within_pair_length_bias_does_not_depend_on_what_people_prefer():
    margin, lengths = [1.0, 2.0, -3.0, 0.5], [(3, 1), (9, 2), (1, 4), (2, 7)]
    swapped = [-m if i % 2 else m for i, m in enumerate(margin)]
    turned = [(r, c) if i % 2 else (c, r) for i, (c, r) in enumerate(lengths)]
    assert value(rows(margin, lengths), "margin_length") == pytest.approx(value(rows(swapped, turned), "margin_length"))


def test_strata_are_measured_on_their_own_rows():
    frame = rows([1.0 if i % 10 < 3 else -1.0 for i in range(100)])
    assert [value(frame, "accuracy", "decile", str(d)) for d in (1, 3, 4, 10)] == [1, 1, 0, 0]


def test_deciles_come_in_numerical_order():
    measured = measure(rows([1.0] * 30), 20, ["decile"])
    assert measured["stratum"].unique(maintain_order=True).to_list() == [str(d) for d in range(1, 11)]


def test_pairs_of_one_prompt_are_resampled_together():
    rng = np.random.default_rng(0)
    right = np.repeat(rng.normal(0.3, 1, 50), 8)  # the eight pairs of a prompt are right or wrong together
    together = interval_of(measure(rows(right, prompts=[f"{i // 8}" for i in range(400)]), 500, ["all"]), metric="accuracy")
    apart = interval_of(measure(rows(right), 500, ["all"]), metric="accuracy")
    assert together and apart and together.high - together.low > 2 * (apart.high - apart.low)


def test_every_seed_counts_alike():
    frame = pl.concat([rows([1.0] * 9), rows([-1.0, 1.0], seed=1)])
    assert value(frame, "accuracy") == 0.75


def test_a_pair_that_occurs_twice_is_refused():
    with pytest.raises(RowsError, match="pair 000000 occurs more than once for rm_uniform, seed 0, set test"):
        measure(pl.concat([rows([1.0]), rows([1.0])]), 10)


def test_rows_of_further_sets_are_not_the_test_split():
    frame = pl.concat([rows([1.0, 1.0]), rows([-1.0] * 3, set="bench")])
    assert value(frame, "accuracy") == 1


def test_no_rows_measure_nothing():
    empty = RM_EVALUATION.empty()
    assert [len(f(empty, 10)) for f in (measure, reliability, agreement, measure_sets)] == [0, 0, 0, 0]


def test_order_of_rows_changes_nothing():
    frame = drawn(300, np.random.default_rng(2))
    assert measure(frame, 50).equals(measure(frame.sample(fraction=1, shuffle=True, seed=4), 50))


def test_models_that_err_alike_agree_beyond_chance():
    frame = pl.concat([rows([1.0, 1.0, -1.0, -1.0]), rows([1.0, 1.0, -1.0, -1.0], model="rm_density")])
    assert [interval_of(agreement(frame, 20), metric=m).mean for m in ("agreement", "kappa")] == [1, 1]


def test_models_that_err_independently_have_no_kappa():
    a, b = [1.0, 1.0, 1.0, -1.0] * 4, [1.0] * 12 + [-1.0] * 4
    frame = pl.concat([rows(a), rows(b, model="rm_density")])
    found = agreement(frame, 20)
    assert interval_of(found, metric="agreement").mean == 0.625
    assert interval_of(found, metric="kappa").mean == pytest.approx(0)


def test_a_tie_agrees_by_half():
    frame = pl.concat([rows([0.0, 1.0]), rows([1.0, 1.0], model="rm_density")])
    assert interval_of(agreement(frame, 20), metric="agreement").mean == 0.75


def test_every_subset_counts_alike_in_the_mean_of_a_set():
    frame = pl.concat([rows([1.0] * 8, set="bench", src="chat"), rows([-1.0, 1.0], set="bench", src="code")])
    found = measure_sets(frame, 50)
    means = {s: interval_of(found, subset=s, metric="accuracy").mean for s in ("chat", "code", MEAN_OF_SUBSETS)}
    assert means == {"chat": 1, "code": 0.5, MEAN_OF_SUBSETS: 0.75}


def test_best_of_n_needs_every_pair_of_the_prompt():
    frame = rows([1.0, 1.0, -1.0, 1.0, 1.0, 1.0], prompts=["a"] * 3 + ["b"] * 3, set="bench")
    found = measure_sets(frame, 50)
    assert interval_of(found, subset="hh", metric="all_right").mean == 0.5
    assert interval_of(found, subset="hh", metric="accuracy").mean == pytest.approx(5 / 6)


def test_a_hundred_thousand_rows_take_seconds():
    rng = np.random.default_rng(0)
    lengths = [(int(c), int(r)) for c, r in rng.integers(1, 500, (20_000, 2))]
    models = ("rm_uniform", "rm_density", "bag_of_words", "longer_reply", "shorter_reply")
    frame = pl.concat([rows(rng.normal(0.3, 1, 20_000), lengths, model=m) for m in models])
    start = time.process_time()
    measure(frame, 2000, ["all"])
    assert time.process_time() - start < 10

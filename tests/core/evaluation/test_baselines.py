"""Baselines learn on the training split alone, and their accuracy is what a reward model must beat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from densityrm_core.arrays import id_keys
from densityrm_core.evaluation.baselines import fit_bag_of_words, fit_baselines
from densityrm_core.streams import unit_intervals

from ..small_sources import read


def pairs(*rows: tuple[str, str], split: str = "train") -> pl.DataFrame:
    columns = {"chosen": [c for c, _ in rows], "rejected": [r for _, r in rows]}
    return pl.DataFrame(columns).with_columns(
        prompt_id=pl.Series([f"{i:016x}" for i in range(len(rows))], dtype=pl.String), split=pl.lit(split)
    )


KIND, RUDE = "thank you kindly friend", "go away you fool"
TRAIN = pairs(*[(KIND, RUDE)] * 20, *[("yes", "no thanks")] * 10, *[("indeed so", "no")] * 10)
VALIDATION = pairs(*[(KIND, RUDE)] * 5, split="validation")
SPLITS = pl.concat([TRAIN, VALIDATION]).lazy()


def margins(name: str, *rows: tuple[str, str], splits: pl.LazyFrame = SPLITS) -> list[float]:
    chosen, rejected = fit_baselines(splits)[name](pairs(*rows, split="test"))
    return (chosen - rejected).tolist()


def test_the_longer_reply_wins_or_loses_by_the_name():
    for name, sign in (("longer_reply", 1), ("shorter_reply", -1)):
        assert np.sign(margins(name, ("longer", "short"), ("a", "bcd"), ("abc", "xyz"))).tolist() == [sign, -sign, 0]


def test_length_is_counted_in_characters():
    assert margins("longer_reply", ("ééé", "abcd"))[0] < 0


def test_longer_reply_claims_what_the_training_split_shows():
    train = pairs(*[("long reply", "short")] * 59, *[("short", "long reply")] * 19).lazy()
    assert margins("longer_reply", ("ab", "a"), splits=train) == [pytest.approx(np.log(60 / 20))]


def test_a_length_that_the_training_split_speaks_against_claims_next_to_nothing_and_still_ranks():
    train = pairs(*[("short", "long reply")] * 20).lazy()
    assert 0 < margins("longer_reply", ("ab", "a"), splits=train)[0] < 1e-5


def test_words_that_were_preferred_are_rewarded():
    assert margins("bag_of_words", ("thank you", "fool"))[0] > 0


def test_a_pair_and_its_mirror_image_have_opposite_margins():
    a, b = margins("bag_of_words", (KIND, RUDE), (RUDE, KIND))
    assert a == pytest.approx(-b)


def test_a_word_counts_once_a_reply():
    once, thrice = margins("bag_of_words", ("kindly", "x y"), ("kindly kindly kindly", "x y"))
    assert once == thrice


def test_baselines_are_the_same_whatever_the_test_split_holds():
    test = pairs(*[(RUDE, KIND)] * 50, split="test")
    with_test = pl.concat([SPLITS.collect(), test]).lazy()
    for name in ("longer_reply", "shorter_reply", "bag_of_words"):
        assert margins(name, (KIND, RUDE), splits=with_test) == margins(name, (KIND, RUDE))


def test_a_training_split_too_small_to_fit_rewards_nothing():
    assert margins("bag_of_words", (KIND, RUDE), splits=pairs((KIND, RUDE)).lazy()) == [0]


def test_at_most_so_many_pairs_are_learned_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("densityrm_core.evaluation.baselines.MAX_PAIRS", 3)
    train = pairs(*[("long reply", "short")] * 20).lazy()
    assert margins("longer_reply", ("ab", "a"), splits=train) == [pytest.approx(np.log(4 / 1))]  # three, and one imagined


def test_bag_of_words_reaches_61_percent_on_hh_harmless(real_data: Path):
    rows = read("hh_rlhf", real_data / "hh-rlhf" / "harmless-base" / "test.jsonl.gz", max_malformed=100).pairs
    keys = id_keys(rows["prompt_id"])
    fold, aside = (unit_intervals(keys, 0, "folds") * 5).astype(int), unit_intervals(keys, 0, "validation") < 0.15
    right: list[float] = []
    for k in range(5):
        learned = fit_bag_of_words(rows.filter((fold != k) & ~aside), rows.filter((fold != k) & aside))
        chosen, rejected = learned(rows.filter(fold == k))
        right += (0.5 + 0.5 * np.sign(chosen - rejected)).tolist()
    print(f"bag of words on HH harmless, 5 folds by prompt: {np.mean(right):.4f} of {len(right)} pairs")
    assert np.mean(right) > 0.57

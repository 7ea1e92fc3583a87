from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from densityrm_core.settings import PlantedSettings
from densityrm_core.sources import SourceName
from densityrm_core.sources.planted import planted_file, planted_rows, write_raw
from densityrm_core.sources.planted_world import CLOSINGS, OPENINGS, TOPICS, PlantedWorld

from ..small_sources import read as read_file

SMALL = PlantedSettings(hh_rows=400, ultrafeedback_rows=400, stack_exchange_questions=200)
NAMES: tuple[SourceName, ...] = ("hh_rlhf", "ultrafeedback", "stack_exchange")


@pytest.fixture(scope="module")
def raw_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("raw")


def read(name: SourceName, raw_dir: Path, planted: PlantedSettings = SMALL) -> pl.DataFrame:
    return read_file(name, planted_file(name, planted, raw_dir)).pairs


@pytest.mark.parametrize("name", NAMES)
def test_same_settings_give_same_bytes(name: SourceName, tmp_path: Path) -> None:
    for file in ("first.gz", "second.gz"):
        write_raw(name, SMALL, tmp_path / file)
    assert (tmp_path / "first.gz").read_bytes() == (tmp_path / "second.gz").read_bytes()


def test_rows_changed_only_together_with_the_generator_number() -> None:
    """If this fails on purpose, raise `_GENERATOR` in planted.py: files already written are read again otherwise."""
    rows = [row for name in NAMES for row in planted_rows(name, SMALL)]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "0964188d50552588"


def test_another_seed_gives_another_file(tmp_path: Path) -> None:
    assert planted_file("hh_rlhf", SMALL, tmp_path) != planted_file("hh_rlhf", SMALL.model_copy(update={"seed": 8}), tmp_path)


def test_a_file_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    path = planted_file("hh_rlhf", SMALL, tmp_path)
    before = path.stat().st_mtime_ns
    assert planted_file("hh_rlhf", SMALL, tmp_path).stat().st_mtime_ns == before


def test_no_temporary_file_stays_behind(tmp_path: Path) -> None:
    path = planted_file("hh_rlhf", SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", NAMES)
def test_parsers_read_back_the_prompts_that_were_written(name: SourceName, raw_dir: Path) -> None:
    rows = list(planted_rows(name, SMALL))
    column = {"hh_rlhf": "chosen", "ultrafeedback": "prompt", "stack_exchange": "question"}[name]
    written = {
        row[column].removeprefix("\n\nHuman: ").split("\n\n")[0].removeprefix("<p>").removesuffix("</p>\n") for row in rows
    }
    assert set(read(name, raw_dir)["prompt"]) <= written


@pytest.mark.parametrize("name", NAMES)
def test_better_reply_is_chosen_in_more_than_85_percent_of_pairs(name: SourceName, raw_dir: Path) -> None:
    world = PlantedWorld(SMALL)
    rows = read(name, raw_dir).select("prompt", "chosen", "rejected").iter_rows()
    gaps = np.array([world.reward(prompt, chosen) - world.reward(prompt, rejected) for prompt, chosen, rejected in rows])
    assert (gaps > 0).mean() > 0.85


@pytest.mark.parametrize("name", NAMES)
def test_no_pair_has_replies_of_equal_reward(name: SourceName, raw_dir: Path) -> None:
    world = PlantedWorld(SMALL)
    rows = read(name, raw_dir).select("prompt", "chosen", "rejected").iter_rows()
    assert all(world.reward(prompt, chosen) != world.reward(prompt, rejected) for prompt, chosen, rejected in rows)


@pytest.mark.parametrize("name", NAMES)
def test_without_defects_nothing_is_rejected(name: SourceName, tmp_path: Path) -> None:
    clean = SMALL.model_copy(update={"defects": 0.0})
    assert read_file(name, planted_file(name, clean, tmp_path)).rejects.is_empty()


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("hh_rlhf", {"identical_replies", "empty_reply", "contexts_differ"}),
        ("ultrafeedback", {"identical_replies", "empty_reply", "tied_scores"}),
        ("stack_exchange", {"equal_scores"}),
    ],
)
def test_defects_are_those_of_the_real_sources(name: SourceName, reasons: set[str], tmp_path: Path) -> None:
    broken = SMALL.model_copy(update={"defects": 0.3})
    assert set(read_file(name, planted_file(name, broken, tmp_path)).rejects["reason"]) == reasons


def test_topics_follow_zipf() -> None:
    world, rng = PlantedWorld(PlantedSettings()), np.random.default_rng(0)
    counts = np.bincount([world.topic(world.draw_prompt(rng)) for _ in range(20_000)], minlength=8)
    assert np.abs(counts / counts.sum() - world.frequencies).max() < 0.01
    assert world.frequencies[0] / world.frequencies[7] == pytest.approx(8**1.3)


def test_prompts_are_almost_all_unique(raw_dir: Path) -> None:
    prompts = pl.concat(read(name, raw_dir).select("prompt", "origin").unique("origin") for name in NAMES)["prompt"]
    assert prompts.n_unique() > 0.97 * len(prompts)


def test_sources_share_the_rule_but_no_rows(raw_dir: Path) -> None:
    hh, ultrafeedback = (set(read(name, raw_dir)["prompt"]) for name in NAMES[:2])
    assert len(hh & ultrafeedback) < 0.1 * len(hh)


def test_liked_opening_and_closing_earn_one_each() -> None:
    world = PlantedWorld(PlantedSettings())
    for topic, likes in world.rule.items():
        prompt = f"How do I fix my old {TOPICS[topic][0][0]} at home this week?"
        opening = next(o for o in OPENINGS if o != likes["opening"])
        closing = next(c for c in CLOSINGS if c != likes["closing"])
        rewards = [
            world.reward(prompt, f"{o} you could tune it and rest it {c}.")
            for o in (opening, likes["opening"])
            for c in (closing, likes["closing"])
        ]
        assert rewards == [0, 1, 1, 2]


def test_no_two_topics_like_the_same() -> None:
    for seed in range(20):
        rule = PlantedWorld(PlantedSettings(seed=seed, topics=12)).rule
        assert len({tuple(likes.values()) for likes in rule.values()}) == 12


def test_nouns_belong_to_one_topic() -> None:
    nouns = [noun for topic_nouns, _ in TOPICS.values() for noun in topic_nouns]
    assert len(nouns) == len(set(nouns))


def test_prompt_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match="not a planted prompt"):
        PlantedWorld(PlantedSettings()).topic("Who wrote Hamlet?")


def test_raters_prefer_by_the_logistic_of_the_gap() -> None:
    world, rng = PlantedWorld(PlantedSettings(label_sharpness=3.0)), np.random.default_rng(0)
    wins = np.mean([world.draw_utility(0.5, rng) > world.draw_utility(0.0, rng) for _ in range(20_000)])
    assert wins == pytest.approx(1 / (1 + np.exp(-1.5)), abs=0.01)


def test_questions_have_two_to_five_answers_of_whole_scores() -> None:
    rows = list(planted_rows("stack_exchange", PlantedSettings()))
    assert {len(row["answers"]) for row in rows} == {2, 3, 4, 5}
    assert all(isinstance(answer["pm_score"], int) for row in rows for answer in row["answers"])


def test_about_15_percent_of_hh_rows_have_two_turns(tmp_path: Path) -> None:
    pairs = read("hh_rlhf", tmp_path, PlantedSettings())
    assert (pairs["context"].list.len() == 3).mean() == pytest.approx(0.15, abs=0.02)


def test_raw_file_is_gzip_without_a_date(tmp_path: Path) -> None:
    path = planted_file("hh_rlhf", SMALL, tmp_path)
    assert path.read_bytes()[4:8] == b"\0\0\0\0"
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == SMALL.hh_rows

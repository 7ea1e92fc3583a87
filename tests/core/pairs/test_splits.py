"""Near-duplicates share a split, and whatever rows come later, no prompt that was there leaves its own."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from densityrm_core.pairs.near_duplicates import cluster, normalised, signatures, similarity, with_twin
from densityrm_core.pairs.selection import Taken
from densityrm_core.pairs.splits import HELD_OUT, SPLITS, splits_of
from densityrm_core.pairs.union import Union, unite_pairs
from densityrm_core.settings import PairsSettings, SplitSettings

from ..small_sources import source

WORDS = [f"{a}{b}" for a in ("alpha", "beta", "gamma", "delta", "omega") for b in ("ron", "tic", "mar", "lus", "vek", "zor")]


def families(count: int, size: int, seed: int) -> list[list[str]]:
    """Families of texts that differ in one or two words of thirty from their first one, and share little with other families."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        words = [f"{WORDS[i]}{rng.integers(1000)}" for i in rng.integers(0, len(WORDS), 30)]
        members = [words]
        for _ in range(size - 1):
            edited = list(words)
            for place in rng.choice(30, rng.integers(1, 3), replace=False):
                edited[place] = f"{WORDS[rng.integers(len(WORDS))]}{rng.integers(1000)}"
            members.append(edited)
        found.append([" ".join(member) for member in members])
    return found


def unite(folder: Path, prompts: list[str], previous: Path | None = None, **settings: object) -> Union:
    out = folder / f"union{len(list(folder.glob('union*')))}"
    rows = source(folder, *((prompt, "x", "y") for prompt in prompts))
    return unite_pairs([rows], PairsSettings(), SplitSettings.model_validate(settings), out, previous)


def column(union: Union, name: str) -> dict[str, str]:
    return dict(union.pairs.frame().select("prompt", name).iter_rows())


def jaccard(first: str, second: str) -> float:
    a, b = ({text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in (first, second))
    return len(a & b) / len(a | b)


def test_shares_of_the_splits_are_as_asked():
    settings = SplitSettings(validation=0.1, test=0.2, judge=0.3)
    found = splits_of(np.arange(20_000, dtype=np.uint64), settings)
    for name, share in (("validation", 0.1), ("test", 0.2), ("judge", 0.3), ("train", 0.4)):
        assert (found == SPLITS.index(name)).mean() == pytest.approx(share, abs=0.01)


def test_another_split_seed_holds_out_other_prompts():
    keys = np.arange(1000, dtype=np.uint64)
    first, second = (splits_of(keys, SplitSettings(seed=seed)) for seed in (0, 1))
    assert 0.3 < (first == second).mean() < 0.7


def test_prompts_that_differ_in_case_or_punctuation_share_a_split(tmp_path: Path):
    pairs = [(f"How do I fix it {i}?", f"how do i  fix it, {i}") for i in range(50)]
    split = column(unite(tmp_path, [text for pair in pairs for text in pair], near_duplicates="never"), "split")
    assert all(split[first] == split[second] for first, second in pairs)


def test_a_prompt_of_signs_alone_is_itself():
    assert normalised(pl.Series(["?!", "...", "Ｈｉ!"])).to_list() == ["?!", "...", "hi"]


def test_signatures_estimate_the_jaccard_similarity_of_shingles():
    texts = [text for family in families(20, 4, seed=0) for text in family]
    found = signatures(pl.Series(texts))
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, len(texts), (2, 500))
    exact = [jaccard(texts[i], texts[j]) for i, j in zip(first, second, strict=True)]
    assert np.abs(similarity(found, first, second) - exact).max() < 0.16
    assert np.abs(similarity(found, first, second) - exact).mean() < 0.03


@pytest.mark.parametrize("texts", [[], ["a"], ["ab", "ab cd"], ["日本語のテキスト", "日本語のテキスト。"]])
def test_short_texts_have_signatures_too(texts: list[str]):
    assert signatures(pl.Series(texts, dtype=pl.String)).shape == (len(texts), 128)


def test_near_duplicates_share_a_cluster_and_a_split(tmp_path: Path):
    twins = families(300, 2, seed=1)
    texts = [text for pair in twins for text in pair]
    np.random.default_rng(0).shuffle(texts)
    united = unite(tmp_path, texts)
    clusters = column(united, "cluster")
    near = [(a, b) for a, b in twins if jaccard(a, b) > 0.85]
    assert len(near) > 100
    assert np.mean([clusters[a] == clusters[b] for a, b in near]) > 0.97
    assert len(set(clusters.values())) >= len(twins)
    by_cluster = united.pairs.frame().group_by("cluster").agg(pl.col("split").n_unique())
    assert by_cluster["split"].max() == 1


def test_banded_clusters_agree_with_comparing_every_pair():
    texts = [text for family in families(30, 4, seed=2) for text in family]
    found, own = signatures(pl.Series(texts)), np.arange(len(texts), dtype=np.uint64)
    everyone = np.arange(len(texts))
    slow = own.copy()
    for row in everyone:
        twins = everyone[:row][similarity(found, np.full(row, row), everyone[:row]) >= 0.8]
        if len(twins):
            slow[row] = slow[twins[0]]
    assert (cluster(own, found, 0.8) == slow).mean() > 0.97


@pytest.mark.parametrize("place", ["behind", "before", "among"])
def test_new_rows_never_move_an_old_prompt(tmp_path: Path, place: str):
    """The new rows include near-duplicates of old ones, and texts that lie between two old clusters."""
    old = [text for family in families(40, 3, seed=3) for text in family]
    new = [text for family in families(40, 6, seed=3) for text in family if text not in old]
    halves = [text.split() for text in old]
    bridges = [" ".join(a[:15] + b[15:]) for a, b in zip(halves, halves[3:], strict=False)]
    first = unite(tmp_path, old)
    rng = np.random.default_rng(0)
    every = {"behind": old + new + bridges, "before": new + bridges + old, "among": [*old, *new, *bridges]}[place]
    if place == "among":
        rng.shuffle(every)
    grown = unite(tmp_path, every, previous=first.pairs.path)
    before, after = column(first, "split"), column(grown, "split")
    assert len(after) > 2 * len(before)
    assert {prompt: after[prompt] for prompt in before} == before


def test_rows_appended_to_a_fresh_read_move_nothing_either(tmp_path: Path):
    texts = [text for family in families(60, 6, seed=4) for text in family]
    np.random.default_rng(0).shuffle(texts)
    before, after = (column(unite(tmp_path, texts[:n]), "cluster") for n in (100, 360))
    assert {prompt: after[prompt] for prompt in before} == before


def test_old_prompts_stay_when_others_are_gone_or_too_many_came_to_compare(tmp_path: Path):
    texts = [text for family in families(20, 4, seed=5) for text in family]
    first = unite(tmp_path, texts)
    fewer = unite(tmp_path, texts[::-1][:40], previous=first.pairs.path)
    more = unite(tmp_path, [*texts, "one more"], previous=first.pairs.path, near_duplicate_prompts=80)
    assert not more.grouping.compared
    for grown in (fewer, more):
        cluster_of = column(grown, "cluster")
        assert all(cluster_of.get(prompt, key) == key for prompt, key in column(first, "cluster").items())


def test_other_settings_of_near_duplicates_start_afresh(tmp_path: Path):
    texts = [text for family in families(20, 4, seed=6) for text in family]
    first = unite(tmp_path, texts)
    alone = unite(tmp_path, texts, previous=first.pairs.path, near_duplicates="never")
    assert alone.grouping.count == len(texts)


def test_twins_across_the_line_are_counted_and_clusters_leave_few(tmp_path: Path):
    texts = [text for family in families(100, 4, seed=7) for text in family]
    found = signatures(pl.Series(texts))
    everyone = np.arange(len(texts))
    asked = everyone % 4 == 0
    slow = (
        np.array([(similarity(found, np.full((~asked).sum(), row), everyone[~asked]) >= 0.8).any() for row in everyone]) & asked
    )
    fast = with_twin(found, asked, ~asked, 0.8)
    assert not (fast & ~slow).any()
    assert fast.sum() > 0.95 * slow.sum() > 50
    united = unite(tmp_path, texts)
    assert united.grouping.leaked <= 0.02 * united.grouping.test_prompts
    assert sum(united.splits.filter(pl.col("split").is_in(HELD_OUT))["prompts"]) > 50


def test_a_source_of_the_same_name_may_come_twice(tmp_path: Path):
    rows: list[Taken] = [source(tmp_path, ("a", "x", "y")), source(tmp_path, ("b", "x", "y"))]
    united = unite_pairs(rows, PairsSettings(), SplitSettings(), tmp_path / "union")
    assert united.pairs.frame()["prompt"].to_list() == ["a", "b"]

"""The union keeps each comparison once, and a prompt never leaves its split."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from densityrm_core.pairs.prompts import PromptError, PromptKeys, index_prompts, prompt_ids, unique_prompts
from densityrm_core.pairs.selection import Taken
from densityrm_core.pairs.union import PairsError, Union, require_splits, unite_pairs
from densityrm_core.settings import PairsSettings, SplitSettings
from densityrm_core.storage import read_frame, write_frame
from densityrm_core.tables import SOURCE_PAIRS

from ..small_sources import source

A_X, A_Y = ("a", "x", "y"), ("a", "y", "x")  # one comparison, both answers


def unite(folder: Path, *sources: Taken, splits: SplitSettings | None = None, **knobs: int) -> Union:
    number = len(list(folder.glob("union*")))
    return unite_pairs(sources, PairsSettings(**knobs), splits or SplitSettings(), folder / f"union{number}")


def split_by_prompt(union: Union) -> dict[str, str]:
    return dict(union.pairs.frame().select("prompt", "split").iter_rows())


def test_pairs_and_rejects_add_up_to_what_was_read(tmp_path: Path):
    united = unite(tmp_path, source(tmp_path, A_X, A_X, ("b", "x", "y"), ("b", "y", "x")))
    assert united.pairs.rows + united.rejects.frame()["pairs"].sum() == united.read == 4


def test_an_exact_duplicate_is_kept_once_and_named(tmp_path: Path):
    united = unite(tmp_path, source(tmp_path, A_X), source(tmp_path, A_X, src="ultrafeedback"))
    assert united.pairs.frame()["src"].to_list() == ["hh"]
    assert united.rejects.frame().select("reason", "origin", "src").rows() == [("duplicate_pair", "file:1", "ultrafeedback")]


def test_a_contradiction_is_a_tie_and_goes(tmp_path: Path):
    united = unite(tmp_path, source(tmp_path, A_X, A_Y))
    assert united.pairs.rows == 0
    assert united.rejects.frame()["reason"].to_list() == ["contradictory_pair"] * 2


def test_the_reply_preferred_more_often_wins(tmp_path: Path):
    united = unite(tmp_path, source(tmp_path, A_Y, A_X, A_X))
    assert united.pairs.frame().select("chosen", "origin").rows() == [("x", "file:2")]
    assert united.reasons == {"duplicate_pair": 2}


def test_the_same_replies_to_another_context_are_another_comparison(tmp_path: Path):
    assert unite(tmp_path, source(tmp_path, A_X, ("b", "x", "y"))).pairs.rows == 2


def test_votes_agree_with_counting_them_one_by_one(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = [(f"p{rng.integers(40)}", *(("x", "y") if rng.random() < 0.6 else ("y", "x"))) for _ in range(400)]
    votes = Counter((prompt, chosen) for prompt, chosen, _ in rows)
    expected = [
        (prompt, chosen, f"file:{1 + rows.index((prompt, chosen, rejected))}")
        for prompt, chosen, rejected in dict.fromkeys(rows)
        if votes[prompt, chosen] > votes[prompt, rejected]
    ]
    kept = unite(tmp_path, source(tmp_path, *rows)).pairs.frame().select("prompt", "chosen", "origin").rows()
    assert sorted(kept) == sorted(expected)


def test_every_knob_removes_what_it_says_and_counts_it(tmp_path: Path):
    plain = source(tmp_path, *((f"p{i % 5}", f"x{i}", "y") for i in range(10)))
    scored = source(tmp_path, ("q", "x", "y"), src="ultrafeedback", scores=(5.0, 4.5), min_score_gap=1.0)
    long = source(tmp_path, ("r" * 50, "x", "y"), src="stack_exchange")
    united = unite(tmp_path, plain, scored, long, max_pairs_per_prompt=1, max_prompt_chars=49)
    assert united.reasons == {"long_prompt": 1, "small_score_gap": 1, "over_prompt_cap": 5}
    assert united.pairs.frame()["chosen"].to_list() == [f"x{i}" for i in range(5)]


def test_pairs_without_scores_know_no_gap(tmp_path: Path):
    assert unite(tmp_path, source(tmp_path, A_X, min_score_gap=1.0)).pairs.rows == 1


def test_a_source_weight_takes_that_share_of_its_prompts_and_a_greater_one_takes_more(tmp_path: Path):
    rows = [(f"prompt {i}", f"x{j}", "y") for i in range(2000) for j in range(2)]
    half, more = (unite(tmp_path, source(tmp_path, *rows, weight=w)) for w in (0.5, 0.7))
    assert half.prompts / 2000 == pytest.approx(0.5, abs=0.04)
    assert half.pairs.rows == 2 * half.prompts
    assert set(split_by_prompt(half)) < set(split_by_prompt(more))
    assert half.reasons == {"source_weight": 4000 - half.pairs.rows}


def test_pairs_point_to_prompts_by_index(tmp_path: Path):
    united = unite(tmp_path, source(tmp_path, ("b", "x", "y"), A_X, ("b", "x", "z")))
    prompts = unique_prompts(united.pairs.path, tmp_path / "prompts.parquet").frame()
    pairs = united.pairs.frame()
    assert pairs["prompt_index"].to_list() == [0, 1, 0]
    assert prompts["prompt"].gather(pairs["prompt_index"]).to_list() == pairs["prompt"].to_list()


def test_unique_prompts_count_their_pairs_and_sources(tmp_path: Path):
    united = unite(tmp_path, source(tmp_path, A_X, ("a", "x", "z")), source(tmp_path, ("a", "p", "q"), src="ultrafeedback"))
    prompts = unique_prompts(united.pairs.path, tmp_path / "prompts.parquet").frame()
    assert prompts.select("prompt", "pairs", "sources").rows() == [("a", 3, ["hh", "ultrafeedback"])]
    assert united.shared == {("hh", "ultrafeedback"): 1}


def test_no_pairs_make_no_prompts(tmp_path: Path):
    united = unite(tmp_path, source(tmp_path, A_X, A_Y))
    assert unique_prompts(united.pairs.path, tmp_path / "prompts.parquet").rows == 0


def test_prompt_id_is_the_head_of_the_md5():
    assert prompt_ids(pl.Series(["Où est-ce?"])).to_list() == [hashlib.md5("Où est-ce?".encode()).hexdigest()[:16]]  # noqa: S324  the id's definition


def test_indexing_prompts_agrees_with_a_dict():
    rng = np.random.default_rng(1)
    texts = [f"prompt {rng.integers(300)}" for _ in range(2000)]
    table, index = index_prompts(pl.Series(texts[i : i + 300]) for i in range(0, 2000, 300))
    assert dict(table.select("prompt", "pairs").iter_rows()) == Counter(texts)
    assert table["prompt"].to_list() == list(dict.fromkeys(texts))
    assert table["prompt"].gather(index.of_row).to_list() == texts


def test_two_prompts_under_one_key_are_both_named(monkeypatch: pytest.MonkeyPatch):
    def add(self: PromptKeys, prompts: pl.Series) -> None:
        self._keys.append(np.zeros(len(prompts), dtype=np.uint64))
        self._checks.append(prompts.hash().to_numpy())

    monkeypatch.setattr(PromptKeys, "add", add)
    with pytest.raises(PromptError, match="'Shall I\\?' and 'Shall you\\?'"):
        index_prompts([pl.Series(["Shall I?", "Shall I?", "Shall you?"])])


def test_the_union_names_prompts_that_share_a_key_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def add(self: PromptKeys, prompts: pl.Series) -> None:
        self._keys.append(np.zeros(len(prompts), dtype=np.uint64))
        self._checks.append(prompts.hash().to_numpy())

    monkeypatch.setattr(PromptKeys, "add", add)
    with pytest.raises(PromptError, match="'b' and 'a'"):
        unite(tmp_path, source(tmp_path, ("b", "x", "y")), source(tmp_path, A_X))


def test_two_prompts_under_one_id_are_both_named(tmp_path: Path):
    same = source(tmp_path, ("b", "x", "y"), A_X)
    frame = read_frame(same.path).with_columns(prompt_id=pl.lit("0" * 16))
    write_frame(frame, same.path, SOURCE_PAIRS)
    with pytest.raises(PromptError, match="'b' and 'a'"):
        unite(tmp_path, same)


def test_too_few_rows_for_a_split_are_said_so(tmp_path: Path):
    united = unite(tmp_path, source(tmp_path, A_X))
    with pytest.raises(PairsError, match=r"1 pairs of 1 prompts leave the split '\w+' empty.*splits\.test \(0\.15\)"):
        require_splits(united, ["train", "validation", "test"], SplitSettings())

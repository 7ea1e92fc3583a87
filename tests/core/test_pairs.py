"""The union keeps each comparison once, and a prompt never leaves its split."""

import hashlib

import polars as pl
import pytest

from densityrm_core import tables
from densityrm_core.experiment import SplitSettings
from densityrm_core.pairs import PairsError, require_splits, split_of, unite_pairs
from densityrm_core.prompts import PromptError, unique_prompts
from densityrm_core.sources.rows import prompt_id


def source(*rows: tuple[str, str, str], src: str = "hh") -> pl.DataFrame:
    return tables.SOURCE_PAIRS.frame(
        [
            {
                "pair_id": f"{src}-{i}",
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "context": [{"role": "user", "content": prompt}],
                "chosen": chosen,
                "rejected": rejected,
                "src": src,
                "origin": f"file:{i + 1}",
            }
            for i, (prompt, chosen, rejected) in enumerate(rows)
        ]
    )


def test_pairs_and_rejects_add_up_to_what_was_read():
    united = unite_pairs([source(("a", "x", "y"), ("a", "x", "y"), ("b", "x", "y"), ("b", "y", "x"))], SplitSettings())
    assert united.pairs.height + united.rejects["pairs"].sum() == united.read == 4


def test_an_exact_duplicate_is_kept_once_and_named():
    united = unite_pairs([source(("a", "x", "y")), source(("a", "x", "y"), src="ultrafeedback")], SplitSettings())
    assert united.pairs["pair_id"].to_list() == ["hh-0"]
    assert united.rejects.select("reason", "origin", "src").rows() == [("duplicate_pair", "file:1", "ultrafeedback")]


def test_a_contradiction_is_a_tie_and_goes():
    united = unite_pairs([source(("a", "x", "y"), ("a", "y", "x"))], SplitSettings())
    assert united.pairs.is_empty()
    assert united.rejects["reason"].to_list() == ["contradictory_pair"] * 2


def test_the_reply_preferred_more_often_wins():
    united = unite_pairs([source(("a", "y", "x"), ("a", "x", "y"), ("a", "x", "y"))], SplitSettings())
    assert united.pairs.select("chosen", "origin").rows() == [("x", "file:2")]
    assert united.rejects.height == 2


def test_the_same_replies_to_another_context_are_another_comparison():
    assert unite_pairs([source(("a", "x", "y"), ("b", "x", "y"))], SplitSettings()).pairs.height == 2


def test_shares_of_the_splits_are_as_asked():
    settings = SplitSettings(validation=0.1, test=0.2, judge=0.3)
    splits = [split_of(f"prompt number {i}", settings) for i in range(20_000)]
    for name, share in (("validation", 0.1), ("test", 0.2), ("judge", 0.3), ("train", 0.4)):
        assert splits.count(name) / len(splits) == pytest.approx(share, abs=0.01)


def test_new_rows_never_move_an_old_prompt():
    old = source(*((f"prompt {i}", "x", "y") for i in range(200)))
    new = source(*((f"another {i}", "x", "y") for i in range(300)), src="ultrafeedback")
    before = unite_pairs([old], SplitSettings()).pairs.select("prompt_id", "split")
    after = unite_pairs([new, old], SplitSettings()).pairs.select("prompt_id", "split")
    assert before.join(after, on="prompt_id").filter(pl.col("split") != pl.col("split_right")).is_empty()


def test_prompts_that_differ_in_case_or_punctuation_share_a_split():
    for i in range(50):
        assert split_of(f"How do I fix it {i}?", SplitSettings()) == split_of(f"how do i  fix it, {i}", SplitSettings())


def test_prompt_id_is_the_head_of_the_md5():
    assert prompt_id("Où est-ce?") == hashlib.md5("Où est-ce?".encode()).hexdigest()[:16]  # noqa: S324  the id's definition


def test_unique_prompts_count_their_pairs_and_sources():
    united = unite_pairs(
        [source(("a", "x", "y"), ("a", "x", "z")), source(("a", "p", "q"), src="ultrafeedback")], SplitSettings()
    )
    assert unique_prompts(united.pairs).select("prompt", "pairs", "sources").rows() == [("a", 3, ["hh", "ultrafeedback"])]


def test_a_prompt_in_two_splits_is_named():
    pairs = unite_pairs([source(("a", "x", "y"), ("a", "x", "z"))], SplitSettings()).pairs
    straddling = pairs.with_columns(split=pl.Series(["train", "test"]))
    with pytest.raises(PromptError, match="in the splits test and train: 'a'"):
        unique_prompts(straddling)


def test_two_prompts_with_one_id_are_both_named():
    pairs = unite_pairs([source(("a", "x", "y"), ("b", "x", "z"))], SplitSettings()).pairs
    collided = pairs.with_columns(prompt_id=pl.lit("0" * 16), split=pl.lit("train"))
    with pytest.raises(PromptError, match="stands for two prompts"):
        unique_prompts(collided)


def test_too_few_rows_for_a_split_are_said_so():
    pairs = unite_pairs([source(("a", "x", "y"))], SplitSettings()).pairs
    with pytest.raises(PairsError, match=r"1 pairs of 1 prompts leave the split '\w+' empty"):
        require_splits(pairs, ["train", "validation", "test"])

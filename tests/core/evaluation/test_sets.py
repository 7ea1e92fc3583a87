"""Sets in RewardBench's formats become pairs; what is broken is counted and named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from densityrm_core.evaluation.sets import EvaluationSet, read_set
from densityrm_core.experiment import Experiment
from densityrm_core.sources.rows import SourceError

PLAIN = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go.", "subset": "chat"}
USER, HELLO, GO = ({"role": r, "content": c} for r, c in (("user", "Hi?"), ("assistant", "Hello."), ("assistant", "Go.")))


def loaded(folder: Path, *rows: Any, name: str = "bench.jsonl") -> EvaluationSet:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_set("bench", str(path), folder / "downloads")


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {**PLAIN, "prompt": [USER]},
        {**PLAIN, "chosen": [HELLO], "rejected": [GO]},
        {**PLAIN, "chosen": [USER, HELLO], "rejected": [USER, GO]},
        {"chosen": [USER, HELLO], "rejected": [USER, GO], "subset": "chat"},
        {**PLAIN, "chosen": ["Hello."], "rejected": ["Go."]},
    ],
)
def test_every_format_gives_the_same_pair(row: dict[str, Any], tmp_path: Path):
    found = loaded(tmp_path, row).pairs.row(0, named=True)
    assert (found["context"], found["chosen"], found["rejected"], found["src"]) == ([USER], "Hello.", "Go.", "chat")
    assert found["pair_id"] == loaded(tmp_path, PLAIN).pairs["pair_id"][0]


def test_every_chosen_reply_is_paired_with_every_rejected_one(tmp_path: Path):
    pairs = loaded(tmp_path, {**PLAIN, "chosen": ["a", "b"], "rejected": ["x", "y", "z"]}).pairs
    assert sorted(zip(pairs["chosen"], pairs["rejected"], strict=True)) == [(c, r) for c in "ab" for r in "xyz"]


def test_a_set_without_subsets_is_its_own_subset(tmp_path: Path):
    assert loaded(tmp_path, {k: v for k, v in PLAIN.items() if k != "subset"}).pairs["src"].to_list() == ["bench"]


def test_pairs_of_a_set_have_no_density_stratum(tmp_path: Path):
    assert loaded(tmp_path, PLAIN).pairs.select("decile", "quartile").row(0) == (None, None)


def test_broken_rows_are_counted_and_the_first_is_named(tmp_path: Path):
    found = loaded(tmp_path, PLAIN, {**PLAIN, "chosen": 3}, "{broken", {**PLAIN, "chosen": "Go."}, {**PLAIN, "rejected": ""})
    assert found.left_out == {"broken_json": 1, "empty_reply": 1, "identical_replies": 1, "wrong_type": 1}
    assert str(found) == (
        "bench: 1 pairs of 5 rows; 4 left out (broken_json 1, empty_reply 1, identical_replies 1, wrong_type 1; "
        "first: bench.jsonl:2 'chosen' must be a text, not a number)"
    )


def test_a_pair_that_its_subset_has_had_counts_once(tmp_path: Path):
    found = loaded(tmp_path, PLAIN, PLAIN, {**PLAIN, "subset": "safety"})
    assert (found.pairs["src"].to_list(), found.left_out) == (["chat", "safety"], {"duplicate": 1})


def test_a_set_of_broken_rows_alone_is_refused(tmp_path: Path):
    with pytest.raises(SourceError, match=r"evaluation\.sets\.bench: none of the 1 rows .* column 'prompt' is missing"):
        loaded(tmp_path, {"question": "?", "chosen": "a", "rejected": "b"})


def test_a_missing_file_names_the_setting(tmp_path: Path):
    with pytest.raises(SourceError, match=r"evaluation\.sets\.bench: .*none\.jsonl"):
        read_set("bench", str(tmp_path / "none.jsonl"), tmp_path)


def test_gzip_and_parquet_hold_the_same_pairs(tmp_path: Path):
    plain = loaded(tmp_path, PLAIN).pairs
    (tmp_path / "bench.jsonl.gz").write_bytes(gzip.compress(json.dumps(PLAIN).encode()))
    pl.DataFrame([{**PLAIN, "chosen": [USER, HELLO], "rejected": [USER, GO]}]).write_parquet(tmp_path / "bench.parquet")
    for name in ("bench.jsonl.gz", "bench.parquet"):
        assert read_set("bench", str(tmp_path / name), tmp_path).pairs.equals(plain)


def test_sets_leave_experiments_comparable():
    with_set = Experiment.model_validate({"evaluation": {"sets": {"rewardbench": "bench.jsonl"}}})
    assert with_set.fingerprint == Experiment().fingerprint


@pytest.mark.parametrize("name", ["test", "a/b", ""])
def test_a_set_cannot_take_the_name_of_the_test_split_or_a_path(name: str):
    with pytest.raises(ValueError, match=r"sets"):
        Experiment.model_validate({"evaluation": {"sets": {name: "x.jsonl"}}})

"""The card of an evaluation shows further sets beside the test split, and says what of them was left out."""

import json
from pathlib import Path

import numpy as np
import polars as pl

from densityrm_core import tables
from densityrm_core.evaluation.reward_models import evaluate_baseline
from densityrm_core.evaluation.sets import read_set
from densityrm_core.tables import with_key
from densityrm_dagster.cards.reward_models import measurements

ROW = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."}


def test_sets_show_each_subset_their_mean_and_what_was_left_out(tmp_path: Path):
    lines = [{**ROW, "subset": "chat"}, {**ROW, "prompt": "Hm?", "subset": "code"}, {**ROW, "chosen": 1}]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_set("bench", str(path), tmp_path)
    answers = evaluate_baseline(lambda pairs: (np.array([1.0, 0.0]), np.array([0.0, 1.0])), found.pairs)
    rows = with_key(answers, tables.RM_EVALUATION, seed=0, model="rm_uniform", precision="fp32", fingerprint="f")
    card, told = measurements(rows, [found], 100)
    table = card["sets"].md_str
    assert "| bench | chat | accuracy | 1 | 100.0" in table and "| bench | code | accuracy | 1 | 0.0" in table
    assert "| bench | mean of subsets | accuracy | 2 | 50.0" in table
    assert card["rm_uniform_bench_accuracy"] == 0.5
    assert told == ["evaluation set bench: 2 pairs of 3 rows; 1 left out (wrong_type 1; "
                    "first: bench.jsonl:3 'chosen' must be a text, not a number)"]  # fmt: skip
    assert "1 left out" in card["set_files"].md_str and "bench.jsonl" in card["set_files"].md_str


def test_a_seed_without_further_sets_shows_none():
    assert "sets" not in measurements(tables.RM_EVALUATION.empty(), [], 100)[0]


def test_rows_of_the_test_split_alone_give_a_card():
    row = {"seed": 0, "model": "rm_uniform", "set": "test", "pair_id": "a", "prompt_id": "1", "src": "hh", "decile": 1,
           "quartile": 1, "reward_chosen": 1.0, "reward_rejected": 0.0, "correct": 1.0, "chars_chosen": 3, "chars_rejected": 2,
           "precision": "fp32", "fingerprint": "f"}  # fmt: skip
    card, told = measurements(tables.RM_EVALUATION.check(pl.DataFrame([row], schema=tables.RM_EVALUATION.schema)), [], 100)
    assert told == ["accuracy of rm_uniform: 1.000 [-inf, inf], on the rare quartile 1.000 [-inf, inf]"]
    assert card["rm_uniform_accuracy"] == 1

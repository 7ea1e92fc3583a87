"""The test split is read in one place, whole, once."""

from __future__ import annotations

import ast
from pathlib import Path

import polars as pl
import pytest

import densityrm_core
import densityrm_dagster
from densityrm_core.evaluation.reward_models import evaluate_baseline, evaluate_reward_model, exam_pairs
from densityrm_core.measurement.reward_models import checked
from densityrm_core.tables import RM_EVALUATION

from ..tiny_models import tiny_reward_model

CONTEXT = [{"role": "user", "content": "Hi?"}]
PAIRS = pl.DataFrame(
    {
        "pair_id": ["a", "b", "c"], "prompt_id": ["1", "2", "3"], "src": ["hh"] * 3, "split": ["train", "test", "test"],
        "context": [CONTEXT] * 3, "chosen": ["x", "abc", "é"], "rejected": ["y", "ab", "éé"],
    }
)  # fmt: skip
STRATA = PAIRS.select("pair_id", "split").with_columns(decile=pl.Series([1, 7, 2]), quartile=pl.Series([1, 3, 1]))
SET = PAIRS.head(1).with_columns(set=pl.lit("bench"), decile=pl.lit(None, pl.Int64), quartile=pl.lit(None, pl.Int64))


def test_the_exam_is_the_test_split_and_the_further_sets():
    exam = exam_pairs(PAIRS.lazy(), STRATA.lazy(), [SET])
    assert exam.select("set", "pair_id", "decile").rows() == [("test", "b", 7), ("test", "c", 2), ("bench", "a", None)]


def test_progress_is_told_until_every_pair_is_scored(tmp_path: Path):
    exam, told = pl.concat([exam_pairs(PAIRS.lazy(), STRATA.lazy())] * 400), []
    rows = evaluate_reward_model(tiny_reward_model(tmp_path), exam, report=lambda done, total: told.append((done, total)))
    assert len(rows) == 800 and len(told) > 1
    assert told == sorted(set(told)) and told[-1] == (800, 800)


def test_rows_tell_lengths_in_characters_and_who_is_right():
    exam = exam_pairs(PAIRS.lazy(), STRATA.lazy())
    rows = evaluate_baseline(lambda pairs: (pairs["decile"].to_numpy() * 1.0, pairs["decile"].to_numpy() * 0 + 2.0), exam)
    assert rows.select("correct", "chars_chosen", "chars_rejected").rows() == [(1.0, 3, 2), (0.5, 1, 2)]
    named = rows.with_columns(seed=pl.lit(0, pl.Int64), model=pl.lit("m"), precision=pl.lit("fp32"), fingerprint=pl.lit("f"))
    assert checked(RM_EVALUATION.check(named.select(RM_EVALUATION.schema.names()))).height == 2


@pytest.mark.parametrize("package", [densityrm_core, densityrm_dagster], ids=lambda package: package.__name__)
def test_no_other_code_asks_for_the_test_split(package: object):
    """Makers of splits name it, measurements of finished rows filter by the set of that name, policies answer its prompts, and an
    estimate of the time counts its pairs."""
    root = Path(str(package.__file__)).parent
    naming = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "test"
    }
    measure = {f"measurement/{name}.py" for name in ("comparison", "frames", "reward_models")}
    measure |= {"report/reward_model_section.py", "report/verdict.py"}
    make, count = {"pairs/splits.py", "settings.py", "assets/pairs.py"}, {"planning/estimate.py"}
    assert naming - measure - make - count <= {"evaluation/reward_models.py", "policies/questions.py"}

"""What policies answered while they were trained is judged afterwards, from the file in their folder."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from densityrm_core.evaluation.curves import FILE, CurveError, judged_curve
from densityrm_core.tables import POLICY_COMPLETIONS, TableError

CONTEXTS = pl.DataFrame(
    {"prompt_id": ["p", "q"], "context": [[{"role": "user", "content": "Hi?"}], [{"role": "user", "content": "Why?"}]]}
)


def judge(contexts, replies):
    return [float(len(context[0]["content"]) * 100 + len(reply)) for context, reply in zip(contexts, replies, strict=True)]


def answers(*rows: tuple[int, str, str]) -> pl.DataFrame:
    frame = [
        {"step": step, "completions_seen": step * 64, "prompt_id": prompt, "prompt": "", "completion": text, "own_reward": 0.5,
         "kl": 0.1 * step, "tokens": 3, "decile": 1, "quartile": 1}
        for step, prompt, text in rows
    ]  # fmt: skip
    return POLICY_COMPLETIONS.check(POLICY_COMPLETIONS.frame(frame))


def folder(tmp_path: Path, frame: pl.DataFrame | None) -> Path:
    policy = tmp_path / "grpo_b" / "0"
    policy.mkdir(parents=True)
    if frame is not None:
        frame.write_parquet(policy / FILE)
    return policy


def test_every_answer_is_judged_in_its_own_context(tmp_path: Path):
    policy = folder(tmp_path, answers((0, "q", "a"), (0, "p", "bb"), (25, "q", "ccc")))
    found = judged_curve(policy, CONTEXTS, judge)
    assert found.select("step", "prompt_id", "judge_reward").rows() == [(0, "q", 401.0), (0, "p", 302.0), (25, "q", 403.0)]
    assert found["kl"].to_list() == [0, 0, 2.5]


def test_a_policy_without_answers_says_what_to_materialize(tmp_path: Path):
    with pytest.raises(CurveError, match=r"has no completions\.parquet.*materialize grpo_b again"):
        judged_curve(folder(tmp_path, None), CONTEXTS, judge)


def test_an_answer_to_an_unknown_prompt_is_named(tmp_path: Path):
    with pytest.raises(CurveError, match="prompts that the pairs do not hold, such as r"):
        judged_curve(folder(tmp_path, answers((0, "r", "a"))), CONTEXTS, judge)


def test_another_files_columns_are_refused(tmp_path: Path):
    with pytest.raises(TableError, match="'kl' is missing"):
        judged_curve(folder(tmp_path, answers((0, "p", "a")).drop("kl")), CONTEXTS, judge)

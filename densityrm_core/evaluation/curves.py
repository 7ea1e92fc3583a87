"""What the judge says of the answers that policies gave while they were trained: reward against the distance travelled."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from densityrm_core.policies.rewards import RewardFunction
from densityrm_core.storage import read_frame
from densityrm_core.tables import POLICY_COMPLETIONS

FILE = "completions.parquet"  # in a policy's folder

_AT_A_TIME = 1024
_COLUMNS = ("step", "prompt_id", "decile", "quartile", "kl", "own_reward", "judge_reward", "tokens")


class CurveError(ValueError):
    """A policy's folder does not hold its answers; the message names it and says what to do."""


def judged_curve(policy: Path, contexts: pl.DataFrame, judge: RewardFunction) -> pl.DataFrame:
    """The columns of tables.POLICY_CURVES but seed, policy and fingerprint, a row an answer, in the order of the answers.

    Args:
        policy: a folder with POLICY_COMPLETIONS in completions.parquet.
        contexts: columns prompt_id and context, the turns that were answered.

    Raises:
        CurveError: the folder has no such file, or a prompt has no context.
        TableError: the file has other columns.
    """
    if not (policy / FILE).exists():
        raise CurveError(f"{policy} has no {FILE}, it was trained by an earlier version: materialize {policy.parent.name} again")
    answers = POLICY_COMPLETIONS.check(read_frame(policy / FILE))
    turns = contexts.select("prompt_id", "context").unique("prompt_id", keep="first", maintain_order=True)
    asked = answers.join(turns, on="prompt_id", how="left", maintain_order="left")
    if lost := asked["context"].null_count():
        first = asked.filter(pl.col("context").is_null())["prompt_id"][0]
        name = policy.parent.name
        raise CurveError(
            f"{policy}: {lost} answers to prompts that the pairs do not hold, such as {first}; materialize {name} again"
        )
    rewards: list[float] = []
    for part in asked.iter_slices(_AT_A_TIME):
        rewards += judge(part["context"].to_list(), part["completion"].to_list())
    return asked.with_columns(pl.Series("judge_reward", rewards, pl.Float64)).select(_COLUMNS)

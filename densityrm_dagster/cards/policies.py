"""What the Dagster UI shows of policies: how a trained one answers before and after, and what their evaluation says."""

from typing import Any

import dagster as dg
import polars as pl

from densityrm_core.tables import POLICY_DIVERSITY
from densityrm_dagster.metadata import markdown_table, plot

_NUMBERS = ("judge_reward", "own_less_judge", "wins", "kl", "entropy")
_OF_DIVERSITY = ("distinct_1", "distinct_2", "self_bleu", "spread", "spread_across")
_CELL = 160


def evaluation_card(rows: pl.DataFrame, pairs: pl.DataFrame, resamples: int) -> dict[str, Any]:
    """The card of POLICY_EVALUATION rows of one seed; `pairs` (PREFERENCE_PAIRS) has the prompts' texts."""
    from densityrm_core.measurement.policies import measure
    from densityrm_core.report import policy_plots, policy_tables

    measured = measure(rows, POLICY_DIVERSITY.empty(), resamples)
    return {
        **_numbers(measured, _NUMBERS),
        "summary": _table(policy_tables.overview(measured)),
        "gains": _table(policy_tables.gains(measured)),
        "wins_by_stratum": _table(policy_tables.wins_by_stratum(measured)),
        "by_decile": _table(policy_tables.by_decile(measured)),
        "rewards": plot(policy_plots.policy_rewards(measured)),
        "wins_by_decile": plot(policy_plots.wins_by_decile(measured)),
        "examples": dg.MetadataValue.md(_examples(rows, pairs)),
    }


def curves_card(rows: pl.DataFrame, resamples: int) -> dict[str, Any]:
    """The card of POLICY_CURVES rows of one seed."""
    from densityrm_core.measurement.equal_kl import compare_at_equal_kl, curve_points
    from densityrm_core.report import policy_plots, policy_tables

    equal = compare_at_equal_kl(rows, resamples)
    level = next(iter(equal.levels.values()), None)
    return {
        **({} if level is None else {"equal_kl_nats": level}),
        **{f"{arm}_judge_reward_at_equal_kl": interval.mean for arm, interval in equal.rewards.items()},
        "at_equal_kl": _table(policy_tables.at_equal_kl(equal)),
        "points": _table(curve_points(rows).drop("seed")),
        "reward_against_kl": plot(policy_plots.reward_against_kl(rows)),
    }


def diversity_card(evaluation: pl.DataFrame, rows: pl.DataFrame, resamples: int) -> dict[str, Any]:
    """The card of POLICY_DIVERSITY rows of one seed, and the replies of the two prompts that are answered most alike."""
    from densityrm_core.measurement.policies import measure
    from densityrm_core.report import policy_plots, policy_tables

    measured = measure(evaluation, rows, resamples, deciles=False)
    in_words, in_meaning = policy_tables.diversity(measured)
    return {
        **_numbers(measured, _OF_DIVERSITY),
        "words": _table(in_words),
        "meaning": _table(in_meaning),
        "diversity": plot(policy_plots.diversity(measured)),
        "most_alike": dg.MetadataValue.md(_most_alike(evaluation, rows)),
    }


def _numbers(measured: pl.DataFrame, metrics: tuple[str, ...]) -> dict[str, float]:
    """Floats that Dagster plots from run to run."""
    shown = measured.filter(pl.col("by") == "all", pl.col("metric").is_in(metrics)).select("policy", "metric", "mean")
    return {f"{policy}_{metric}": mean for policy, metric, mean in shown.iter_rows() if mean is not None}


def _examples(rows: pl.DataFrame, pairs: pl.DataFrame) -> str:
    """What each policy answers, greedily, to a rare and to a common prompt."""
    greedy = rows.filter(pl.col("sample") == 0)
    picked = pl.concat([greedy.sort("decile", "prompt_id").head(1), greedy.sort("decile", "prompt_id").tail(1)])["prompt_id"]
    prompt = pairs.select("prompt_id", "prompt").unique("prompt_id")
    shown = greedy.filter(pl.col("prompt_id").is_in(picked.implode())).join(prompt, on="prompt_id").sort("decile", "prompt_id")
    return markdown_table(shown.select("prompt", "policy", "completion", "judge_reward"))


def _most_alike(evaluation: pl.DataFrame, rows: pl.DataFrame) -> str:
    """The replies of each policy to the prompt on which it repeats itself most."""
    least = rows.sort("policy", "distinct_2", "prompt_id", nulls_last=True).group_by("policy", maintain_order=True).head(1)
    replies = evaluation.filter(pl.col("sample") > 0).join(
        least.select("policy", "prompt_id", "distinct_2"), ["policy", "prompt_id"]
    )
    return markdown_table(replies.sort("policy", "sample").select("policy", "prompt_id", "distinct_2", "completion"))


def _table(frame: pl.DataFrame) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(markdown_table(frame, _CELL))


_CELL = 400


def before_and_after(completions: pl.DataFrame, kept_step: int) -> dict[str, dg.MarkdownMetadataValue]:
    """Answers of the base policy and of the weights that are kept, to the commonest and the rarest watched prompt.

    Args:
        completions: tables.POLICY_COMPLETIONS of one training.
        kept_step: the step whose weights are kept; where that was not looked at, the last look before it is shown.
    """
    placed = completions.drop_nulls("decile").sort("decile", "prompt_id")
    if placed.is_empty():
        return {}
    ends = {"common": placed["prompt_id"][-1], "rare": placed["prompt_id"][0]}
    last = placed.filter(pl.col("step") <= kept_step)["step"].max()
    shown = [
        placed.filter(prompt_id=prompt, step=step).select(
            pl.lit(kind).alias("prompt is"), "prompt", "step", "completion", "own_reward", "kl"
        )
        for kind, prompt in ends.items()
        for step in dict.fromkeys((0, last))
    ]
    return {"before_and_after": dg.MetadataValue.md(markdown_table(pl.concat(shown), _CELL))}

"""What the Dagster UI shows of a trained policy: how it answers before and after, a common prompt and a rare one."""

import dagster as dg
import polars as pl

from densityrm_dagster.metadata import markdown_table

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

"""What policies are worth, and how diverse they are: numbers with intervals, overall and by density stratum.

Everything is computed over the sampled completions, prompt by prompt, and compared with the base policy on the same prompt.
Intervals are 95 % bootstrap intervals over prompts and, where there are several, seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from densityrm_core.arms import in_order, reward_model_of
from densityrm_core.arrays import Doubles
from densityrm_core.measurement.bootstrap import bootstrap_statistic
from densityrm_core.measurement.frames import QUARTILES, ends, flat, pair_policies, reply_means, table

OF_REPLIES = ("judge_reward", "own_reward", "kl", "tokens", "entropy")
AGAINST_BASE = ("change", "wins", "judge_gain", "own_gain", "own_less_judge")
OF_DIVERSITY = ("distinct_1", "distinct_2", "self_bleu", "spread", "spread_across")
POLICY_METRICS = (*OF_REPLIES, "greedy", *AGAINST_BASE, *OF_DIVERSITY)

_KEY = ("seed", "policy", "prompt_id")
_MEASURED = {**dict.fromkeys(("by", "stratum", "policy", "metric"), pl.String()), "prompts": pl.Int64()}


def measure(evaluation: pl.DataFrame, diversity: pl.DataFrame, resamples: int, deciles: bool = True) -> pl.DataFrame:
    """Every metric of every policy, overall, in the strata of `statistics.QUARTILES` and by decile.

    Over the sampled completions of a prompt, then over prompts, then over seeds:

    - judge_reward, own_reward, kl, tokens, entropy: means, as in tables.POLICY_EVALUATION; `greedy` is the judge's reward of the
      greedy completion.
    - change: judge reward less the base policy's, in the judge's units.
    - wins: `win_rates` against the base policy.
    - judge_gain, own_gain: the gain over the base policy by the judge, and by the policy's own reward model, each in standard
      deviations of that judge's rewards of the base policy's completions in the seed, so that they can be set beside each other.
    - own_less_judge: own_gain - judge_gain, what the reward model pays for and the judge does not: over-optimisation [Gao et
      al. 2023].
    - distinct_1, distinct_2, self_bleu, spread, spread_across: as in tables.POLICY_DIVERSITY.

    Args:
        evaluation, diversity: tables.POLICY_EVALUATION, tables.POLICY_DIVERSITY, of one or several seeds.
        deciles: whether to measure each decile, too.

    Returns:
        columns by ("all", "stratum", "decile"), stratum, policy, metric, prompts, mean, low, high; what is undefined is left out.
    """
    cells = prompt_cells(evaluation, diversity)
    parts = [("stratum", name, cells.filter(pl.col("quartile").is_in(quartiles))) for name, quartiles in QUARTILES.items()]
    if deciles:
        parts += [("decile", str(d), cells.filter(decile=d)) for d in sorted(cells["decile"].unique())]
    found = [
        {"by": "all" if name == "all" else by, "stratum": name, **row}
        for by, name, part in parts
        if part.height
        for row in _measured(part, resamples)
    ]
    return table(found, _MEASURED)


def prompt_cells(evaluation: pl.DataFrame, diversity: pl.DataFrame) -> pl.DataFrame:
    """A row a seed, policy and prompt: decile, quartile and POLICY_METRICS before they are averaged; null where undefined."""
    of_prompt = evaluation.select(*_KEY, "decile").unique(_KEY)
    greedy = evaluation.filter(pl.col("sample") == 0).select(*_KEY, greedy="judge_reward")
    cells = reply_means(evaluation).join(of_prompt, on=_KEY, how="left").join(greedy, on=_KEY, how="left")
    changes = [pair_policies(cells, p, "base").select(*_KEY, change="difference") for p in _trained(cells)]
    for frame in (
        pl.concat([_no_change(), *changes]),
        win_rates(evaluation),
        _gains(evaluation),
        diversity.select(*_KEY, *OF_DIVERSITY),
    ):
        cells = cells.join(frame, on=_KEY, how="left")
    gap = pl.col("own_gain") - pl.col("judge_gain")
    return cells.with_columns(own_less_judge=gap).select(*_KEY, "decile", "quartile", *POLICY_METRICS).sort(_KEY)


def win_rates(evaluation: pl.DataFrame) -> pl.DataFrame:
    """How often the judge prefers a policy's sample to one of the base policy on the same prompt: over all pairs, ties half.

    The base policy of a seed without an evaluation of it is that of all other seeds.

    Returns:
        columns seed, policy, prompt_id, wins; no rows of the base policy.
    """
    sampled = evaluation.filter(pl.col("sample") > 0).select(*_KEY, "judge_reward")
    base = sampled.filter(pl.col("policy") == "base").select("seed", "prompt_id", base="judge_reward")
    without = sampled.select("seed").unique().join(base.select("seed").unique(), on="seed", how="anti")
    base = pl.concat([base, base.drop("seed").join(without, how="cross").select(base.columns)])
    pairs = sampled.filter(pl.col("policy") != "base").join(base, on=["seed", "prompt_id"])
    wins = 0.5 + 0.5 * (pl.col("judge_reward") - pl.col("base")).sign()
    return pairs.group_by(_KEY).agg(wins=wins.mean()).sort(_KEY)


def policies_of(measured: pl.DataFrame) -> list[str]:
    """The policies of a frame, in the order in which they are shown."""
    return in_order(measured["policy"])


def _gains(evaluation: pl.DataFrame) -> pl.DataFrame:
    """judge_gain and own_gain of every prompt of a seed whose base policy was evaluated, null where its rewards are all alike."""
    columns = ("judge_reward", "rm_uniform_reward", "rm_density_reward")
    sampled = evaluation.filter(pl.col("sample") > 0).sort(*_KEY, "sample")
    base = sampled.filter(pl.col("policy") == "base")
    means = sampled.group_by(_KEY).agg(pl.col(columns).mean())
    base_means = base.group_by("seed", "prompt_id").agg(pl.col(columns).mean().name.prefix("base_"))
    deviations = base.group_by("seed").agg(pl.when(pl.col(c).std() > 0).then(pl.col(c).std()).alias(f"sd_{c}") for c in columns)
    joined = means.filter(pl.col("policy") != "base").join(base_means, on=["seed", "prompt_id"]).join(deviations, on="seed")
    gain = {c: (pl.col(c) - pl.col(f"base_{c}")) / pl.col(f"sd_{c}") for c in columns}
    own = pl.lit(None, pl.Float64)
    for policy in _trained(joined):
        own = pl.when(pl.col("policy") == policy).then(gain[f"{reward_model_of(policy)}_reward"]).otherwise(own)
    return joined.select(*_KEY, judge_gain=gain["judge_reward"], own_gain=own)


def _measured(cells: pl.DataFrame, resamples: int) -> list[dict[str, object]]:
    """All metrics of all policies on the prompts of one stratum; every resample holds the same prompts for all of them."""
    policies = policies_of(cells)
    slots = cells["policy"].replace_strict(policies, range(len(policies)), return_dtype=pl.Int64).to_numpy()
    values = cells.select(POLICY_METRICS).to_numpy().astype(np.float64)
    known = ~np.isnan(values)
    columns = np.concatenate([np.where(known, values, 0.0), known], axis=1)
    prompts = cells["prompt_id"].rank("dense")
    drawn = bootstrap_statistic(columns, cells["seed"], prompts, _means, resamples, 0, slots, len(policies))
    found: list[dict[str, object]] = []
    for i, policy in enumerate(policies):
        own = cells.filter(policy=policy)
        for j, metric in enumerate(POLICY_METRICS):
            if known[slots == i, j].any():
                interval = drawn.interval(i * len(POLICY_METRICS) + j)
                count = own.filter(pl.col(metric).is_not_null())["prompt_id"].n_unique()
                found.append({"policy": policy, "metric": metric, "prompts": count, **ends(interval)})
    return found


def _means(sums: Doubles) -> Doubles:
    """Mean of each metric of each policy from sums and counts, (..., policies, 2 metrics) to (..., policies * metrics)."""
    total, count = np.split(sums, 2, axis=-1)
    return flat(total / count, 2)


def _trained(cells: pl.DataFrame) -> Sequence[str]:
    """The policies of `cells` but the base policy."""
    return [policy for policy in in_order(cells["policy"]) if policy != "base"]


def _no_change() -> pl.DataFrame:
    return pl.DataFrame(schema={"seed": pl.Int64, "policy": pl.String, "prompt_id": pl.String, "change": pl.Float64})

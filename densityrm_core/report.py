"""The report a person reads: the answer first, then the tables, figures and limits behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from densityrm_core import plots
from densityrm_core.document import Block, Grid, Picture, Report, Text, finite
from densityrm_core.experiment import Experiment
from densityrm_core.rm_section import reward_model_section
from densityrm_core.statistics import (
    STRATA,
    Hypothesis,
    Interval,
    Verdict,
    bootstrap_column,
    bootstrap_strata,
    pair_policies,
    policy_hypothesis,
    reply_means,
    reward_model_hypothesis,
    reward_spec,
)

_ARMS = {"base": "base", "a": "A: neither", "b": "B: RM", "c": "C: prompts", "d": "D: both"}


def build_report(experiment: Experiment, rm: pl.DataFrame, policies: pl.DataFrame, notes: Sequence[str] = ()) -> Report:
    """Answer the question of the experiment from RM_EVALUATION and POLICY_EVALUATION rows.

    H1: accuracy of rm_density - rm_uniform on the rare quartile, paired by seed and test pair.
    H2: judge reward of arm B - arm A over the sampled completions, paired by seed and prompt.
    Overall, supported needs both, one refutation refutes, and without data for either it is undecided.

    Args:
        experiment: rows of other fingerprints or of seeds it does not list are left out, and the report says so.
        rm, policies: either may be empty, lack seeds or lack arms.
        notes: sentences to print among the remarks.
    """
    remarks = list(notes)
    rm = _own_rows(rm, experiment, "reward-model", remarks)
    policies = _own_rows(policies, experiment, "policy", remarks)
    remarks += _missing(experiment, rm, policies)
    cells = reply_means(policies)

    claim, n = experiment.evaluation.claim, experiment.evaluation.bootstrap
    h1, h2 = reward_model_hypothesis(rm, claim, n), policy_hypothesis(cells, claim, n)
    overall = _overall(h1, h2)
    section, arms, differences = reward_model_section(rm, n), _arms(policies, cells, n), _differences(cells, n)
    sizes = _sizes(rm, policies)
    table = {
        "experiment": experiment.name,
        "fingerprint": experiment.fingerprint,
        "seeds": list(experiment.seeds),
        "verdict": overall,
        "reward_model": {**vars(h1), **section.table},
        "policy": {**vars(h2), "arms": arms, "differences": differences},
        "sizes": sizes,
        "remarks": remarks,
    }
    figures = dict(section.figures)
    if len(cells):
        figures["policy_rewards.png"] = plots.policy_rewards(policies, n)
        figures["reward_against_kl.png"] = plots.reward_against_kl(policies)
    blocks = (
        Text("Does sampling by 1/density help?", heading=1),
        Text(_answer(overall, h1.verdict, h2.verdict)),
        Text(h1.sentence),
        Text(h2.sentence),
        *section.blocks,
        *_policy_blocks(arms, differences, figures),
        Text("What this rests on", heading=2),
        Text(_basis(experiment, sizes)),
        *(Text(f"- {remark}") for remark in remarks),
        Text(_limits(experiment, sizes)),
    )
    return Report(blocks, finite(table), figures)


def _own_rows(frame: pl.DataFrame, experiment: Experiment, kind: str, remarks: list[str]) -> pl.DataFrame:
    """The rows of this experiment; what is left out is told in `remarks`."""
    own = frame.filter(pl.col("fingerprint") == experiment.fingerprint)
    if foreign := len(frame) - len(own):
        remarks.append(f"{foreign:,} {kind} rows were left out: they come from other settings (another fingerprint).")
    listed = own.filter(pl.col("seed").is_in(experiment.seeds))
    if extra := sorted(set(own["seed"]) - set(experiment.seeds)):
        remarks.append(f"{kind} rows of seeds that the experiment does not list were left out: {_list(extra)}.")
    return listed


def _missing(experiment: Experiment, rm: pl.DataFrame, policies: pl.DataFrame) -> list[str]:
    """One remark for every seed, reward model and arm that the experiment lists and the rows lack."""
    have: dict[str, set[int]] = {m: set(rm.filter(pl.col("model") == m)["seed"]) for m in ("rm_uniform", "rm_density")}
    have |= {_arm(a): set(policies.filter(pl.col("policy") == a)["seed"]) for a in experiment.arms}
    absent = set(experiment.seeds).difference(*have.values())
    remarks = [f"seed {s} has no evaluation yet." for s in experiment.seeds if s in absent]
    for name, seeds in have.items():
        if not seeds:
            remarks.append(f"{name} has no evaluation yet.")
        elif missing := sorted(set(experiment.seeds) - seeds - absent):
            remarks.append(f"{name} has no evaluation of seed {_list(missing)} yet.")
    if not (policies["policy"] == "base").any():
        remarks.append("the base policy has no evaluation yet.")
    return remarks


def _overall(h1: Hypothesis, h2: Hypothesis) -> Verdict:
    verdicts = {h1.verdict, h2.verdict}
    if h1.difference is None or h2.difference is None:
        return "undecided"
    if verdicts == {"supported"}:
        return "supported"
    return "refuted" if "refuted" in verdicts else "undecided"


def _arms(policies: pl.DataFrame, cells: pl.DataFrame, n: int) -> dict[str, dict[str, Any]]:
    arms: dict[str, dict[str, Any]] = {}
    for policy in _ARMS:
        own, change = cells.filter(pl.col("policy") == policy), pair_policies(cells, policy, "base")
        greedy = policies.filter((pl.col("policy") == policy) & (pl.col("sample") == 0))
        if len(own):
            arms[policy] = {
                "judge_reward": bootstrap_column(own, "judge_reward", n),
                "change": bootstrap_column(change, "difference", n) if policy != "base" and len(change) else None,
                "greedy": _mean(greedy, "judge_reward"),
                "own_reward": _mean(own, "own_reward"),
                "kl": _mean(own, "kl"),
                "tokens": _mean(own, "tokens"),
                "seeds": sorted(set(own["seed"])),
            }
    return arms


def _mean(frame: pl.DataFrame, column: str) -> float | None:
    """Mean over seeds of the mean over rows; None where there is nothing to average."""
    by_seed = frame.drop_nulls(column).group_by("seed").agg(pl.col(column).mean()).sort("seed")[column].to_list()
    return sum(by_seed) / len(by_seed) if by_seed else None


def _differences(cells: pl.DataFrame, n: int) -> dict[str, dict[str, Interval | None]]:
    pairs = {f"{arm}-a": pair_policies(cells, arm, "a") for arm in "bcd"}
    return {name: bootstrap_strata(rows, "difference", n) for name, rows in pairs.items() if len(rows)}


def _sizes(rm: pl.DataFrame, policies: pl.DataFrame) -> dict[str, Any]:
    rm = rm.filter(pl.col("set") == "test")
    return {
        "reward_model": {
            "seeds": sorted(set(rm["seed"])),
            "prompts": rm["prompt_id"].n_unique(),
            "pairs": rm["pair_id"].n_unique(),
            "rare_pairs": rm.filter(pl.col("quartile") == 1)["pair_id"].n_unique(),
        },
        "policy": {
            "seeds": sorted(set(policies.filter(pl.col("policy") != "base")["seed"])),
            "prompts": policies["prompt_id"].n_unique(),
            "samples": policies.filter(pl.col("sample") > 0)["sample"].n_unique(),
        },
    }


def _policy_blocks(
    arms: dict[str, dict[str, Any]], differences: dict[str, dict[str, Interval | None]], figures: dict[str, bytes]
) -> tuple[Block, ...]:
    if not arms:
        return (Text("Policies", 2), Text("No policy has been evaluated yet."))
    spec = reward_spec(*(a["judge_reward"].mean for a in arms.values()))
    rows = [
        (_ARMS[p], _show(a["judge_reward"], spec), _show(a["change"], "+" + spec), _show(a["greedy"], spec),
         _show(a["own_reward"], ".2f"), _show(a["kl"], ".2f"), _show(a["tokens"], ".1f"), str(len(a["seeds"])))
        for p, a in arms.items()
    ]  # fmt: skip
    header = ("1/density in", "judge reward [95 %]", "against base [95 %]", "greedy", "own RM", "KL, nats", "tokens", "seeds")
    square = Grid(
        ("judge reward", "prompts uniform", "prompts by 1/density"),
        tuple(
            (rm, *(f"{p.upper()}: {_show(arms[p]['judge_reward'], spec)}" if p in arms else f"{p.upper()}: -" for p in pair))
            for rm, pair in {"RM uniform": "ac", "RM by 1/density": "bd"}.items()
        ),
    )
    paired = tuple((k.upper().replace("-", " - "), *(_show(i, "+" + spec) for i in d.values())) for k, d in differences.items())
    return (
        Text("Policies", 2),
        square,
        Grid(header, tuple(rows)),
        *([Grid(("judge reward, paired [95 %]", *STRATA), paired)] if paired else []),
        *_pictures(figures, {"policy_rewards.png": "Judge reward per arm", "reward_against_kl.png": "Judge reward against KL"}),
    )


def _pictures(figures: dict[str, bytes], captions: dict[str, str]) -> list[Picture]:
    return [Picture(name, caption) for name, caption in captions.items() if name in figures]


def _answer(overall: Verdict, h1: Verdict, h2: Verdict) -> str:
    return (
        f"{overall.capitalize()} at this size: sampling by 1/density makes a better reward model on rare prompts (H1 {h1}) "
        f"and a better policy (H2 {h2})."
    )


def _basis(experiment: Experiment, sizes: dict[str, Any]) -> str:
    rm, policy = sizes["reward_model"], sizes["policy"]
    return (
        f"Experiment {experiment.name}, fingerprint {experiment.fingerprint}. "
        f"Reward models: {_count(len(rm['seeds']), 'seed')}, {_count(rm['prompts'], 'prompt')}, "
        f"{_count(rm['pairs'], 'test pair')}, {rm['rare_pairs']:,} of them on prompts of the rare quartile. "
        f"Policies: {_count(len(policy['seeds']), 'seed')}, {_count(policy['prompts'], 'prompt')}, "
        f"{_count(policy['samples'], 'sampled completion')} each. Judge rewards are those of the sampled completions; "
        "the greedy completion stands apart. Differences are paired by seed and by test pair or prompt."
    )


def _limits(experiment: Experiment, sizes: dict[str, Any]) -> str:
    seeds = min(filter(None, (len(sizes[part]["seeds"]) for part in ("reward_model", "policy"))), default=0)
    judge = "the planted rule" if experiment.judge.kind == "planted" else "one reward model, trained on its own split"
    return (
        f"Limits: with {_count(seeds, 'seed')} the intervals miss part of the difference between training runs and are "
        f"optimistic. The judge is {judge}. Arms are compared where training ended, not at equal KL. The two hypotheses are not "
        "corrected for each other. The verdict holds for these models and data only."
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _arm(policy: str) -> str:
    return f"arm {policy.upper()}"


def _show(value: Interval | float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)

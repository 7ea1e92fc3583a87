"""The report a person reads: the answer first, then the tables, figures and limits behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from densityrm_core.arms import BEST_OF
from densityrm_core.experiment import Experiment
from densityrm_core.measurement.frames import reply_means
from densityrm_core.measurement.hypotheses import Hypothesis, Verdict, policy_hypothesis, reward_model_hypothesis
from densityrm_core.report.document import Document, Text, finite
from densityrm_core.report.policy_section import policy_section
from densityrm_core.report.reward_model_section import reward_model_section


class ReportError(ValueError):
    """The tables do not belong together; the message says which partition is missing and what to do."""


@dataclass(frozen=True)
class PolicyResults:
    """What is known of policies: rows of POLICY_EVALUATION, and of POLICY_CURVES and POLICY_DIVERSITY for the same seeds."""

    evaluation: pl.DataFrame
    curves: pl.DataFrame
    diversity: pl.DataFrame


def build_report(experiment: Experiment, rm: pl.DataFrame, policies: PolicyResults, notes: Sequence[str] = ()) -> Document:
    """Answer the question of the experiment from rows of RM_EVALUATION and of what is known of policies.

    H1: accuracy of rm_density - rm_uniform on the rare quartile, paired by seed and test pair.
    H2: judge reward of arm B - arm A over the sampled completions, paired by seed and prompt.
    Overall, supported needs both, one refutation refutes, and without data for either it is undecided.

    Args:
        experiment: rows of other fingerprints or of seeds it does not list are left out, and the report says so.
        rm, policies: either may be empty, lack seeds or lack arms.
        notes: sentences to print among the remarks.

    Raises:
        ReportError: a seed's policies were evaluated, but their curves or their diversity are missing; or models of one seed were
            trained in different precisions. Where seeds differ in it, the report says so.
    """
    remarks = list(notes)
    rm = _own_rows(rm, experiment, "reward-model", remarks)
    found = _own_rows(policies.evaluation, experiment, "policy", remarks)
    curves, diversity = (_own_rows(frame, experiment) for frame in (policies.curves, policies.diversity))
    _refuse_incomplete(found, curves, diversity)
    precisions = _precisions(rm, found)
    remarks += _missing(experiment, rm, found) + _mixed(precisions)
    cells = reply_means(found)

    claim, n = experiment.evaluation.claim, experiment.evaluation.bootstrap
    h1, h2 = reward_model_hypothesis(rm, claim, n), policy_hypothesis(cells, claim, n)
    overall = _overall(h1, h2)
    of_rm, of_policies = reward_model_section(rm, n), policy_section(found, curves, diversity, n)
    sizes = _sizes(rm, found)
    table = {
        "experiment": experiment.name,
        "fingerprint": experiment.fingerprint,
        "seeds": list(experiment.seeds),
        "verdict": overall,
        "reward_model": {**vars(h1), **of_rm.table},
        "policy": {**vars(h2), **of_policies.table},
        "sizes": sizes,
        "precision": precisions,
        "remarks": remarks,
    }
    blocks = (
        Text("Does sampling by 1/density help?", heading=1),
        Text(_answer(overall, h1.verdict, h2.verdict)),
        Text(h1.sentence),
        Text(h2.sentence),
        *of_rm.blocks,
        *of_policies.blocks,
        Text("What this rests on", heading=2),
        Text(_basis(experiment, sizes, precisions)),
        *(Text(f"- {remark}") for remark in remarks),
        Text(_limits(experiment, sizes)),
    )
    return Document(blocks, finite(table), {**of_rm.drawings, **of_policies.drawings})


def _own_rows(frame: pl.DataFrame, experiment: Experiment, kind: str = "", remarks: list[str] | None = None) -> pl.DataFrame:
    """The rows of this experiment; what is left out is told in `remarks`."""
    own = frame.filter(pl.col("fingerprint") == experiment.fingerprint)
    if remarks is None:
        return own.filter(pl.col("seed").is_in(experiment.seeds))
    if foreign := len(frame) - len(own):
        remarks.append(f"{foreign:,} {kind} rows were left out: they come from other settings (another fingerprint).")
    listed = own.filter(pl.col("seed").is_in(experiment.seeds))
    if extra := sorted(set(own["seed"]) - set(experiment.seeds)):
        remarks.append(f"{kind} rows of seeds that the experiment does not list were left out: {_list(extra)}.")
    return listed


def _refuse_incomplete(evaluation: pl.DataFrame, curves: pl.DataFrame, diversity: pl.DataFrame) -> None:
    """Every trained policy of every seed has a curve, every policy but those picked by a reward model has a diversity."""
    own = evaluation.select("seed", "policy").unique().filter(~pl.col("policy").str.starts_with(BEST_OF)).sort("seed", "policy")
    wanted = {"policy_curves": (curves, own.filter(pl.col("policy") != "base")), "policy_diversity": (diversity, own)}
    for name, (frame, policies) in wanted.items():
        for seed, policy in policies.join(frame, on=["seed", "policy"], how="anti", maintain_order="left").iter_rows():
            raise ReportError(
                f"{name} has no rows of policy {policy}, seed {seed}, that go with its evaluation: materialize {name} "
                f"for partition {seed} again, or the grpo_* assets of that partition if they are older"
            )


def _precisions(*frames: pl.DataFrame) -> dict[str, list[int]]:
    """The seeds whose models were trained in each precision. Raises ReportError if those of one seed differ."""
    known = pl.concat([frame.select("seed", "precision") for frame in frames]).drop_nulls().unique().sort("seed", "precision")
    for seed, found in known.group_by("seed", maintain_order=True).agg("precision").iter_rows():
        if len(found) > 1:
            raise ReportError(
                f"models of seed {seed} were trained in {' and '.join(found)}, so that their difference is not that of sampling "
                f"alone: materialize the rm_* and grpo_* assets of partition {seed} again, or set compute.precision"
            )
    seeds = known.group_by("precision", maintain_order=True).agg("seed").sort("precision")
    return dict(seeds.iter_rows())


def _mixed(precisions: dict[str, list[int]]) -> list[str]:
    """A remark where seeds were trained in different precisions."""
    if len(precisions) < 2:
        return []
    parts = " and ".join(f"{name} (seed {_list(seeds)})" for name, seeds in precisions.items())
    return [f"models of two precisions are mixed here: {parts}; a difference between seeds may be one of arithmetic."]


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


def _answer(overall: Verdict, h1: Verdict, h2: Verdict) -> str:
    return (
        f"{overall.capitalize()} at this size: sampling by 1/density makes a better reward model on rare prompts (H1 {h1}) "
        f"and a better policy (H2 {h2})."
    )


def _trained_in(precisions: dict[str, list[int]]) -> str:
    return f"All models were trained in {next(iter(precisions))}. " if len(precisions) == 1 else ""


def _basis(experiment: Experiment, sizes: dict[str, Any], precisions: dict[str, list[int]]) -> str:
    rm, policy = sizes["reward_model"], sizes["policy"]
    return (
        f"Experiment {experiment.name}, fingerprint {experiment.fingerprint}. "
        f"Reward models: {_count(len(rm['seeds']), 'seed')}, {_count(rm['prompts'], 'prompt')}, "
        f"{_count(rm['pairs'], 'test pair')}, {rm['rare_pairs']:,} of them on prompts of the rare quartile. "
        f"Policies: {_count(len(policy['seeds']), 'seed')}, {_count(policy['prompts'], 'prompt')}, "
        f"{_count(policy['samples'], 'sampled completion')} each. {_trained_in(precisions)}"
        "Judge rewards are those of the sampled completions; "
        "the greedy completion stands apart. Differences are paired by seed and by test pair or prompt."
    )


def _limits(experiment: Experiment, sizes: dict[str, Any]) -> str:
    seeds = min(filter(None, (len(sizes[part]["seeds"]) for part in ("reward_model", "policy"))), default=0)
    judge = "the planted rule" if experiment.judge.kind == "planted" else "one reward model, trained on its own split"
    return (
        f"Limits: with {_count(seeds, 'seed')} the intervals miss part of the difference between training runs and are "
        "optimistic; one base model serves all seeds, so the chance in its own training is in no interval. "
        f"The judge is {judge}. The verdict on policies compares arms where training ended; the table at equal KL "
        "compares them where they are equally far from the base policy. The two hypotheses are not corrected for each other. "
        "The verdict holds for these models and data only."
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _arm(policy: str) -> str:
    return f"arm {policy.upper()}"

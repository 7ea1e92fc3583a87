from __future__ import annotations

import base64
import json
import re
from functools import cache

import numpy as np
import polars as pl
import pytest

from densityrm_core.experiment import Experiment
from densityrm_core.report.document import Document
from densityrm_core.report.verdict import PolicyResults, ReportError, build_report
from densityrm_core.tables import POLICY_EVALUATION, RM_EVALUATION

from ..policy_rows import curves_of, diversity_of

EXPERIMENT = Experiment.model_validate({"evaluation": {"bootstrap": 300}})
FINGERPRINT = EXPERIMENT.fingerprint


def rm_rows(gain: float, seeds=(0, 1, 2), fingerprint: str = FINGERPRINT) -> pl.DataFrame:
    """Uniform RM right on 60 % of the pairs, density RM on 60 % + gain of the rare ones; two pairs a prompt."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        for i in range(400):
            quartile = i // 2 % 4 + 1
            luck = rng.random()
            for model in ("rm_uniform", "rm_density"):
                p = 0.6 + (gain if model == "rm_density" and quartile == 1 else 0)
                correct = float(luck < p) if gain else float(rng.random() < p)
                rows.append(
                    {"seed": seed, "model": model, "set": "test", "pair_id": f"pair{i}", "prompt_id": f"{i // 2}",
                     "src": "hh", "decile": quartile * 2, "quartile": quartile, "reward_chosen": correct,
                     "reward_rejected": 0.5, "correct": correct, "chars_chosen": 8 if i % 4 == 0 else 6,
                     "chars_rejected": 7, "fingerprint": fingerprint}
                )  # fmt: skip
    return RM_EVALUATION.check(RM_EVALUATION.frame(rows))


def with_longer_reply(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows, and those of the baseline that prefers the longer reply."""
    longer = (pl.col("chars_chosen") > pl.col("chars_rejected")).cast(pl.Float64)
    baseline = rows.filter(pl.col("model") == "rm_uniform").with_columns(
        model=pl.lit("longer_reply"), reward_chosen=longer, reward_rejected=1 - longer, correct=longer
    )
    return pl.concat([rows, baseline])


def results(rows: pl.DataFrame) -> PolicyResults:
    """Rows of an evaluation with the curves and the diversity that go with them."""
    return PolicyResults(rows, curves_of(rows), diversity_of(rows))


def policies(gain: float, **options: object) -> PolicyResults:
    return results(policy_rows(gain, **options))


def policy_rows(gain: float, arms="abc", seeds=(0, 1, 2), base_seeds=(0, 1, 2)) -> pl.DataFrame:
    """Base at -1, arms A and C at 0, B and D at `gain`; greedy completions at 5."""
    rng = np.random.default_rng(1)
    level = {"base": -1.0, "a": 0.0, "b": gain, "c": 0.0, "d": gain}
    rows = [
        {"seed": s, "policy": p, "prompt_id": f"{i}", "decile": i % 4 * 2 + 1, "quartile": i % 4 + 1, "sample": k,
         "completion": "x", "judge_reward": level[p] + rng.normal(0, 0.3) if k else 5.0,
         "own_reward": None if p == "base" else 0.7, "rm_uniform_reward": level[p] + rng.normal(),
         "rm_density_reward": 3 * level[p] + rng.normal(), "kl": 0.0 if p == "base" else 2.5, "entropy": 1.5, "tokens": 12,
         "fingerprint": FINGERPRINT}
        for p in ("base", *arms) for s in (base_seeds if p == "base" else seeds) for i in range(60) for k in range(3)
    ]  # fmt: skip
    return POLICY_EVALUATION.check(POLICY_EVALUATION.frame(rows))


@cache
def report_of_policies() -> Document:
    """Of policies alone, arm B ahead of A."""
    return build_report(EXPERIMENT, NO_RM, policies(0.5))


NO_POLICIES, NO_RM = results(POLICY_EVALUATION.empty()), RM_EVALUATION.empty()


@pytest.mark.parametrize(
    ("rm_gain", "policy_gain", "expected"),
    [
        (0.2, 0.5, "supported"),
        (-0.2, -0.5, "refuted"),
        (0.2, -0.5, "refuted"),
        (0.0, 0.5, "undecided"),
        (0.2, 0.0, "undecided"),
    ],
)
def test_overall_verdict_needs_both_hypotheses(rm_gain, policy_gain, expected):
    assert build_report(EXPERIMENT, rm_rows(rm_gain), policies(policy_gain)).table["verdict"] == expected


def test_answer_is_the_first_sentence():
    answer = build_report(EXPERIMENT, rm_rows(0.2), policies(0.5)).markdown.split("\n\n")[1]
    assert answer == (
        "Supported at this size: sampling by 1/density makes a better reward model on rare prompts (H1 supported) "
        "and a better policy (H2 supported)."
    )


def test_rare_quartile_alone_decides_the_reward_model_hypothesis():
    rm = rm_rows(0.2)
    common = rm.with_columns(
        correct=pl.when((pl.col("quartile") > 1) & (pl.col("model") == "rm_density")).then(0.0).otherwise("correct")
    )
    h1 = build_report(EXPERIMENT, common, NO_POLICIES).table["reward_model"]
    assert (h1["verdict"], h1["accuracy"]["difference"]["all"]["high"] < 0) == ("supported", True)


def test_accuracy_difference_is_the_difference_of_the_accuracies():
    accuracy = build_report(EXPERIMENT, rm_rows(0.2), NO_POLICIES).table["reward_model"]["accuracy"]
    rare = {row: strata["rare quartile"]["mean"] for row, strata in accuracy.items()}
    assert rare["difference"] == pytest.approx(rare["rm_density"] - rare["rm_uniform"])


def test_longer_reply_is_a_baseline_of_the_accuracy():
    accuracy = build_report(EXPERIMENT, with_longer_reply(rm_rows(0.2)), NO_POLICIES).table["reward_model"]["accuracy"]
    assert accuracy["longer_reply"]["all"]["mean"] == 25


def test_calibration_length_bias_and_agreement_stand_beside_the_accuracy():
    section = build_report(EXPERIMENT, with_longer_reply(rm_rows(0.2)), NO_POLICIES).table["reward_model"]
    assert set(section["metrics"]) == {"rm_uniform", "rm_density", "longer_reply"}
    assert section["metrics"]["longer_reply"]["accuracy_longer_better"]["mean"] == 1
    assert {(row["model"], row["other"]) for row in section["agreement"]} == {
        ("rm_uniform", "rm_density"),
        ("rm_uniform", "longer_reply"),
        ("rm_density", "longer_reply"),
    }


def test_rows_of_further_sets_leave_the_verdict_alone():
    own = rm_rows(0.2)
    further = rm_rows(-0.5).with_columns(
        set=pl.lit("bench"), src=pl.lit("chat"), decile=pl.lit(None, pl.Int64), quartile=pl.lit(None, pl.Int64)
    )
    with_set = build_report(EXPERIMENT, pl.concat([own, further]), NO_POLICIES).table
    without = build_report(EXPERIMENT, own, NO_POLICIES).table
    assert {row["set"] for row in with_set["reward_model"].pop("sets")} == {"bench"}
    assert without["reward_model"].pop("sets") == [] and with_set == without


def test_policy_gain_is_related_to_the_improvement_over_base():
    h2 = build_report(EXPERIMENT, rm_rows(0.2), policies(0.5)).table["policy"]
    assert (h2["relative_gain"], h2["baseline"]) == ("confirmed", pytest.approx(1, abs=0.1))


@pytest.mark.parametrize(("gain", "expected"), [(0.5, "confirmed"), (0.1, "compatible"), (0.0, "ruled out")])
def test_claimed_gain_is_confirmed_compatible_or_ruled_out(gain, expected):
    assert build_report(EXPERIMENT, NO_RM, policies(gain)).table["policy"]["relative_gain"] == expected


def test_judge_reward_is_that_of_the_sampled_completions():
    arm = report_of_policies().table["policy"]["arms"]["a"]
    assert (arm["judge_reward"]["mean"], arm["greedy"]) == (pytest.approx(0, abs=0.1), 5)


def test_base_policy_of_one_seed_serves_all_seeds():
    change = build_report(EXPERIMENT, NO_RM, policies(0.5, base_seeds=(0,))).table["policy"]["arms"]["a"]["change"]
    assert change["mean"] == pytest.approx(1, abs=0.1)


def test_arm_d_completes_the_square():
    report = build_report(EXPERIMENT, NO_RM, policies(0.5, arms="abcd"))
    assert re.search(r"D: 0\.[45]", report.markdown) and set(report.table["policy"]["differences"]) == {"b-a", "c-a", "d-a"}


def test_missing_arm_is_named():
    report = build_report(EXPERIMENT, rm_rows(0.2), policies(0.5, arms="ac"))
    assert "arm B has no evaluation yet." in report.markdown and report.table["verdict"] == "undecided"


def test_without_policies_the_answer_is_undecided_and_says_why():
    report = build_report(EXPERIMENT, rm_rows(0.2), NO_POLICIES)
    assert report.markdown.split("\n\n")[1].startswith("Undecided")
    assert "A better policy under the judge is undecided: no evaluation of arm A and arm B." in report.markdown


def test_refuted_reward_model_without_policies_is_still_undecided():
    assert build_report(EXPERIMENT, rm_rows(-0.2), NO_POLICIES).table["verdict"] == "undecided"


def test_empty_tables_make_a_report():
    report = build_report(EXPERIMENT, NO_RM, NO_POLICIES)
    assert (report.table["verdict"], report.figures) == ("undecided", {})


def test_missing_base_policy_leaves_the_relative_gain_undefined():
    rows = policy_rows(0.5).filter(pl.col("policy") != "base")
    assert build_report(EXPERIMENT, NO_RM, results(rows)).table["policy"]["relative_gain"] == "undefined"


def test_one_seed_makes_a_verdict_and_names_the_absent_seeds():
    report = build_report(EXPERIMENT, rm_rows(0.2, seeds=(0,)), policies(0.5, seeds=(0,), base_seeds=(0,)))
    assert report.table["verdict"] == "supported"
    assert report.table["remarks"] == ["seed 1 has no evaluation yet.", "seed 2 has no evaluation yet."]


def test_seed_that_one_arm_lacks_is_named():
    rows = policy_rows(0.5).filter(~((pl.col("policy") == "b") & (pl.col("seed") == 2)))
    assert build_report(EXPERIMENT, rm_rows(0.2), results(rows)).table["remarks"] == ["arm B has no evaluation of seed 2 yet."]


def test_rows_of_another_experiment_are_left_out_and_counted():
    mixed = pl.concat([rm_rows(0.2), rm_rows(-0.5, fingerprint="other")])
    report = build_report(EXPERIMENT, mixed, NO_POLICIES)
    assert report.table["reward_model"]["verdict"] == "supported"
    assert "2,400 reward-model rows were left out" in report.markdown


def test_seeds_that_the_experiment_does_not_list_are_left_out():
    report = build_report(EXPERIMENT, rm_rows(0.2, seeds=(0, 1, 2, 9)), NO_POLICIES)
    assert report.table["sizes"]["reward_model"]["seeds"] == [0, 1, 2]


def test_notes_are_printed():
    assert "The judge was retrained." in build_report(EXPERIMENT, NO_RM, NO_POLICIES, ["The judge was retrained."]).markdown


def test_table_is_strict_json():
    one_prompt = rm_rows(0.2).filter(pl.col("prompt_id") == "0")
    table = build_report(EXPERIMENT, one_prompt, policies(0.5)).table
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_terminal_fits_110_columns():
    text = build_report(EXPERIMENT, with_longer_reply(rm_rows(0.2)), policies(0.5, arms="abcd")).terminal()
    assert max(map(len, text.splitlines())) <= 110


def test_embedded_images_are_the_figures():
    report = build_report(EXPERIMENT, rm_rows(0.2), policies(0.5))
    images = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^)]+)", report.embedded())]
    assert images == list(report.figures.values()) and len(images) == 6


@pytest.mark.parametrize(
    ("rm", "rows"),
    [
        (rm_rows(0.2).filter(pl.col("prompt_id") == "0"), policy_rows(0.5).filter(pl.col("policy") != "base")),
        (rm_rows(0.2, seeds=(0,)), policy_rows(0.5, arms="ac", seeds=(0,), base_seeds=(0,))),
        (with_longer_reply(rm_rows(0.2)), policy_rows(0.5, arms="abcd", base_seeds=(0,))),
    ],
    ids=["one prompt, no base policy", "one seed, no arm B", "a baseline and arm D"],
)
def test_figures_are_drawn_of_whatever_there_is(rm, rows):
    figures = build_report(EXPERIMENT, rm, results(rows)).figures
    assert len(figures) == 6 and all(image.startswith(b"\x89PNG") for image in figures.values())


def test_written_report_links_the_figures_beside_it(tmp_path):
    path = build_report(EXPERIMENT, rm_rows(0.2), policies(0.5)).write(tmp_path / "out")
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text())
    assert {p.name for p in path.parent.iterdir()} == {"report.md", "report.json", "report.txt", *links}


def test_failed_write_leaves_the_old_report(tmp_path):
    path = build_report(EXPERIMENT, NO_RM, NO_POLICIES).write(tmp_path)
    before = path.read_text()
    (tmp_path / "report.json").unlink()
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError):
        build_report(EXPERIMENT, rm_rows(0.2), NO_POLICIES).write(tmp_path)
    assert path.read_text() == before and not list(tmp_path.glob(".*"))


def test_equal_tables_make_equal_reports():
    rm, found = rm_rows(0.2), policies(0.5)
    reversed_rows = PolicyResults(found.evaluation.reverse(), found.curves.reverse(), found.diversity.reverse())
    shuffled = build_report(EXPERIMENT, rm.sample(fraction=1, shuffle=True, seed=3), reversed_rows)
    straight = build_report(EXPERIMENT, rm, found)
    assert shuffled == straight and shuffled.figures == straight.figures


def in_precision(rows: pl.DataFrame, *precisions: str) -> pl.DataFrame:
    """Rows of the models of seed 0, 1, ... as trained in these precisions; baselines and seeds beyond have none."""
    by_seed = pl.col("seed").replace_strict(dict(enumerate(precisions)), default=None, return_dtype=pl.String)
    return rows.with_columns(precision=by_seed)


def test_models_of_one_seed_in_two_precisions_are_refused():
    rows = in_precision(rm_rows(0.2), "fp32", "bf16", "fp32")
    mixed = rows.with_columns(
        pl.when(pl.col("model") == "rm_density", seed=1).then(pl.lit("fp32")).otherwise("precision").alias("precision")
    )
    with pytest.raises(
        ReportError, match=r"models of seed 1 were trained in bf16 and fp32, .* partition 1 again, or set compute"
    ):
        build_report(EXPERIMENT, mixed, policies(0.3))
    of_policies = results(in_precision(policy_rows(0.3), "bf16", "fp32", "fp32"))
    with pytest.raises(ReportError, match="models of seed 0 were trained in bf16 and fp32"):
        build_report(EXPERIMENT, in_precision(rm_rows(0.2), "fp32", "fp32", "fp32"), of_policies)


def test_seeds_in_two_precisions_are_mixed_only_with_a_word():
    report = build_report(EXPERIMENT, in_precision(rm_rows(0.2), "fp32", "fp32", "bf16"), policies(0.3))
    assert report.table["precision"] == {"bf16": [2], "fp32": [0, 1]}
    assert "models of two precisions are mixed here: bf16 (seed 2) and fp32 (seed 0, 1)" in report.markdown
    alike = build_report(EXPERIMENT, in_precision(rm_rows(0.2), "fp32", "fp32", "fp32"), policies(0.3))
    assert "All models were trained in fp32." in alike.markdown
    assert "precisions" not in alike.markdown


def test_curves_or_diversity_that_a_seed_lacks_are_refused_by_name():
    found = policies(0.5)
    lost = found.curves.filter(pl.col("seed") != 1)
    with pytest.raises(
        ReportError, match=r"policy_curves has no rows of policy a, seed 1.*materialize policy_curves for partition 1"
    ):
        build_report(EXPERIMENT, NO_RM, PolicyResults(found.evaluation, lost, found.diversity))
    stale = found.diversity.with_columns(fingerprint=pl.lit("other"))
    with pytest.raises(ReportError, match="policy_diversity has no rows of policy a, seed 0"):
        build_report(EXPERIMENT, NO_RM, PolicyResults(found.evaluation, found.curves, stale))


def test_win_rates_stand_beside_the_judge_reward_by_stratum():
    report = report_of_policies()
    arms = report.table["policy"]["arms"]
    assert 0.9 < arms["a"]["wins"]["mean"] < arms["b"]["wins"]["mean"] <= 1
    assert "wins against base, % [95 %] | all | rare quartile" in report.markdown


def test_own_gain_beyond_the_judges_is_over_optimisation():
    arms = report_of_policies().table["policy"]["arms"]
    # rm_uniform's rewards follow the judge's level with three times its noise, rm_density's with three times its gain, too
    assert arms["a"]["own_less_judge"]["high"] < 0
    assert arms["b"]["own_gain"]["mean"] == pytest.approx(4.5, abs=0.4)


def test_arms_are_compared_at_equal_kl_too():
    report = report_of_policies()
    equal = report.table["policy"]["equal_kl"]
    assert equal["levels"] == {"0": 2.5, "1": 2.5, "2": 2.5}
    assert equal["differences"]["b-a"]["all"]["low"] > 0
    assert "| at equal KL, paired [95 %] |" in report.markdown and "2.50 to 2.50 nats a reply" in report.markdown


def test_best_of_n_is_shown_and_takes_no_part_in_the_verdict():
    rows = policy_rows(0.5)
    best = rows.filter((pl.col("policy") == "a") & (pl.col("sample") == 1)).with_columns(
        policy=pl.lit("best_of_16_density"), judge_reward=pl.lit(9.0)
    )
    with_best = build_report(EXPERIMENT, NO_RM, results(pl.concat([rows, best])))
    without = build_report(EXPERIMENT, NO_RM, results(rows))
    assert "| best of 16, density | 9.000 [9.000, 9.000] |" in with_best.markdown
    assert max(map(len, with_best.terminal().splitlines())) <= 110
    assert with_best.table["verdict"] == without.table["verdict"]
    assert with_best.table["policy"]["difference"] == without.table["policy"]["difference"]
    assert with_best.table["remarks"] == without.table["remarks"]

"""Group evaluation: the verdict, of the tables of all seeds."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from densityrm_core.experiment import Experiment
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import version
from densityrm_dagster.groups import EVALUATED
from densityrm_dagster.io_managers import FolderIOManager
from densityrm_dagster.metadata import folder_output

_COMMON = {"group_name": "evaluation", "owners": OWNERS, "automation_condition": on_new_content()}


def report_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """The report."""
    return [_hypothesis_report(experiment)]


def _hypothesis_report(experiment: Experiment) -> dg.AssetsDefinition:
    @dg.asset(
        **_COMMON,
        code_version=version(4, experiment.fingerprint),
        kinds={"markdown"},
        io_manager_key="reports",
        ins={name: dg.AssetIn(input_manager_key="tables") for name in EVALUATED},
    )
    def hypothesis_report(
        context: dg.AssetExecutionContext,
        rm_evaluation: pl.DataFrame,
        policy_evaluation: pl.DataFrame,
        policy_curves: pl.DataFrame,
        policy_diversity: pl.DataFrame,
        experiment: dg.ResourceParam[Experiment],
        reports: dg.ResourceParam[FolderIOManager],
    ) -> dg.Output[Path]:
        """The verdict: does sampling by 1/density make a better reward model, and a better policy?"""
        from densityrm_core.report.verdict import PolicyResults, build_report

        policies = PolicyResults(policy_evaluation, policy_curves, policy_diversity)
        with clear_failures():
            report = build_report(experiment, rm_evaluation, policies)
        folder = reports.stage(context)
        report.write(folder)
        context.log.info(f"report.md, report.json and {len(report.figures)} figures written")
        return folder_output(folder, {"report": dg.MetadataValue.md(report.embedded()), **_headline(report.table)})

    return hypothesis_report


def _headline(table: dict[str, Any]) -> dict[str, Any]:
    """The verdict without opening the report: in words, and as numbers that Dagster plots from run to run."""
    claims = {"reward_model": "rare_accuracy_gain_percent", "policy": "judge_reward_gain"}
    gains = {name: table[part]["difference"]["mean"] for part, name in claims.items() if table[part]["difference"]}
    sentences = {f"{part}_verdict": table[part]["sentence"] for part in claims}
    return {"verdict": table["verdict"], **sentences, **gains}

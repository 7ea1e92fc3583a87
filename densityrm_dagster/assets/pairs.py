"""Group pairs: raw rows -> canonical pairs of each source -> their union."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from densityrm_core import tables
from densityrm_core.experiment import Experiment
from densityrm_core.pairs import require_splits, unite_pairs
from densityrm_core.sources import SourceRead, read_source
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content, weekly
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import version
from densityrm_dagster.io_managers import TABLE
from densityrm_dagster.metadata import markdown_table, table_output

SOURCES = {"hh_rlhf": "HH-RLHF", "ultrafeedback": "UltraFeedback", "stack_exchange": "Stack Exchange"}


def pair_assets(experiment: Experiment, raw: Path) -> list[dg.AssetsDefinition]:
    """The assets of this group; planted raw files are written under `raw`."""
    return [*(_source(name, title, experiment, raw) for name, title in SOURCES.items()), _union(experiment)]


def _source(name: str, title: str, experiment: Experiment, raw: Path) -> dg.AssetsDefinition:
    pairs, rejects = f"{name}_pairs", f"{name}_rejects"
    made_by = version(1, getattr(experiment.sources, name), experiment.planted)

    @dg.multi_asset(
        name=pairs,
        outs={
            pairs: _out(tables.SOURCE_PAIRS, f"Preference pairs of {title}, read from its raw rows.", made_by, weekly()),
            rejects: _out(tables.REJECTS, f"Rows of {title} that could not become a pair, and why.", made_by),
        },
        check_specs=[_accounted(pairs)],
        group_name="pairs",
        retry_policy=dg.RetryPolicy(max_retries=2, delay=30, backoff=dg.Backoff.EXPONENTIAL),
    )
    def source(context: dg.AssetExecutionContext, experiment: dg.ResourceParam[Experiment]) -> Iterator[Any]:
        settings = getattr(experiment.sources, name)
        with clear_failures():
            read = read_source(name, settings, experiment.planted, raw)
        card = _source_card(read, settings.path)
        context.log.info(f"{read.rows_read:,} rows read, {read.candidates:,} candidate pairs = {_sum_of(read)}")
        yield table_output(read.pairs, tables.SOURCE_PAIRS, card=card, name=pairs)
        yield table_output(read.rejects, tables.REJECTS, card={"reasons": card["reasons"]}, name=rejects)
        yield _account(pairs, read.candidates, read.pairs.height, read.rejects)

    return source


def _union(experiment: Experiment) -> dg.AssetsDefinition:
    name, rejects, made_by = "preference_pairs", "preference_rejects", version(1, experiment.splits)
    inputs = {f"{source}_pairs": dg.AssetIn(input_manager_key="tables") for source in SOURCES}

    @dg.multi_asset(
        name=name,
        ins=inputs,
        outs={
            name: _out(
                tables.PREFERENCE_PAIRS,
                "All sources in one table: duplicates and ties out, split by prompt.",
                made_by,
                on_new_content(),
            ),
            rejects: _out(tables.REJECTS, "Pairs that the union left out: duplicates and contradictions.", made_by),
        },
        check_specs=[_accounted(name), _blocking("no_prompt_in_two_splits", name, "Every prompt is in exactly one split.")],
        group_name="pairs",
    )
    def union(
        context: dg.AssetExecutionContext, experiment: dg.ResourceParam[Experiment], **sources: pl.DataFrame
    ) -> Iterator[Any]:
        united = unite_pairs([sources[key] for key in inputs], experiment.splits)
        with clear_failures():
            require_splits(
                united.pairs, ["train", "validation", "test", *(["judge"] if experiment.judge.kind == "model" else [])]
            )
        splits = united.pairs.group_by("split").agg(pl.len().alias("pairs"), pl.col("prompt_id").n_unique().alias("prompts"))
        lineage = {c: [(key, c) for key in inputs] for c in tables.SOURCE_PAIRS.schema} | {
            "split": [(key, "prompt") for key in inputs]
        }
        card = {"splits": dg.MetadataValue.md(markdown_table(splits.sort("split"))), "reasons": _reasons(united.rejects)}
        context.log.info(f"{united.read:,} pairs read = {united.pairs.height:,} kept + {_reason_words(united.rejects)}")
        yield table_output(united.pairs, tables.PREFERENCE_PAIRS, lineage, card, name)
        yield table_output(united.rejects, tables.REJECTS, name=rejects)
        yield _account(name, united.read, united.pairs.height, united.rejects)
        straddling = united.pairs.group_by("prompt_id").agg(pl.col("split").n_unique()).filter(pl.col("split") > 1)
        yield dg.AssetCheckResult(
            check_name="no_prompt_in_two_splits",
            asset_key=name,
            passed=straddling.is_empty(),
            metadata={"prompts": straddling.height},
        )

    return union


def _out(table: tables.Table, description: str, made_by: str, condition: dg.AutomationCondition | None = None) -> dg.AssetOut:
    return dg.AssetOut(
        io_manager_key="tables",
        description=description,
        metadata={TABLE: table.name},
        owners=OWNERS,
        kinds={"polars", "parquet"},
        code_version=made_by,
        automation_condition=condition,
    )


def _accounted(asset: str) -> dg.AssetCheckSpec:
    return _blocking("rows_accounted_for", asset, "Pairs and rejects add up to the candidate pairs that were read.")


def _blocking(name: str, asset: str, description: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=asset, blocking=True, description=description)


def _account(asset: str, read: int, pairs: int, rejects: pl.DataFrame) -> dg.AssetCheckResult:
    rejected = int(rejects["pairs"].sum())
    numbers = {"read": read, "pairs": pairs, "rejects": rejected}
    return dg.AssetCheckResult(
        check_name="rows_accounted_for", asset_key=asset, passed=read == pairs + rejected, metadata=numbers
    )


def _source_card(read: SourceRead, path: str) -> dict[str, Any]:
    return {
        "read_from": path,
        "rows_read": read.rows_read,
        "candidate_pairs": read.candidates,
        "pairs": read.pairs.height,
        "rejects": int(read.rejects["pairs"].sum()),
        "reasons": _reasons(read.rejects),
        "reject_counts": dict(_counts(read.rejects).iter_rows()),
    }


def _counts(rejects: pl.DataFrame) -> pl.DataFrame:
    return rejects.group_by("reason").agg(pl.col("pairs").sum()).sort("pairs", "reason", descending=[True, False])


def _reasons(rejects: pl.DataFrame) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(markdown_table(_counts(rejects)) if rejects.height else "nothing was rejected")


def _reason_words(rejects: pl.DataFrame) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in _counts(rejects).iter_rows())
    return f"{int(rejects['pairs'].sum()):,} rejects" + (f" ({reasons})" if reasons else "")


def _sum_of(read: SourceRead) -> str:
    return f"{read.pairs.height:,} pairs + {_reason_words(read.rejects)}"

"""Group pairs: raw rows -> canonical pairs of each source -> their union."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from densityrm_core.experiment import Experiment
from densityrm_core.pairs.selection import Taken
from densityrm_core.pairs.union import Union, require_splits, unite_pairs
from densityrm_core.sources import Folders, SourceRead, read_source
from densityrm_core.storage import Stored
from densityrm_core.tables import PREFERENCE_PAIRS, REJECTS, SOURCE_PAIRS, Table
from densityrm_dagster.assets import OWNERS
from densityrm_dagster.automation import on_new_content, weekly
from densityrm_dagster.cards.pairs import data_card, files_card, knobs_card, overlap_card, reasons_card, reasons_in_words
from densityrm_dagster.failures import clear_failures
from densityrm_dagster.freshness import STAMP, stamp_of, version
from densityrm_dagster.groups import SOURCES
from densityrm_dagster.io_managers import TABLE, ParquetIOManager
from densityrm_dagster.metadata import markdown_table, table_output
from densityrm_dagster.terminal import progress

_LEAK = 0.01  # share of test prompts with a near twin in the training split from which on a warning is due


def pair_assets(experiment: Experiment, raw: Path, shards: Path) -> list[dg.AssetsDefinition]:
    """The assets of this group. `raw` holds planted rows and downloads, `shards` what was read of single files before."""
    names = [name for name in SOURCES if name != "nanochat" or name in experiment.sources.enabled()]
    return [*(_source(name, experiment, raw, shards) for name in names), _union(names, experiment)]


def _source(name: str, experiment: Experiment, raw: Path, shards: Path) -> dg.AssetsDefinition:
    pairs, rejects, title = f"{name}_pairs", f"{name}_rejects", SOURCES[name]
    made_by = version(2, getattr(experiment.sources, name).reading(), experiment.planted)

    @dg.multi_asset(
        name=pairs,
        outs={
            pairs: _out(SOURCE_PAIRS, f"Preference pairs of {title}, read from its raw rows.", made_by, weekly()),
            rejects: _out(REJECTS, f"Rows of {title} that could not become a pair, and why.", made_by),
        },
        check_specs=[_accounted(pairs)],
        group_name="pairs",
        retry_policy=dg.RetryPolicy(max_retries=2, delay=30, backoff=dg.Backoff.EXPONENTIAL),
    )
    def source(
        context: dg.AssetExecutionContext, experiment: dg.ResourceParam[Experiment], tables: dg.ResourceParam[ParquetIOManager]
    ) -> Iterator[Any]:
        settings = getattr(experiment.sources, name)
        with tables.stage(pairs) as folder:
            with clear_failures():
                stamp = stamp_of(name, experiment, raw)
                folders = Folders(folder, raw, shards)
                read = read_source(
                    name, settings, experiment.planted, folders, experiment.compute.parsers, progress(context.log.info)
                )
            if settings.enabled:
                words = reasons_in_words(read.reasons)
                context.log.info(
                    f"{read.rows_read:,} rows, {read.candidates:,} candidate pairs = {read.pairs.rows:,} pairs + {words}"
                )
            card = {**_source_card(read, settings.path if settings.enabled else "(disabled)"), STAMP: stamp}
            yield _account(pairs, read.candidates, read.pairs, sum(read.reasons.values()))
            yield table_output(read.rejects, REJECTS, card={"reasons": card["reasons"]}, name=rejects)
            yield table_output(read.pairs, SOURCE_PAIRS, card=card, name=pairs)

    return source


def _union(names: list[str], experiment: Experiment) -> dg.AssetsDefinition:
    name, rejects = "preference_pairs", "preference_rejects"
    knobs = {source: [settings.weight, settings.min_score_gap] for source, settings in experiment.sources.enabled().items()}
    made_by = version(2, experiment.splits, experiment.pairs, knobs)
    inputs = {f"{source}_pairs": dg.AssetIn(input_manager_key="tables", dagster_type=Path) for source in names}

    @dg.multi_asset(
        name=name,
        ins=inputs,
        outs={
            name: _out(
                PREFERENCE_PAIRS,
                "All sources in one table: duplicates and ties out, split by prompt.",
                made_by,
                on_new_content(),
            ),
            rejects: _out(REJECTS, "Pairs that the union left out: knobs, duplicates and contradictions.", made_by),
        },
        check_specs=[
            _accounted(name),
            _blocking("no_cluster_in_two_splits", name, "Every cluster of near-duplicate prompts is in exactly one split."),
            dg.AssetCheckSpec(
                "no_near_twin_of_test_in_train",
                asset=name,
                description="Share of test prompts that have a near-duplicate among the training prompts nevertheless.",
            ),
        ],
        group_name="pairs",
    )
    def union(
        context: dg.AssetExecutionContext,
        experiment: dg.ResourceParam[Experiment],
        tables: dg.ResourceParam[ParquetIOManager],
        **sources: Path,
    ) -> Iterator[Any]:
        settings = experiment.sources.enabled()
        taken = [Taken(sources[f"{s}_pairs"], settings[s].weight, settings[s].min_score_gap) for s in names if s in settings]
        needed = ["train", "validation", "test", *(["judge"] if experiment.judge.kind == "model" else [])]
        with tables.stage(name) as folder:
            with clear_failures():
                former = tables.path(dg.AssetKey(name))
                united = unite_pairs(taken, experiment.pairs, experiment.splits, folder, former, progress(context.log.info))
                require_splits(united, needed, experiment.splits)
            words = reasons_in_words(united.reasons)
            context.log.info(f"{united.read:,} pairs read = {united.pairs.rows:,} kept + {words}")
            yield _account(name, united.read, united.pairs, united.rejects.rows)
            yield _unbroken(united)
            yield _leak(united)
            lineage = {c: [(key, c) for key in inputs] for c in SOURCE_PAIRS.schema if c != "comparison"} | {
                c: [(key, "prompt") for key in inputs] for c in ("prompt_index", "cluster", "split")
            }
            card = _union_card(united, experiment)
            yield table_output(united.rejects, REJECTS, card={"reasons": card["reasons"]}, name=rejects)
            yield table_output(united.pairs, PREFERENCE_PAIRS, lineage, card, name)

    return union


def _source_card(read: SourceRead, path: str) -> dict[str, Any]:
    return {
        "read_from": path,
        "rows_read": read.rows_read,
        "candidate_pairs": read.candidates,
        "pairs": read.pairs.rows,
        "rejects": sum(read.reasons.values()),
        "reasons": reasons_card(read.reasons),
        "reject_counts": read.reasons,
        "files": files_card(read.files),
        **data_card(read.pairs),
    }


def _union_card(united: Union, experiment: Experiment) -> dict[str, Any]:
    grouping = united.grouping
    return {
        "pairs": united.pairs.rows,
        "prompts": united.prompts,
        "clusters": grouping.count,
        "near_duplicates_compared": grouping.compared,
        "splits": dg.MetadataValue.md(markdown_table(united.splits)),
        "reasons": reasons_card(united.reasons),
        "knobs": knobs_card(united.reasons, experiment),
        "overlap_of_sources": overlap_card(united.shared),
        **data_card(united.pairs),
    }


def _unbroken(united: Union) -> dg.AssetCheckResult:
    """Looks at what was stored, not at what was meant to be."""
    import polars as pl

    stored = pl.scan_parquet(united.pairs.path)
    broken = {
        key: stored.group_by(key).agg(pl.col("split").n_unique()).filter(pl.col("split") > 1).select(pl.len()).collect().item()
        for key in ("prompt_id", "cluster")
    }
    return dg.AssetCheckResult(
        check_name="no_cluster_in_two_splits",
        asset_key="preference_pairs",
        passed=not any(broken.values()),
        metadata={"prompts_in_two_splits": broken["prompt_id"], "clusters_in_two_splits": broken["cluster"]},
    )


def _leak(united: Union) -> dg.AssetCheckResult:
    grouping = united.grouping
    share = grouping.leaked / max(1, grouping.test_prompts)
    numbers: dict[str, Any] = {"test_prompts": grouping.test_prompts}
    if grouping.compared:
        numbers |= {"with_near_twin_in_train": grouping.leaked, "share": share}
    else:
        numbers["not_measured"] = "prompts were not compared; splits.near_duplicates: always does it"
    return dg.AssetCheckResult(
        check_name="no_near_twin_of_test_in_train",
        asset_key="preference_pairs",
        passed=share <= _LEAK,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=numbers,
    )


def _out(table: Table, description: str, made_by: str, condition: dg.AutomationCondition | None = None) -> dg.AssetOut:
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


def _account(asset: str, read: int, pairs: Stored, rejected: int) -> dg.AssetCheckResult:
    numbers = {"read": read, "pairs": pairs.rows, "rejects": rejected}
    return dg.AssetCheckResult(
        check_name="rows_accounted_for", asset_key=asset, passed=read == pairs.rows + rejected, metadata=numbers
    )

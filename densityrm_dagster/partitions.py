"""Replicates are partitions: every seed has its own materialization, retry, backfill, lineage and MLflow run."""

import dagster as dg

from densityrm_core.experiment import Experiment


def seed_partitions(experiment: Experiment) -> dg.StaticPartitionsDefinition:
    """One partition for each seed of the experiment."""
    return dg.StaticPartitionsDefinition([str(seed) for seed in experiment.seeds])


def partition_of(context: dg.AssetExecutionContext) -> str | None:
    """The asset's partition; None for an asset without partitions, though its run may be for one."""
    return context.partition_key if context.assets_def.partitions_def else None


def seed_of(context: dg.AssetExecutionContext) -> int:
    """The seed that this step is about."""
    return int(context.partition_key)

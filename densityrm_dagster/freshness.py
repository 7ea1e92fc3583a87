"""What is up to date: code versions that follow the experiment's settings, raw files that changed, results that are missing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from densityrm_core.experiment import Experiment
from densityrm_core.settings import Settings
from densityrm_core.sources import SourceError, files_of

STAMP = "source_stamp"  # metadata of a source's pairs: state of the raw files that they were read from
_INPUT = "dagster/input_data_version/"

Exists = Callable[[dg.AssetKey, str | None], bool]


def version(number: int, *sections: Settings | dict[str, Any] | str) -> str:
    """A code version: raise `number` when an asset's meaning changes; the settings it is made from count by themselves."""
    content = json.dumps([s.model_dump(mode="json") if isinstance(s, Settings) else s for s in sections], sort_keys=True)
    return f"{number}-{hashlib.sha256(content.encode()).hexdigest()[:8]}" if sections else str(number)


def stamp_of(name: Any, experiment: Experiment, raw: Path) -> str:
    """Changes whenever a raw file of a source may have changed, came or went. Raises SourceError."""
    files = files_of(name, getattr(experiment.sources, name), experiment.planted, raw)
    return hashlib.sha256(json.dumps([(file.name, file.address, file.stamp) for file in files]).encode()).hexdigest()[:16]


def changed_sources(instance: dg.DagsterInstance, experiment: Experiment, raw: Path) -> dict[str, str]:
    """Sources whose raw files are not those that their pairs were read from, each with its present stamp or what hinders it."""
    changed: dict[str, str] = {}
    for name in experiment.sources.enabled():
        try:
            stamp = stamp_of(name, experiment, raw)
        except SourceError as error:
            stamp = str(error)
        event = instance.get_latest_materialization_event(dg.AssetKey(f"{name}_pairs"))
        made = event.asset_materialization.metadata if event and event.asset_materialization else {}
        if STAMP not in made or made[STAMP].value != stamp:
            changed[name] = stamp
    return changed


def outdated(
    instance: dg.DagsterInstance, definitions: dg.Definitions, partition: str, exists: Exists = lambda key, partition: True
) -> list[dg.AssetKey]:
    """Assets to materialize for one partition, in order: never made, made by other code or settings, from other inputs, or lost.

    An unpartitioned asset that gathers partitions (the report) is always among them if anything else is, or if it is missing.
    What one step makes, as pairs and rejects, is among them together: a run may have been killed between the two.

    Args:
        exists: whether the stored value of an asset and partition is still there.
    """
    graph = definitions.resolve_asset_graph()
    current: dict[dg.AssetKey, str] = {}
    stale: set[dg.AssetKey] = set()
    for key in graph.toposorted_asset_keys:
        node = graph.get(key)
        own_partition = partition if node.is_partitioned else None
        record = instance.get_latest_data_version_record(key, partition_key=own_partition)
        tags = dict(record.asset_materialization.tags or {}) if record and record.asset_materialization else {}
        made = tags.get("dagster/data_version", "")
        # Dagster records a partitioned input as the hash of its partitions' versions, here of the one that was read
        current[key] = hashlib.sha256(made.encode()).hexdigest() if node.is_partitioned else made
        gathers = not node.is_partitioned and any(graph.get(parent).is_partitioned for parent in node.parent_keys)
        inputs = [] if gathers else list(node.parent_keys)
        same_inputs = all(tags.get(_INPUT + parent.to_user_string()) == current[parent] for parent in inputs)
        same_code = tags.get("dagster/code_version") == node.code_version
        lost = not exists(key, own_partition)
        if lost or not (same_code and same_inputs):
            stale.add(key)
    found: list[dg.AssetKey] = []
    for key in graph.toposorted_asset_keys:
        together = graph.get(key).execution_set_asset_keys
        parents = {parent for made in together for parent in graph.get(made).parent_keys}
        if not stale.isdisjoint(together) or not parents.isdisjoint(found):
            found.append(key)
    return found

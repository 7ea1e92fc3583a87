"""What is up to date: code versions that follow the experiment's settings, and the assets a run still has to make."""

import hashlib
import json

import dagster as dg

from densityrm_core.experiment import Settings

_INPUT = "dagster/input_data_version/"


def version(number: int, *sections: Settings | str) -> str:
    """A code version: raise `number` when an asset's meaning changes; the settings it is made from count by themselves."""
    content = json.dumps([s if isinstance(s, str) else s.model_dump(mode="json") for s in sections], sort_keys=True)
    return f"{number}-{hashlib.sha256(content.encode()).hexdigest()[:8]}" if sections else str(number)


def outdated(instance: dg.DagsterInstance, definitions: dg.Definitions, partition: str) -> list[dg.AssetKey]:
    """Assets to materialize for one partition: never made, made by other code or settings, or from other inputs; in order.

    An unpartitioned asset that gathers partitions (the report) is always among them if anything else is, or if it is missing.
    """
    graph = definitions.resolve_asset_graph()
    current: dict[dg.AssetKey, str] = {}
    found: list[dg.AssetKey] = []
    for key in graph.toposorted_asset_keys:
        node = graph.get(key)
        record = instance.get_latest_data_version_record(key, partition_key=partition if node.is_partitioned else None)
        tags = dict(record.asset_materialization.tags or {}) if record and record.asset_materialization else {}
        made = tags.get("dagster/data_version", "")
        # Dagster records a partitioned input as the hash of its partitions' versions, here of the one that was read
        current[key] = hashlib.sha256(made.encode()).hexdigest() if node.is_partitioned else made
        gathers = not node.is_partitioned and any(graph.get(parent).is_partitioned for parent in node.parent_keys)
        inputs = [] if gathers else list(node.parent_keys)
        same_inputs = all(tags.get(_INPUT + parent.to_user_string()) == current[parent] for parent in inputs)
        same_code = tags.get("dagster/code_version") == node.code_version
        if not (same_code and same_inputs) or any(parent in found for parent in node.parent_keys):
            found.append(key)
    return found

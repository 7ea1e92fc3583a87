"""What runs by itself: a weekly schedule and a sensor for changed content. Both are shipped switched off."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition  # its return type

from densityrm_core.experiment import Experiment
from densityrm_dagster.freshness import changed_sources
from densityrm_dagster.groups import per_seed_assets

_MONDAY = "0 3 * * 1"


def on_new_content() -> dg.AutomationCondition:
    """Re-materialize when an input's data version changed; the same content again is no reason."""
    changed = dg.AutomationCondition.data_version_changed() | dg.AutomationCondition.newly_missing()
    upstream = dg.AutomationCondition.any_deps_match(changed | dg.AutomationCondition.will_be_requested())
    waiting = dg.AutomationCondition.any_deps_missing() | dg.AutomationCondition.any_deps_in_progress()
    ready = ~waiting & ~dg.AutomationCondition.in_progress()
    due = upstream | dg.AutomationCondition.newly_missing() | dg.AutomationCondition.code_version_changed()
    return due.since(dg.AutomationCondition.newly_requested() | dg.AutomationCondition.newly_updated()) & ready


def weekly() -> dg.AutomationCondition:
    """Read the raw rows again every Monday."""
    return dg.AutomationCondition.on_cron(_MONDAY)


def automation_sensor() -> dg.AutomationConditionSensorDefinition:
    """Evaluates the conditions of all assets."""
    return dg.AutomationConditionSensorDefinition(
        "new_content", target=dg.AssetSelection.all(), default_status=dg.DefaultSensorStatus.STOPPED
    )


def source_sensor(experiment: Experiment, raw: Path) -> dg.SensorDefinition:
    """Watches the raw files of all sources, local and remote, and has those read again that changed.

    What was read of unchanged files is kept, and what hangs on a source is left alone unless its content changed: then
    `new_content` carries on.
    """
    keys = {name: [dg.AssetKey(f"{name}_{table}") for table in ("pairs", "rejects")] for name in experiment.sources.enabled()}

    @dg.sensor(
        name="source_files",
        target=dg.AssetSelection.assets(*(key for pair in keys.values() for key in pair)),
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.STOPPED,
    )
    def source_files(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        """Requests a run for the sources with new, changed or missing files; once for each state of the files."""
        changed = changed_sources(context.instance, experiment, raw)
        if not changed:
            return dg.SkipReason("every source was read from the files as they are")
        state = "-".join(f"{name}={hashlib.sha256(stamp.encode()).hexdigest()[:16]}" for name, stamp in sorted(changed.items()))
        return dg.RunRequest(run_key=state, asset_selection=[key for name in changed for key in keys[name]])

    return source_files


def weekly_schedule(experiment: Experiment, job: UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """The whole experiment, every seed, once a week."""

    @dg.schedule(name="weekly_experiment", job=job, cron_schedule=_MONDAY, default_status=dg.DefaultScheduleStatus.STOPPED)
    def weekly_experiment(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
        """Runs wait for one another, so the data are prepared once, by the first seed's run."""
        day = f"{context.scheduled_execution_time:%Y-%m-%d}"
        for number, seed in enumerate(experiment.seeds):
            yield dg.RunRequest(
                run_key=f"{day}-{seed}",
                partition_key=str(seed),
                asset_selection=None if number == 0 else [dg.AssetKey(name) for name in per_seed_assets(experiment)],
                tags={"dagster/priority": str(-number)},
            )

    return weekly_experiment

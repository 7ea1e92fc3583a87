"""Run an experiment from the terminal, in the same Dagster instance that the interface shows."""

import dagster as dg

from densityrm_core.experiment import Experiment
from densityrm_dagster.assets.pairs import SOURCES
from densityrm_dagster.freshness import outdated

# Two steps at a time, each a fork of a server that has paid for the slow imports once
_EXECUTOR = {
    "max_concurrent": 2,
    "start_method": {
        "forkserver": {
            "preload_modules": [
                "densityrm_dagster.definitions",
                "densityrm_core.embedding",
                "densityrm_core.evaluation",
                "densityrm_core.sft",
                "sentence_transformers",
                "mlflow",
            ]
        }
    },
}


def run_experiment_job() -> dg.JobDefinition:
    """The job `run_experiment`, as a step's own process finds it."""
    from densityrm_dagster.definitions import defs

    return defs.resolve_job_def("run_experiment")


def run_experiment(seed: int) -> list[str]:
    """Materialize what is missing or outdated for one seed. Returns what failed, one line each."""
    from densityrm_dagster.definitions import defs

    with dg.DagsterInstance.get() as instance:
        wanted = outdated(instance, defs, str(seed))
        if not wanted:
            return []
        result = dg.execute_job(
            dg.reconstructable(run_experiment_job),
            instance=instance,
            tags={"dagster/partition": str(seed)},
            asset_selection=wanted,
            run_config={"execution": {"config": {"multiprocess": _EXECUTOR}}, "loggers": {"terminal": {}}},
        )
        if result.success:
            return []
        failed = [event for event in result.all_events if event.is_failure]
        steps = [event for event in failed if event.is_step_failure]
        return [_reason(event) for event in steps or failed] or ["the run failed; the Dagster interface shows why"]


def describe_sources(experiment: Experiment) -> str:
    """What became of the raw rows of every enabled source, from its latest materialization: a line each."""
    lines: list[str] = []
    with dg.DagsterInstance.get() as instance:
        for source, title in SOURCES.items():
            event = instance.get_latest_materialization_event(dg.AssetKey(f"{source}_pairs"))
            if event is None or event.asset_materialization is None or not getattr(experiment.sources, source).enabled:
                continue
            numbers = {name: entry.value for name, entry in event.asset_materialization.metadata.items()}
            rows, pairs, rejects = numbers["rows_read"], numbers["pairs"], numbers["rejects"]
            read = f"{rows:,} rows read"
            if numbers["candidate_pairs"] != rows:
                read += f" with {numbers['candidate_pairs']:,} candidate pairs"
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in numbers["reject_counts"].items())
            lines.append(f"{title:<14} {read} = {pairs:,} pairs + {rejects:,} rejects" + (f" ({reasons})" if reasons else ""))
    return "\n".join(lines)


def _reason(event: dg.DagsterEvent) -> str:
    if not event.is_step_failure:
        return event.message or "the run failed"
    data = event.step_failure_data
    if data.user_failure_data and data.user_failure_data.description:
        return f"{event.step_key}: {data.user_failure_data.description}"
    error = data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return f"{event.step_key}: {error.message.strip() if error else 'failed'}"

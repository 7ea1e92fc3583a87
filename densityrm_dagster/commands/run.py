"""Run an experiment from the terminal, in the same Dagster instance that the interface shows."""

from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

import dagster as dg

from densityrm_core.experiment import Experiment
from densityrm_dagster.freshness import Exists, changed_sources, outdated
from densityrm_dagster.groups import SOURCES, data_assets
from densityrm_dagster.reaper import PROCESS, this_process

# What most steps would load for themselves: the assets, the instance's storage, what draws; then what trains and is tracked
_PRELOAD = [
    "densityrm_dagster.definitions",
    "dagster._core.storage.sqlite_storage",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
_PRELOAD_TRAINING = [
    *_PRELOAD,
    "densityrm_core.vectors.encoders",
    "densityrm_core.density.weighing",
    "densityrm_core.evaluation.policies",
    "densityrm_core.models.base_model",
    "scipy.stats",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
]


class RunFailedError(Exception):
    """A run failed; `reasons` has a line for each failed step."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def run_experiment_job() -> dg.JobDefinition:
    """The job `run_experiment`, as a step's own process finds it."""
    from densityrm_dagster.definitions import defs

    return defs.resolve_job_def("run_experiment")


def run_experiment(seed: int, experiment: Experiment, root: Path, only: frozenset[str] | None = None) -> bool:
    """Materialize what is missing, lost or outdated for one seed; sources whose raw files changed are read first.

    The data are prepared in a run of their own, which loads no training library: bad rows are reported before that is waited for.

    Args:
        only: names of the assets to consider; all if not given.

    Returns:
        whether there was anything to do.

    Raises:
        RunFailedError: a step failed.
    """
    from densityrm_dagster.definitions import defs

    with dg.DagsterInstance.get() as instance:

        def due() -> list[dg.AssetKey]:
            found = outdated(instance, defs, str(seed), stored_under(root / experiment.name))
            return [key for key in found if only is None or key.to_user_string() in only]

        wanted = due()
        changed = [dg.AssetKey(f"{name}_pairs") for name in changed_sources(instance, experiment, root / "raw")]
        again = [key for key in changed if key not in wanted]
        if again:
            rejects = [dg.AssetKey(key.to_user_string().removesuffix("_pairs") + "_rejects") for key in again]
            _materialize(instance, seed, again + rejects, _PRELOAD)
            wanted = due()
        data = [key for key in wanted if key.to_user_string() in data_assets()]
        if data:
            _materialize(instance, seed, data, _PRELOAD)
            wanted = due()
        if wanted:
            _materialize(instance, seed, wanted, _PRELOAD_TRAINING)
        return bool(again or data or wanted)


def renew_fork_server(preload: list[str]) -> None:
    """Stop a fork server that lacks some of `preload`: it would go on as it is, and every step load the rest for itself."""
    server = forkserver._forkserver
    if not set(preload) <= set(server._preload_modules):
        server._stop()


def stored_under(state: Path) -> Exists:
    """Whether an asset's stored value is there: a table, a model folder or a report."""

    def exists(key: dg.AssetKey, partition: str | None) -> bool:
        name = key.to_user_string()
        if partition is None:
            places = [state / "tables" / f"{name}.parquet", state / "models" / name, state / "reports" / name]
        else:
            places = [state / "tables" / name / f"{partition}.parquet", state / "models" / name / partition]
        return any(place.exists() for place in places)

    return exists


def describe_sources(experiment: Experiment) -> str:
    """What became of the raw rows of every enabled source, from its latest materialization: a line each."""
    lines: list[str] = []
    with dg.DagsterInstance.get() as instance:
        for source in experiment.sources.enabled():
            event = instance.get_latest_materialization_event(dg.AssetKey(f"{source}_pairs"))
            if event is None or event.asset_materialization is None:
                continue
            numbers = {name: entry.value for name, entry in event.asset_materialization.metadata.items()}
            rows, pairs, rejects = numbers["rows_read"], numbers["pairs"], numbers["rejects"]
            read = f"{rows:,} rows read"
            if numbers["candidate_pairs"] != rows:
                read += f" with {numbers['candidate_pairs']:,} candidate pairs"
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in numbers["reject_counts"].items())
            title = SOURCES[source]
            lines.append(f"{title:<14} {read} = {pairs:,} pairs + {rejects:,} rejects" + (f" ({reasons})" if reasons else ""))
    return "\n".join(lines)


def _materialize(instance: dg.DagsterInstance, seed: int, assets: Sequence[dg.AssetKey], preload: list[str]) -> None:
    """Two steps at a time, each a fork of a server that has paid for the slow imports `preload` once."""
    renew_fork_server(preload)
    executor = {"max_concurrent": 2, "start_method": {"forkserver": {"preload_modules": preload}}}
    result = dg.execute_job(
        dg.reconstructable(run_experiment_job),
        instance=instance,
        tags={"dagster/partition": str(seed), PROCESS: this_process()},
        asset_selection=list(assets),
        run_config={"execution": {"config": {"multiprocess": executor}}, "loggers": {"terminal": {}}},
    )
    if not result.success:
        failed = [event for event in result.all_events if event.is_failure]
        steps = [event for event in failed if event.is_step_failure]
        raise RunFailedError([_reason(event) for event in steps or failed] or ["the run failed; the Dagster interface shows why"])


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

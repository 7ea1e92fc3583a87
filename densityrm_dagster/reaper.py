"""Runs whose process was killed: Dagster would count them as running for ever, and start no other."""

import os
from pathlib import Path

import dagster as dg

PROCESS = "densityrm/process"  # tag of a run that lives in the process of a command
_IN_FLIGHT = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def this_process() -> str:
    """Number and start time of this process; no later process has both."""
    return _identity(os.getpid())


def close_dead_runs(instance: dg.DagsterInstance, root: Path, alone: bool) -> list[str]:
    """Mark runs that no process works on any more as failed, in Dagster and in MLflow; returns their ids.

    A run of `densityrm demo` names its process. Others belong to the servers of `densityrm up`: they are dead if this process is
    `alone` on its home.
    """
    dead = [run for run in instance.get_runs(dg.RunsFilter(statuses=_IN_FLIGHT)) if _is_dead(run, alone)]
    for run in dead:
        instance.report_run_failed(run, "the process of this run was killed; its finished assets are kept")
    if dead and (root / "mlflow" / "mlflow.db").exists():
        _close_mirrors(f"sqlite:///{root / 'mlflow' / 'mlflow.db'}", [run.run_id for run in dead])
    return [run.run_id for run in dead]


def _is_dead(run: dg.DagsterRun, alone: bool) -> bool:
    process = run.tags.get(PROCESS)
    return alone if process is None else _identity(int(process.split("@")[0])) != process


def _close_mirrors(uri: str, runs: list[str]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in runs:
        for mirror in client.search_runs(experiments, f"tags.`dagster.run_id` = '{run}' and attributes.status = 'RUNNING'"):
            client.set_terminated(mirror.info.run_id, "KILLED")


def _identity(pid: int) -> str:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        return ""
    return "" if after_name[0] == "Z" else f"{pid}@{after_name[19]}"

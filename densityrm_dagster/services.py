"""The two servers of a user, Dagster and MLflow: where they are, and the Dagster instance they share."""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from filelock import FileLock

from densityrm_core.experiment import ExperimentError
from densityrm_core.files import lock, sweep
from densityrm_dagster.reaper import close_dead_runs

_DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
python_logs: {python_log_level: INFO}
run_coordinator: {module: dagster, class: QueuedRunCoordinator}
concurrency: {runs: {max_concurrent_runs: 1}}
run_monitoring: {enabled: true, start_timeout_seconds: 300, cancel_timeout_seconds: 60}
"""


@dataclass(frozen=True)
class Addresses:
    dagster: str
    mlflow: str
    dagster_port: int
    mlflow_port: int


def urls() -> Addresses:
    """Where the servers listen: loopback, ports from DENSITYRM_DAGSTER_PORT (3000) and DENSITYRM_MLFLOW_PORT (5000)."""
    dagster, mlflow = (_port(f"DENSITYRM_{name}_PORT", usual) for name, usual in (("DAGSTER", 3000), ("MLFLOW", 5000)))
    return Addresses(f"http://127.0.0.1:{dagster}", f"http://127.0.0.1:{mlflow}", dagster, mlflow)


def _port(variable: str, usual: int) -> int:
    given = os.environ.get(variable) or str(usual)
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise ExperimentError(f"{variable}: {given!r} is no port; set it to a number from 1 to 65535, or unset it")
    return int(given)


def tracking_uri(root: Path) -> str:
    """MLflow's database of a state folder."""
    return f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"


def prepare_home(root: Path, experiment: str) -> int:
    """Create an experiment's state with a Dagster instance of its own, and point this process and its children at them.

    The instance's database is created here, once: two servers that find none would both create it, and one would fail. What a
    killed process left is cleared away: half-written files, and runs that it had in hand.

    Returns:
        the descriptor of a lock that says "in use" for as long as this process, or one that it passes it to, lives.
    """
    state = root / experiment
    instance = state / "dagster"
    instance.mkdir(parents=True, exist_ok=True)
    (root / "mlflow" / "artifacts").mkdir(parents=True, exist_ok=True)
    settings = instance / "dagster.yaml"
    if not settings.exists():
        settings.write_text(_DAGSTER_YAML, encoding="utf-8")
    os.environ["DENSITYRM_HOME"], os.environ["DAGSTER_HOME"] = str(root), str(instance)
    os.environ.setdefault("MPLCONFIGDIR", str(root / "cache" / "matplotlib"))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")  # registered models are code and safetensors
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    in_use = os.open(instance / "in-use.lock", os.O_RDWR | os.O_CREAT, 0o644)
    alone = lock(in_use)
    with FileLock(instance / "create.lock"), dg.DagsterInstance.get() as opened:
        close_dead_runs(opened, root, alone)
    for folder in (state, root / "raw"):
        sweep(folder)
    fcntl.flock(in_use, fcntl.LOCK_SH)
    return in_use

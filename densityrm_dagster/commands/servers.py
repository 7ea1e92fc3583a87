"""`densityrm up`: the Dagster webserver, its daemon and the MLflow server as one, on loopback; stopping one stops all."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from densityrm_dagster.services import urls

_START_S, _STOP_S = 180, 15


def serve(root: Path, in_use: int) -> int:
    """Start all servers on the state in `root`, print their addresses, and wait for Ctrl-C or SIGTERM. Returns an exit code.

    Args:
        in_use: the lock of `prepare_home`; the servers hold it too, should this process be killed before them.
    """
    address = urls()
    database, artifacts = root / "mlflow" / "mlflow.db", root / "mlflow" / "artifacts"
    module = ["-m", "densityrm_dagster.definitions"]
    commands = {
        "MLflow": [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(address.mlflow_port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(artifacts)),
        ],
        "Dagster": [
            *(sys.executable, "-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(address.dagster_port), *module),
        ],
        "Dagster daemon": [sys.executable, "-m", "dagster._daemon", "run", *module],
    }
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts us in the background has set SIGINT to be ignored
        signal.signal(number, _interrupt)
    logs = root / "logs"
    logs.mkdir(exist_ok=True)
    processes = {
        name: _start(command, logs / f"{name.lower().replace(' ', '-')}.log", in_use) for name, command in commands.items()
    }
    try:
        for name, url in (("Dagster", f"{address.dagster}/server_info"), ("MLflow", f"{address.mlflow}/health")):
            _await(name, url, processes[name], logs)
        print(f"Dagster  {address.dagster}\nMLflow   {address.mlflow}\nCtrl-C stops both; logs are in {logs}", flush=True)
        while True:
            for name, process in processes.items():
                if process.poll() is not None:
                    print(f"{name} stopped by itself (exit code {process.returncode}); see {logs}", file=sys.stderr)
                    return 1
            time.sleep(0.5)
    except KeyboardInterrupt:
        return 0
    except TimeoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        _stop(list(processes.values()))


def _start(command: list[str], log: Path, in_use: int) -> "subprocess.Popen[bytes]":
    with log.open("ab") as output:  # Ctrl-C then reaches this process only, which stops the servers in order
        return subprocess.Popen(  # noqa: S603  our own command line
            command, stdout=output, stderr=output, start_new_session=True, pass_fds=[in_use]
        )


def _await(name: str, url: str, process: "subprocess.Popen[bytes]", logs: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise TimeoutError(f"{name} did not start (exit code {process.returncode}); see {logs}; is its port in use?")
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310  a loopback address
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"{name} does not answer at {url} after {_START_S} s; see {logs}")


def _stop(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + _STOP_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

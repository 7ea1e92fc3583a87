"""Where the experiment's state lies and whether it opens, and who has the ports of Dagster and MLflow."""

import contextlib
import json
import os
import socket
import sqlite3
import tempfile
import urllib.request
from pathlib import Path

import dagster as dg

from densityrm_dagster.doctor.lines import Line, first_line, green, red
from densityrm_dagster.services import urls

_DATABASE_S = 2.0
_LISTENS = "0A"  # state of a socket in /proc/net/tcp
_SERVERS = {
    "Dagster port": ("DENSITYRM_DAGSTER_PORT", "dagster_port", "server_info"),
    "MLflow port": ("DENSITYRM_MLFLOW_PORT", "mlflow_port", "health"),
}


def state(root: Path, experiment: str) -> list[Line]:
    """Whether the state folder can be written, and the databases in it be opened."""
    return [_writable(root), _mlflow(root / "mlflow" / "mlflow.db"), _dagster(root / experiment / "dagster")]


def ports(root: Path, patience: float = 2.0) -> list[Line]:
    """Whether both servers could listen, or do.

    Args:
        patience: seconds that a server may take to answer.
    """
    try:
        address = urls()
    except ValueError as error:
        remedy = "set DENSITYRM_DAGSTER_PORT and DENSITYRM_MLFLOW_PORT to numbers, or unset them"
        return [red("ports", f"a port is no number ({first_line(error)})", remedy)]
    if address.dagster_port == address.mlflow_port:
        remedy = "set DENSITYRM_DAGSTER_PORT and DENSITYRM_MLFLOW_PORT to two different ports"
        return [red("ports", f"both servers have port {address.dagster_port}", remedy)]
    return [
        _port(name, getattr(address, port), variable, path, root, patience) for name, (variable, port, path) in _SERVERS.items()
    ]


def _writable(root: Path) -> Line:
    there = next(parent for parent in (root, *root.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return green("state", f"{root}{'' if root == there else ', which will be made'}  [DENSITYRM_HOME]")
    except OSError as error:
        remedy = "set DENSITYRM_HOME to a folder that you may write to"
        return red("state", f"{there} cannot be written to ({error.strerror})", remedy)


def _mlflow(database: Path) -> Line:
    if not database.exists():
        return green("MLflow", "its database will be made")
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=_DATABASE_S)) as opened:
            ((runs,),) = opened.execute("select count(*) from runs")
    except sqlite3.Error as error:
        remedy = f"move {database} away; a new one is made, and metrics are beside the models too"
        return red("MLflow", f"{database} does not open ({first_line(error)})", remedy)
    return green("MLflow", f"its database opens: {runs:,} runs")


def _dagster(instance: Path) -> Line:
    if not (instance / "dagster.yaml").exists():
        return green("Dagster", "its instance will be made")
    try:
        with dg.DagsterInstance.from_config(str(instance)) as opened:
            runs = opened.get_runs_count()
    except Exception as error:  # Dagster and its database raise many kinds; all mean that the instance is not to be used
        remedy = f"move {instance} away; a new one is made, and the experiment runs anew"
        return red("Dagster", f"the instance in {instance} does not open ({first_line(error)})", remedy)
    return green("Dagster", f"its instance opens: {runs:,} runs")


def _port(name: str, port: int, variable: str, path: str, root: Path, patience: float) -> Line:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = first_line(error)
        else:
            return green(name, f"{port} is free  [{variable}]")
    process = _listener(port)
    remedy = f"set {variable} to another port, or stop what has this one"
    if process is None:
        return red(name, f"{port} is taken ({reason})", remedy)
    if _answers(port, path, patience):
        if (home := _home_of(process)) in (None, root):
            return green(name, f"{port}: the server is up (process {process})  [{variable}]")
        return red(name, f"{port} is taken by the server of another state, {home} (process {process})", remedy)
    return red(name, f"{port} is taken by process {process}, {_command(process)}", remedy)


def _answers(port: int, path: str, patience: float) -> bool:
    """Whether Dagster's or MLflow's server is at a port."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/{path}", timeout=patience) as answer:
            said = answer.read(4096)
        return said.strip() == b"OK" if path == "health" else "dagster_version" in json.loads(said)
    except (OSError, ValueError):
        return False


def _listener(port: int) -> int | None:
    """The process that listens at a port; None where it is another user's."""
    sockets = {f"socket:[{fields[9]}]" for fields in _sockets() if fields[3] == _LISTENS and fields[1].endswith(f":{port:04X}")}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for opened in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(opened.readlink()) in sockets:
                        return int(process.name)
    return None


def _sockets() -> list[list[str]]:
    """Fields of every line of the system's tables of TCP sockets: 1 is the local address, 3 the state, 9 the number."""
    tables = [Path("/proc/net") / name for name in ("tcp", "tcp6")]
    return [line.split() for table in tables if table.exists() for line in table.read_text(encoding="ascii").splitlines()[1:]]


def _command(process: int) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "whose command line cannot be read"
    line = " ".join(" ".join(words).split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def _home_of(process: int) -> Path | None:
    """The state folder that a server of ours was started on; None where it does not say."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"DENSITYRM_HOME="):
                return Path(os.fsdecode(entry.partition(b"=")[2])).absolute()
    return None

"""The servers a person opens: launch the graph for one seed through the Dagster interface, follow the links to MLflow."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .commands import REPOSITORY, TINY

LAUNCH = """
mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
ASSETS = """
{ assetNodes { assetKey { path } description groupName kinds isMaterializable isPartitioned
  assetMaterializations(limit: 1) { metadataEntries { __typename label
    ... on UrlMetadataEntry { url } ... on IntMetadataEntry { intValue } ... on TextMetadataEntry { text } } } } }"""
CODE_LOCATION = {"repositoryName": "__repository__", "repositoryLocationName": "densityrm_dagster.definitions"}
NO_CARD_NEEDED = {"path", "dagster/storage_kind"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Interface:
    def __init__(self, dagster: int, mlflow: int, process: "subprocess.Popen[str]") -> None:
        self.dagster, self.mlflow, self.process = f"http://127.0.0.1:{dagster}", f"http://127.0.0.1:{mlflow}", process

    def ask(self, query: str, **variables: object) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.dagster}/graphql", body, {"Content-Type": "application/json"})  # noqa: S310  loopback
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310  loopback
            content = json.load(answer)
        assert "errors" not in content, content["errors"]
        return content["data"]


@pytest.fixture(scope="module")
def interface(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interface]:
    folder = tmp_path_factory.mktemp("up")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(TINY))
    dagster, mlflow = free_port(), free_port()
    environment = {
        **os.environ,
        "DENSITYRM_EXPERIMENT": str(folder / "experiment.yaml"),
        "DENSITYRM_HOME": str(folder / "home"),
        "DENSITYRM_DAGSTER_PORT": str(dagster),
        "DENSITYRM_MLFLOW_PORT": str(mlflow),
    }
    command = [sys.executable, "-m", "densityrm_dagster", "up"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0] == f"Dagster  http://127.0.0.1:{dagster}\n", logs(folder)
        assert lines[1] == f"MLflow   http://127.0.0.1:{mlflow}\n"
        yield Interface(dagster, mlflow, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{dagster}/server_info", timeout=5)
    finally:
        if process.poll() is None:
            process.kill()


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in (folder / "home" / "logs").glob("*.log"))


def test_launching_all_assets_for_one_seed_materializes_the_graph(interface: Interface):
    paths = [node["assetKey"] for node in interface.ask("{ assetNodes { assetKey { path } } }")["assetNodes"]]
    params = {
        "selector": {**CODE_LOCATION, "jobName": "__ASSET_JOB", "assetSelection": paths},  # what "Materialize all" launches
        "mode": "default",
        "runConfigData": json.dumps({"execution": {"config": {"in_process": {}}}}),  # saves an interpreter a step
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": "0"}]},
    }
    launched = interface.ask(LAUNCH, params=params)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    deadline = time.monotonic() + 400
    status = "QUEUED"
    while status not in {"SUCCESS", "FAILURE", "CANCELED"} and time.monotonic() < deadline:
        time.sleep(2)
        status = interface.ask(STATUS, id=launched["run"]["runId"])["runOrError"]["status"]
    assert status == "SUCCESS"

    nodes = {node["assetKey"]["path"][0]: node for node in interface.ask(ASSETS)["assetNodes"]}
    assert len(nodes) == 24
    for name, node in nodes.items():
        assert node["description"], name
        (made,) = node["assetMaterializations"]
        entries = {entry["label"]: entry for entry in made["metadataEntries"]}
        assert "dagster/row_count" in entries or set(entries) - NO_CARD_NEEDED, name
        if name in {"base_model", "rm_uniform", "rm_density", "grpo_a", "grpo_b", "grpo_c"}:
            with urllib.request.urlopen(entries["mlflow_run"]["url"], timeout=30) as page:  # noqa: S310  loopback
                assert page.status == 200
            run_id = entries["mlflow_run_id"]["text"]
            with urllib.request.urlopen(f"{interface.mlflow}/api/2.0/mlflow/runs/get?run_id={run_id}", timeout=30) as found:  # noqa: S310
                assert json.load(found)["run"]["info"]["status"] == "FINISHED"


def test_a_bad_value_in_the_launchpad_is_refused_before_anything_trains(interface: Interface):
    params = {
        "selector": {**CODE_LOCATION, "jobName": "train_reward_models"},
        "mode": "default",
        "runConfigData": json.dumps({"ops": {"rm_uniform": {"config": {"learning_rate": -1.0}}}}),
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": "0"}]},
    }
    launched = interface.ask(LAUNCH, params=params)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]
    deadline, status = time.monotonic() + 120, "QUEUED"
    while status not in {"SUCCESS", "FAILURE", "CANCELED"} and time.monotonic() < deadline:
        time.sleep(1)
        status = interface.ask(STATUS, id=run_id)["runOrError"]["status"]
    assert status == "FAILURE"
    made = interface.ask(
        "query($id: ID!) { runOrError(runId: $id) { ... on Run { assetMaterializations { timestamp }"
        " stepStats { stepKey attempts { startTime } } } } }",
        id=run_id,
    )["runOrError"]
    assert made["assetMaterializations"] == []
    assert all(len(step["attempts"]) <= 1 for step in made["stepStats"])


STOP = "mutation($id: String!) { terminateRun(runId: $id) { __typename ... on PythonError { message } } }"
SAID = """
query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
  ... on MessageEvent { message } ... on ExecutionStepFailureEvent { failureMetadata { description } } } } } }"""


def materialize_rm(interface: Interface) -> str:
    config = {"steps": 20_000, "evaluate_every": 20_000}
    params = {
        "selector": {**CODE_LOCATION, "jobName": "__ASSET_JOB", "assetSelection": [{"path": ["rm_uniform"]}]},
        "mode": "default",
        "runConfigData": json.dumps({"ops": {"rm_uniform": {"config": config}}}),
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": "0"}]},
    }
    return interface.ask(LAUNCH, params=params)["launchRun"]["run"]["runId"]


def messages(interface: Interface, run_id: str) -> list[str]:
    """What the run has said so far, in the words of a failure where a step has failed."""
    events = interface.ask(SAID, id=run_id)["logsForRun"]["events"]
    return [(event.get("failureMetadata") or {}).get("description") or event.get("message", "") for event in events]


def terminate_when(interface: Interface, run_id: str, said: str) -> list[str]:
    """Wait until the run has said something, press Terminate, and wait for its end; all that it said."""
    deadline = time.monotonic() + 200
    while not any(said in message for message in messages(interface, run_id)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert interface.ask(STOP, id=run_id)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    while interface.ask(STATUS, id=run_id)["runOrError"]["status"] != "CANCELED" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert interface.ask(STATUS, id=run_id)["runOrError"]["status"] == "CANCELED"
    return messages(interface, run_id)


def test_a_terminated_training_saves_and_the_next_materialization_goes_on(interface: Interface):
    first = terminate_when(interface, materialize_rm(interface), "pairs/s")
    (stopped,) = {int(m.split("stopped before step ")[1].split()[0]) for m in first if "stopped before step" in m}
    second = terminate_when(interface, materialize_rm(interface), "going on after step")
    assert any(f"going on after step {stopped - 1} of 20000" in message for message in second)
    found = urllib.request.Request(  # noqa: S310  loopback
        f"{interface.mlflow}/api/2.0/mlflow/runs/search",
        json.dumps({"experiment_ids": ["1", "2", "3"], "filter": "params.steps = '20000'"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(found, timeout=30) as answer:  # noqa: S310  loopback
        runs = json.load(answer)["runs"]
    assert [run["info"]["status"] for run in runs] == ["KILLED", "KILLED"]

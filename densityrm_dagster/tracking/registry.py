"""Reward models in MLflow's model registry: a version for each materialization, and the way from its name back to a folder."""

import contextlib
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dagster as dg

from densityrm_dagster.metadata import folder_hash
from densityrm_dagster.tracking.mirror import MirroredRun

_CODE = Path(__file__).with_name("reward_pyfunc.py")
_WEIGHTS = "reward_model"  # as in reward_pyfunc.py
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/]+))")
_REQUIREMENTS = ("densityrm", "mlflow", "torch", "transformers")
_EXAMPLE = {"prompt": ["How do I brew coffee?"], "response": ["Grind the beans and pour hot water over them."]}


class RegistryError(ValueError):
    """A registered model cannot be had; the message says which and what to do."""


def register_reward_model(mirror: MirroredRun, folder: Path) -> dict[str, Any]:
    """Make a model folder the next version of `<experiment>-<variant>`, and what the asset shows of it.

    The version carries the tags of the mirrored run (Dagster run, experiment, fingerprint), its seed, and the folder's data
    version; the alias `seed-<seed>` moves to it. Where MLflow is out of reach, nothing is registered, and the card says so.
    """
    registered: list[Any] = []
    mirror.attempt(lambda: registered.append(_register(mirror, folder)))
    if not registered:
        return {"mlflow_synced": mirror.synced}
    (made,) = registered
    link = f"{mirror.url.split('/#/')[0]}/#/models/{made.name}/versions/{made.version}"
    return {"registered_model": f"models:/{made.name}/{made.version}", "registered_model_page": dg.MetadataValue.url(link)}


def _register(mirror: MirroredRun, folder: Path) -> Any:
    from mlflow.entities import LoggedModelOutput

    client, run = mirror.client, mirror.client.get_run(mirror.run_id)
    tags = {key: value for key, value in run.data.tags.items() if key.startswith(("dagster.", "densityrm."))}
    seed, content = run.data.params["seed"], folder_hash(folder)
    tags |= {"densityrm.seed": seed, "densityrm.data_version": content}
    name = f"{tags['densityrm.experiment']}-{tags['densityrm.variant']}"
    model = client.create_logged_model(run.info.experiment_id, name, mirror.run_id, tags, model_type="reward model")
    with TemporaryDirectory() as stage:
        _write_pyfunc(Path(stage, "model"), mirror.run_id, model.model_id)
        client.log_model_artifacts(model.model_id, f"{stage}/model")
    client.log_model_artifacts(model.model_id, str(folder), f"artifacts/{_WEIGHTS}")  # the weights are copied this once
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(mirror.run_id, [LoggedModelOutput(model.model_id, step=0)])
    _create_registered_model(client, name)
    made = client.create_model_version(name, model.artifact_location, mirror.run_id, tags, model_id=model.model_id)
    client.set_registered_model_alias(name, f"seed-{seed}", made.version)
    return made


def _write_pyfunc(path: Path, run_id: str, model_id: str) -> None:
    """All of a pyfunc model but its weights, whose place is an empty folder."""
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, Schema

    columns = Schema([ColSpec("string", "prompt"), ColSpec("string", "response")])
    with TemporaryDirectory() as parent:
        empty = Path(parent, _WEIGHTS)
        empty.mkdir()
        save_model(
            path,
            python_model=str(_CODE),
            artifacts={_WEIGHTS: str(empty)},
            signature=ModelSignature(columns, Schema([ColSpec("double", "reward")])),
            input_example=pd.DataFrame(_EXAMPLE),
            pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in _REQUIREMENTS],
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )


def _create_registered_model(client: Any, name: str) -> None:
    """The entry that versions belong to, unless it is there, be it made by another process just now."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextlib.contextmanager
def registered_folder(uri: str, tracking_uri: str) -> Iterator[Path]:
    """The Hugging Face folder of `models:/name/version` or `models:/name@alias`; where it has to be fetched, gone at the end.

    Raises:
        RegistryError: there is no such model, or it is none of ours, or the registry cannot be reached.
    """
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.utils.file_utils import local_file_uri_to_path

    found = _URI.fullmatch(uri)
    if not found:
        raise RegistryError(f"{uri} is no registered model; write models:/<name>/<version> or models:/<name>@<alias>")
    name, number, alias = found["name"], found["version"], found["alias"]
    client = MlflowClient(tracking_uri, tracking_uri)
    try:
        made = client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias)
        place = f"{client.get_model_version_download_uri(name, made.version)}/artifacts/{_WEIGHTS}"
        if place.startswith("file:") or "://" not in place:
            yield Path(local_file_uri_to_path(place))
            return
        with TemporaryDirectory() as folder:
            yield Path(download_artifacts(artifact_uri=place, dst_path=folder, tracking_uri=tracking_uri))
    except MlflowException as error:
        raise RegistryError(f"{uri}: {error.message}") from None

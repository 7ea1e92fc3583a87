"""MLflow as a mirror: one run for each materialization, linked both ways; a dead server costs a warning, never a training run."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from dagster._core.errors import DagsterExecutionInterruptedError  # what Terminate raises; Dagster exports it nowhere else

from densityrm_dagster.partitions import partition_of

DENSITIES, REWARD_MODELS, POLICIES = "densityrm/densities", "densityrm/reward-models", "densityrm/policies"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # opens as a table of runs, not as a page of traces
_FLUSH_EVERY_S, _FLUSH_AT = 5.0, 500
_BATCH = 1000  # points that MLflow accepts at once


class MLflowTracker(dg.ConfigurableResource):
    """Where runs go (`tracking_uri`, `artifacts`) and the addresses at which a person sees them."""

    tracking_uri: str
    artifacts: str
    ui_url: str
    dagster_url: str

    @contextlib.contextmanager
    def run(
        self,
        context: dg.AssetExecutionContext,
        experiment: str,
        params: dict[str, Any],
        tags: dict[str, str],
        stopped: tuple[type[BaseException], ...] = (),
    ) -> Iterator["MirroredRun"]:
        """A run that ends FINISHED, FAILED or KILLED, as the block does; `stopped` are the exceptions of a run told to end."""
        mirror = MirroredRun(context.log.warning)
        mirror.attempt(lambda: self._start(context, experiment, params, tags, mirror))
        status = "FAILED"
        try:
            yield mirror
            status = "FINISHED"
        except (DagsterExecutionInterruptedError, KeyboardInterrupt, *stopped):
            status = "KILLED"
            raise
        finally:
            mirror.flush()
            mirror.attempt(lambda: mirror.client.set_terminated(mirror.run_id, status))

    def _start(
        self,
        context: dg.AssetExecutionContext,
        experiment: str,
        params: dict[str, Any],
        tags: dict[str, str],
        mirror: "MirroredRun",
    ) -> None:
        from filelock import FileLock
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        Path(self.artifacts).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(self.artifacts, ".lock")):  # the first client creates the schema, and only one may
            client = MlflowClient(self.tracking_uri)
            found = client.get_experiment_by_name(experiment)
            location = Path(self.artifacts, experiment).absolute().as_uri()
            number = found.experiment_id if found else client.create_experiment(experiment, location, _KIND)
        key = context.asset_key.to_user_string()
        partition = partition_of(context) or ""
        run_url, asset_url = f"{self.dagster_url}/runs/{context.run_id}", f"{self.dagster_url}/assets/{key}"
        links = {
            "dagster.run_id": context.run_id,
            "dagster.asset_key": key,
            "dagster.partition": partition,
            "dagster.url": run_url,
            "mlflow.note.content": f"Dagster [run {context.run_id[:8]}]({run_url}) · [asset {key}]({asset_url})",
            "mlflow.source.name": "densityrm",
        }
        run = client.create_run(number, run_name=f"{key}[{partition}]" if partition else key, tags={**links, **tags})
        mirror.connect(client, run.info.run_id, f"{self.ui_url}/#/experiments/{number}/runs/{run.info.run_id}")
        client.log_batch(mirror.run_id, params=[Param(name, str(value)) for name, value in params.items()])


class MirroredRun:
    """A run being mirrored. After its first failed call it says so once and stops trying; nothing raises."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.client: Any = None
        self.run_id, self.url, self.synced = "", "", True
        self._warn, self._points, self._flushed = warn, [], time.monotonic()

    def connect(self, client: Any, run_id: str, url: str) -> None:
        self.client, self.run_id, self.url = client, run_id, url

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Buffer metrics of one point of the x axis; they are sent in batches."""
        now = int(time.time() * 1000)
        self._points += [(name, float(value), now, step) for name, value in metrics.items()]
        if len(self._points) >= _FLUSH_AT or time.monotonic() - self._flushed > _FLUSH_EVERY_S:
            self.flush()

    def final(self, metrics: dict[str, float]) -> None:
        """Repeat the last values under `final/`, where runs are compared."""
        self.log(0, {f"final/{name.removeprefix('eval/').removeprefix('train/')}": value for name, value in metrics.items()})

    def params(self, params: dict[str, str]) -> None:
        """Further parameters, known only once the run is under way."""

        def send() -> None:
            from mlflow.entities import Param

            self.client.log_batch(self.run_id, params=[Param(name, value) for name, value in params.items()])

        self.attempt(send)

    def artifact(self, path: Path) -> None:
        self.attempt(lambda: self.client.log_artifact(self.run_id, str(path)))

    def table(self, name: str, frame: pl.DataFrame) -> None:
        """Keep a frame as a table that MLflow's interface shows, beside those of other runs."""
        self.attempt(lambda: self.client.log_table(self.run_id, frame.to_dict(as_series=False), f"{name}.json"))

    def flush(self) -> None:
        points, self._points, self._flushed = self._points, [], time.monotonic()

        def send() -> None:
            from mlflow.entities import Metric

            for start in range(0, len(points), _BATCH):
                self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in points[start : start + _BATCH]])

        if points:
            self.attempt(send)

    def attempt(self, call: Callable[[], Any]) -> None:
        if not self.synced:
            return
        try:
            call()
        except Exception as error:  # whatever the tracker's transport raises: training goes on, and says so
            self.synced = False
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._warn(f"MLflow is out of reach ({reason}); metrics are kept in metrics.parquet beside the model")

    def metadata(self) -> dict[str, Any]:
        """Link and state of the mirror, for the asset."""
        link = {"mlflow_run": dg.MetadataValue.url(self.url), "mlflow_run_id": self.run_id} if self.run_id else {}
        return {**link, "mlflow_synced": self.synced}

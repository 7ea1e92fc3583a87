"""A training run as Dagster and MLflow see it: progress, curves, links, report card."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from densityrm_core.choices import Taken, noted
from densityrm_core.experiment import Experiment
from densityrm_core.settings import ComputeSettings, Settings
from densityrm_core.training import plots as training_plots
from densityrm_dagster.metadata import plot
from densityrm_dagster.partitions import partition_of
from densityrm_dagster.tracking.mirror import MirroredRun, MLflowTracker
from densityrm_dagster.tracking.registry import register_reward_model

if TYPE_CHECKING:
    from densityrm_core.training.loop import Plan

_SAY_EVERY_S = 5.0
_SHOWN = {"train/loss", "train/accuracy", "eval/accuracy", "reward/mean", "kl/sequence"}


class Training:
    """A watch for the core's loops that speaks to Dagster's log and to MLflow, and turns into a report card."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        mirror: MirroredRun,
        unit: str,
        checkpoints: Path,
        compute: ComputeSettings,
        taken: Taken,
    ) -> None:
        from densityrm_core.training.checkpoints import CheckpointFolder
        from densityrm_core.training.loop import Watch

        self._context, self._mirror, self._unit, self._taken = context, mirror, unit, taken
        self._started, self._said, self._resumed = time.monotonic(), 0.0, 0
        folder = CheckpointFolder(checkpoints, compute.checkpoint_every, compute.checkpoints_kept)
        self.watch = Watch(report=self._point, resumed=self._go_on, say=context.log.warning, folder=folder)

    def _go_on(self, step: int, plan: "Plan") -> None:
        self._resumed = step
        self._context.log.info(f"going on after step {step} of {plan.steps}")

    def _point(self, step: int, plan: "Plan", metrics: dict[str, float]) -> None:
        self._mirror.log(step * plan.units, metrics)
        now = time.monotonic()
        if step <= self._resumed or (now - self._said < _SAY_EVERY_S and step != plan.steps):
            return
        self._said = now
        elapsed, done = now - self._started, step - self._resumed
        left = elapsed / done * (plan.steps - step)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name in _SHOWN)
        rate = done * plan.units / max(elapsed, 1e-9)
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        self._context.log.info(f"{step}/{plan.steps}  {speed} {self._unit}/s  {left:.0f} s left  {shown}")

    def finish(self, folder: Path, final: dict[str, float], curves: list[str]) -> dict[str, Any]:
        """Write metrics.parquet beside the model and return the report card: final values, curves, seconds, MLflow link."""
        frame = self.watch.frame()
        frame.write_parquet(folder / "metrics.parquet")
        self._mirror.artifact(folder / "metrics.parquet")
        self._mirror.final(final)
        self._mirror.flush()
        return {
            **{name.replace("/", "_"): value for name, value in final.items()},
            "seconds": round(time.monotonic() - self._started, 1),
            **record_hardware(self._mirror, self._taken),
            "curves": plot(training_plots.curves(frame, curves, f"{self._unit} seen")),
            **self._mirror.metadata(),
        }

    def keep(self, folder: Path, name: str, frame: pl.DataFrame) -> None:
        """A table of the training: a Parquet file beside the model, and one that MLflow shows."""
        frame.write_parquet(folder / f"{name}.parquet")
        self._mirror.table(name, frame)

    def losses_finite(self) -> dg.AssetCheckResult:
        """The check of this name: no loss of the training was NaN or infinite."""
        losses = self.watch.frame().filter(pl.col("metric").str.ends_with("loss"))["value"]
        passed = bool(losses.is_finite().all())
        return dg.AssetCheckResult(check_name="losses_finite", passed=passed, metadata={"points": len(losses)})

    def register(self, folder: Path) -> dict[str, Any]:
        """Make the finished reward model a version in MLflow's registry; what the report card says of it."""
        return register_reward_model(self._mirror, folder)


@contextlib.contextmanager
def tracked(
    context: dg.AssetExecutionContext,
    mlflow: MLflowTracker,
    experiment: Experiment,
    group: str,
    settings: Settings,
    variant: str,
    unit: str,
    checkpoints: Path,
    **params: Any,
) -> Iterator[Training]:
    """One MLflow run around one training, its parameters the settings it was given; torch set up as the experiment says.

    checkpoints: where the training goes on from if it was stopped.
    """
    from densityrm_core.training.loop import TrainingStoppedError

    set_up_torch(experiment.compute)
    seed = partition_of(context) or "0"
    described = {"variant": variant, "seed": seed, "experiment": experiment.name, **params, **settings.model_dump(mode="json")}
    tags = tags_of(experiment) | {"densityrm.variant": variant}
    with mlflow.run(context, group, described, tags, stopped=(TrainingStoppedError,)) as mirror, noted() as taken:
        yield Training(context, mirror, unit, checkpoints, experiment.compute, taken)


def record_hardware(mirror: MirroredRun, taken: Taken) -> dict[str, dg.MetadataValue]:
    """What something was computed on, and which of the branches that depend on it (`choices`) were taken."""
    from densityrm_core.hardware import device_kind, processor_name

    found = {name.replace(" ", "_"): ", ".join(sorted(branches)) for name, branches in sorted(taken.items())}
    found |= {"device_kind": device_kind(found.get("device", "cpu")), "processor": processor_name()}
    mirror.params({f"hardware.{name}": value for name, value in found.items()})
    return {"hardware": dg.MetadataValue.json(found)}


def tags_of(experiment: Experiment) -> dict[str, str]:
    """By which runs of one experiment are found and compared."""
    return {"densityrm.experiment": experiment.name, "densityrm.fingerprint": experiment.fingerprint}


def set_up_torch(compute: ComputeSettings) -> None:
    """Threads of this process, how packed rows attend in it, and no kernels whose results differ from run to run."""
    import torch
    from transformers.utils import logging

    from densityrm_core.models.attention import use_kernel

    torch.set_num_threads(compute.threads)
    use_kernel(compute.attention)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS sums in another order from run to run
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # no kernel here reads what it has not written
    logging.set_verbosity_error()
    logging.disable_progress_bar()

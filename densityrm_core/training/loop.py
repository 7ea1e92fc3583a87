"""What every loop shares: optimizer, schedule, clipping, metrics, and when to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import polars as pl
import torch
from torch import Tensor

from densityrm_core import tables
from densityrm_core.training.checkpoints import CheckpointFolder, Checkpoints, Progress
from densityrm_core.training.ranks import SOLO, Ranks, clip_gradients, divided

Part = tuple[Tensor | None, dict[str, float]]  # scalar loss, or None where there is nothing to learn; metrics


class TrainingError(RuntimeError):
    """Training went wrong (the message names the step); nothing was saved."""


class TrainingStoppedError(RuntimeError):
    """The run was asked to stop."""


@dataclass(frozen=True)
class Plan:
    """The numbers every optimizer loop needs. `units` is how much one step adds to the x axis (pairs, completions...)."""

    steps: int
    units: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    log_every: int = 10


@dataclass
class Watch:
    """Where a loop's metrics go: kept for the metrics table, and passed on to whoever watches.

    `report(step, plan, metrics)` is called with the optimizer step (from 1), the plan and the metrics of this point. Where a run
    goes on, `resumed(step, plan)` is called first, and the points of before are reported again. `say` is told what went wrong
    without ending the run. `folder` is where checkpoints are kept, if anywhere.
    """

    report: Callable[[int, Plan, dict[str, float]], None] = lambda step, plan, metrics: None
    resumed: Callable[[int, Plan], None] = lambda step, plan: None
    should_stop: Callable[[], bool] = lambda: False
    say: Callable[[str], None] = print
    folder: CheckpointFolder | None = None
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list[tuple[int, dict[str, float]]])

    def checkpoints(self, key: str, ranks: Ranks = SOLO) -> Checkpoints | None:
        """The checkpoints of a training, see `key_of`; None if there is no place for them."""
        return self.folder.of(key, self.say, ranks) if self.folder else None

    def record(self, step: int, plan: Plan, metrics: dict[str, float]) -> None:
        self.points.append((step * plan.units, metrics))
        self.report(step, plan, metrics)

    def resume(self, progress: Progress, plan: Plan) -> None:
        """Take over the points of a run that goes on."""
        self.points[:] = progress.points
        self.resumed(progress.step, plan)
        for at, metrics in self.points:
            self.report(at // plan.units, plan, metrics)

    def frame(self) -> pl.DataFrame:
        """All points so far, per tables.METRICS."""
        rows = [{"step": at, "metric": name, "value": value} for at, metrics in self.points for name, value in metrics.items()]
        return tables.METRICS.frame(rows)

    def last(self, metric: str) -> float:
        """The latest value of a metric."""
        return next(metrics[metric] for _, metrics in reversed(self.points) if metric in metrics)


def optimize(
    model: Any,
    plan: Plan,
    watch: Watch,
    parts_at: Callable[[int], Iterable[Part]],
    after: Callable[[int], dict[str, float] | None] = lambda step: None,
    finished: Callable[[], bool] = lambda: False,
    checkpoints: Checkpoints | None = None,
    memory: dict[str, list[Any]] | None = None,
    ranks: Ranks = SOLO,
    updates: int = 1,
) -> int:
    """Minimise the sum of `parts_at(step)` with AdamW, warm-up + cosine and gradient clipping; returns the steps taken.

    Args:
        model: what is trained, in train mode afterwards; parameters that need no gradient stay as they are.
        parts_at: step (from 0) -> parts of the step's loss, one after the other, so that only one is in memory. The parts' losses
            and metrics are summed, over ranks too; metrics are averaged over `plan.log_every` steps when recorded.
        after: step (from 1) -> further metrics to record at this point, or None.
        finished: true ends the loop early, as a success.
        checkpoints: where to go on from, and to save to every so many steps and when stopped.
        memory: what `parts_at` and `finished` remember from step to step; restored in place.
        ranks: the processes that share every step. Only the first one's watch is told of it.
        updates: how often within a step `parts_at` is asked and the optimizer moves; metrics are averaged over them, too.

    Raises:
        TrainingError: the loss or its gradient is not finite.
        TrainingStoppedError: `watch.should_stop()` said so, or the process was told to end.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _adamw(trained, plan)
    memory = {} if memory is None else memory
    progress = checkpoints.restore(model, optimizer) if checkpoints else Progress()
    memory.update(progress.memory)
    if progress.step:
        watch.resume(progress, plan)
    progress.points, progress.memory = watch.points, memory
    model.train()
    with told_to_end() as told:
        for step in range(progress.step, plan.steps):
            if ranks.any(told() or watch.should_stop()):
                if checkpoints:
                    checkpoints.save(progress, model, optimizer)
                ranks.wait()
                raise TrainingStoppedError(f"stopped before step {step + 1} of {plan.steps}; run it again to go on from there")
            rate = learning_rate_at(step, plan)
            for _ in range(updates):
                progress.recent.append(_update(trained, optimizer, plan, step, rate, parts_at(step), ranks))
            further = after(step + 1) or {}
            done = step + 1 == plan.steps or finished()
            if further or done or (step + 1) % plan.log_every == 0:
                means = {name: sum(m[name] for m in progress.recent) / len(progress.recent) for name in progress.recent[0]}
                watch.record(step + 1, plan, {**means, **further, "train/learning_rate": rate})
                progress.recent = []
            progress.step = step + 1
            if done:
                return step + 1
            if checkpoints and (step + 1) % checkpoints.every == 0:
                checkpoints.save(progress, model, optimizer)
    return plan.steps


def _adamw(parameters: list[Tensor], plan: Plan) -> torch.optim.Optimizer:
    """AdamW [Loshchilov & Hutter 2019], fused; sharded parameters form a group of their own."""
    groups: list[dict[str, Any]] = [{"params": part} for part in divided(parameters) if part]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay, fused=True)


def _update(
    trained: list[Tensor],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    step: int,
    rate: float,
    parts: Iterable[Part],
    ranks: Ranks,
) -> dict[str, float]:
    """One move of the optimizer, none where no part has a loss; its metrics."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    counted: Counter[str] = Counter()
    learnt = False
    for loss, metrics in parts:
        counted.update({"train/loss": 0.0 if loss is None else loss.item(), **metrics})
        if loss is not None:
            loss.backward()
            learnt = True
    summed = dict(zip(counted, ranks.total(list(counted.values())), strict=True))
    _refuse_unless_finite(summed["train/loss"], "loss", step, plan)
    if not ranks.any(learnt):
        return {**summed, "train/grad_norm": 0.0}
    ranks.sum_gradients(trained)
    norm = clip_gradients(trained, plan.max_grad_norm)
    _refuse_unless_finite(norm, "gradient's norm", step, plan)
    optimizer.step()
    optimizer.zero_grad()
    return {**summed, "train/grad_norm": norm}


def _refuse_unless_finite(value: float, what: str, step: int, plan: Plan) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"the {what} is {value} at step {step + 1} of {plan.steps}; lower the learning rate. Earlier checkpoints are kept"
        )


@contextlib.contextmanager
def told_to_end() -> Generator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came: the step is finished first. Only a process's main thread can ask."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        came.set()

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def learning_rate_at(step: int, plan: Plan) -> float:
    """Linear warm-up, then half a cosine to zero [Loshchilov & Hutter 2017]; step counts from 0."""
    warm = min(1.0, (step + 1) / max(1.0, plan.warmup * plan.steps))
    return plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / plan.steps))

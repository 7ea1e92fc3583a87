"""Checkpoints of a training: all that the next step depends on, so that a run killed at any moment ends in the same bits.

What a step draws follows from (seed, step), so the state is the weights that are trained, the optimizer's moments, torch's
generator, the metrics so far and the step. A checkpoint is written aside and renamed: there is a whole one or none.

    <folder>/<key>/step-00000100/state.safetensors   model.<name>, optimizer.<number>.<moment>, generator
    <folder>/<key>/step-00000100/progress.json       step, points, recent metrics, what the loop itself remembers
    <folder>/<key>/best/                              the weights to go back to, with their loss and step

The key is a hash of all that the training depends on, so a changed setting finds no checkpoint of before. Where weights are
sharded over ranks, all ranks take part and the first one writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from densityrm_core.files import temporary_folder
from densityrm_core.training.ranks import SOLO, Ranks, sharded_like, whole

Metrics = dict[str, float]

_TENSORS, _PROGRESS, _BEST = "state.safetensors", "progress.json", "best"


@dataclass
class Progress:
    """How far a training is: steps done, points recorded, metrics not yet recorded, what the loop itself remembers; all JSON."""

    step: int = 0
    points: list[tuple[int, Metrics]] = field(default_factory=list[tuple[int, Metrics]])
    recent: list[Metrics] = field(default_factory=list[Metrics])
    memory: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])


def key_of(*parts: Any) -> str:
    """A key of all that a training depends on: models by their weights, everything else by its bytes or its text."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, parameter in part.named_parameters():
                digest.update(name.encode())
                digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


class Checkpoints:
    """The last few checkpoints of one training, below `folder/key`; those of other keys in `folder` are removed."""

    def __init__(
        self,
        folder: Path,
        key: str,
        every: int = 100,
        keep: int = 2,
        say: Callable[[str], None] = print,
        ranks: Ranks = SOLO,
    ) -> None:
        """Args: key, of everything the training depends on; every, steps; keep, how many; say receives what went wrong."""
        self._parent, self._folder = folder, folder / key
        self.every, self._keep, self._say, self._ranks = every, keep, say, ranks

    def save(self, progress: Progress, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint and drop the oldest; if it cannot be written, say so and leave the earlier ones alone."""
        target = self._folder / f"step-{progress.step:08d}"
        tensors = _trained(model) | _moments(optimizer) | {"generator": torch.get_rng_state()}
        if self._ranks.first and not target.exists() and self._write(target, tensors, json.dumps(asdict(progress))):
            self._prune()

    def restore(self, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
        """Put model and optimizer where the last whole checkpoint left them; a fresh Progress if there is none."""
        for folder in sorted(self._folder.glob("step-*"), reverse=True):
            try:
                tensors = load_file(folder / _TENSORS)
                progress = Progress(**json.loads((folder / _PROGRESS).read_text(encoding="utf-8")))
                _put_moments(tensors, optimizer)
                _put_trained(tensors, model)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                self._say(f"{folder} cannot be read ({error}); trying the one before")
                continue
            torch.set_rng_state(tensors["generator"])
            progress.points = [(at, metrics) for at, metrics in progress.points]
            return progress
        return Progress()

    def save_best(self, step: int, loss: float, model: Any) -> None:
        """Keep the weights of `step` beside the checkpoints, unless those of a lower loss, or an earlier step, are there."""
        kept = self._best()
        tensors = _trained(model)
        if self._ranks.first and (kept is None or (loss, step) < kept):
            self._write(self._folder / _BEST, tensors, json.dumps({"loss": loss, "step": step}))

    def restore_best(self, model: Any) -> int | None:
        """Put the best weights into the model; the step they are from, None if none are kept."""
        kept = self._best()
        if kept is None:
            return None
        try:
            _put_trained(load_file(self._folder / _BEST / _TENSORS), model)
        except (OSError, SafetensorError, KeyError) as error:
            self._say(f"the best weights, of step {kept[1]}, cannot be read ({error}); the last ones are kept")
            return None
        return kept[1]

    def _best(self) -> tuple[float, int] | None:
        try:
            kept = json.loads((self._folder / _BEST / _PROGRESS).read_text(encoding="utf-8"))
            return float(kept["loss"]), int(kept["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, target: Path, tensors: dict[str, Tensor], progress: str) -> bool:
        """A folder of both, whole or not at all."""
        try:
            with temporary_folder(target) as staged:
                save_file(tensors, staged / _TENSORS)
                (staged / _PROGRESS).write_text(progress, encoding="utf-8")
                for file in (_TENSORS, _PROGRESS):
                    _flush(staged / file)
                shutil.rmtree(target, ignore_errors=True)
                staged.rename(target)
        except (OSError, SafetensorError) as error:
            self._say(f"{target.name} is not saved: {error}; training goes on, earlier checkpoints are kept")
            return False
        return True

    def _prune(self) -> None:
        for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        for other in self._parent.iterdir():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)


class Best:
    """The weights to go back to, of the lowest loss or simply the last that were offered: beside the checkpoints, or in memory
    where there are none."""

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        self._checkpoints = checkpoints
        self._kept: tuple[float, int] | None = None
        self._weights: dict[str, Tensor] = {}

    def offer(self, step: int, loss: float, model: Any) -> None:
        """Keep the weights of `step` if no earlier ones have as low a loss."""
        if self._checkpoints:
            self._checkpoints.save_best(step, loss, model)
        elif self._kept is None or (loss, step) < self._kept:
            self._kept, self._weights = (loss, step), {name: value.clone() for name, value in _trained(model).items()}

    def replace(self, step: int, model: Any) -> None:
        """Keep the weights of `step`, whatever was kept before: each later step is the better one."""
        self.offer(step, -float(step), model)

    def restore(self, model: Any) -> int | None:
        """Put the kept weights into the model; the step they are from, None if none are kept."""
        if self._checkpoints:
            return self._checkpoints.restore_best(model)
        if self._kept is None:
            return None
        _put_trained(self._weights, model)
        return self._kept[1]


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a training may keep its checkpoints, how often it writes one, and how many stay."""

    folder: Path
    every: int = 100
    keep: int = 2

    def of(self, key: str, say: Callable[[str], None] = print, ranks: Ranks = SOLO) -> Checkpoints:
        """The checkpoints of the training with this key."""
        return Checkpoints(self.folder, key, self.every, self.keep, say, ranks)


def _trained(model: Any) -> dict[str, Tensor]:
    """The parameters that are trained, each once however often it is tied, whole."""
    return {f"model.{name}": whole(parameter.detach()).contiguous() for name, parameter in _trainable(model)}


def _trainable(model: Any) -> Iterable[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the parameter's number, whole."""
    states = optimizer.state_dict()["state"].items()
    return {f"optimizer.{n}.{name}": whole(value).contiguous() for n, state in states for name, value in state.items()}


def _put_trained(tensors: dict[str, Tensor], model: Any) -> None:
    parameters = dict(_trainable(model))
    if missing := [name for name in parameters if f"model.{name}" not in tensors]:
        raise KeyError(f"no {min(missing)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(sharded_like(tensors[f"model.{name}"].to(parameter.device), parameter))


def _put_moments(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, moment = rest.partition(".")
            like = parameters[int(number)]
            states.setdefault(int(number), {})[moment] = sharded_like(value.to(like.device), like) if value.ndim else value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _flush(file: Path) -> None:
    with file.open("rb") as content:
        os.fsync(content.fileno())

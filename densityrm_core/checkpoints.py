"""Checkpoints of a training: all that the next step depends on, so that a run killed at any moment ends in the same bits.

What a step draws follows from (seed, step), so the state is weights, the optimizer's moments, torch's generator, the metrics so
far and the step. A checkpoint is written aside and renamed: there is a whole one or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from densityrm_core.storage import lock, temporary_name

Metrics = dict[str, float]

_TENSORS, _PROGRESS = "state.safetensors", "progress.json"


@dataclass
class Progress:
    """How far a training is: steps done, points recorded, metrics not yet recorded, and what the loop itself remembers."""

    step: int = 0
    points: list[tuple[int, Metrics]] = field(default_factory=list[tuple[int, Metrics]])
    recent: list[Metrics] = field(default_factory=list[Metrics])
    memory: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


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

    def __init__(self, folder: Path, key: str, every: int = 100, keep: int = 2, say: Callable[[str], None] = print) -> None:
        """Args: key, of everything the training depends on; every, steps; keep, how many; say receives what went wrong."""
        self._parent, self._folder = folder, folder / key
        self.every, self._keep, self._say = every, keep, say

    def save(self, progress: Progress, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint and drop the oldest; if it cannot be written, say so and leave the earlier ones alone."""
        target = self._folder / f"step-{progress.step:08d}"
        if target.exists():
            return
        staged = temporary_name(target)
        try:
            staged.mkdir(parents=True)
            held = os.open(staged, os.O_RDONLY)
            try:
                lock(held)
                save_file(_tensors(model, optimizer), staged / _TENSORS)
                (staged / _PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
                for file in (_TENSORS, _PROGRESS):
                    _flush(staged / file)
                staged.rename(target)
            finally:
                os.close(held)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            self._say(f"no checkpoint at step {progress.step}: {error}; training goes on, earlier ones are kept")
            return
        self._prune()

    def restore(self, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
        """Put model and optimizer where the last whole checkpoint left them; a fresh Progress if there is none."""
        for folder in sorted(self._folder.glob("step-*"), reverse=True):
            try:
                tensors = load_file(folder / _TENSORS)
                progress = Progress(**json.loads((folder / _PROGRESS).read_text(encoding="utf-8")))
                _put(tensors, model, optimizer)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                self._say(f"{folder} cannot be read ({error}); trying the one before")
                continue
            progress.points = [(at, metrics) for at, metrics in progress.points]
            return progress
        return Progress()

    def _prune(self) -> None:
        for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        for other in self._parent.iterdir():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)


def _tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, each once however often it is tied; the optimizer's state by the parameter's number; the generator."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return {name: value.contiguous() for name, value in tensors.items()} | {"generator": torch.get_rng_state()}


def _put(tensors: dict[str, Tensor], model: Any, optimizer: torch.optim.Optimizer) -> None:
    parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    if missing := parameters.keys() - tensors.keys():
        raise KeyError(f"no {min(missing)}")
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, moment = rest.partition(".")
            states.setdefault(int(number), {})[moment] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    torch.set_rng_state(tensors["generator"])


def _flush(file: Path) -> None:
    with file.open("rb") as content:
        os.fsync(content.fileno())

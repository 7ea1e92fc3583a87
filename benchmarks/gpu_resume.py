"""Parts of `benchmarks.gpu_check` that start processes: a training that is killed, and one that ranks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.gpu_work import Check, Figures, require
from benchmarks.killed_training import kill_and_resume, prepare
from densityrm_core.hardware import gpus
from densityrm_core.reward_models.train import RewardModelTask, train_reward_model
from densityrm_core.settings import ComputeSettings, RewardModelSettings
from densityrm_core.training.loop import Watch
from densityrm_core.training.rank_processes import on_ranks
from densityrm_core.training.ranks import Ranks, clip_gradients

_SAME = 1e-4  # gradients that are summed by ranks, in another order


def resume(check: Check) -> Figures:
    """A reward model's training that is killed with SIGKILL ends in the bytes of one that was left alone."""
    kills, steps, longest = (1, 60, 0.2) if check.small else (2, 200, 1.5)
    found = kill_and_resume(check.folder, kills, steps, 0, device="cuda" if check.cuda else "cpu", longest=longest)
    require(bool(found["identical"]), f"other bytes: {found}")
    require(found["landed"] > 0 and found["resumed"] > 0, f"no kill met the training: {found}")
    return {**found, "steps": steps}


def ranks(check: Check) -> Figures:
    """Two ranks train as one process, where there are two GPUs or none; on a single GPU every collective is asked of NCCL."""
    if check.cuda and len(gpus()) < 2:
        (heard,) = list(on_ranks(1, check.device, _ask_everything, stop=lambda: False))
        return {"ranks": 1, **heard}
    prepare(check.folder)
    alone, shared = (_train(check, size) for size in (1, 2))
    off = max(abs(alone[name] - shared[name]) for name in ("train/loss", "train/grad_norm"))
    require(off < _SAME, f"two ranks are not one: {shared} and {alone}")
    return {"ranks": 2, "off_by": off}


def _train(check: Check, size: int) -> dict[str, float]:
    pairs = pl.read_parquet(check.folder / "pairs.parquet")
    compute = ComputeSettings.model_validate({"device": check.device, "precision": "fp32", "ranks": size})
    settings = RewardModelSettings(steps=3, pairs_per_step=8, keep="last", evaluate_every=3)
    watch = Watch()
    task = RewardModelTask(check.folder / "base", pairs, np.ones(pairs.height), pairs.head(8), settings, 0, compute=compute)
    train_reward_model(task, watch)
    return watch.points[-1][1]


def _ask_everything(ranks: Ranks, say: Callable[[Any], None], stopped: Callable[[], bool]) -> None:
    """Whatever ranks ask of one another, asked by one that takes itself for one of two: sums are its own values."""
    of_two = replace(ranks, size=2)
    weight = torch.nn.Parameter(torch.ones(3, device=ranks.device))
    (weight * torch.tensor([3.0, 0.0, 4.0], device=ranks.device)).sum().backward()
    of_two.sum_gradients([weight])
    heard = {
        "total": of_two.total([1 / 3, 2.0**40 + 1]) == [1 / 3, 2.0**40 + 1],
        "any": of_two.any(True) and not of_two.any(False),
        "most": of_two.most(7) == 7,
        "norm": abs(clip_gradients([weight], 1.0) - 5) < 1e-5,
    }
    of_two.wait()
    if not all(heard.values()):
        raise RuntimeError(f"collectives are wrong: {heard}")
    say(heard)

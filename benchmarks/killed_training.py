"""A training, killed again and again at random moments, ends in the bits of one that was left alone.

A small reward model, or policy, is trained on planted pairs in a process of its own, which is killed with SIGKILL after a random
time and started again until all kills are spent and it ends. Keys: `what`, `kills`, `landed` (kills that met a running
training), `resumed` (starts that went on from a checkpoint), `identical` (weights and metrics, byte for byte).
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch

from densityrm_core.models.base_model import train_base_model
from densityrm_core.models.folders import new_reward_model, save_model
from densityrm_core.policies.grpo import PolicyTask, TrainedPolicy, train_policy
from densityrm_core.reward_models.train import RewardModelTask, TrainedRewardModel, train_reward_model
from densityrm_core.settings import (
    BaseModelSettings,
    ComputeSettings,
    GrpoSettings,
    PlantedSettings,
    RewardModelSettings,
    SourceSettings,
)
from densityrm_core.sources import Folders, read_source
from densityrm_core.training.checkpoints import CheckpointFolder
from densityrm_core.training.loop import Watch

What = Literal["reward_model", "policy"]
Device = Literal["cpu", "cuda"]
WHAT: tuple[What, ...] = ("reward_model", "policy")
_LONGEST = 6.0  # seconds that all kills together leave a training, on average


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--what", default="reward_model", choices=WHAT)
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--steps", type=int, default=120)
    arguments.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="killed_training.") as folder:
        found = kill_and_resume(Path(folder), options.kills, options.steps, options.seed, options.what, options.device)
    print(json.dumps({"what": options.what, "device": options.device, **found}))


def kill_and_resume(
    folder: Path,
    kills: int,
    steps: int,
    seed: int,
    what: What = "reward_model",
    device: Device = "cpu",
    longest: float = _LONGEST,
) -> dict[str, int | bool]:
    """Train once undisturbed and once with kills, below `folder`; what happened, see the module.

    Args:
        longest: seconds that all kills together leave the training, on average.
    """
    prepare(folder)
    undisturbed, disturbed = (Training(folder, folder / name, steps, what, device) for name in ("undisturbed", "disturbed"))
    _start(undisturbed).join()
    moments, landed = random.Random(seed), 0
    for _ in range(kills):
        run = _start(disturbed)
        while run.is_alive() and not (disturbed.out / "running").exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, longest / kills * 2))
        landed += run.is_alive()
        run.kill()
        run.join()
        (disturbed.out / "running").unlink(missing_ok=True)
    _start(disturbed).join()
    names = ("model.safetensors", "metrics.parquet")
    identical = all((undisturbed.out / name).read_bytes() == (disturbed.out / name).read_bytes() for name in names)
    resumed = len((disturbed.out / "resumed").read_text().splitlines()) if (disturbed.out / "resumed").exists() else 0
    return {"kills": kills, "landed": landed, "resumed": resumed, "identical": identical}


@dataclass(frozen=True)
class Training:
    """What a process trains: base model and pairs in `folder`, result in `out`."""

    folder: Path
    out: Path
    steps: int
    what: What = "reward_model"
    device: Device = "cpu"

    def run(self) -> None:
        torch.set_num_threads(1)
        self.out.mkdir(exist_ok=True)
        pairs = pl.read_parquet(self.folder / "pairs.parquet")
        watch = Watch(
            report=lambda *_: (self.out / "running").touch(),
            resumed=lambda step, _: self._note(step),
            folder=CheckpointFolder(self.out / "checkpoints", every=5),
        )
        trained = self._policy(pairs, watch) if self.what == "policy" else self._reward_model(pairs, watch)
        save_model(trained.model, trained.codec, self.out, {})
        watch.frame().write_parquet(self.out / "metrics.parquet")

    def _reward_model(self, pairs: pl.DataFrame, watch: Watch) -> TrainedRewardModel:
        settings = RewardModelSettings(steps=self.steps, pairs_per_step=8, evaluate_every=20)
        weights = np.random.default_rng(0).lognormal(0, 0.5, pairs.height)
        task = RewardModelTask(self.folder / "base", pairs, weights, pairs.head(64), settings, seed=0, compute=self._compute)
        return train_reward_model(task, watch)

    def _policy(self, pairs: pl.DataFrame, watch: Watch) -> TrainedPolicy:
        asked = pairs.unique("prompt_id", keep="first", maintain_order=True).with_columns(
            weight=pl.lit(1.0), decile=pl.lit(1, pl.Int8), quartile=pl.lit(1, pl.Int8)
        )
        settings = GrpoSettings(
            steps=self.steps,
            prompts_per_step=4,
            group_size=4,
            max_new_tokens=12,
            evaluate_every=10,
            learning_rate=1e-3,
            log_every=1,
        )
        task = PolicyTask(self.folder / "base", self.folder / "rm", asked, asked.head(8), settings, seed=0, compute=self._compute)
        trained = train_policy(task, watch)
        trained.completions.write_parquet(self.out / "completions.parquet")
        return trained

    @property
    def _compute(self) -> ComputeSettings:
        return ComputeSettings(device=self.device)

    def _note(self, step: int) -> None:
        with (self.out / "resumed").open("a", encoding="utf-8") as notes:
            notes.write(f"{step}\n")


def _start(training: Training) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["densityrm_core.policies.grpo"])  # only the training itself is to be met by the kills
    process = context.Process(target=training.run)
    process.start()
    return process


def prepare(folder: Path, hidden_size: int = 64, layers: int = 2) -> None:
    """Planted pairs, an untrained base model and a reward model, below `folder`."""
    folders = Folders(folder, folder / "raw", folder / "shards")
    pairs = read_source("hh_rlhf", SourceSettings(), PlantedSettings(hh_rows=600), folders).pairs.frame()
    pairs.write_parquet(folder / "pairs.parquet")
    model, codec, _ = train_base_model(pairs, BaseModelSettings(steps=0, hidden_size=hidden_size, layers=layers), Watch())
    save_model(model, codec, folder / "base", {})
    save_model(new_reward_model(folder / "base", 0), codec, folder / "rm", {})


if __name__ == "__main__":
    main()

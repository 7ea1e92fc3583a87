"""One training shared by two processes is the training of one: same curve, same weights, same checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from densityrm_core.models.base_model import train_base_model
from densityrm_core.models.folders import save_model
from densityrm_core.reward_models.train import RewardModelTask, TrainedRewardModel, train_reward_model
from densityrm_core.settings import BaseModelSettings, ComputeSettings, RewardModelSettings
from densityrm_core.training.checkpoints import CheckpointFolder
from densityrm_core.training.loop import Plan, TrainingError, TrainingStoppedError, Watch
from densityrm_core.training.rank_processes import RanksError, on_ranks
from densityrm_core.training.ranks import Ranks

SETTINGS = RewardModelSettings(steps=8, pairs_per_step=9, tokens_per_batch=120, evaluate_every=4, learning_rate=1e-3)
UNDER_TORCHRUN = """
import json, sys
from pathlib import Path
import numpy as np, polars as pl, torch
from densityrm_core.settings import ComputeSettings, RewardModelSettings
from densityrm_core.reward_models.train import RewardModelTask, train_reward_model
from densityrm_core.training.loop import Watch
torch.set_num_threads(1)
folder, settings = Path(sys.argv[1]), RewardModelSettings.model_validate_json(sys.argv[2])
pairs = pl.read_parquet(folder / "pairs.parquet")
watch = Watch()
compute = ComputeSettings(device="cpu", ranks=2)
task = RewardModelTask(folder / "base", pairs, np.arange(1.0, 121), pairs.head(20), settings, 0, compute=compute)
train_reward_model(task, watch)
if torch.distributed.get_rank() == 0:
    (folder / "points.json").write_text(json.dumps(watch.points))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(0)
    words = ["tomato", "bicycle", "violin", "teapot", "lamp"]
    rows = [
        {
            "context": [{"role": "user", "content": " ".join(rng.choice(words, 1 + i % 7))}],
            "chosen": " ".join(rng.choice(words, 1 + i % 5)),
            "rejected": "no " + " ".join(rng.choice(words, 1 + i % 3)),
        }
        for i in range(120)
    ]
    pairs = pl.DataFrame(rows)
    pairs.write_parquet(folder / "pairs.parquet")
    model, codec, _ = train_base_model(pairs, BaseModelSettings(vocab_size=300, hidden_size=32, layers=2, steps=0), Watch())
    save_model(model, codec, folder / "base", {})
    return folder


def task(folder: Path, settings: RewardModelSettings = SETTINGS, **compute: object) -> RewardModelTask:
    pairs = pl.read_parquet(folder / "pairs.parquet")
    resources = ComputeSettings.model_validate({"device": "cpu", **compute})
    return RewardModelTask(folder / "base", pairs, np.arange(1.0, 121), pairs.head(20), settings, 0, compute=resources)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[TrainedRewardModel, Watch]:
    watch = Watch()
    return train_reward_model(task(folder), watch), watch


def assert_same_curve(points: list, alone: Watch) -> None:
    assert [at for at, _ in points] == [at for at, _ in alone.points]
    for (_, ours), (_, theirs) in zip(points, alone.points, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.takes("ranks=gloo", "device=cpu")
def test_two_ranks_train_as_one(folder: Path, alone: tuple[TrainedRewardModel, Watch]):
    shared = Watch()
    trained = train_reward_model(task(folder, ranks=2), shared)
    assert_same_curve(shared.points, alone[1])
    assert weights(trained.model).numpy() == pytest.approx(weights(alone[0].model).numpy(), abs=1e-4)
    assert trained.step == alone[0].step


class LeaveError(Exception):
    pass


def test_two_ranks_of_sharded_weights_go_on_after_a_kill_and_train_as_one(
    folder: Path, alone: tuple[TrainedRewardModel, Watch], tmp_path: Path
):
    def leave(step: int, plan: Plan, metrics: dict[str, float]) -> None:
        raise LeaveError  # the ranks are killed then

    from_step: list[int] = []
    with pytest.raises(LeaveError):
        train_reward_model(task(folder, ranks=2, shard=True), Watch(report=leave, folder=CheckpointFolder(tmp_path, every=2)))
    watch = Watch(resumed=lambda step, plan: from_step.append(step), folder=CheckpointFolder(tmp_path, every=2))
    trained = train_reward_model(task(folder, ranks=2, shard=True), watch)
    assert from_step and from_step[0] >= 2
    assert_same_curve(watch.points, alone[1])
    assert weights(trained.model).numpy() == pytest.approx(weights(alone[0].model).numpy(), abs=1e-4)


def test_ranks_told_to_stop_save_first(folder: Path, tmp_path: Path):
    watch = Watch(folder=CheckpointFolder(tmp_path), should_stop=lambda: True)
    with pytest.raises(TrainingStoppedError, match="run it again to go on"):
        train_reward_model(task(folder, SETTINGS.model_copy(update={"steps": 100_000}), ranks=2), watch)
    assert list(tmp_path.rglob("step-*"))


def test_torchrun_trains_as_one_process_does(folder: Path, alone: tuple[TrainedRewardModel, Watch]):
    (folder / "program.py").write_text(UNDER_TORCHRUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    subprocess.run([*launch, folder / "program.py", folder, SETTINGS.model_dump_json()], check=True, timeout=120)  # noqa: S603  ours
    points = [(at, metrics) for at, metrics in json.loads((folder / "points.json").read_text())]
    assert_same_curve(points, alone[1])


def test_what_a_rank_raises_is_raised_here(folder: Path):
    reckless = SETTINGS.model_copy(update={"learning_rate": 1.0, "max_grad_norm": 1e30, "center_rewards": 1e38})
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train_reward_model(task(folder, reckless, ranks=2), Watch())


def _dies(ranks: Ranks, say: object, stopped: object) -> None:
    import os
    import signal

    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_ends_the_training_with_a_message():
    with pytest.raises(RanksError, match=r"\[.*-9.*\]: one was killed"):
        list(on_ranks(2, "cpu", _dies, stop=lambda: False))

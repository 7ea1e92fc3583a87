"""A training that was stopped, killed or short of disk ends in the bits of one that was left alone."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.killed_training import kill_and_resume
from densityrm_core.training.checkpoints import Checkpoints, key_of
from densityrm_core.training.loop import Plan, TrainingError, TrainingStoppedError, Watch, optimize

PLAN = Plan(25, 4, 1e-2, weight_decay=0.05, log_every=4)


def train(checkpoints: Checkpoints | None = None, stop_at: int = -1, broken_at: int = -1, pause: float = 0.0):
    """Weights and metrics of a small training whose loop remembers, and whose every step draws from torch's generator."""
    torch.manual_seed(0)
    model, watch, memory, seen = torch.nn.Linear(6, 1), Watch(), {"losses": list[float]()}, []
    watch.should_stop = lambda: len(seen) == stop_at

    def parts_at(step: int):
        seen.append(step)
        time.sleep(pause)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)) + 0.1 * torch.randn(8, 6)
        loss = ((model(x)[:, 0] - x.sum(1)) ** 2).mean() * (float("nan") if step == broken_at else 1)
        memory["losses"].append(loss.item())
        return [(loss, {"remembered": float(sum(memory["losses"]))})]

    optimize(model, PLAN, watch, parts_at, checkpoints=checkpoints, memory=memory)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), watch.frame()


def assert_same(one, other) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].equals(other[1])


@pytest.mark.parametrize("stop_at", [1, 6, 7, 24])
def test_a_stopped_run_goes_on_where_it_stopped(stop_at: int, tmp_path: Path):
    with pytest.raises(TrainingStoppedError):
        train(Checkpoints(tmp_path, "key", every=5), stop_at)
    assert_same(train(Checkpoints(tmp_path, "key", every=5)), train())


def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path):
    """SIGKILL twice, after a new checkpoint each time, then to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([kill_and_resume.__module__])
    for _ in range(2):
        before = set(tmp_path.rglob("step-*"))
        run = context.Process(target=train, args=(Checkpoints(tmp_path, "key", every=3), -1, -1, 0.05))
        run.start()
        while set(tmp_path.rglob("step-*")) <= before and run.is_alive():
            time.sleep(0.01)
        run.kill()
        run.join()
    assert set(tmp_path.rglob("step-*"))
    assert_same(train(Checkpoints(tmp_path, "key", every=3)), train())


def test_a_run_told_to_end_saves_first(tmp_path: Path):
    model, handler = torch.nn.Linear(1, 1), signal.getsignal(signal.SIGTERM)

    def parts_at(step: int):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return [((model.weight**2).sum(), {})]

    with pytest.raises(TrainingStoppedError, match="before step 8"):
        optimize(model, PLAN, Watch(), parts_at, checkpoints=Checkpoints(tmp_path, "key"))
    assert [folder.name for folder in tmp_path.rglob("step-*")] == ["step-00000007"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_the_last_few_are_kept_and_those_of_another_training_removed(tmp_path: Path):
    train(Checkpoints(tmp_path, "other", every=5))
    train(Checkpoints(tmp_path, "key", every=5, keep=2))
    found = sorted(str(folder.relative_to(tmp_path)) for folder in tmp_path.rglob("step-*"))
    assert found == ["key/step-00000015", "key/step-00000020"]


def test_a_broken_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path):
    said: list[str] = []
    train(Checkpoints(tmp_path, "key", every=5))
    broken = tmp_path / "key" / "step-00000020" / "state.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    assert_same(train(Checkpoints(tmp_path, "key", every=5, say=said.append)), train())
    assert "trying the one before" in said[0]


def test_a_loss_that_is_not_finite_leaves_the_checkpoints_of_before(tmp_path: Path):
    with pytest.raises(TrainingError, match="step 13 of 25"):
        train(Checkpoints(tmp_path, "key", every=5), broken_at=12)
    assert_same(train(Checkpoints(tmp_path, "key", every=5)), train())


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingStoppedError):
        train(Checkpoints(tmp_path, "key", every=5), stop_at=7)
    monkeypatch.setattr("densityrm_core.training.checkpoints.save_file", full)
    assert_same(train(Checkpoints(tmp_path, "key", every=5, say=said.append)), train())
    assert "No space left on device; training goes on" in said[0]
    assert sorted(folder.name for folder in (tmp_path / "key").iterdir()) == ["step-00000005", "step-00000007"]


def test_a_reward_model_killed_twice_is_the_one_that_was_not(tmp_path: Path):
    found = kill_and_resume(tmp_path, kills=2, steps=60, seed=1)
    assert found["resumed"] >= 1
    assert found["identical"]


def test_a_training_from_other_weights_is_another_training():
    first, same, other = (torch.nn.Linear(3, 1) for _ in range(3))
    same.load_state_dict(first.state_dict())
    assert key_of(first, "settings") == key_of(same, "settings")
    assert len({key_of(first, "settings"), key_of(other, "settings"), key_of(first, "others")}) == 3

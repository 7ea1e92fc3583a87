"""A policy's training that is killed in the middle of something goes on to the same bits."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.killed_training import Training, prepare

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model, reward model and pairs, and the training that was left alone."""
    folder = tmp_path_factory.mktemp("killed")
    prepare(folder)
    assert in_a_process(Training(folder, folder / "undisturbed", STEPS, "policy").run) == 0
    return folder


def in_a_process(work: Callable[..., None], *arguments: Any) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["densityrm_core.policies.grpo"])
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def killed(training: Training, moment: str) -> None:
    """Train, and be killed in the middle of `moment`."""
    from densityrm_core.policies import rollout
    from densityrm_core.training import checkpoints

    def die_at(call: int, whole: Callable[..., Any], first: bool = True) -> Callable[..., Any]:
        calls = iter(range(1, 10**9))

        def counted(*arguments: Any, **named: Any) -> Any:
            dying = next(calls) == call
            if dying and first:
                os.kill(os.getpid(), signal.SIGKILL)
            done = whole(*arguments, **named)
            if dying:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return counted

    if moment == "generation":
        rollout.choose = die_at(12 * 8 + 5, rollout.choose)
    elif moment == "update":
        hooked = die_at(8, lambda *_: None)
        register_optimizer_step_post_hook(hooked)
    else:
        checkpoints.save_file = die_at(2, checkpoints.save_file, first=False)
    training.run()


@pytest.mark.parametrize("moment", ["generation", "update", "saving"])
def test_killed_in_the_middle_it_ends_in_the_same_bits(folder: Path, moment: str):
    training = Training(folder, folder / moment, STEPS, "policy")
    assert in_a_process(killed, training, moment) == -signal.SIGKILL
    assert not (training.out / "model.safetensors").exists()
    assert in_a_process(training.run) == 0
    for name in ("model.safetensors", "metrics.parquet", "completions.parquet"):
        assert (training.out / name).read_bytes() == (folder / "undisturbed" / name).read_bytes(), name
    assert (training.out / "resumed").read_text().split() == ["5"]

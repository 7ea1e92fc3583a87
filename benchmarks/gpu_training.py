"""Parts of `benchmarks.gpu_check` that train reward models: precision, attention, compilation, memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import polars as pl
import torch
from torch._dynamo.utils import counters

from benchmarks.gpu_work import (
    ARCHITECTURES,
    Check,
    Figures,
    gap,
    gradient,
    language_model,
    padded_rows,
    random_pairs,
    require,
    require_packed,
    reward_model,
    seconds,
    sized_config,
)
from benchmarks.killed_training import prepare
from benchmarks.measure import memory, reset_peak
from densityrm_core.models.attention import attention_kernel
from densityrm_core.models.likelihood import log_probs
from densityrm_core.models.packing import pack, rewards, tokens_of
from densityrm_core.reward_models.loss import bradley_terry_loss
from densityrm_core.reward_models.train import RewardModelTask, train_reward_model
from densityrm_core.settings import ComputeSettings, RewardModelSettings
from densityrm_core.training.loop import Watch
from densityrm_core.training.precision import Precision, computing

SAME = 1e-4  # relative: float32 on two devices, each summing in its own order, without TF32
_LATE = 4  # graphs that the later half of the shapes may compile: a side of just 128, or whole and narrowed layers in turn
_BF16 = 0.1  # relative error of a gradient that bfloat16 may make at most
_AS_PADDED = 1.5  # times the padded computation's error that ours may have


class _Step:
    """A step of a reward model on packed rows, or on padded ones as anybody would write it."""

    def __init__(self, check: Check) -> None:
        small, config = check.small, sized_config(check)
        self.groups = random_pairs(4 if small else 32, 40 if small else 300, 20 if small else 150, 0, config.vocab_size)
        self.model, self._device = reward_model(config, check.device), check.device
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        require_packed(self.model)

    def loss(self, packed: bool, precision: Precision) -> torch.Tensor:
        with computing(precision, self._device):
            if packed:
                given = rewards(self.model, pack(self.groups, self._device))
            else:
                ids, mask = padded_rows(self.groups, self._device)
                given = self.model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()
        return bradley_terry_loss(*given.view(-1, 2).unbind(1))

    def run(self, packed: bool, precision: Precision = "bf16") -> None:
        self.loss(packed, precision).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def bf16(check: Check) -> Figures:
    """Packed bfloat16 is as near to float32 as padded bfloat16 is; what a step of each takes."""
    step = _Step(check)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, packed, precision in (("fp32", True, "fp32"), ("padded_fp32", False, "fp32"), *_BOTH):
        loss = step.loss(packed, precision)
        found[name] = loss.detach(), gradient(step.model, loss)
    error = {name: gap(grads, found["fp32"][1]) for name, (_, grads) in found.items() if name != "fp32"}
    require(error["padded_fp32"] < SAME, f"float32: packed and padded gradients differ by {error['padded_fp32']:.1g}")
    worst = min(_BF16, _AS_PADDED * error["padded_bf16"] + 1e-3)
    require(error["packed_bf16"] <= worst, f"bfloat16: gradient errors {error}")
    took = {name: seconds(check, lambda p=packed: step.run(p), 2 if check.small else 8, 1) for name, packed, _ in _BOTH}
    pairs, tokens = len(step.groups), sum(map(tokens_of, step.groups))
    return {
        "loss": {name: float(loss) for name, (loss, _) in found.items()},
        "gradient_error": error,
        "step_s": took,
        "pairs_per_s": {name: round(pairs / each, 1) for name, each in took.items()},
        "tokens_per_s": round(tokens / took["packed_bf16"]),
        "padded_seconds_of_ours": round(took["padded_bf16"] / took["packed_bf16"], 2),
    }


_BOTH: tuple[tuple[str, bool, Precision], ...] = (("packed_bf16", True, "bf16"), ("padded_bf16", False, "bf16"))


def flex(check: Check) -> Figures:
    """FlexAttention, forth and back in float32, computes what spans do on the CPU, and does not recompile without end."""
    torch.set_float32_matmul_precision("highest")  # FlexAttention's kernels read this too: no TF32
    kernel, given = "flex" if check.cuda else "flex_eager", random_pairs(6, 90, 120, 1)
    error: dict[str, dict[str, float]] = {}
    for name, config in list(ARCHITECTURES.items())[: 1 if check.small else None]:  # tests/core/models/test_packing.py has all
        with attention_kernel("spans"):
            expected = _results(config, given, "cpu")
        with attention_kernel(kernel):
            found = _results(config, given, check.device)
        error[name] = {what: gap(found[what], expected[what]) for what in expected}
        worst = max(error[name].values())
        require(worst < SAME, f"{name}: {kernel} on {check.device} and spans on the CPU differ: {error[name]}")
    return {"kernel": kernel, "tolerance": SAME, "error": error, **_shapes(check, kernel)}


def _results(config: Any, given: Any, device: str) -> dict[str, torch.Tensor]:
    scorer, policy, batch = reward_model(config, device), language_model(config, device), pack(given, device)
    require_packed(scorer)
    require_packed(policy)
    scored = rewards(scorer, batch)
    loss, likely = bradley_terry_loss(*scored.view(-1, 2).unbind(1)), log_probs(policy, batch)
    return {
        "rewards": scored.detach(),
        "loss": loss.detach(),
        "log_probs": likely.detach(),
        "reward_gradient": gradient(scorer, loss),
        "likelihood_gradient": gradient(policy, likely.mean()),
    }


def _shapes(check: Check, kernel: Any) -> Figures:
    """Batches of ever other shapes, rewards and gradients right in each; graphs of the second half of them were all known."""
    count = 2 if check.small else 24
    config = ARCHITECTURES["qwen3"]
    plain, model = reward_model(config), reward_model(config, check.device)
    graphs, started, worst = [counters["stats"]["unique_graphs"]], time.perf_counter(), 0.0
    for number in range(count):
        given = random_pairs(1 + 3 * number % 17, 20 + 37 * number % 300, 10 + 53 * number % 200, number)
        with attention_kernel("spans"):
            expected = rewards(plain, pack(given))
            of_expected = gradient(plain, expected.square().mean())
        with attention_kernel(kernel):
            require_packed(model)
            found = rewards(model, pack(given, check.device))
            of_found = gradient(model, found.square().mean())
        worst = max(worst, gap(found, expected), gap(of_found, of_expected))
        graphs.append(counters["stats"]["unique_graphs"])
    require(worst < SAME, f"of {count} batches of different shapes one is off by {worst:.1g}")
    compiled, late = graphs[-1], graphs[-1] - graphs[count // 2]
    require(not check.cuda or compiled > 0, "nothing was compiled")
    require(not check.cuda or late <= _LATE, f"batches {count // 2 + 1} to {count} compiled {late} further graphs: {graphs}")
    return {"shapes": count, "shapes_error": worst, "graphs": compiled, "shapes_s": round(time.perf_counter() - started, 2)}


def compiled(check: Check) -> Figures:
    """torch.compile of the layers leaves the losses as they are; what it takes and what it saves.

    Small, it is left out: on a CPU it takes half a minute, and tests/core/training/test_training_stack.py has it.
    """
    if check.small:
        return {"skipped": "small"}
    prepare(check.folder, 576, 6)
    pairs = pl.read_parquet(check.folder / "pairs.parquet")
    settings = RewardModelSettings(steps=30, pairs_per_step=32, evaluate_every=10, learning_rate=1e-4)
    losses: dict[str, list[float]] = {}
    figures: Figures = {}
    for name in ("off", "on"):
        marks: list[float] = []
        compute = ComputeSettings(device=check.device, compile=name == "on")
        watch = Watch(should_stop=lambda marks=marks: bool(marks.append(time.perf_counter())))
        task = RewardModelTask(check.folder / "base", pairs, np.ones(pairs.height), pairs.head(64), settings, 0, compute=compute)
        train_reward_model(task, watch)
        losses[name] = [metrics["train/loss"] for _, metrics in watch.points]
        took = np.diff(marks)
        figures[name] = {"step_s": float(np.median(took[10:])), "first_step_s": float(took[0]), "losses": losses[name]}
    difference = float(np.abs(np.subtract(losses["off"], losses["on"])).max())
    require(difference < 0.02, f"losses differ by {difference:.1g}: {losses}")
    figures["compile_s"] = round(figures["on"]["first_step_s"] - figures["off"]["first_step_s"], 2)
    return {**figures, "loss_difference": difference, "ratio": round(figures["off"]["step_s"] / figures["on"]["step_s"], 2)}


def memory_of_a_step(check: Check) -> Figures:
    """Peak of a bfloat16 step beyond weights, gradients and moments, packed and padded, in MiB."""
    step, peak = _Step(check), dict[str, float]()
    for name, packed, _ in _BOTH:
        step.run(packed)
        if check.cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            before = reset_peak()
        step.run(packed)
        after = torch.cuda.max_memory_allocated() if check.cuda else memory("VmHWM")
        peak[name] = round((after - before) / 2**20, 1)
    return {"peak_mib": peak, "of": "torch.cuda.max_memory_allocated" if check.cuda else "VmHWM"}

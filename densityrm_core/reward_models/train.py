"""Reward models: Bradley-Terry training on sampled pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from densityrm_core.choices import take
from densityrm_core.hardware import pick_device
from densityrm_core.models.attention import attention_kernel, resolve_kernel
from densityrm_core.models.folders import load_codec, load_reward_model, new_reward_model, precision_of, save_model
from densityrm_core.models.packing import pack, rewards, say_if_padded, split_by_tokens
from densityrm_core.models.tokens import Codec
from densityrm_core.reward_models.adaptation import adapt
from densityrm_core.reward_models.loss import Targets, bradley_terry_loss, centering_penalty, correctness, targets_of
from densityrm_core.reward_models.scoring import PreferenceTokens, score_pairs, tokenize_pairs
from densityrm_core.sampling import make_sampler
from densityrm_core.settings import ComputeSettings, RewardModelSettings, SamplingSettings
from densityrm_core.streams import stream_seed
from densityrm_core.training.checkpoints import Best, key_of
from densityrm_core.training.loop import Part, Plan, Watch, optimize, told_to_end
from densityrm_core.training.precision import Precision, computing
from densityrm_core.training.rank_processes import on_ranks
from densityrm_core.training.ranks import Ranks, join

WATCHED_PAIRS = 512  # of the validation split, on which a training is watched


@dataclass(frozen=True)
class RewardModelTask:
    """What a reward model is trained on. Two of them differ in nothing but `weights`.

    Args:
        base: folder of the base model.
        pairs, validation: tables.PREFERENCE_PAIRS, the training and the validation split.
        weights: sampling weight of every training pair, (pairs,), any scale.
        seed: decides the head's initial weights and the order of the pairs.
        sampling: how pairs are drawn by their weights.
        compute: device, precision and ranks.
    """

    base: Path
    pairs: pl.DataFrame
    weights: npt.NDArray[np.float64]
    validation: pl.DataFrame
    settings: RewardModelSettings
    seed: int
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


@dataclass(frozen=True)
class TrainedRewardModel:
    """A reward model, the step its weights are from, and what was measured there on the validation split."""

    model: Any
    codec: Codec
    step: int
    metrics: dict[str, float]
    precision: Precision

    @property
    def card(self) -> dict[str, Any]:
        """What its folder says of it: the step of its weights, the precision they were trained in, and the scale of their rewards
        if there was a validation split."""
        names = {"reward_mean": "eval/reward_mean", "reward_std": "eval/reward_std"}
        scale = {name: self.metrics[metric] for name, metric in names.items() if metric in self.metrics}
        return {"step": self.step, "precision": self.precision, **scale}


def train_reward_model(task: RewardModelTask, watch: Watch) -> TrainedRewardModel:
    """A reward model started from the base model's weights.

    With `compute.ranks` above 1 the steps are shared by as many processes of this machine; under torchrun, by those that it
    started, each of which calls this with the same task.
    """
    device = pick_device(task.compute.device)
    ranks = join(device)
    if task.compute.ranks == 1 or ranks.size > 1:
        if ranks.size == 1:
            take("ranks", "alone")
        return _train(task, watch, ranks)
    precision = precision_of(task.base, task.compute, device)
    with TemporaryDirectory(prefix="densityrm.") as out, told_to_end() as told:
        where = Path(out)
        heard = on_ranks(
            task.compute.ranks, device, _train_and_save, task, watch.folder, where, stop=lambda: told() or watch.should_stop()
        )
        step, metrics = _pass_on(heard, watch)
        return TrainedRewardModel(load_reward_model(where, device), load_codec(where), step, metrics, precision)


def _train(task: RewardModelTask, watch: Watch, ranks: Ranks) -> TrainedRewardModel:
    with attention_kernel(task.compute.attention):
        return _train_here(task, watch, ranks, precision_of(task.base, task.compute, ranks.device))


def _train_here(task: RewardModelTask, watch: Watch, ranks: Ranks, precision: Precision) -> TrainedRewardModel:
    settings = task.settings
    codec = load_codec(task.base)
    model = new_reward_model(task.base, task.seed, ranks.device)
    say_if_padded(model, watch.say)
    targets = targets_of(task.pairs, task.weights, settings)
    train, held_out = tokenize_pairs(task.pairs, codec), tokenize_pairs(task.validation.head(WATCHED_PAIRS), codec)
    key = key_of(model, precision, resolve_kernel(ranks.device), *_identity(task, targets, train, held_out))
    plain = adapt(model, settings, task.compute, task.seed, ranks)
    sampler = make_sampler(task.weights, stream_seed(task.seed, "reward model", "pairs"), task.sampling)
    checkpoints = watch.checkpoints(key, ranks)
    best = Best(checkpoints)

    def parts_at(step: int) -> Iterator[Part]:
        drawn = sampler.batch(step, settings.pairs_per_step, ranks.rank, ranks.size)
        for batch in batches_of(train, drawn, settings.tokens_per_batch, ranks):
            yield preference_loss(model, batch, targets, settings, precision)

    def after(step: int) -> dict[str, float] | None:
        if not held_out or (step % settings.evaluate_every and step != settings.steps):
            return None
        with computing(precision, ranks.device):
            metrics = _evaluate(model, held_out)
        if settings.keep == "best":
            best.offer(step, metrics["eval/loss"], model)
        return metrics

    steps = optimize(model, _plan(settings), watch, parts_at, after, checkpoints=checkpoints, ranks=ranks)
    step = (best.restore(model) if settings.keep == "best" else None) or steps
    metrics = dict(watch.points).get(step * settings.pairs_per_step, {})
    evaluated = {name: value for name, value in metrics.items() if name.startswith("eval/")}
    return TrainedRewardModel(plain(), codec, step, evaluated, precision)


@dataclass(frozen=True)
class Batch:
    """Pairs that are computed together: their numbers, their tokens, and their share of the step's pairs."""

    numbers: npt.NDArray[np.int64]
    pairs: Sequence[PreferenceTokens]
    share: float


def batches_of(train: list[PreferenceTokens], drawn: npt.NDArray[np.int64], most: int, ranks: Ranks) -> list[Batch]:
    """A rank's pairs in batches of at most `most` tokens; as many for every rank, the last ones perhaps without a share."""
    step = len(drawn) if ranks.size == 1 else round(ranks.total([len(drawn)])[0])
    groups = [train[i].group for i in drawn]
    batches = [
        Batch(drawn[part], [train[i] for i in drawn[part]], len(part) / step)
        for part in map(np.array, split_by_tokens(groups, most))
    ]
    idle = ranks.most(len(batches)) - len(batches)
    return batches + [Batch(drawn[:1], [train[drawn[0]]], 0.0)] * idle


def preference_loss(
    model: Any, batch: Batch, targets: Targets, settings: RewardModelSettings, precision: Precision
) -> tuple[Tensor, dict[str, float]]:
    """What these pairs add to the mean over the step's pairs."""
    with computing(precision, str(model.device)):
        chosen, rejected = rewards(model, pack([pair.group for pair in batch.pairs], model.device)).view(-1, 2).unbind(1)
    asked = targets.of(batch.numbers, chosen.device)
    loss = bradley_terry_loss(chosen, rejected, **asked)
    loss = loss + settings.center_rewards * centering_penalty(chosen, rejected, asked["weight"])
    lead = (chosen - rejected).detach()
    metrics = {"train/accuracy": correctness(lead).mean().item(), "train/margin": lead.mean().item()}
    return batch.share * loss, {name: batch.share * value for name, value in metrics.items()}


def _evaluate(model: Any, held_out: Sequence[PreferenceTokens]) -> dict[str, float]:
    chosen, rejected = score_pairs(model, held_out)
    lead = chosen - rejected
    every = torch.cat([chosen, rejected])
    return {
        "eval/accuracy": correctness(lead).mean().item(),
        "eval/loss": bradley_terry_loss(chosen, rejected).item(),
        "eval/margin": lead.mean().item(),
        "eval/reward_mean": every.mean().item(),
        "eval/reward_std": every.std().item(),
    }


def _plan(settings: RewardModelSettings) -> Plan:
    return Plan(
        settings.steps,
        settings.pairs_per_step,
        settings.learning_rate,
        settings.warmup,
        settings.weight_decay,
        settings.max_grad_norm,
    )


def _identity(task: RewardModelTask, targets: Targets, *pairs: Sequence[PreferenceTokens]) -> Iterator[str | bytes]:
    """All that a training depends on beside its first weights."""
    yield task.settings.model_dump_json() + task.sampling.model_dump_json()
    yield task.compute.model_dump_json(include={"compile", "ranks", "shard"}) + str(task.seed)
    yield task.weights.tobytes()
    yield from (target.numpy().tobytes() for target in (targets.margin, targets.label, targets.weight))
    yield from (str(pair) for part in pairs for pair in part)


def _train_and_save(
    ranks: Ranks, say: Callable[[Any], None], stopped: Callable[[], bool], task: RewardModelTask, folder: Any, out: Path
) -> None:
    """The work of one rank; the first one says what the watch is to be told."""

    watch = Watch(should_stop=stopped, say=lambda text: say(("say", text)), folder=folder)
    if ranks.first:
        watch.report = lambda step, plan, metrics: say(("report", step, plan, metrics))
        watch.resumed = lambda step, plan: say(("resumed", step, plan))
    trained = _train(task, watch, ranks)
    save_model(trained.model, trained.codec, out, {}, ranks)
    if ranks.first:
        say(("done", trained.step, trained.metrics))


def _pass_on(heard: Iterable[tuple[Any, ...]], watch: Watch) -> tuple[int, dict[str, float]]:
    """Tell the watch what the ranks say; the step and metrics they ended with."""
    ended: tuple[int, dict[str, float]] = (0, {})
    for kind, *said in heard:
        if kind == "report":
            watch.record(*said)
        elif kind == "resumed":
            watch.resumed(*said)
        elif kind == "say":
            watch.say(*said)
        else:
            ended = said[0], said[1]
    return ended

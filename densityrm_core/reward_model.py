"""Reward models: Bradley-Terry training on sampled pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from densityrm_core.checkpoints import key_of
from densityrm_core.experiment import RewardModelSettings, SamplingSettings
from densityrm_core.losses import bradley_terry_loss, correctness
from densityrm_core.models import load_codec, new_reward_model
from densityrm_core.packing import Group, pack, rewards, split_by_tokens
from densityrm_core.sampling import make_sampler
from densityrm_core.scoring import score_pairs, tokenize_pairs
from densityrm_core.streams import stream_seed
from densityrm_core.tokens import Codec
from densityrm_core.training import Part, Plan, Watch, optimize

_MAX_VALIDATION_PAIRS = 512


def train_reward_model(
    base: Path,
    pairs: pl.DataFrame,
    weights: npt.NDArray[np.float64],
    validation: pl.DataFrame,
    settings: RewardModelSettings,
    seed: int,
    watch: Watch,
    device: str = "cpu",
    sampling: SamplingSettings = SamplingSettings(),
) -> tuple[Any, Codec]:
    """A reward model started from the base model's weights. Two of them differ in nothing but `weights`.

    Args:
        base: folder of the base model.
        pairs, validation: tables.PREFERENCE_PAIRS, the training and the validation split.
        weights: sampling weight of every training pair, (pairs,), any scale.
        seed: decides the head's initial weights and the order of the pairs.
        sampling: how pairs are drawn by their weights.
    """
    codec = load_codec(base)
    model = new_reward_model(base, seed, device)
    train, held_out = tokenize_pairs(pairs, codec), tokenize_pairs(validation.head(_MAX_VALIDATION_PAIRS), codec)
    sampler = make_sampler(weights, stream_seed(seed, "reward model", "pairs"), sampling)

    def parts_at(step: int) -> Iterator[Part]:
        batch = [train[i].group for i in sampler.batch(step, settings.pairs_per_step)]
        for part in split_by_tokens(batch, settings.tokens_per_batch):
            yield _loss(model, [batch[i] for i in part], settings)

    def after(step: int) -> dict[str, float] | None:
        if not held_out or (step % settings.evaluate_every and step != settings.steps):
            return None
        chosen, rejected = score_pairs(model, held_out)
        margin = chosen - rejected
        loss = torch.nn.functional.softplus(-margin).mean().item()
        return {"eval/accuracy": correctness(margin).mean().item(), "eval/loss": loss, "eval/margin": margin.mean().item()}

    plan = Plan(
        settings.steps,
        settings.pairs_per_step,
        settings.learning_rate,
        settings.warmup,
        settings.weight_decay,
        settings.max_grad_norm,
    )
    key = key_of(
        model, settings.model_dump_json(), sampling.model_dump_json(), seed, str(train), str(held_out), weights.tobytes()
    )
    optimize(model, plan, watch, parts_at, after, checkpoints=watch.checkpoints(key))
    return model, codec


def _loss(model: Any, pairs: Sequence[Group], settings: RewardModelSettings) -> Part:
    """What these pairs add to the mean over the step's pairs."""
    chosen, rejected = rewards(model, pack(pairs, model.device)).view(-1, 2).unbind(1)
    margin = (chosen - rejected).detach()
    loss = bradley_terry_loss(chosen, rejected) + settings.center_rewards * ((chosen + rejected) ** 2).mean()
    share = len(pairs) / settings.pairs_per_step
    metrics = {"train/accuracy": correctness(margin).mean().item(), "train/margin": margin.mean().item()}
    return share * loss, {name: share * value for name, value in metrics.items()}

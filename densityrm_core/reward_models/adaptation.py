"""Which weights of a model are trained, and how its layers compute: freezing, LoRA, checkpointing, compilation, sharding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from densityrm_core.choices import take
from densityrm_core.models.attention import packed_attention
from densityrm_core.models.folders import ModelError
from densityrm_core.models.packing import backbone_of, decoder_layers, why_padded
from densityrm_core.settings import ComputeSettings, RewardModelSettings
from densityrm_core.streams import stream_seed
from densityrm_core.training.ranks import Ranks, shard


def adapt(model: Any, settings: RewardModelSettings, compute: ComputeSettings, seed: int, ranks: Ranks) -> Callable[[], Any]:
    """Make `model` ready to be trained as the settings say; returns what gives the plain model back when it is trained.

    Raises:
        ModelError: the model has fewer layers than are to be frozen, its layers are needed and cannot be told, or `peft` is
            needed and not installed.
    """
    finish = _add_lora(model, settings, seed) if settings.lora_rank else lambda: model
    if settings.frozen_layers:
        _freeze(model, settings.frozen_layers)
    if compute.gradient_checkpointing:
        _recompute_activations(model)
    if compute.shard and ranks.size > 1:
        shard(backbone_of(model), _layers(model), ranks)
    if take("compile", "on" if compute.compile else "off") == "on":
        for layer in _layers(model):
            layer.compile(dynamic=True)
    return finish


def _layers(model: Any) -> nn.ModuleList:
    layers = decoder_layers(model)
    if layers is None:
        raise ModelError(
            f"the layers of a {model.config.model_type} model cannot be told: set frozen_layers and lora_rank to 0, "
            "compile and shard to false"
        )
    return layers


def _recompute_activations(model: Any) -> None:
    """Keep only what enters a layer; the backward pass computes the rest again, attending to packed rows as the forward pass."""
    padded = bool(why_padded(model))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if padded else packed_attention(model, backbone_of(model))

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def _freeze(model: Any, count: int) -> None:
    layers = _layers(model)
    if count > len(layers):
        raise ModelError(f"reward_model.frozen_layers is {count}, but the model has {len(layers)} layers")
    backbone = backbone_of(model)
    embeddings = [module for module in backbone.children() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *layers[:count]):
        module.requires_grad_(False)


def _add_lora(model: Any, settings: RewardModelSettings, seed: int) -> Callable[[], Any]:
    """Low-rank updates beside every linear map of the layers [Hu et al. 2021, eq. 3]; the head is trained whole."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("reward_model.lora_rank needs the package peft: pip install 'densityrm[lora]'") from None
    kinds = (nn.Linear, _conv1d())
    names = {
        name.rpartition(".")[2] for layer in _layers(model) for name, module in layer.named_modules() if isinstance(module, kinds)
    }
    torch.manual_seed(stream_seed(seed, "reward model", "lora"))
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=sorted(names), lora_dropout=0.0)
    wrapped = get_peft_model(model, config)
    model.score.requires_grad_(True)
    return wrapped.merge_and_unload


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D

"""Which weights of a model are trained, and how its layers compute: freezing, LoRA, checkpointing, compilation, sharding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from densityrm_core.attention import packed_attention
from densityrm_core.experiment import ComputeSettings, RewardModelSettings
from densityrm_core.models import ModelError
from densityrm_core.packing import backbone_of, why_padded
from densityrm_core.ranks import Ranks, shard
from densityrm_core.streams import stream_seed


def adapt(model: Any, settings: RewardModelSettings, compute: ComputeSettings, seed: int, ranks: Ranks) -> Callable[[], Any]:
    """Make `model` ready to be trained as the settings say; returns what gives the plain model back when it is trained.

    Raises:
        ModelError: the model has fewer layers than are to be frozen, or `peft` is needed and not installed.
    """
    layers = decoder_layers(model)
    finish = _add_lora(model, layers, settings, seed) if settings.lora_rank else lambda: model
    if settings.frozen_layers:
        _freeze(model, layers, settings.frozen_layers)
    if compute.gradient_checkpointing:
        _recompute_activations(model)
    if compute.shard and ranks.size > 1:
        shard(backbone_of(model), layers, ranks)
    if compute.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    return finish


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a Hugging Face model, lowest first. Raises ModelError if they cannot be told."""
    count = model.config.get_text_config().num_hidden_layers
    for module in backbone_of(model).children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"the layers of a {model.config.model_type} model cannot be told: it has no list of {count} modules")


def _recompute_activations(model: Any) -> None:
    """Keep only what enters a layer; the backward pass computes the rest again, attending to packed rows as the forward pass."""
    padded = bool(why_padded(model))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if padded else packed_attention(model, backbone_of(model))

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def _freeze(model: Any, layers: nn.ModuleList, count: int) -> None:
    if count > len(layers):
        raise ModelError(f"reward_model.frozen_layers is {count}, but the model has {len(layers)} layers")
    backbone = backbone_of(model)
    embeddings = [module for module in backbone.children() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *layers[:count]):
        module.requires_grad_(False)


def _add_lora(model: Any, layers: nn.ModuleList, settings: RewardModelSettings, seed: int) -> Callable[[], Any]:
    """Low-rank updates beside every linear map of the layers [Hu et al. 2021, eq. 3]; the head is trained whole."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("reward_model.lora_rank needs the package peft: pip install 'densityrm[lora]'") from None
    kinds = (nn.Linear, _conv1d())
    names = {name.rpartition(".")[2] for layer in layers for name, module in layer.named_modules() if isinstance(module, kinds)}
    torch.manual_seed(stream_seed(seed, "reward model", "lora"))
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=sorted(names), lora_dropout=0.0)
    wrapped = get_peft_model(model, config)
    model.score.requires_grad_(True)
    return wrapped.merge_and_unload


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D

"""Attention over packed rows, for unmodified Hugging Face decoders: registered with transformers under a name of its own.

All tokens of a batch stand in one row. Neighbouring groups form spans of some hundred tokens, each one call of PyTorch's
attention under a mask that lets a branch see its prompt and itself. So linear layers run on the distinct tokens and nothing else,
and attention is quadratic in a span, not in the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "densityrm_packed"
_SPAN = 128  # tokens of neighbouring groups that share one call; a larger group has a call of its own


@dataclass(frozen=True)
class Layout:
    """Spans of a packed row: `sizes`, their tokens; `masks`, (n, n) float32 each, 0 where a token may look, -inf elsewhere."""

    sizes: tuple[int, ...]
    masks: tuple[Tensor, ...]


def lay_out(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> Layout:
    """The layout of groups given as (tokens of the prompt, tokens of each branch), in order."""
    spans: list[list[tuple[int, Sequence[int]]]] = []
    room = 0
    for prompt, branches in groups:
        size = prompt + sum(branches)
        if not spans or size > room:
            spans.append([])
            room = _SPAN
        spans[-1].append((prompt, branches))
        room -= size
    masks = [_mask(span) for span in spans]
    return Layout(tuple(len(mask) for mask in masks), tuple(mask.to(device) for mask in masks))


@contextlib.contextmanager
def packed_attention(*modules: Any) -> Generator[None]:
    """Within, the modules attend by the layout that their forward pass is given as `layout`."""
    configs = [module.config for module in modules]
    names = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name


@torch.compiler.disable
def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """Query (1, heads, T, d), key and value (1, kv heads, T, d) -> (1, T, heads, d). One split: slices cost a copy each, back."""
    grouped = query.shape[1] != key.shape[1]
    parts = zip(*(x.split(layout.sizes, 2) for x in (query, key, value)), layout.masks, strict=True)
    done = [
        scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout, scale=scaling, enable_gqa=grouped)
        for q, k, v, mask in parts
    ]
    return torch.cat([part.transpose(1, 2) for part in done], 1), None


def _mask(span: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    size = sum(prompt + sum(branches) for prompt, branches in span)
    allowed, start = torch.zeros(size, size, dtype=torch.bool), 0
    for prompt, branches in span:
        first = start
        for length in (prompt, *branches):
            allowed[start : start + length, first : first + prompt] = True
            allowed[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
            start += length
    return torch.zeros(size, size).masked_fill(~allowed, float("-inf"))


AttentionInterface.register(NAME, _attend)

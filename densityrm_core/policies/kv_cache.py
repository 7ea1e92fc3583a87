"""Keys and values of a rollout: each prompt's computed once and copied to its group, room for every new token from the start.

Registered with transformers as an attention function, so that Hugging Face decoders run unmodified. Prompts are computed as a
packed row, without padding; new tokens as one token a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from densityrm_core.models.attention import Layout, attend

NAME = "densityrm_rollout"
# On recent GPUs PyTorch would take cuDNN first, which builds a graph, some 30 ms, for every new number of columns: every token
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KeyValues:
    """Buffers (rows, kv heads, width + new tokens, head size) of every attention module; a row is a completion.

    A prompt shorter than the widest leaves a gap behind it, which `mask` hides.
    """

    def __init__(self, lengths: Tensor, group_size: int, max_new_tokens: int) -> None:
        """Args: lengths, tokens of every prompt of the packed row that is computed first, (prompts,) int64."""
        self._group_size, self._width = group_size, int(lengths.max())
        self.filled = self._width  # columns in use
        at = torch.arange(self._width, device=lengths.device)
        starts = lengths.cumsum(0) - lengths
        self._source = (starts[:, None] + at).clamp(max=int(lengths.sum()) - 1)  # (prompts, width) places in the packed row
        hidden = (at >= lengths[:, None]).repeat_interleave(group_size, 0)
        self._mask = torch.zeros(len(hidden), self._width + max_new_tokens, device=lengths.device)
        self._mask[:, : self._width].masked_fill_(hidden, float("-inf"))
        self._buffers: dict[Any, tuple[Tensor, Tensor]] = {}

    def store_prompts(self, module: Any, key: Tensor, value: Tensor) -> None:
        """Keep a module's keys and values of the packed prompts, (1, kv heads, T, d), for every member of their groups."""
        self._buffers[module] = self._spread(key), self._spread(value)

    def append(self, module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep those of one more token a row, (rows, kv heads, 1, d); all keys, values and the mask (rows, 1, 1, columns)."""
        keys, values = self._buffers[module]
        keys[:, :, self.filled] = key[:, :, 0]
        values[:, :, self.filled] = value[:, :, 0]
        end = self.filled + 1
        return keys[:, :, :end], values[:, :, :end], self._mask[:, None, None, :end].to(key.dtype)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self._mask = self._mask[rows]
        self._buffers = {module: (keys[rows], values[rows]) for module, (keys, values) in self._buffers.items()}

    def _spread(self, states: Tensor) -> Tensor:
        prompts = states[0][:, self._source].transpose(0, 1)  # (prompts, kv heads, width, d)
        rows = len(prompts) * self._group_size
        buffer = states.new_empty(rows, prompts.shape[1], self._mask.shape[1], prompts.shape[3])
        buffer[:, :, : self._width] = prompts.repeat_interleave(self._group_size, 0)
        return buffer


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cache: KeyValues,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """With a layout, prompts as a packed row; else query (rows, heads, 1, d), key and value (rows, kv heads, 1, d)."""
    if layout is not None:
        cache.store_prompts(module, key, value)
        return attend(module, query, key, value, None, scaling, dropout, layout=layout)
    rows, heads, _one, size = query.shape
    keys, values, mask = cache.append(module, key, value)
    grouped = query.view(rows, key.shape[1], -1, size)  # query heads that share a key head stand side by side, as queries of it
    with sdpa_kernel(_KERNELS):
        done = scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
    return done.reshape(rows, 1, heads, size), None


AttentionInterface.register(NAME, torch.compiler.disable(_attend))

"""Completions sampled from a policy: each prompt computed once for its whole group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densityrm_core.packing import Ids
from densityrm_core.tokens import Codec


@torch.no_grad()
def sample_completions(
    policy: Any,
    prompts: Sequence[Ids],
    codec: Codec,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """`group_size` completions of every prompt, as ids; a completion ends with end-of-sequence unless it was cut off.

    Args:
        seed: the draws are a function of it and of the prompts in this call, given the policy.
        temperature: 0 takes the likeliest token (`group_size` equal completions).
    """
    from transformers import DynamicCache

    policy.eval()
    generator = torch.Generator().manual_seed(seed)
    ids, seen = _left_padded(prompts, codec.pad)
    cache = DynamicCache(config=policy.config)
    logits = _next_logits(policy, ids, seen, seen.cumsum(1).sub(1).clamp(min=0), cache)
    cache.batch_repeat_interleave(group_size)
    logits, seen = logits.repeat_interleave(group_size, 0), seen.repeat_interleave(group_size, 0)
    written = torch.full((len(seen), max_new_tokens), codec.pad)
    alive = torch.arange(len(seen))
    for t in range(max_new_tokens):
        token = _choose(logits, temperature, generator)
        written[alive, t] = token
        going = token != codec.eos
        if t + 1 == max_new_tokens or not going.any():
            break
        if int(going.sum()) <= 0.75 * len(going):  # finished rows leave the batch
            alive, token, seen = alive[going], token[going], seen[going]
            cache.batch_select_indices(going.nonzero().squeeze(1).to(policy.device))
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
        logits = _next_logits(policy, token[:, None], seen, seen.sum(1, keepdim=True) - 1, cache)
    completions = [_until_end(row, codec.eos, max_new_tokens) for row in written.tolist()]
    return [completions[i : i + group_size] for i in range(0, len(completions), group_size)]


def _left_padded(prompts: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, seen


def _next_logits(policy: Any, ids: Tensor, seen: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Logits of the next token of every row, (rows, vocabulary), float32, on the CPU."""
    device = policy.device
    output = policy(
        input_ids=ids.to(device),
        attention_mask=seen.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float().cpu()


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token a row by inversion of the cumulative distribution, (rows,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    point = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _until_end(row: list[int], eos: int, longest: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row[:longest]

"""Packed rows: a prompt once, its branches (chosen and rejected, or a group of completions) behind it.

A branch sees the prompt and itself, never its siblings, and its positions go on from the end of the prompt, so every branch is
computed exactly as if it stood alone behind its prompt, while the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Ids = Sequence[int]


@dataclass(frozen=True)
class Packed:
    """A batch of B rows, T tokens wide. Flat positions index the row-major (B * T) token grid."""

    ids: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64
    mask: Tensor  # (B, 1, T, T) float32, 0 where a token may look and -inf elsewhere
    ends: Tensor  # (branches,) flat position of the last token of every branch
    sources: Tensor  # (tokens,) flat position whose output predicts each branch token
    targets: Tensor  # (tokens,) the branch tokens
    branch: Tensor  # (tokens,) number of the branch each target belongs to


def pack(groups: Sequence[tuple[Ids, Sequence[Ids]]], pad: int, device: torch.device | str = "cpu") -> Packed:
    """Rows of (prompt ids, branches), in order; neither the prompt nor a branch may be empty."""
    width = max(len(prompt) + sum(map(len, branches)) for prompt, branches in groups)
    ids = torch.full((len(groups), width), pad)
    positions = torch.zeros(len(groups), width, dtype=torch.long)
    allowed = torch.eye(width, dtype=torch.bool).repeat(len(groups), 1, 1)  # padding sees itself: no softmax is empty
    ends: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    branch: list[int] = []
    for row, (prompt, branches) in enumerate(groups):
        p = len(prompt)
        ids[row, :p] = torch.tensor(prompt)
        positions[row, :p] = torch.arange(p)
        allowed[row, :p, :p] = torch.ones(p, p, dtype=torch.bool).tril()
        start = p
        for tokens in branches:
            end = start + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            positions[row, start:end] = torch.arange(p, p + len(tokens))
            allowed[row, start:end, :p] = True
            allowed[row, start:end, start:end] = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            sources += [row * width + p - 1, *range(row * width + start, row * width + end - 1)]
            targets += tokens
            branch += [len(ends)] * len(tokens)
            ends.append(row * width + end - 1)
            start = end
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[:, None]
    lists = (torch.tensor(x, device=device) for x in (ends, sources, targets, branch))
    return Packed(ids.to(device), positions.to(device), mask.to(device), *lists)


def hidden_states(model: nn.Module, batch: Packed) -> Tensor:
    """Last hidden states of an unmodified Hugging Face decoder, (B * T, hidden)."""
    backbone: Any = getattr(model, str(model.base_model_prefix))
    output = backbone(
        input_ids=batch.ids,
        attention_mask=batch.mask.to(next(model.parameters()).dtype),
        position_ids=batch.positions,
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)


def rewards(model: Any, batch: Packed) -> Tensor:
    """Scalar reward of every branch, read at its last token, (branches,), float32."""
    return model.score(hidden_states(model, batch)[batch.ends]).squeeze(-1).float()


def log_probs(model: Any, batch: Packed, temperature: float = 1.0) -> Tensor:
    """Log-probability of every branch token given what stands before it, (tokens,), float32, in nats."""
    logits = model.get_output_embeddings()(hidden_states(model, batch)[batch.sources]).float() / temperature
    return -nn.functional.cross_entropy(logits, batch.targets, reduction="none")

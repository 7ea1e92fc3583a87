"""How likely a language model holds the tokens of packed branches, without the logits of a whole batch in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densityrm_core.models.packing import Packed, states_at

_LOGITS_AT_A_TIME = 2**23  # 32 MiB of float32


def log_probs(model: Any, batch: Packed, temperature: float = 1.0) -> Tensor:
    """Log-probability of every branch token given what stands before it, (tokens,), float32, in nats."""
    return likelihood(model, batch, temperature)[0]


def likelihood(model: Any, batch: Packed, temperature: float = 1.0, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every branch token, and, if asked for, the entropy of the distribution it was drawn from.

    Each (tokens,), float32, in nats, of the distribution at the temperature. Logits are computed some rows at a time, and again
    in the backward pass, so that memory does not grow with tokens x vocabulary.
    """
    states = states_at(model, batch, batch.sources)
    rows = max(1, _LOGITS_AT_A_TIME // model.config.get_text_config().vocab_size)
    parts = [
        _of_rows(model, *part, temperature, entropy)
        if len(states) <= rows or not torch.is_grad_enabled()
        else checkpoint(_of_rows, model, *part, temperature, entropy, use_reentrant=False, preserve_rng_state=False)
        for part in zip(states.split(rows), batch.targets.split(rows), strict=True)
    ]
    found = torch.cat(parts, 1)
    return found[0], found[1] if entropy else None


def logits_of(model: Any, states: Tensor) -> Tensor:
    """Logits of last hidden states, (rows, hidden) -> (rows, vocabulary), float32."""
    logits = model.get_output_embeddings()(states).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def _of_rows(model: Any, states: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Tensor:
    """(1 or 2, rows): log-probabilities, entropies."""
    logits = logits_of(model, states)
    if temperature != 1:
        logits = logits / temperature
    if not entropy:
        return -nn.functional.cross_entropy(logits, targets, reduction="none")[None]
    scores = logits.log_softmax(-1)
    return torch.stack([scores.gather(-1, targets[:, None]).squeeze(1), -(scores.exp() * scores).sum(-1)])

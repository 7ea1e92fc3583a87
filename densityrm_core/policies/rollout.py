"""Completions sampled from a policy: each prompt computed once for its whole group, finished rows leave the batch.

A token is drawn by a key of (seed, prompt, member, place) alone, so a completion is the same whatever else is in the batch, as
far as the logits are: kernels for other shapes may round their last bit otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densityrm_core.models.attention import packed_attention
from densityrm_core.models.likelihood import logits_of
from densityrm_core.models.packing import Ids, backbone_of, pack, why_padded
from densityrm_core.policies.decoding import Decoding, choose, member_keys, points_at, prompt_keys
from densityrm_core.policies.kv_cache import NAME, KeyValues
from densityrm_core.streams import Words

_COMPACT_BELOW = 0.75  # of the rows still writing


@dataclass(frozen=True)
class Rollout:
    """Completions of every prompt's group, as ids, each with the log-probability of every token as it was sampled, in nats.

    A completion ends with end-of-sequence unless it was cut off.
    """

    groups: list[list[list[int]]]
    log_probs: list[list[list[float]]]


@torch.no_grad()
def sample_completions(
    policy: Any,
    prompts: Sequence[Ids],
    eos: int,
    group_size: int,
    decoding: Decoding,
    draws: int | Words,
) -> Rollout:
    """`group_size` completions of every prompt.

    Args:
        eos: the token that ends a completion.
        draws: what decides the draws: a seed, or the keys that `prompt_keys` made of the prompts' longer list.
    """
    if not prompts:
        return Rollout([], [])
    members = member_keys(prompt_keys(prompts, draws) if isinstance(draws, int) else draws, group_size)
    training = policy.training
    policy.eval()
    decoder = (_Padded if why_padded(policy) else _Packed)(policy, prompts, group_size, decoding.max_new_tokens)
    try:
        written, log_probs = _decode(decoder, members, eos, decoding)
    finally:
        policy.train(training)
    lengths = ((written == eos).cumsum(1) == 0).sum(1).add(1).clamp(max=decoding.max_new_tokens).tolist()
    tokens = [row[:n] for row, n in zip(written.tolist(), lengths, strict=True)]
    values = [row[:n] for row, n in zip(log_probs.tolist(), lengths, strict=True)]
    starts = range(0, len(tokens), group_size)
    return Rollout([tokens[i : i + group_size] for i in starts], [values[i : i + group_size] for i in starts])


def _decode(decoder: _Decoder, members: Words, eos: int, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities, (rows, max_new_tokens) each, on the CPU; meaningless behind a row's end."""
    logits = decoder.prompts()
    written = torch.full((len(members), decoding.max_new_tokens), eos)
    log_probs = torch.zeros(written.shape)
    alive = torch.arange(len(members))
    for place in range(decoding.max_new_tokens):
        token, log_prob = choose(logits, decoding, points_at(members, place).to(logits.device))
        written[alive, place], log_probs[alive, place] = token.cpu(), log_prob.cpu()
        going = token != eos
        if place + 1 == decoding.max_new_tokens or not going.any():
            break
        if int(going.sum()) <= _COMPACT_BELOW * len(going):
            rows = going.nonzero().squeeze(1)
            decoder.keep(rows)
            token, rows = token[rows], rows.cpu()
            alive, members = alive[rows], members[rows.numpy()]
        logits = decoder.next(token)
    return written, log_probs


class _Decoder(ABC):
    """A policy that has read some prompts; logits are those of the next token of every row, (rows, vocabulary), float32."""

    def __init__(self, policy: Any, prompts: Sequence[Ids], group_size: int, max_new_tokens: int) -> None:
        self._policy, self._prompts, self._group_size = policy, prompts, group_size
        self._max_new_tokens = max_new_tokens

    @abstractmethod
    def prompts(self) -> Tensor:
        """Logits behind every prompt, repeated for its group."""

    @abstractmethod
    def next(self, tokens: Tensor) -> Tensor:
        """Logits behind one more token a row, (rows,)."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""


class _Packed(_Decoder):
    """Prompts in one row without padding, keys and values in buffers of their final size."""

    def prompts(self) -> Tensor:
        batch = pack([(prompt, []) for prompt in self._prompts], self._policy.device)
        lengths = torch.tensor([len(prompt) for prompt in self._prompts], device=self._policy.device)
        self._cache = KeyValues(lengths, self._group_size, self._max_new_tokens)
        states = self._states(batch.ids, batch.positions, layout=batch.layout)[0, lengths.cumsum(0) - 1]
        self._positions = lengths.repeat_interleave(self._group_size)
        return logits_of(self._policy, states).repeat_interleave(self._group_size, 0)

    def next(self, tokens: Tensor) -> Tensor:
        states = self._states(tokens[:, None], self._positions[:, None])[:, 0]
        self._cache.filled += 1
        self._positions = self._positions + 1
        return logits_of(self._policy, states)

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)
        self._positions = self._positions[rows]

    def _states(self, ids: Tensor, positions: Tensor, **further: Any) -> Tensor:
        backbone = backbone_of(self._policy)
        with packed_attention(self._policy, backbone, name=NAME):
            output = backbone(input_ids=ids, position_ids=positions, cache=self._cache, use_cache=False, **further)
        return output.last_hidden_state


class _Padded(_Decoder):
    """Prompts padded on the left, keys and values in transformers' own cache: for models that do not take packed rows."""

    def prompts(self) -> Tensor:
        from transformers import DynamicCache

        width = max(map(len, self._prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in self._prompts])
        seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self._prompts])
        self._cache, self._seen = DynamicCache(config=self._policy.config), seen.to(self._policy.device)
        logits = self._logits(ids.to(self._policy.device), self._seen.cumsum(1).sub(1).clamp(min=0))
        self._cache.batch_repeat_interleave(self._group_size)
        self._seen = self._seen.repeat_interleave(self._group_size, 0)
        return logits.repeat_interleave(self._group_size, 0)

    def next(self, tokens: Tensor) -> Tensor:
        self._seen = torch.cat([self._seen, self._seen.new_ones(len(self._seen), 1)], 1)
        return self._logits(tokens[:, None], self._seen.sum(1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._seen = self._seen[rows]

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._policy(
            input_ids=ids,
            attention_mask=self._seen,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

"""From logits to a token: temperature, top-k, top-p, and a draw that depends on nothing but its key and its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from densityrm_core.models.packing import Ids
from densityrm_core.streams import Words, mix64, stream_seed

_TO_UNIT = 2.0**-32


@dataclass(frozen=True)
class Decoding:
    """How completions are sampled.

    temperature: 0 takes the likeliest token. top_k: 0 keeps all tokens. top_p: 1 keeps all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are needed, not {self}")


def choose(logits: Tensor, decoding: Decoding, points: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inversion of the cumulative distribution, and its log-probability.

    Args:
        logits: (rows, vocabulary), float32.
        points: where each row's distribution is cut, (rows,), float64, in [0, 1).

    Returns:
        tokens (rows,) int64; log-probabilities (rows,) float32, in nats, of the distribution that was sampled: after temperature,
        top-k and top-p. Greedily chosen tokens have those of temperature 1.
    """
    if decoding.temperature == 0:
        token = logits.argmax(-1)
        return token, _log_prob(logits, token)
    logits = _filtered(logits / decoding.temperature, decoding)
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # float32 would shift the tail of a large vocabulary
    token = torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return token, _log_prob(logits, token)


def prompt_keys(prompts: Sequence[Ids], seed: int) -> Words:
    """A key for every prompt, (prompts,): a function of the seed, its tokens, and how often it stands before in the list."""
    seen: dict[tuple[int, ...], count[int]] = {}
    names = [(",".join(map(str, prompt)), next(seen.setdefault(tuple(prompt), count()))) for prompt in prompts]
    return np.array([stream_seed(seed, *name) for name in names], np.uint64)


def member_keys(prompts: Words, group_size: int) -> Words:
    """A key for every completion of every prompt's group, (prompts * group_size,)."""
    members = np.tile(np.arange(group_size, dtype=np.uint64), len(prompts))
    return mix64(np.repeat(prompts, group_size) ^ mix64(members, np.uint64(0)), np.uint64(0))


def points_at(members: Words, place: int) -> Tensor:
    """The point in [0, 1) at which each completion draws its token number `place`; (completions,), float64, 32 random bits."""
    words = mix64(members, np.uint64(place))
    return torch.from_numpy((words >> np.uint64(32)).astype(np.float64) * _TO_UNIT)  # below 1 even after rounding


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    return logits.gather(-1, token[:, None]).squeeze(1) - logits.logsumexp(-1)


def _filtered(logits: Tensor, decoding: Decoding) -> Tensor:
    """-inf for all but the k likeliest tokens [Fan et al. 2018], then but the fewest of probability p [Holtzman et al. 2020]."""
    if 0 < decoding.top_k < logits.shape[-1]:
        least = logits.topk(decoding.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if decoding.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        logits = logits.masked_fill((before >= decoding.top_p).scatter(-1, order, before >= decoding.top_p), float("-inf"))
    return logits

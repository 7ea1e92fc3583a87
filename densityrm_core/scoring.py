"""Rewards of replies under a trained reward model: the same tokens and the same rows as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from densityrm_core.models.packing import Group, Ids, pack, rewards, split_by_tokens
from densityrm_core.models.tokens import Codec

Report = Callable[[int, int], None]  # groups that are scored, and all

_TOKENS_AT_A_TIME = 8192


@dataclass(frozen=True)
class PreferenceTokens:
    """A pair as ids: what both replies answer, and the two replies."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def group(self) -> Group:
        """The prompt and its two branches, chosen first."""
        return self.prompt, [self.chosen, self.rejected]


def tokenize_pairs(pairs: pl.DataFrame, codec: Codec) -> list[PreferenceTokens]:
    """Ids of every row of `pairs` (tables.PREFERENCE_PAIRS), in order."""
    columns = (pairs[name].to_list() for name in ("context", "chosen", "rejected"))
    return [PreferenceTokens(codec.prompt(x), codec.reply(c), codec.reply(r)) for x, c, r in zip(*columns, strict=True)]


def score_pairs(model: Any, pairs: Sequence[PreferenceTokens], report: Report | None = None) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and of rejected, in order; each (pairs,), float32, on the CPU."""
    chosen, rejected = _score(model, [pair.group for pair in pairs], report).view(-1, 2).unbind(1)
    return chosen, rejected


def score_groups(model: Any, prompts: Sequence[Ids], groups: Sequence[Sequence[Ids]]) -> Tensor:
    """Rewards of groups of replies to prompts, (sum of group sizes,), float32, on the CPU."""
    return _score(model, list(zip(prompts, groups, strict=True)))


def _score(model: Any, groups: list[Group], report: Report | None = None) -> Tensor:
    training = model.training
    model.eval()
    found = [torch.zeros(0)]
    with torch.no_grad():
        for part in split_by_tokens(groups, _TOKENS_AT_A_TIME):
            found.append(rewards(model, pack([groups[i] for i in part], model.device)).cpu())
            if report:
                report(part[-1] + 1, len(groups))
    model.train(training)
    return torch.cat(found)

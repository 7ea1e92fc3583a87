"""What samples completions: the policy itself, or, on CUDA, vLLM with the policy's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from densityrm_core.decoding import Decoding
from densityrm_core.packing import Ids
from densityrm_core.rollout import Rollout, sample_completions
from densityrm_core.streams import Words


class Engine(Protocol):
    """Samples from the policy as it is now."""

    def sample(self, prompts: Sequence[Ids], group_size: int, decoding: Decoding, keys: Words) -> Rollout:
        """Completions of every prompt, drawn by the prompts' keys (decoding.prompt_keys)."""
        ...


class TransformersEngine:
    """The policy, or a bfloat16 copy of it: under autocast every token would convert all weights again."""

    def __init__(self, policy: Any, eos: int, bfloat16: Callable[[], bool] = lambda: False) -> None:
        self._policy, self._eos, self._bfloat16 = policy, eos, bfloat16
        self._copy: Any = None

    def sample(self, prompts: Sequence[Ids], group_size: int, decoding: Decoding, keys: Words) -> Rollout:
        """See Engine."""
        return sample_completions(self._current(), prompts, self._eos, group_size, decoding, keys)

    @torch.no_grad()
    def _current(self) -> Any:
        if not self._bfloat16():
            return self._policy
        if self._copy is None:
            self._copy = copy.deepcopy(self._policy).to(torch.bfloat16)
        for kept, now in zip(self._copy.parameters(), self._policy.parameters(), strict=True):
            kept.copy_(now)
        return self._copy

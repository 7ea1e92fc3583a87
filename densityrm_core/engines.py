"""What samples completions: the policy itself, or, on CUDA, vLLM with the policy's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from densityrm_core.decoding import Decoding
from densityrm_core.models.packing import Ids, treat_alike
from densityrm_core.rollout import Rollout, sample_completions
from densityrm_core.streams import Words
from densityrm_core.training.precision import Precision


class Engine(Protocol):
    """Samples from the policy as it is now."""

    def sample(self, prompts: Sequence[Ids], group_size: int, decoding: Decoding, keys: Words) -> Rollout:
        """Completions of every prompt, drawn by the prompts' keys (decoding.prompt_keys)."""
        ...


class TransformersEngine:
    """The policy, or a bfloat16 copy of it: under autocast every token would convert all weights again."""

    def __init__(self, policy: Any, eos: int, precision: Precision = "fp32") -> None:
        self._policy, self._eos, self._sampled_from = policy, eos, policy
        if precision == "bf16":
            self._sampled_from = copy.deepcopy(policy).requires_grad_(False)
            for parameter in self._sampled_from.parameters():  # buffers stay: rotary frequencies need all their digits
                parameter.data = parameter.data.to(torch.bfloat16)
            treat_alike(self._sampled_from, policy)

    def sample(self, prompts: Sequence[Ids], group_size: int, decoding: Decoding, keys: Words) -> Rollout:
        """See Engine."""
        if self._sampled_from is not self._policy:
            for kept, now in zip(self._sampled_from.parameters(), self._policy.parameters(), strict=True):
                kept.copy_(now.detach())
        return sample_completions(self._sampled_from, prompts, self._eos, group_size, decoding, keys)

"""What samples completions: the policy itself, or, on CUDA, vLLM with the policy's weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from densityrm_core.models.folders import ModelError
from densityrm_core.models.packing import Ids, treat_alike
from densityrm_core.policies.decoding import Decoding
from densityrm_core.policies.rollout import Rollout, sample_completions
from densityrm_core.streams import Words
from densityrm_core.training.precision import Precision

_SHARE_OF_MEMORY = 0.3  # of the GPU, for vLLM; policy, reference and reward model need the rest


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


class VllmEngine:
    """Completions sampled by vLLM on the GPU that trains the policy, with its weights of the moment; needs the extra `vllm`.

    Draws follow from their seeds as far as vLLM's do; other batches may give other tokens. It has not been run: no machine with
    a GPU was at hand. What it relies on is vLLM's documented interface, and the way in which TRL hands weights to an engine of
    the same process.
    """

    def __init__(self, policy: Any, folder: Path, eos: int) -> None:
        """Args: folder, of the base model, which tells vLLM the architecture.

        Raises:
            ModelError: vLLM is not installed, or the policy is not on a GPU.
        """
        if not str(policy.device).startswith("cuda"):
            raise ModelError("compute.rollouts: vllm samples on CUDA only; set it to transformers")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over within the process
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]  an extra, of which there is no version for CPUs here
        except ImportError:
            raise ModelError("compute.rollouts: vllm needs the package vllm: pip install 'densityrm[vllm]'") from None
        self._policy, self._eos = policy, eos
        self._llm: Any = LLM(
            model=str(folder),
            dtype="bfloat16",
            gpu_memory_utilization=_SHARE_OF_MEMORY,
            logprobs_mode="processed_logprobs",  # of the distribution at the temperature
        )

    def sample(self, prompts: Sequence[Ids], group_size: int, decoding: Decoding, keys: Words) -> Rollout:
        """See Engine."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]  as above

        self._hand_over_weights()
        how = [
            SamplingParams(
                n=group_size,
                temperature=decoding.temperature,
                top_k=decoding.top_k or -1,
                top_p=decoding.top_p,
                max_tokens=decoding.max_new_tokens,
                seed=int(key) & 0x7FFFFFFF,
                stop_token_ids=[self._eos],
                logprobs=0,
            )
            for key in keys
        ]
        found = self._llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], how, use_tqdm=False)
        groups = [[list(reply.token_ids) for reply in answer.outputs] for answer in found]
        log_probs = [
            [[at[token].logprob for token, at in zip(reply.token_ids, reply.logprobs, strict=True)] for reply in answer.outputs]
            for answer in found
        ]
        return Rollout(groups, log_probs)

    def _hand_over_weights(self) -> None:
        model = self._llm.llm_engine.model_executor.driver_worker.model_runner.model
        model.load_weights((name, parameter.data) for name, parameter in self._policy.named_parameters())
        self._llm.reset_prefix_cache()

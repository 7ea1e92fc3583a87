"""Completions sampled by vLLM on the GPU that trains the policy, with the policy's weights of the moment.

For CUDA alone, with the extra `vllm`. It has not been run: no machine with a GPU was at hand. What it relies on is vLLM's
documented interface, and the way in which TRL loads weights into an engine of the same process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from densityrm_core.decoding import Decoding
from densityrm_core.models.folders import ModelError
from densityrm_core.models.packing import Ids
from densityrm_core.rollout import Rollout
from densityrm_core.streams import Words

_SHARE_OF_MEMORY = 0.3  # of the GPU; policy, reference and reward model need the rest


class VllmEngine:
    """An engine (engines.Engine) whose draws follow from their seeds as far as vLLM's do; other batches may give other tokens."""

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
        """See engines.Engine."""
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

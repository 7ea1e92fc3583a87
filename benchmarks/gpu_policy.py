"""Parts of `benchmarks.gpu_check` that sample from policies and train them."""

from __future__ import annotations

import time
from importlib.util import find_spec

import polars as pl
import torch

from benchmarks.gpu_work import (
    ARCHITECTURES,
    Check,
    Figures,
    language_model,
    random_pairs,
    require,
    require_packed,
    seconds,
    sized_config,
)
from benchmarks.killed_training import prepare
from densityrm_core.models.likelihood import log_probs
from densityrm_core.models.packing import pack
from densityrm_core.policies.decoding import Decoding, prompt_keys
from densityrm_core.policies.engines import TransformersEngine
from densityrm_core.policies.grpo import PolicyTask, train_policy
from densityrm_core.policies.rollout import Rollout, sample_completions
from densityrm_core.settings import ComputeSettings, GrpoSettings
from densityrm_core.training.loop import Watch
from densityrm_core.training.precision import computing

_GREEDY = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
_NEW_GREEDY = 12
_FP32_GAP, _BF16_GAP = 1e-4, 0.05  # mean nats between a token as it was sampled and as the training computes it


def rollout(check: Check) -> Figures:
    """Greedy tokens are Hugging Face's; what is sampled has the log-probabilities that the training computes; tokens a second."""
    for name in ARCHITECTURES:
        _require_greedy_as_generate(check, name)
    config = sized_config(check)
    policy = language_model(config, check.device).eval()
    require_packed(policy)
    group, new = (2, 8) if check.small else (8, 64)
    prompts = [prompt for prompt, _ in random_pairs(3 if check.small else 16, 100, 1, 2, config.vocab_size)]
    keys, decoding = prompt_keys(prompts, 0), Decoding(new)
    figures: Figures = {"greedy_as_generate": list(ARCHITECTURES)}
    for precision, most in (("fp32", _FP32_GAP), ("bf16", _BF16_GAP)):
        engine = TransformersEngine(policy, -1, precision)
        sampled = engine.sample(prompts, group, decoding, keys)
        with torch.no_grad(), computing(precision, check.device):
            trained = log_probs(policy, pack(list(zip(prompts, sampled.groups, strict=True)), check.device)).cpu()
        distance = float((_flat(sampled) - trained).abs().mean())
        require(distance < most, f"{precision}: sampled log-probabilities are {distance:.2g} nats off what the training computes")
        took = seconds(check, lambda e=engine: e.sample(prompts, group, decoding, keys), 1 if check.small else 3, 0)
        figures[precision] = {"log_prob_gap": distance, "tokens_per_s": round(len(trained) / took)}
    return figures


def _require_greedy_as_generate(check: Check, name: str) -> None:
    model = language_model(ARCHITECTURES[name], check.device).eval()
    ours = sample_completions(model, _GREEDY, 0, 2, Decoding(_NEW_GREEDY, temperature=0), 0).groups
    for prompt, groups in zip(_GREEDY, ours, strict=True):
        ids = torch.tensor([prompt], device=check.device)
        options = {"do_sample": False, "max_new_tokens": _NEW_GREEDY, "eos_token_id": 0}
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        require(groups == [theirs, theirs], f"{name}: greedy completions {groups} are not generate's {theirs}")


def _flat(sampled: Rollout) -> torch.Tensor:
    return torch.tensor([value for group in sampled.log_probs for values in group for value in values])


def grpo(check: Check) -> Figures:
    """A policy is trained on the device, and its first step is the CPU's: same tokens, same loss.

    TRL's GRPOTrainer is not beside it: `python -m benchmarks.grpo` compares the two, on CPUs.
    """
    prepare(check.folder)
    figures, watch, took = _train(check, check.device, "transformers")
    on_cpu = watch if not check.cuda else _train(check, "cpu", "transformers")[1]
    names = ("reward/mean", "completions/tokens", "train/loss")
    (_, first), (_, expected) = (next(p for p in w.points if "train/loss" in p[1]) for w in (watch, on_cpu))
    apart = {name: abs(first[name] - expected[name]) for name in names}
    require(max(apart.values()) < 0.02, f"the first step is not the CPU's: {first} and {expected}")
    return {**figures, "step_s": took, "first_step_off_by": apart, "beside_trl": "not compared"}


def vllm(check: Check) -> Figures:
    """A policy is trained on completions that vLLM samples, where it is installed."""
    if not check.cuda or not find_spec("vllm"):
        return {"skipped": "vLLM is not installed" if check.cuda else "vLLM samples on GPUs"}
    prepare(check.folder, 256)
    figures, _, took = _train(check, check.device, "vllm")
    return {**figures, "step_s": took}


def _train(check: Check, device: str, rollouts: str) -> tuple[Figures, Watch, float]:
    pairs = pl.read_parquet(check.folder / "pairs.parquet")
    asked = pairs.unique("prompt_id", keep="first", maintain_order=True).with_columns(
        weight=pl.lit(1.0), decile=pl.lit(1, pl.Int8), quartile=pl.lit(1, pl.Int8)
    )
    size = {"prompts_per_step": 2, "group_size": 3} if check.small else {"prompts_per_step": 8, "group_size": 8}
    settings = GrpoSettings(steps=3, max_new_tokens=8 if check.small else 24, log_every=1, evaluate_every=3, **size)
    compute = ComputeSettings.model_validate({"device": device, "precision": "fp32", "rollouts": rollouts})
    marks: list[float] = []
    watch = Watch(should_stop=lambda: bool(marks.append(time.perf_counter())))
    task = PolicyTask(check.folder / "base", check.folder / "rm", asked, asked.head(4), settings, 0, compute=compute)
    trained = train_policy(task, watch)
    distance = max(metrics["rollout/log_prob_gap"] for _, metrics in watch.points if "rollout/log_prob_gap" in metrics)
    require(distance < _BF16_GAP, f"sampled log-probabilities are {distance:.2g} nats off what the training computes")
    require(trained.steps == 3, f"{trained.steps} of 3 steps were taken")
    return {"steps": trained.steps, "log_prob_gap": distance}, watch, round(marks[-1] - marks[-2], 3)

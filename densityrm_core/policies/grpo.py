"""Group relative policy optimization [Shao et al. 2024] against a frozen reward model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from densityrm_core.choices import take
from densityrm_core.hardware import pick_device
from densityrm_core.models.attention import attention_kernel, resolve_kernel
from densityrm_core.models.folders import ModelError, load_causal_lm, load_codec, precision_of
from densityrm_core.models.likelihood import likelihood, log_probs
from densityrm_core.models.packing import say_if_padded
from densityrm_core.models.tokens import Codec
from densityrm_core.policies.decoding import Decoding
from densityrm_core.policies.engines import Engine, TransformersEngine, VllmEngine
from densityrm_core.policies.experience import Batch, Collector, Experience
from densityrm_core.policies.kl_control import KLControl
from densityrm_core.policies.loss import Sampled, policy_loss
from densityrm_core.policies.questions import Questions, read_questions
from densityrm_core.policies.rewards import Rewarder, RewardFunction, RewardScale, load_rewarder, scale_of
from densityrm_core.policies.rollout import sample_completions
from densityrm_core.policies.watch import PolicyWatch
from densityrm_core.sampling import Sampler, make_sampler
from densityrm_core.settings import ComputeSettings, GrpoSettings, SamplingSettings
from densityrm_core.streams import stream_seed
from densityrm_core.training.checkpoints import Best, key_of
from densityrm_core.training.loop import Part, Plan, Watch, optimize
from densityrm_core.training.precision import Precision, computing

_SCALE_PROMPTS, _SCALE_SAMPLES = 64, 4
_FINAL = ("train/loss", "reward/mean", "kl/sequence", "eval/reward", "eval/kl", "eval/tokens")


@dataclass(frozen=True)
class PolicyTask:
    """What a policy is trained on. Two arms differ in nothing but the reward model and the prompts' weights.

    Args:
        base: folder of the base model, which is also the reference policy.
        reward_model: folder of the reward model, or a function of contexts and replies.
        prompts: the columns `context` and `weight` (sampling weight, any scale), one row a prompt.
        watched: prompts that are answered every so many steps: prompt_id, prompt, context, decile, quartile; may be empty.
        seed: decides the order of the prompts and the sampled tokens.
        sampling: how prompts are drawn by their weights.
        compute: device and precision.
    """

    base: Path
    reward_model: Path | RewardFunction
    prompts: pl.DataFrame
    watched: pl.DataFrame
    settings: GrpoSettings
    seed: int
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy and how it came to be: `steps` were taken, the weights are those after `kept_step`."""

    model: Any
    codec: Codec
    scale: RewardScale
    steps: int
    kept_step: int
    stopped_by_kl: bool
    completions: pl.DataFrame  # tables.POLICY_COMPLETIONS
    metrics: dict[str, float]  # the last of each that there is
    precision: Precision

    @property
    def how_it_went(self) -> dict[str, Any]:
        """What a person is told of the end of the training."""
        return {"steps_taken": self.steps, "kept_step": self.kept_step, "stopped_by_kl_budget": self.stopped_by_kl}

    @property
    def card(self) -> dict[str, Any]:
        """What its folder says of it."""
        return {**self.how_it_went, **self.scale.card, "precision": self.precision}


def train_policy(task: PolicyTask, watch: Watch) -> TrainedPolicy:
    """A policy started from the base model, trained on completions that it samples itself, step by step.

    Raises:
        ModelError: a model cannot be loaded, or prompt and completion do not fit the base model's context.
        TrainingError: the loss is not finite, or the reward model gives no finite reward.
    """
    with attention_kernel(task.compute.attention):
        return _train(task, watch, pick_device(task.compute.device))


def _train(task: PolicyTask, watch: Watch, device: str) -> TrainedPolicy:
    settings, precision = task.settings, precision_of(task.base, task.compute, device)
    codec = load_codec(task.base)
    policy, reference = load_causal_lm(task.base, device), load_causal_lm(task.base, device).eval().requires_grad_(False)
    say_if_padded(policy, watch.say)
    asked, watched = (read_questions(prompts, codec) for prompts in (task.prompts, task.watched))
    _check_context(policy, asked, task)
    rewarder = load_rewarder(task.reward_model, codec, device)
    if isinstance(task.reward_model, Path) and scale_of(task.reward_model) is None:
        rewarder = rewarder.on(_scale_on_base(reference, rewarder, asked, task))
    key = key_of(policy, rewarder.identity, precision, resolve_kernel(device), *_identity(task, asked, watched, rewarder.scale))
    checkpoints = watch.checkpoints(key)
    memory: dict[str, list[Any]] = {}
    control = KLControl(settings, memory)
    looking = PolicyWatch(task.watched, watched, rewarder, settings, task.seed, memory)
    engine = _engine(policy, codec, precision, task)
    collector = Collector(engine, rewarder, asked, _samplers(task), settings, task.seed)
    updates = _Updates(policy, reference, collector, control, settings, precision)
    inside = Best(checkpoints)

    def after(step: int) -> dict[str, float] | None:
        if step % settings.evaluate_every and step != settings.steps:
            return None
        metrics = looking.look(step, engine, policy, reference)
        if not control.past_budget() and control.inside_budget(looking.highest_kl):
            inside.replace(step, policy)
        return metrics

    looking.look(0, engine, policy, reference)
    steps = optimize(
        policy,
        _plan(settings),
        watch,
        updates.parts_at,
        after,
        control.past_budget,
        checkpoints,
        memory,
        updates=settings.inner_epochs,
    )
    stopped = control.past_budget()
    outside = stopped or not control.inside_budget(looking.highest_kl)
    kept = _back_inside(policy, task.base, inside) if outside else steps
    last = {name: value for _, metrics in watch.points for name, value in metrics.items() if name in _FINAL}
    return TrainedPolicy(policy, codec, rewarder.scale, steps, kept, stopped, looking.completions, last, precision)


class _Updates:
    """The parts of a step's updates: the first samples, all learn from what it sampled."""

    def __init__(
        self,
        policy: Any,
        reference: Any,
        collector: Collector,
        control: KLControl,
        settings: GrpoSettings,
        precision: Precision,
    ) -> None:
        self._policy, self._reference, self._collector = policy, reference, collector
        self._control, self._settings = control, settings
        self._precision: Precision = precision
        self._step = -1
        self._experience = Experience([], {})
        self._known: list[Sampled] = []
        self._measured: dict[str, float] = {}

    def parts_at(self, step: int) -> Iterator[Part]:
        """A loss for every batch of the step, the first with the metrics of the rollout."""
        first = step != self._step
        if first:
            self._step, self._known = step, []
            self._experience = self._collector.collect(step, self._policy.device)
        beta, drift, gap = self._control.beta, 0.0, 0.0
        for number, batch in enumerate(self._experience.batches):
            with computing(self._precision, str(self._policy.device)):
                current, entropy = likelihood(
                    self._policy, batch.packed, self._settings.temperature, bool(self._settings.entropy_bonus)
                )
            share = len(batch.weight) / self._experience.completions
            if first:
                self._known.append(self._before(batch, current))
                drift += self._drift(self._known[-1]) / self._experience.completions
                gap += share * (batch.sampled - current.detach()).abs().mean().item()
            loss, told = policy_loss(current, entropy, self._known[number], self._settings, beta)
            yield loss, {name: value * share for name, value in told.items()}
        if first:
            self._measured = {"kl/coefficient": beta, "rollout/log_prob_gap": gap, **self._observe(drift)}
        yield None, {"train/clipped": 0.0, **self._experience.metrics, **self._measured}

    def _before(self, batch: Batch, current: Tensor) -> Sampled:
        """On policy the log-probabilities of before are those of now, so the first update's ratio is exactly 1."""
        reference = None
        if self._needs_reference:
            with torch.no_grad(), computing(self._precision, str(self._policy.device)):
                reference = log_probs(self._reference, batch.packed, self._settings.temperature)
        return Sampled(batch.packed.branch, current.detach(), reference, batch.advantage, batch.weight)

    def _drift(self, sampled: Sampled) -> float:
        return 0.0 if sampled.reference is None else (sampled.old - sampled.reference).sum().item()

    def _observe(self, kl: float) -> dict[str, float]:
        """The KL a sequence, if it is measured; a step without completions that count repeats the last one."""
        if not self._needs_reference:
            return {}
        if self._experience.batches:
            self._control.observe(kl)
        return {"kl/sequence": self._control.last}

    @property
    def _needs_reference(self) -> bool:
        return self._settings.kl_coefficient > 0 or self._settings.kl_budget is not None


def _engine(policy: Any, codec: Codec, precision: Precision, task: PolicyTask) -> Engine:
    if take("rollouts", task.compute.rollouts) == "vllm":
        return VllmEngine(policy, task.base, codec.eos)
    return TransformersEngine(policy, codec.eos, precision)


def _check_context(policy: Any, asked: Questions, task: PolicyTask) -> None:
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, asked.prompts))
    if positions is not None and longest + task.settings.max_new_tokens > positions:
        raise ModelError(
            f"the longest prompt has {longest:,} tokens and grpo.max_new_tokens is {task.settings.max_new_tokens:,}, but "
            f"{task.base} has {positions:,} positions: lower base_model.max_prompt_tokens, which keeps the end of a prompt, or "
            "grpo.max_new_tokens"
        )


def _samplers(task: PolicyTask) -> tuple[Sampler, Sampler]:
    weights = task.prompts["weight"].to_numpy()
    prompts, further = (
        make_sampler(weights, stream_seed(task.seed, "grpo", name), task.sampling) for name in ("prompts", "resampled")
    )
    return prompts, further


def _scale_on_base(base: Any, rewarder: Rewarder, asked: Questions, task: PolicyTask) -> RewardScale:
    """Mean and standard deviation of the reward over completions of the base policy: for a reward model without a scale."""
    contexts, prompts = asked.contexts[:_SCALE_PROMPTS], asked.prompts[:_SCALE_PROMPTS]
    decoding = Decoding(task.settings.max_new_tokens, task.settings.temperature)
    seed = stream_seed(task.seed, "grpo", "scale")
    groups = sample_completions(base, prompts, rewarder.policy.eos, _SCALE_SAMPLES, decoding, seed).groups
    rewards = rewarder.rewards(contexts, prompts, groups)
    rewards = rewards[rewards.isfinite()]
    return RewardScale(rewards.mean().item(), rewards.std().item()) if len(rewards) > 1 else RewardScale(0.0, 1.0)


def _back_inside(policy: Any, base: Path, inside: Best) -> int:
    """Take back the last weights that were inside the KL budget, or those of the base policy; the step they are from."""
    step = inside.restore(policy)
    if step is None:
        policy.load_state_dict(load_causal_lm(base, str(policy.device)).state_dict())
    return step or 0


def _plan(settings: GrpoSettings) -> Plan:
    return Plan(
        settings.steps,
        settings.prompts_per_step * settings.group_size,
        settings.learning_rate,
        settings.warmup,
        0.0,
        settings.max_grad_norm,
        settings.log_every,
    )


def _identity(task: PolicyTask, asked: Questions, watched: Questions, scale: RewardScale) -> Iterator[str | bytes]:
    """All that a training depends on beside its models."""
    yield task.settings.model_dump_json() + task.sampling.model_dump_json()
    yield task.compute.rollouts + str(task.seed) + str(scale)
    yield task.prompts["weight"].to_numpy().tobytes()
    yield from (str(questions.prompts) for questions in (asked, watched))

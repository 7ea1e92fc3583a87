"""How long an experiment takes on this machine: a few real units of its work on a random model of its shape, timed and added up.

What is timed: a step of the base model, of a reward model and of GRPO, and pairs and replies of the evaluations. Models of many
layers are timed with one layer and with three, long steps with some of their rows. Reading and embedding the rows is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from densityrm_core.experiment import Experiment
from densityrm_core.models.attention import attention_kernel
from densityrm_core.models.likelihood import log_probs
from densityrm_core.models.packing import Group, pack, rewards, split_by_tokens
from densityrm_core.models.shapes import Shape
from densityrm_core.planning.needs import AT_A_TIME, training_needed
from densityrm_core.policies.decoding import Decoding, prompt_keys
from densityrm_core.policies.engines import TransformersEngine
from densityrm_core.reward_models.loss import bradley_terry_loss
from densityrm_core.reward_models.train import WATCHED_PAIRS
from densityrm_core.settings import PLANTED
from densityrm_core.sources.planted import planted_rows
from densityrm_core.training.precision import Precision, computing

_CHARS = 3.8  # of a token: measured with the tokenizer of the planted world; those of public models are close to it
_MOST_TOKENS, _MOST_NEW = 4096, 16  # of a unit as it is timed
_WORK = 2**32  # weights x tokens of a unit as it is timed, at most: a second of a slow processor
_DEEPEST, _FEW = 4, 3  # layers that are all timed; of deeper models one is, and a few
_AGAIN_S, _TIMES = 0.4, 4  # a unit is timed so often, the best counts, unless one takes longer than this
_STEP_S = 5.0  # of every asset beside its work: a process, its plots, its intervals, its records; measured, 1 to 6
_RUN_S = 12.0  # of every run: its plan, and the libraries that its steps share
_EMBED_S, _MAP_S = 1.8e-4, 10.0  # seconds of a processor for a token of a prompt; of the map of the prompts
_EXAM = 32  # prompts of an evaluation of policies that are timed together
_SPREAD = 0.2  # of an estimate, both ways


class TooLargeError(ValueError):
    """The model takes more memory than a probe may; the message says how much."""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a reply as they are trained on, and how many pairs the held-out splits have."""

    prompt: int
    reply: int
    validation: int
    test: int


@dataclass(frozen=True)
class Units:
    """Seconds of each unit of work."""

    tune: float  # a step of the base model
    prefer: float  # a step of a reward model
    score: float  # a pair's rewards
    improve: float  # a step of GRPO: sampling, rewards, reference, update
    look: float  # the answers to the held-out prompts of a training
    examine: float  # _EXAM prompts of the evaluation of a policy


@dataclass(frozen=True)
class Estimate:
    """Seconds from the first row to the verdict, between `least` and `most`."""

    seconds: float

    @property
    def least(self) -> float:
        """The lower end."""
        return self.seconds * (1 - _SPREAD)

    @property
    def most(self) -> float:
        """The upper end."""
        return self.seconds * (1 + _SPREAD)

    def __str__(self) -> str:
        """As a person says it: about 6 to 9 minutes."""
        unit, name = next(
            (u, n) for u, n in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")) if self.least >= u
        )
        low, high = round(self.least / unit), round(self.most / unit)
        return f"about {low} to {max(high, low + 1)} {name}"


def lengths_of(experiment: Experiment, pairs: Path) -> Lengths:
    """By the table of pairs if it is there, else by some rows of the planted world, else half of what is read at most."""
    splits, base = experiment.splits, experiment.base_model
    longest = base.max_prompt_tokens, base.max_reply_tokens
    if pairs.is_file():
        texts = pl.scan_parquet(pairs).select(
            "split", prompt=pl.col("prompt").str.len_chars(), reply=pl.col("chosen").str.len_chars()
        )
        frame = texts.collect()
        held = {split: frame.filter(pl.col("split") == split).height for split in ("validation", "test")}
        return Lengths(*_tokens(frame, longest), **held)
    sources = experiment.sources.enabled().values()
    rows = experiment.planted.hh_rows + experiment.planted.ultrafeedback_rows + 2 * experiment.planted.stack_exchange_questions
    held = {"validation": round(rows * splits.validation), "test": round(rows * splits.test)}
    if any(source.path != PLANTED for source in sources):
        return Lengths(longest[0] // 2, longest[1] // 2, **held)
    few = experiment.planted.model_copy(update={"ultrafeedback_rows": 100})
    drawn = [(len(row["prompt"]), len(row["chosen"][1]["content"])) for row in planted_rows("ultrafeedback", few)]
    return Lengths(*_tokens(pl.DataFrame(drawn, ["prompt", "reply"], orient="row"), longest), **held)


def probe(experiment: Experiment, shape: Shape, lengths: Lengths, device: str, precision: Precision, memory: int) -> Units:
    """The units of work, timed on random models of `shape`, or of fewer layers, with `compute.threads` threads.

    Args:
        memory: bytes that the models and what they compute may take.

    Raises:
        TooLargeError: not even a model of three layers fits.
    """
    small = experiment.model_copy(update={"grpo": experiment.grpo.model_copy(update={"tokens_per_batch": 1024})})
    timed = [shape] if shape.layers <= _DEEPEST else [replace(shape, layers=1), replace(shape, layers=_FEW)]
    needed = training_needed(small, timed[-1]) if len(timed) == 1 else 8 * timed[-1].weights
    if needed > memory:
        raise TooLargeError(f"a model of {timed[-1].layers} of its {shape.layers} layers takes {needed / 2**30:.1f} GiB to probe")
    threads = torch.get_num_threads()
    torch.set_num_threads(experiment.compute.threads)
    try:
        with attention_kernel(experiment.compute.attention):
            found = [_Probe(experiment, each, lengths, device, precision).units() for each in timed]
    finally:
        torch.set_num_threads(threads)
    one, few = vars(found[0]), vars(found[-1])
    layers = (shape.layers - 1) / (_FEW - 1)
    whole = Units(**{name: one[name] + max(0.0, few[name] - one[name]) * layers for name in one})
    scorer = experiment.reward_model
    forward = scorer.pairs_per_step * whole.score
    learning = max(1, shape.layers - scorer.frozen_layers) / shape.layers  # frozen layers are computed forward only
    return replace(whole, prefer=forward + max(0.0, whole.prefer - forward) * learning)


def estimate(experiment: Experiment, units: Units, lengths: Lengths, prompts: int | None, processors: int) -> Estimate:
    """The units added up over seeds and arms, two assets at a time where there are processors for them.

    Args:
        prompts: how many are embedded; nothing is counted for it where nobody knows.
    """
    model, scorer, grpo, exam = experiment.base_model, experiment.reward_model, experiment.grpo, experiment.evaluation
    workers = min(AT_A_TIME, max(1, processors // experiment.compute.threads))
    looks = scorer.steps // scorer.evaluate_every + 1
    validation = min(WATCHED_PAIRS, lengths.validation) * units.score
    prefer = scorer.steps * units.prefer + looks * validation
    improve = grpo.steps * units.improve + (grpo.steps // grpo.evaluate_every + 1) * units.look
    examine = (len(experiment.arms) + 1) * exam.prompts / _EXAM * units.examine
    judge = [experiment.judge.steps * units.prefer] if experiment.judge.kind == "model" else []
    sources = [0.0] * len(experiment.sources.enabled())
    embed = (prompts or 0) * lengths.prompt * _EMBED_S / min(experiment.compute.search_threads, processors)
    once = [sources, [0.0], [0.0], [model.steps * units.tune, embed + _MAP_S * bool(prompts)], judge or [0.0], [0.0]]
    seed = [
        [prefer] * 2,
        [improve] * len(experiment.arms) + [2 * lengths.test * units.score],
        [examine],
        [0.0, 0.0],
        [0.0],
    ]
    runs = _RUN_S * (1 + len(experiment.seeds))  # the data are prepared in one of their own
    return Estimate(runs + sum(_makespan(stage, workers) for stage in once + seed * len(experiment.seeds)))


def _makespan(stage: Sequence[float], workers: int) -> float:
    """Seconds of assets that wait for nothing but a worker, the longest first."""
    busy = [0.0] * workers
    for seconds in sorted(stage, reverse=True):
        busy[busy.index(min(busy))] += seconds + _STEP_S
    return max(busy)


def _tokens(chars: pl.DataFrame, longest: tuple[int, int]) -> tuple[int, int]:
    """Mean tokens of `prompt` and `reply`, each cut to its longest; a template and an end-of-sequence add some."""
    prompt, reply = (
        max(2, round(float((chars[name] / _CHARS + 2).clip(upper_bound=most).to_numpy().mean())))
        for name, most in zip(("prompt", "reply"), longest, strict=True)
    )
    return prompt, reply


class _Probe:
    """Random models of one shape, and rows of the experiment's lengths."""

    def __init__(self, experiment: Experiment, shape: Shape, lengths: Lengths, device: str, precision: Precision) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        config = _config(shape, lengths, experiment)
        self._experiment, self._lengths, self._device = experiment, lengths, device
        self._precision: Precision = precision
        self._policy: Any = AutoModelForCausalLM.from_config(config).to(device)
        self._scorer: Any = AutoModelForSequenceClassification.from_config(config).to(device)
        self._draw = np.random.default_rng(0)
        self._vocabulary = shape.vocabulary
        self._most = max(512, min(_MOST_TOKENS, _WORK // shape.parameters))
        alone = experiment.compute.threads == 1 and device == "cpu"
        self._clock = time.process_time if alone else time.perf_counter  # what others do on this machine does not count

    def units(self) -> Units:
        """Every unit, timed."""
        experiment, grpo = self._experiment, self._experiment.grpo
        sampled = grpo.prompts_per_step * grpo.group_size
        tune = self._steps(self._policy, self._tune_loss, experiment.base_model.batch_size, 1, self._most)
        prefer = self._steps(
            self._scorer,
            self._preference_loss,
            experiment.reward_model.pairs_per_step,
            2,
            experiment.reward_model.tokens_per_batch,
        )
        score = self._forward(self._scorer, rewards, 64, 2) / 64
        of_group = self._forward(self._scorer, rewards, grpo.prompts_per_step, grpo.group_size)
        known = self._forward(self._policy, log_probs, grpo.prompts_per_step, grpo.group_size)
        learn = self._steps(self._policy, self._tune_loss, grpo.prompts_per_step, grpo.group_size, grpo.tokens_per_batch)
        improve = self._rollout(grpo.prompts_per_step, grpo.group_size) + of_group + known + grpo.inner_epochs * learn
        answers = grpo.evaluation_prompts / sampled
        look = self._rollout(grpo.evaluation_prompts, 1) + answers * (of_group + 2 * known)
        replies = experiment.evaluation.samples + 1
        readers = 3 if experiment.judge.kind == "model" else 2
        examine = self._rollout(_EXAM, 1) + self._rollout(_EXAM, replies - 1)
        examine += _EXAM * replies / sampled * (readers * of_group + 2 * known)
        return Units(tune, prefer, score, improve, look, examine)

    def _groups(self, count: int, replies: int) -> list[Group]:
        def ids(length: int) -> list[int]:
            return self._draw.integers(1, self._vocabulary, length).tolist()

        return [(ids(self._lengths.prompt), [ids(self._lengths.reply) for _ in range(replies)]) for _ in range(count)]

    def _some(self, count: int, replies: int) -> tuple[list[Group], float]:
        """As many groups as are timed, and how many times as much all of them are."""
        taken = min(count, max(1, self._most // (self._lengths.prompt + replies * self._lengths.reply)))
        return self._groups(taken, replies), count / taken

    def _steps(self, model: Any, loss: Callable[[Any, list[Group]], torch.Tensor], count: int, replies: int, most: int) -> float:
        """A step of the optimizer on so many groups, computed at most so many tokens at a time."""
        groups, share = self._some(count, replies)
        parts = [[groups[i] for i in part] for part in split_by_tokens(groups, most)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def gradients() -> None:
            for part in parts:
                loss(model, part).backward()

        def move() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        model.train()
        learnt = self._best(gradients)
        moved = self._best(move)
        optimizer.zero_grad()
        return share * learnt + moved

    def _tune_loss(self, model: Any, groups: list[Group]) -> torch.Tensor:
        with computing(self._precision, self._device):
            return -log_probs(model, pack(groups, self._device)).mean()

    def _preference_loss(self, model: Any, groups: list[Group]) -> torch.Tensor:
        with computing(self._precision, self._device):
            chosen, rejected = rewards(model, pack(groups, self._device)).view(-1, 2).unbind(1)
        return bradley_terry_loss(chosen, rejected)

    def _forward(self, model: Any, of: Callable[..., torch.Tensor], count: int, replies: int) -> float:
        groups, share = self._some(count, replies)
        model.eval()
        with torch.no_grad(), computing(self._precision, self._device):
            return share * self._best(lambda: of(model, pack(groups, self._device)))

    def _rollout(self, prompts: int, group: int) -> float:
        """Sampling as many tokens as a reply has, half as many again for the longest; no end-of-sequence ends it before."""
        new = min(self._experiment.grpo.max_new_tokens, round(1.5 * self._lengths.reply))
        timed = min(new, _MOST_NEW)
        asked = [ids for ids, _ in self._groups(prompts, 0)]
        engine, decoding = TransformersEngine(self._policy, -1, self._precision), Decoding(timed)
        keys = prompt_keys(asked, 0)
        with torch.no_grad():
            return self._best(lambda: engine.sample(asked, group, decoding, keys)) * new / timed

    def _best(self, run: Callable[[], object]) -> float:
        taken: list[float] = []
        while len(taken) < _TIMES and sum(taken) < _AGAIN_S:
            started = self._clock()
            run()
            if self._device != "cpu":
                torch.zeros(1, device=self._device).item()  # waits for what was queued
            taken.append(self._clock() - started)
        return min(taken)


def _config(shape: Shape, lengths: Lengths, experiment: Experiment) -> Any:
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_width,
        max_position_embeddings=lengths.prompt + lengths.reply + experiment.grpo.max_new_tokens,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
    )
    config.num_labels = 1
    return config

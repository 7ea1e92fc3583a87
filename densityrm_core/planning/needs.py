"""What an experiment needs of a machine, roughly: bytes of disk that it has yet to write, bytes of memory at its peak.

Sums over what its settings make: weights are float32, AdamW keeps two moments of each, two assets are made at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from densityrm_core.experiment import Experiment
from densityrm_core.models.shapes import Shape
from densityrm_core.settings import PLANTED

AT_A_TIME = 2  # assets that are made at a time
_PROGRAM = int(0.75 * 2**30)  # of a process with its libraries; measured, 0.65 and 0.76 GiB
_TRACKING = 200 << 20  # databases, plots and reports
_ROW = 1 << 10  # of a planted row, as text
_COPIES = 4  # of a row: its shard, the union, its prompt and vector
_WIDTH = 384  # of a vector, as the default encoder's
_ACTIVATIONS = 12  # values of a layer's width that a token keeps for the backward pass, beside four of the MLP's; measured
_LOGITS = 3 * 32 << 20  # see models.likelihood._LOGITS_AT_A_TIME: logits, their probabilities, their gradient


class Need(NamedTuple):
    """Bytes, and what they are for: bytes by purpose."""

    bytes: int
    parts: dict[str, int]


def disk_needed(experiment: Experiment, shape: Shape, state: Path, raw: int | None) -> Need:
    """What is still to be written.

    Args:
        state: folder of the experiment; models that are there need no room again.
        raw: bytes of the raw rows where they lie on this machine, None where they are not known.
    """
    made = state / "models"
    single = ["base_model"] + ["rm_judge"] * (experiment.judge.kind == "model")
    scorers = [f"{name}/{seed}" for name in ("rm_uniform", "rm_density") for seed in experiment.seeds]
    arms = [f"grpo_{arm}/{seed}" for arm in experiment.arms for seed in experiment.seeds]
    registered = [name for name in (*scorers, *single[1:]) if not (made / name).exists()]
    missing = [name for name in (*single, *scorers, *arms) if not (made / name).exists()]
    checkpoints = (
        AT_A_TIME * (experiment.compute.checkpoints_kept * 3 + 1) * shape.weights if missing else 0
    )  # and the best weights
    rows = 0 if (state / "tables" / "pair_weights.parquet").exists() else _rows(experiment) if raw is None else _COPIES * raw
    converted = shape.weights if experiment.base_model.model != "scratch" and "base_model" in missing else 0
    return _summed(
        {
            "models": len(missing) * shape.weights,
            "MLflow's registry": len(registered) * shape.weights,
            "checkpoints": checkpoints,
            "conversion or download": converted,
            "tables": rows,
            "tracking": _TRACKING if missing else 0,
        }
    )


def training_needed(experiment: Experiment, shape: Shape) -> int:
    """Memory of the largest training: weights, gradients, moments, models beside it, and what the backward pass keeps."""
    return max(_tuning(experiment, shape), _preferring(experiment, shape), _improving(experiment, shape))


def _tuning(experiment: Experiment, shape: Shape) -> int:
    base = experiment.base_model
    tokens = base.batch_size * (base.max_prompt_tokens + base.max_reply_tokens) // 2  # a batch's mean is half of the longest
    return 4 * shape.weights + tokens * _kept(shape) * shape.layers + _LOGITS if base.steps else 0


def _preferring(experiment: Experiment, shape: Shape) -> int:
    base, scorer = experiment.base_model, experiment.reward_model
    tokens = min(scorer.tokens_per_batch, scorer.pairs_per_step * (base.max_prompt_tokens + 2 * base.max_reply_tokens))
    learning = max(1, shape.layers - scorer.frozen_layers)
    trained = 0.02 if scorer.lora_rank else learning / shape.layers
    layers = 1 if experiment.compute.gradient_checkpointing else learning
    return int((1 + 3 * trained) * shape.weights) + tokens * _kept(shape) * layers


def _improving(experiment: Experiment, shape: Shape) -> int:
    """A policy, its reference, its reward model, a copy that samples; a step's rows, or the keys and values of a rollout."""
    base, grpo = experiment.base_model, experiment.grpo
    answers = grpo.group_size * grpo.max_new_tokens
    tokens = min(grpo.tokens_per_batch, grpo.prompts_per_step * (base.max_prompt_tokens + answers))
    rows = grpo.prompts_per_step * grpo.group_size * (base.max_prompt_tokens + grpo.max_new_tokens)
    cache = 2 * 4 * rows * shape.layers * shape.key_value_heads * shape.head_width
    return 7 * shape.weights + max(tokens * _kept(shape) * shape.layers + _LOGITS, cache)


def _kept(shape: Shape) -> int:
    """Bytes that a token keeps of a layer for the backward pass, in float32; under bfloat16 a quarter less."""
    return 4 * (_ACTIVATIONS * shape.width + 4 * shape.inner)


def memory_needed(experiment: Experiment, shape: Shape, prompts: int | None, on_gpu: bool) -> Need:
    """Memory of the machine at the peak: two trainings, or a training beside the search for neighbours.

    Args:
        prompts: how many there are, None if nobody knows yet.
        on_gpu: trainings take the GPU's memory, not the machine's.
    """
    limit = int(experiment.compute.max_memory_gib * 2**30)
    search = limit if prompts is None else min(limit, 4 * 4 * _WIDTH * prompts + (256 << 20))
    training = 0 if on_gpu else training_needed(experiment, shape)
    ranks = experiment.compute.ranks
    two = {"two trainings": AT_A_TIME * training * ranks, "their programs": (AT_A_TIME * ranks + 1) * _PROGRAM}
    one = {"the search for neighbours": search, "a training beside it": training, "their programs": (AT_A_TIME + 1) * _PROGRAM}
    return max(_summed(two), _summed(one), key=lambda need: need.bytes)


def planted_rows(experiment: Experiment) -> int | None:
    """How many rows there are, where all are planted."""
    planted, sources = experiment.planted, experiment.sources.enabled()
    if any(source.path != PLANTED for source in sources.values()):
        return None
    rows = {"hh_rlhf": planted.hh_rows, "ultrafeedback": planted.ultrafeedback_rows}
    return sum(rows.get(name, 3 * planted.stack_exchange_questions) for name in sources)


def _rows(experiment: Experiment) -> int:
    return _COPIES * _ROW * (planted_rows(experiment) or 0)


def _summed(parts: dict[str, int]) -> Need:
    return Need(sum(parts.values()), {name: size for name, size in parts.items() if size})

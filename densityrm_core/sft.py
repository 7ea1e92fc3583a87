"""Supervised fine-tuning of the base model on the chosen replies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from densityrm_core.attention import attention_kernel, resolve_kernel
from densityrm_core.base_models import as_hugging_face
from densityrm_core.hardware import pick_device
from densityrm_core.likelihood import log_probs
from densityrm_core.models import fit_to_tokenizer, load_causal_lm, load_tokenizer, scratch_model, width_of
from densityrm_core.packing import pack, say_if_padded
from densityrm_core.sampling import SystematicSampler
from densityrm_core.settings import BaseModelSettings, ComputeSettings
from densityrm_core.tokens import Codec
from densityrm_core.training.checkpoints import key_of
from densityrm_core.training.loop import Part, Plan, Watch, optimize
from densityrm_core.training.precision import Precision, computing, resolve_precision

_ON_CPU = ComputeSettings(device="cpu")


class TrainedBaseModel(NamedTuple):
    """A base model, and the precision that it was tuned in and that holds for all that starts from it."""

    model: Any
    codec: Codec
    precision: Precision

    @property
    def card(self) -> dict[str, Any]:
        """What its folder says of it."""
        return {"precision": self.precision}


def train_base_model(
    pairs: pl.DataFrame,
    settings: BaseModelSettings,
    watch: Watch,
    compute: ComputeSettings = _ON_CPU,
    cache: Path | None = None,
) -> TrainedBaseModel:
    """The policy every arm starts from: `settings.model`, or a small model built here, tuned on the chosen replies of `pairs`.

    Args:
        pairs: tables.PREFERENCE_PAIRS, the training split.
        compute: device and precision.
        cache: where a GGUF file or nanochat checkpoint is converted to, once; if not given, it is converted for this call only.

    Raises:
        ModelError: `settings.model` cannot be loaded.
    """
    rows = list(zip(pairs["context"].to_list(), pairs["chosen"].to_list(), strict=True))
    if settings.model == "scratch":
        texts = (text for context, chosen in rows for text in (*(turn["content"] for turn in context), chosen))
        model, tokenizer = scratch_model(texts, settings)
    else:
        with TemporaryDirectory() as passing:
            source = as_hugging_face(settings.model, cache or Path(passing))
            model, tokenizer = load_causal_lm(source), load_tokenizer(source)
        fit_to_tokenizer(model, tokenizer)
    device = pick_device(compute.device)
    precision = resolve_precision(compute.precision, device, width_of(model))
    trained = TrainedBaseModel(
        model.to(device), Codec(tokenizer, settings.max_prompt_tokens, settings.max_reply_tokens), precision
    )
    if settings.steps:
        with attention_kernel(compute.attention):
            _tune(trained, rows, settings, watch)
    return trained


def _tune(trained: TrainedBaseModel, rows: list[tuple[Any, str]], settings: BaseModelSettings, watch: Watch) -> None:
    model, codec, device = trained.model, trained.codec, str(trained.model.device)
    say_if_padded(model, watch.say)
    sequences = [(codec.prompt(context), [codec.reply(chosen)]) for context, chosen in rows]
    sampler = SystematicSampler(np.ones(len(sequences)), len(sequences), seed=0)

    def parts_at(step: int) -> Iterator[Part]:
        batch = pack([sequences[i] for i in sampler.batch(step, settings.batch_size)], device)
        with computing(trained.precision, device):
            likely = log_probs(model, batch)
        yield -likely.mean(), {}

    plan = Plan(settings.steps, settings.batch_size, settings.learning_rate, weight_decay=0.05)
    key = key_of(model, settings.model_dump_json(), trained.precision, resolve_kernel(device), str(sequences))
    optimize(model, plan, watch, parts_at, checkpoints=watch.checkpoints(key))

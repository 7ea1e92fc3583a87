"""Supervised fine-tuning of the base model on the chosen replies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from densityrm_core.base_models import as_hugging_face
from densityrm_core.checkpoints import key_of
from densityrm_core.likelihood import log_probs
from densityrm_core.models import fit_to_tokenizer, load_causal_lm, load_tokenizer, scratch_model
from densityrm_core.packing import pack
from densityrm_core.sampling import SystematicSampler
from densityrm_core.settings import BaseModelSettings
from densityrm_core.tokens import Codec
from densityrm_core.training import Part, Plan, Watch, optimize


def train_base_model(
    pairs: pl.DataFrame, settings: BaseModelSettings, watch: Watch, device: str = "cpu", cache: Path | None = None
) -> tuple[Any, Codec]:
    """The policy every arm starts from: `settings.model`, or a small model built here, tuned on the chosen replies of `pairs`.

    Args:
        pairs: tables.PREFERENCE_PAIRS, the training split.
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
    model.to(device)
    codec = Codec(tokenizer, settings.max_prompt_tokens, settings.max_reply_tokens)
    if settings.steps:
        _tune(model, codec, rows, settings, watch)
    return model, codec


def _tune(model: Any, codec: Codec, rows: list[tuple[Any, str]], settings: BaseModelSettings, watch: Watch) -> None:
    sequences = [(codec.prompt(context), [codec.reply(chosen)]) for context, chosen in rows]
    sampler = SystematicSampler(np.ones(len(sequences)), len(sequences), seed=0)

    def parts_at(step: int) -> Iterator[Part]:
        batch = pack([sequences[i] for i in sampler.batch(step, settings.batch_size)], model.device)
        yield -log_probs(model, batch).mean(), {}

    plan = Plan(settings.steps, settings.batch_size, settings.learning_rate, weight_decay=0.05)
    key = key_of(model, settings.model_dump_json(), str(sequences))
    optimize(model, plan, watch, parts_at, checkpoints=watch.checkpoints(key))

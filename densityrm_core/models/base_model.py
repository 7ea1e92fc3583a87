"""Supervised fine-tuning of the base model on the chosen replies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
import torch

from densityrm_core.hardware import pick_device
from densityrm_core.models.attention import attention_kernel, resolve_kernel
from densityrm_core.models.conversion import as_hugging_face
from densityrm_core.models.folders import fit_to_tokenizer, load_causal_lm, load_tokenizer, width_of
from densityrm_core.models.likelihood import log_probs
from densityrm_core.models.packing import pack, say_if_padded
from densityrm_core.models.tokens import CHAT_TEMPLATE, Codec
from densityrm_core.sampling import SystematicSampler
from densityrm_core.settings import BaseModelSettings, ComputeSettings
from densityrm_core.streams import stream_seed
from densityrm_core.training.checkpoints import key_of
from densityrm_core.training.loop import Part, Plan, Watch, optimize
from densityrm_core.training.precision import Precision, computing, resolve_precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")
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


def scratch_model(texts: Iterable[str], settings: BaseModelSettings) -> tuple[Any, PreTrainedTokenizerBase]:
    """A small untrained Qwen3 decoder and a byte-level BPE tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(_SPECIAL)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[0], pad_token=special[1], additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    head_size = 32
    config = Qwen3Config(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // head_size,
        num_key_value_heads=settings.hidden_size // head_size,
        head_dim=head_size,
        max_position_embeddings=max(512, settings.max_prompt_tokens + settings.max_reply_tokens),
        tie_word_embeddings=True,
        initializer_range=math.sqrt(0.4 / settings.hidden_size),  # SmallInit [Nguyen & Salazar 2019]; 0.02 is for wide models
        eos_token_id=bpe.token_to_id(special[0]),
        pad_token_id=bpe.token_to_id(special[1]),
        bos_token_id=None,
    )
    torch.manual_seed(stream_seed(0, "base model", "init"))
    return AutoModelForCausalLM.from_config(config), tokenizer


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

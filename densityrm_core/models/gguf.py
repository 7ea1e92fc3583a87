"""A GGUF file as a Hugging Face folder: weights in float32, and a tokenizer that splits text as the model was taught to."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from densityrm_core.models.folders import ModelError, first_line

# How a byte-level vocabulary's text is split before merging, `tokenizer.ggml.pre` of the file
_GPT2_SPLIT = (None, "default", "gpt-2", "gpt2")
_DIGIT_SPLIT = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # every digit alone, the rest as GPT-2


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into `folder`.

    Raises:
        ModelError: the file is broken or incomplete, or transformers cannot rebuild its architecture or its tokenizer.
    """
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(file))
        if metadata.get("tokenizer.ggml.eos_token_id") is None:
            raise ModelError("it names no end-of-sequence token (tokenizer.ggml.eos_token_id)")
        digits_alone = _splits_digits(metadata)
        with TemporaryDirectory() as alone:  # what else lies beside the file would be read too
            Path(alone, file.name).symlink_to(file.resolve())
            tokenizer, model, loading = _load(alone, file.name)
    except Exception as error:  # the readers raise many kinds; all mean that the file cannot be used
        raise _unusable(file, first_line(error)) from error
    lost = sorted(loading["missing_keys"]) + sorted(loading["mismatched_keys"])
    if lost:
        raise _unusable(file, f"{len(lost)} weights are missing or of another shape, {lost[0]} is the first")
    if digits_alone:
        tokenizer.backend_tokenizer.pre_tokenizer = _split_digits()
    model.hf_quantizer = None  # the weights are plain numbers now, which transformers refuses to save as long as this is set
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))


def _load(folder: str, name: str) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=name)
    plain = GgufConfig(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=plain, output_loading_info=True
    )
    return tokenizer, *loaded


def _splits_digits(metadata: dict[str, Any]) -> bool:
    """Whether text must be split into single digits, which transformers does not do; ModelError for rules that nobody knows."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = metadata.get("tokenizer.ggml.pre")
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and name not in (*_GPT2_SPLIT, *_DIGIT_SPLIT, *GGUF_PRE_TOKENIZER_SPLITS):
        raise ModelError(f"its tokenizer splits text by the rules of {name!r}, which transformers cannot rebuild")
    return byte_level and name in _DIGIT_SPLIT


def _split_digits() -> Any:
    from tokenizers import pre_tokenizers

    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([digits, gpt2])


def _unusable(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"{file}: cannot be converted: {reason}; check that the file is complete (its SHA-256), or name the Hugging Face folder "
        "or hub id that it was made from"
    )

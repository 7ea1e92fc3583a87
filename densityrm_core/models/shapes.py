"""The shape of a language model, known without loading it: its size, its precision and the time of its steps follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from densityrm_core.hardware import BASE_MODELS, located
from densityrm_core.models.gguf_header import read_header
from densityrm_core.settings import BaseModelSettings

_HEAD = 32  # width of an attention head of scratch models


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder: width, layers, tokens, and how its layers are divided."""

    width: int
    layers: int
    vocabulary: int
    heads: int
    key_value_heads: int
    head_width: int
    inner: int
    tied: bool = True

    @property
    def parameters(self) -> int:
        """Roughly how many weights it has; three matrices of the inner width, as Llama and its like have."""
        attention = 2 * self.width * self.head_width * (self.heads + self.key_value_heads)
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * layer + self.width * self.vocabulary * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """Bytes of its weights in float32."""
        return 4 * self.parameters


def shape_of(settings: BaseModelSettings, made: Path) -> Shape | None:
    """The shape of the base model; None where it is not known before the model is downloaded.

    Args:
        made: folder of the experiment's base model, which may not be there yet.
    """
    if (made / "config.json").is_file():
        return _of_folder(made)
    if settings.model == "scratch":
        width = settings.hidden_size
        heads = width // _HEAD
        return Shape(width, settings.layers, settings.vocab_size, heads, heads, _HEAD, 3 * width)
    return _of_place(settings.model)


def _of_place(model: str) -> Shape | None:
    path = Path(located(model, BASE_MODELS))
    if path.suffix.lower() == ".gguf":
        return _of_gguf(path) if path.is_file() else None
    if path.is_dir():
        metas = sorted(path.glob("meta_*.json"))
        return _of_folder(path) if (path / "config.json").is_file() else _of_nanochat(metas[-1]) if metas else None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError:  # no name that the hub could have
        return None
    return _of_folder(Path(cached).parent) if isinstance(cached, str) else None


def _of_folder(folder: Path) -> Shape | None:
    """By the names that Llama's and GPT-2's relatives use; None if it is broken, which its loader explains better."""
    try:
        whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _shape(cast(dict[str, Any], whole.get("text_config", whole)))
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _of_nanochat(meta: Path) -> Shape | None:
    try:
        return _shape({**json.loads(meta.read_text(encoding="utf-8"))["model_config"], "tie_word_embeddings": False})
    except (OSError, ValueError, KeyError):
        return None


def _shape(config: Mapping[str, Any]) -> Shape:
    def first(*names: str, otherwise: int = 0) -> int:
        return next((int(config[name]) for name in names if config.get(name)), otherwise)

    width, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head", otherwise=1)
    layers = first("num_hidden_layers", "n_layer")
    if not width or not layers:
        raise KeyError("hidden_size")
    return Shape(
        width,
        layers,
        first("vocab_size"),
        heads,
        first("num_key_value_heads", "n_kv_head", otherwise=heads),
        first("head_dim", otherwise=width // heads),
        first("intermediate_size", "n_inner", otherwise=4 * width),
        bool(config.get("tie_word_embeddings", True)),
    )


def _of_gguf(file: Path) -> Shape | None:
    try:
        header = read_header(file)
        name = header["general.architecture"]
        config = {key: header[f"{name}.{field}"] for key, field in _GGUF.items() if f"{name}.{field}" in header}
        return _shape({**config, "vocab_size": header["tokenizer.ggml.tokens"]})
    except (OSError, ValueError, KeyError):
        return None


_GGUF = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
}

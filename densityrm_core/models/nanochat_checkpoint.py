"""A checkpoint of nanochat (github.com/karpathy/nanochat, its first format, October 2025) as a Hugging Face folder.

The checkpoint is `model_<step>.pt`, a state dict, and `meta_<step>.json`, whose `model_config` has its six sizes. The tokenizer
must be a `tokenizer.json`: nanochat pickles it otherwise, and nothing is ever unpickled here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densityrm_core.models.folders import ModelError, first_line

# nanochat's render_conversation: a system message opens the first user turn
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{% if m['role'] == 'assistant' %}{{ '<|assistant_start|>' + m['content'] + '<|assistant_end|>' }}"
    "{% else %}{{ '<|user_start|>' + (system if loop.first else '') + m['content'] + '<|user_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)
_BOS, _EOS = "<|bos|>", "<|assistant_end|>"
_TURNS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>")
_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_BLOCK = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_EXPORT = (
    "where nanochat runs, with transformers and blobfile installed, write it as tokenizer.json: "
    "python -c 'from nanochat.tokenizer import get_tokenizer; "
    "from transformers.integrations.tiktoken import convert_tiktoken_to_fast; "
    'convert_tiktoken_to_fast(get_tokenizer().enc, "tokenizer")\'; then copy it beside the checkpoint'
)


@dataclass(frozen=True)
class Checkpoint:
    """The files that a nanochat model is made of."""

    weights: Path
    meta: Path
    tokenizer: Path

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """All of them."""
        return self.weights, self.meta, self.tokenizer


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of the highest step in `folder`; None if there is none.

    Raises:
        ModelError: its meta file or its tokenizer is missing.
    """
    steps = {int(found[1]): file for file in folder.glob("model_*.pt") if (found := re.fullmatch(r"model_(\d+)\.pt", file.name))}
    if not steps:
        return None
    weights = steps[max(steps)]
    meta = weights.with_name(f"meta_{weights.stem.removeprefix('model_')}.json")
    if not meta.is_file():
        raise ModelError(f"{meta}: is missing; nanochat writes it beside {weights.name}, copy both")
    return Checkpoint(weights, meta, _tokenizer_of(folder.resolve()))


def convert_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the model, in float32, and the tokenizer of a checkpoint into `folder`.

    Raises:
        ModelError: it cannot be read, its parts do not fit each other, or it has parts that came to nanochat later.
    """
    sizes = _sizes(checkpoint.meta)
    tokenizer = _load_tokenizer(checkpoint.tokenizer, sizes["vocab_size"])
    model = _empty_model(sizes, tokenizer)
    weights = _renamed(_state(checkpoint.weights), sizes, checkpoint.weights)
    for name, parameter in model.state_dict().items():
        if weights[name].shape != parameter.shape:
            raise ModelError(
                f"{checkpoint.weights}: its {name} is of shape {tuple(weights[name].shape)}, where {checkpoint.meta.name} "
                f"means {tuple(parameter.shape)}; the two files are not of one model"
            )
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))


def _tokenizer_of(folder: Path) -> Path:
    """nanochat keeps one tokenizer for all its models: <base>/tokenizer beside <base>/<phase>_checkpoints/<model>."""
    places = [folder, folder / "tokenizer", folder.parent / "tokenizer", folder.parent.parent / "tokenizer"]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
    pickled = [place for place in places if (place / "tokenizer.pkl").is_file()]
    if pickled:
        raise ModelError(f"{pickled[0] / 'tokenizer.pkl'}: is a pickle, which could run any code and is never loaded; {_EXPORT}")
    raise ModelError(f"{folder}: has no tokenizer.json, nor has a folder `tokenizer` in it or above it; {_EXPORT}")


def _sizes(meta: Path) -> dict[str, int]:
    try:
        config = json.loads(meta.read_text(encoding="utf-8"))["model_config"]
        unknown, missing = sorted(set(config) - set(_SIZES)), sorted(set(_SIZES) - set(config))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{meta}: cannot be read ({first_line(error)}); nanochat writes it, with a model_config") from error
    if unknown:
        raise _newer(meta, "model_config", unknown)
    if missing or not all(type(size) is int and size > 0 for size in config.values()):
        raise ModelError(f"{meta}: its model_config must have {', '.join(_SIZES)} as whole numbers above 0")
    return config


def _load_tokenizer(file: Path, vocabulary: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ModelError(f"{file}: cannot be read as a tokenizer ({first_line(error)}); {_EXPORT}") from error
    lacking = [token for token in (_BOS, *_TURNS, _EOS) if token not in tokenizer.get_vocab()]
    if lacking:
        raise ModelError(f"{file}: lacks {', '.join(lacking)}; it is not the tokenizer of a nanochat model")
    if len(tokenizer) != vocabulary:
        raise ModelError(f"{file}: has {len(tokenizer)} tokens, the model {vocabulary}; it is the tokenizer of another model")
    tokenizer.add_special_tokens({"bos_token": _BOS, "eos_token": _EOS, "additional_special_tokens": list(_TURNS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _empty_model(sizes: dict[str, int], tokenizer: Any) -> Any:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = NanoChatConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["n_embd"],
        intermediate_size=4 * sizes["n_embd"],
        num_hidden_layers=sizes["n_layer"],
        num_attention_heads=sizes["n_head"],
        num_key_value_heads=sizes["n_kv_head"],
        max_position_embeddings=sizes["sequence_len"],
        rms_norm_eps=torch.finfo(torch.float32).eps,  # torch's default, which nanochat uses
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        final_logit_softcapping=15.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype=torch.float32,
    )
    with torch.device("meta"):
        return NanoChatForCausalLM(config)


def _state(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return {str(name).removeprefix("_orig_mod."): tensor.float() for name, tensor in state.items()}
    except Exception as error:  # torch and pickle raise many kinds; all mean that this is no state dict of plain tensors
        raise ModelError(
            f"{file}: cannot be read as a state dict of tensors ({first_line(error)}); copy the file again from where nanochat "
            "wrote it"
        ) from error


def _renamed(state: dict[str, Tensor], sizes: dict[str, int], file: Path) -> dict[str, Tensor]:
    names = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for layer in range(sizes["n_layer"]):
        names |= {f"transformer.h.{layer}.{a}.weight": f"model.layers.{layer}.{b}.weight" for a, b in _BLOCK.items()}
    unknown, missing = state.keys() - names.keys(), names.keys() - state.keys()
    if unknown:
        raise _newer(file, "state dict", {re.sub(r"\.\d+\.", ".*.", name) for name in unknown})
    if missing:
        raise ModelError(f"{file}: lacks {len(missing)} weights, {min(missing)} for one; its meta file must be of another model")
    renamed = {names[name]: tensor for name, tensor in state.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        renamed[name] = renamed[name][: sizes["vocab_size"]]  # rows beyond are filling, which nanochat never reads
    return renamed


def _newer(file: Path, part: str, names: Iterable[str]) -> ModelError:
    return ModelError(
        f"{file}: its {part} has {', '.join(sorted(names))}, which came to nanochat after its first format and which the "
        "NanoChat class of transformers cannot hold; use a checkpoint without them (nanochat of October 2025)"
    )

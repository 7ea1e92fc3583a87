"""Load, build and save models and tokenizers as Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from densityrm_core.models.tokens import CHAT_TEMPLATE, Codec
from densityrm_core.settings import ComputeSettings
from densityrm_core.streams import stream_seed
from densityrm_core.training.precision import Precision, resolve_precision
from densityrm_core.training.ranks import SOLO, Ranks, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = "densityrm.json"
_NO_LIMIT = 10**9  # tokenizers without a limit say 10^30


class ModelError(ValueError):
    """A model cannot be loaded or used; the message says which and what to do."""


def load_causal_lm(source: str | Path, device: str = "cpu") -> Any:
    """A `…ForCausalLM` from a folder or hub id, in float32, without dropout.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, source, device)


def load_reward_model(source: str | Path, device: str = "cpu") -> Any:
    """A `…ForSequenceClassification` with one label from a folder or hub id, in float32, without dropout."""
    return _load(_classifier(), source, device)


def new_reward_model(base: str | Path, seed: int, device: str = "cpu") -> Any:
    """The base model with a fresh scalar head: weights ~ N(0, 1/hidden), so that first rewards are of order one at most."""
    torch.manual_seed(stream_seed(seed, "reward model", "init"))
    model = _load(_classifier(), base, device, num_labels=1)
    with torch.no_grad():
        head = torch.empty(model.score.weight.shape).normal_(std=1 / (model.config.get_text_config().hidden_size + 1))
        model.score.weight.copy_(head)
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a padding token of its own and a chat template.

    Raises:
        ModelError: it cannot be loaded, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{source}: its tokenizer has no end-of-sequence token, which closes every reply; name one of its tokens in "
            f'{source}/tokenizer_config.json, as in "eos_token": "<|endoftext|>"'
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


def fit_to_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model an embedding for every token, and the tokenizer's padding token in place of its own.

    A new embedding is the mean of the old ones, so that a new token is never likely [Hewitt 2021]. A model whose padding token
    is also its end of sequence would never train the embedding of that token: torch gives padding no gradient.
    """
    embeddings = model.get_input_embeddings()
    old = embeddings.num_embeddings
    if len(tokenizer) > old:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    layer.weight[old:] = layer.weight[:old].mean(0)
    model.config.pad_token_id = model.get_input_embeddings().padding_idx = tokenizer.pad_token_id


def load_codec(folder: str | Path) -> Codec:
    """The codec a model folder was trained with."""
    card = read_card(folder)
    return Codec(load_tokenizer(folder), int(card["max_prompt_tokens"]), int(card["max_reply_tokens"]))


def save_model(model: Any, codec: Codec, folder: Path, card: dict[str, Any], ranks: Ranks = SOLO) -> None:
    """Weights (safetensors), config, tokenizer, and a card of how the model came to be (densityrm.json).

    Where weights are sharded, every rank must call this; the first one writes.
    """
    fit_to_tokenizer(model, codec.tokenizer)
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    if not ranks.first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=weights)
    codec.tokenizer.save_pretrained(str(folder))
    limits = {"max_prompt_tokens": codec.max_prompt_tokens, "max_reply_tokens": codec.max_reply_tokens}
    (folder / CARD).write_text(json.dumps({**limits, **card}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_card(folder: str | Path) -> dict[str, Any]:
    """What `save_model` noted about a model."""
    path = Path(folder) / CARD
    if not path.exists():
        raise ModelError(f"{path} is missing: {folder} was not written by densityrm")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}; write the folder again") from error


def width_of(model: Any) -> int:
    """Hidden size of a model, by which `auto` decides its precision."""
    return int(model.config.get_text_config().hidden_size)


def precision_of(base: str | Path, compute: ComputeSettings, device: str) -> Precision:
    """The precision of whatever is trained from a base model: as set, else the one that the base model itself was made in.

    So it is one for all reward models, policies and seeds, wherever each is trained. Of a base model without such a record the
    rule decides, see `resolve_precision`.
    """
    recorded = read_card(base).get("precision") if compute.precision == "auto" else None
    width = int(read_config(base).get_text_config().hidden_size)
    return resolve_precision(recorded or compute.precision, device, width)


def common_precision(folders: Iterable[str | Path]) -> Precision | None:
    """That in which the models in these folders were trained; None where none says so.

    Raises:
        ModelError: two were trained in different precisions, which no comparison may mix.
    """
    recorded = {str(folder): read_card(folder).get("precision") for folder in folders if Path(folder, CARD).exists()}
    found = {precision: folder for folder, precision in recorded.items() if precision}
    if len(found) > 1:
        (one, folder), (other, further) = list(found.items())[:2]
        raise ModelError(
            f"{folder} was trained in {one}, {further} in {other}: models of two precisions are not compared; materialize one of "
            "them again, or set compute.precision"
        )
    return next(iter(found), None)


def read_config(folder: str | Path) -> Any:
    """The config of a Hugging Face folder, without its weights.

    Raises:
        ModelError: there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    if not Path(folder, "config.json").is_file():
        raise ModelError(f"{folder} is no model: there is no config.json; give the folder of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: its config.json cannot be read: {first_line(error)}") from error


def most_tokens(tokenizer: PreTrainedTokenizerBase, config: Any, otherwise: int) -> int:
    """Tokens of prompt and reply together that both the tokenizer and the model allow; `otherwise` where neither says."""
    limits = (tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None))
    return int(min((limit for limit in limits if limit and 0 < limit < _NO_LIMIT), default=otherwise))


def _classifier() -> Any:
    from transformers import AutoModelForSequenceClassification

    from densityrm_core.models.nanochat_classifier import register_classifier

    register_classifier()
    return AutoModelForSequenceClassification


def _load(cls: Any, source: str | Path, device: str, **config: Any) -> Any:
    try:
        model = cls.from_pretrained(str(source), dtype=torch.float32, attn_implementation="sdpa", **config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source}: cannot be loaded as a {cls.__name__}: {first_line(error)}") from error
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(device)


def first_line(error: Exception) -> str:
    """What an error of a library says first; the rest is advice to programmers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

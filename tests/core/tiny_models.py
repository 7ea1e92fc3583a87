"""Models of a few thousand weights, made in a moment."""

from pathlib import Path

import torch

from densityrm_core.models.base_model import scratch_model
from densityrm_core.models.folders import new_reward_model, save_model
from densityrm_core.models.tokens import Codec
from densityrm_core.settings import BaseModelSettings

TEXTS = ["How do I fix my bicycle?", "Sure, oil it. Then ride it.", "No. Why would you ask that?", "Is a tomato a fruit?"]
MAX_PROMPT_TOKENS, MAX_REPLY_TOKENS = 48, 32


def tiny_language_model(folder: Path) -> Path:
    """An untrained language model with its tokenizer; small embeddings, tied to the head, make its predictions nearly uniform."""
    settings = BaseModelSettings(vocab_size=300, hidden_size=32, layers=2)
    model, tokenizer = scratch_model(TEXTS * 5, settings)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.02 / model.config.initializer_range)
    save_model(model, Codec(tokenizer, MAX_PROMPT_TOKENS, MAX_REPLY_TOKENS), folder, {})
    return folder


def tiny_reward_model(folder: Path, base: Path | None = None) -> Path:
    """A reward model with a random head on `base`."""
    from densityrm_core.models.folders import load_codec

    base = base or tiny_language_model(folder / "base")
    save_model(new_reward_model(base, seed=0), load_codec(base), folder / "rm", {})
    return folder / "rm"

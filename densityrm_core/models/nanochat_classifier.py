"""The reward model of a nanochat policy: transformers has nanochat's decoder, but no classifier on top of it."""

from __future__ import annotations

from transformers import AutoModelForSequenceClassification, NanoChatConfig, NanoChatPreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class NanoChatForSequenceClassification(GenericForSequenceClassification, NanoChatPreTrainedModel):
    """nanochat's decoder and a linear head on its last hidden state, read at the last token that is not padding."""


def register_classifier() -> None:
    """Let `AutoModelForSequenceClassification` load nanochat's, too."""
    AutoModelForSequenceClassification.register(NanoChatConfig, NanoChatForSequenceClassification, exist_ok=True)

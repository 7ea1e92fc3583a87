"""The work that is given to TRL and to us alike: real pairs as ids, and models of random weights."""

import argparse
import gzip
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from densityrm_core.hardware import fast_bfloat16, processor_name

TOKENIZER_SIZE = 8192
EOS, PAD = "<|eos|>", "<|pad|>"
# model type, layers, width, heads, key-value heads, width of the MLP, vocabulary
SHAPES = {
    "5m": ("qwen3", 4, 256, 4, 4, 768, 8192),
    "47m": ("qwen3", 12, 576, 9, 3, 1536, 8192),
    "135m": ("llama", 30, 576, 9, 3, 1536, 49152),  # SmolLM2-135M
}

Texts = tuple[str, str]
IdPair = tuple[list[int], list[int]]


def arguments(description: str | None, sides: Sequence[str], steps: Mapping[str, int]) -> argparse.Namespace:
    """What a benchmark beside TRL is asked: model, precision, threads, steps and sides. Exits with a message without TRL.

    Args:
        steps: timed steps of each model, unless the command says otherwise.

    Returns:
        with `precision` resolved to bf16, where this machine multiplies it fast, or fp32; and `steps` to a number.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="5m", choices=SHAPES)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help=f"timed steps, by default {steps}")
    parser.add_argument("--sides", nargs="+", default=sides, choices=sides)
    asked = parser.parse_args()
    if not find_spec("trl"):
        sys.exit("TRL is not installed: make bench installs it, or pip install -c constraints.txt -e '.[bench]'")
    if asked.precision == "auto":
        asked.precision = "bf16" if fast_bfloat16() else "fp32"
    asked.steps = asked.steps or steps[asked.model]
    return asked


def conditions(asked: argparse.Namespace) -> dict[str, Any]:
    """What a measurement holds for, as its last line tells it."""
    return {**{name: getattr(asked, name) for name in ("model", "precision", "threads", "steps")}, "cpu": processor_name()}


def real_pairs() -> list[Texts]:
    """Whole conversations (chosen, rejected) of the harmless-base test split of HH-RLHF, in a fixed random order.

    Exits with a message where the rows are absent: folder `DENSITYRM_TEST_DATA`, else ../shared/data beside the repository.
    """
    folder = Path(os.environ.get("DENSITYRM_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = folder / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    if not path.exists():
        sys.exit(f"{path} is absent: set DENSITYRM_TEST_DATA to the folder that holds hh-rlhf/harmless-base/test.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [(row["chosen"], row["rejected"]) for row in rows if row["chosen"] != row["rejected"]]
    random.Random(0).shuffle(pairs)
    return pairs


def new_tokenizer(pairs: list[Texts]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the pairs' own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def tokenize(pairs: list[Texts], tokenizer: PreTrainedTokenizerFast, longest: int) -> list[IdPair]:
    """The pairs of which neither side is longer than `longest` tokens, end-of-sequence included."""
    sides = (tokenizer([pair[side] + EOS for pair in pairs])["input_ids"] for side in (0, 1))
    return [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) <= longest]


def new_config(shape: str, tokenizer: PreTrainedTokenizerFast, **further: Any) -> Any:
    """Configuration of a model of SHAPES."""
    from transformers import AutoConfig

    kind, layers, width, heads, kv_heads, mlp, vocabulary = SHAPES[shape]
    return AutoConfig.for_model(
        kind,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **further,
    )


def new_reward_model(shape: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A reward model of random weights, float32, the same ones whoever asks."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(new_config(shape, tokenizer, num_labels=1))


def new_language_model(shape: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A language model of random weights, float32, the same ones whoever asks."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(new_config(shape, tokenizer))


def short_prompts(pairs: list[Texts], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Distinct conversations up to where the assistant speaks, of 48 to 80 tokens."""
    mark = "\n\nAssistant:"
    prompts = list(dict.fromkeys(chosen[: chosen.rfind(mark) + len(mark)] for chosen, _ in pairs))
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    return [prompt for prompt, length in zip(prompts, lengths, strict=True) if 48 <= length <= 80]

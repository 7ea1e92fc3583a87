"""From which width on bfloat16 pays on this processor: a reward model's step and a rollout, in float32 and in bfloat16.

For each width a model of three layers and random weights does the same work in both precisions, interleaved; medians. Short rows
are those of the planted world, long ones those of real dialogues, and no two batches have the same shape: a bfloat16 product of a
new shape is compiled first, on CPUs. The last line is a JSON object: `ratio` by width (float32
seconds / bfloat16 seconds of `step_short`, `step_long` and `rollout`), `device_kind`, `cpu` and `threads`. The threshold of
`densityrm_core.training.precision` was read off such runs, which stand beside it.
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3Config

from benchmarks.measure import interleaved
from densityrm_core.hardware import device_kind, processor_name
from densityrm_core.models.packing import pack, rewards
from densityrm_core.policies.decoding import Decoding
from densityrm_core.policies.rollout import sample_completions
from densityrm_core.reward_models.loss import bradley_terry_loss
from densityrm_core.training.precision import Precision, computing

WIDTHS, LAYERS, VOCABULARY = (128, 192, 256, 384, 576, 768), 3, 1024
SHORT, LONG = (64, 24, 12), (16, 113, 45)  # pairs, mean tokens of the prompt, of a reply
PROMPTS, GROUP, NEW_TOKENS = 8, 8, 24
WARM_UP = 2
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=7)
    asked = arguments.parse_args()
    torch.set_num_threads(asked.threads)
    ratios: dict[int, dict[str, float]] = {}
    for width in asked.widths:
        ratios[width] = measure(width, asked.rounds)
        print(f"width {width:>5}  " + "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios[width].items()), flush=True)
    print(json.dumps({"ratio": ratios, "device_kind": device_kind("cpu"), "cpu": processor_name(), "threads": asked.threads}))


def measure(width: int, rounds: int) -> dict[str, float]:
    """float32 seconds / bfloat16 seconds of every kind of work."""
    config = _config(width)
    torch.manual_seed(0)
    scorer = AutoModelForSequenceClassification.from_config(config)
    policy = AutoModelForCausalLM.from_config(config).eval()
    count = WARM_UP + rounds
    work: dict[str, dict[str, Callable[[], object]]] = {
        "step_short": {name: _steps(scorer, name, count, *SHORT) for name in PRECISIONS},
        "step_long": {name: _steps(scorer, name, count, *LONG) for name in PRECISIONS},
        "rollout": {name: _rollouts(policy, name, count) for name in PRECISIONS},
    }
    ratios: dict[str, float] = {}
    for name, ways in work.items():
        interleaved(ways, WARM_UP)
        taken = interleaved(ways, rounds)
        ratios[name] = round(taken["fp32"] / taken["bf16"], 2)
    return ratios


def _config(width: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        num_labels=1,
    )


def _steps(model: Any, precision: Precision, count: int, pairs: int, prompt: int, reply: int) -> Callable[[], None]:
    """A step on another batch at every call."""
    draw = random.Random(1)
    batches = iter(
        [pack([(_ids(draw, prompt), [_ids(draw, reply), _ids(draw, reply)]) for _ in range(pairs)]) for _ in range(count)]
    )

    def run() -> None:
        with computing(precision, "cpu"):
            chosen, rejected = rewards(model, next(batches)).view(-1, 2).unbind(1)
        bradley_terry_loss(chosen, rejected).backward()
        model.zero_grad()

    return run


def _rollouts(policy: Any, precision: Precision, count: int) -> Callable[[], None]:
    """A rollout of other prompts at every call."""
    draw, sampled = random.Random(2), copy.deepcopy(policy).bfloat16() if precision == "bf16" else policy
    prompts = iter([[_ids(draw, SHORT[1]) for _ in range(PROMPTS)] for _ in range(count)])

    def run() -> None:
        sample_completions(sampled, next(prompts), 0, GROUP, Decoding(NEW_TOKENS, 1.0), 0)

    return run


def _ids(draw: random.Random, mean: int) -> list[int]:
    """Half to one and a half times as many random tokens."""
    return [draw.randrange(1, VOCABULARY) for _ in range(draw.randrange(mean // 2, mean + mean // 2))]


if __name__ == "__main__":
    main()

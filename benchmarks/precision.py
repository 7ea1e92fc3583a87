"""From which width on bfloat16 pays on this processor: a reward model's step and a rollout, in float32 and in bfloat16.

For each width a model of three layers and random weights does the same work in both precisions, interleaved; medians. Short rows
are those of the planted world, long ones those of real dialogues. The last line is a JSON object: `ratio` by width (float32
seconds / bfloat16 seconds of `step_short`, `step_long` and `rollout`), `device_kind`, `cpu` and `threads`. The threshold of
`densityrm_core.precision` was read off such runs, which stand beside it.
"""

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3Config

from benchmarks.measure import interleaved
from densityrm_core.decoding import Decoding
from densityrm_core.hardware import device_kind, processor_name
from densityrm_core.losses import bradley_terry_loss
from densityrm_core.packing import pack, rewards
from densityrm_core.precision import computing
from densityrm_core.rollout import sample_completions

WIDTHS, LAYERS, VOCABULARY = (64, 128, 192, 256, 384, 576, 768), 3, 1024
SHORT, LONG = (64, 24, 12), (16, 113, 45)  # pairs, tokens of the prompt, tokens of each reply
PROMPTS, GROUP, NEW_TOKENS = 8, 8, 24


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
    policies = {False: AutoModelForCausalLM.from_config(config).eval()}
    policies[True] = copy.deepcopy(policies[False]).to(torch.bfloat16)
    work: dict[str, Callable[[bool], object]] = {
        "step_short": _step(scorer, *SHORT),
        "step_long": _step(scorer, *LONG),
        "rollout": lambda bfloat16: _rollout(policies[bfloat16]),
    }
    ratios: dict[str, float] = {}
    for name, run in work.items():
        ways = {"fp32": lambda run=run: run(False), "bf16": lambda run=run: run(True)}
        interleaved(ways, 2)
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


def _step(model: Any, pairs: int, prompt: int, reply: int) -> Callable[[bool], None]:
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=draw).tolist()

    batch = pack([(ids(prompt), [ids(reply), ids(reply)]) for _ in range(pairs)])

    def run(bfloat16: bool) -> None:
        with computing("bf16" if bfloat16 else "fp32", "cpu"):
            chosen, rejected = rewards(model, batch).view(-1, 2).unbind(1)
        bradley_terry_loss(chosen, rejected).backward()
        model.zero_grad()

    return run


def _rollout(policy: Any) -> None:
    prompts = [list(range(1, 25)) for _ in range(PROMPTS)]
    sample_completions(policy, prompts, 0, GROUP, Decoding(NEW_TOKENS, 1.0), 0)


if __name__ == "__main__":
    main()

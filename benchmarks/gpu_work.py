"""What the parts of `benchmarks.gpu_check` share: what is asked of them, small models of every kind, pairs, clocks."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    NanoChatConfig,
    Qwen2Config,
    Qwen3Config,
)

from densityrm_core.choices import Taken
from densityrm_core.models.nanochat_classifier import register_classifier
from densityrm_core.models.packing import Group, _takes_narrowing, why_padded

Figures = dict[str, Any]

VOCABULARY = 512
# Heads of 16: Triton's products have no smaller side, so FlexAttention refuses narrower heads on a GPU
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**_COMMON),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=16),
    "gpt2": GPT2Config(
        **{"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": None},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        bos_token_id=None,
    ),
    "nanochat": NanoChatConfig(**_COMMON),
}


class CheckError(AssertionError):
    """What was found is not what must hold."""


@dataclass(frozen=True)
class Check:
    """What every part is given.

    Args:
        device: where models run, cpu or cuda.
        small: whether only the road is to be walked, in seconds.
        data: real rows of the sources, None for the planted world.
        base: folder of a base model, or "": the packaged SmolLM2 where it is installed, else one of random weights.
        folder: for temporary files, one for each part.
        ends: when all is to be done, as time.time() counts.
    """

    device: str
    small: bool
    data: Path | None
    base: str
    folder: Path
    ends: float

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Part:
    """A part of the check: `run` gives its figures, or raises.

    Args:
        claims: branches that it must take on a GPU, as choice=branch.
        seconds: after which it is cut off.
    """

    name: str
    run: Callable[[Check], Figures]
    claims: tuple[str, ...] = ()
    seconds: float = 120


def missing(claims: Sequence[str], taken: Taken) -> list[str]:
    """The claims that did not come true."""
    return [claim for claim in claims if claim.partition("=")[2] not in taken.get(claim.partition("=")[0], set())]


def require(holds: bool, otherwise: str) -> None:
    """Fail the part unless something holds.

    Raises:
        CheckError: it does not.
    """
    if not holds:
        raise CheckError(otherwise)


def require_packed(model: Any) -> None:
    """Fail where a model would silently be computed on padded rows, or its last layer whole."""
    require(not why_padded(model), why_padded(model))
    require(_takes_narrowing(model), f"the last layer of {model.config.model_type} models is not narrowed")


def reward_model(config: Any, device: str = "cpu") -> Any:
    """Of random weights, the same ones on every device; embeddings large enough for rewards to differ."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    register_classifier()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).to(device)


def language_model(config: Any, device: str = "cpu") -> Any:
    """Of random weights, the same ones on every device."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(device)


def sized_config(check: Check) -> Any:
    """The 47 M weights that benchmarks train beside TRL; a few thousand where small."""
    width, layers, vocabulary = (64, 2, VOCABULARY) if check.small else (576, 12, 8192)
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4 if check.small else 9,
        num_key_value_heads=2 if check.small else 3,
        head_dim=16 if check.small else 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
    )


def random_pairs(count: int, prompt: int, reply: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[Group]:
    """Groups of two branches; lengths are drawn up to `prompt` and `reply`, a fifth of either at least."""
    draw = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(max(1, most // 5), most + 1, (1,), generator=draw))
        return torch.randint(1, vocabulary, (length,), generator=draw).tolist()

    return [(ids(prompt), [ids(reply), ids(reply)]) for _ in range(count)]


def padded_rows(groups: Sequence[Group], device: str) -> tuple[Tensor, Tensor]:
    """Every branch behind its prompt in a row of its own: ids and mask, as one gives them to a Hugging Face model."""
    rows = [[*prompt, *branch] for prompt, branches in groups for branch in branches]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    return ids, (ids != 0).long()


def gradient(model: torch.nn.Module, loss: Tensor) -> Tensor:
    """The gradient of all weights in one vector, float64 on the CPU."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])


def gap(one: Tensor, other: Tensor) -> float:
    """Length of the difference in lengths of `other`; both on any device."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm())


def seconds(check: Check, run: Callable[[], object], rounds: int, warm: int = 1) -> float:
    """Median seconds of a call, the device's work included."""
    for _ in range(warm):
        run()
    taken: list[float] = []
    for _ in range(rounds):
        _wait(check)
        started = time.perf_counter()
        run()
        _wait(check)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _wait(check: Check) -> None:
    if check.cuda:
        torch.cuda.synchronize()

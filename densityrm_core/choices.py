"""Every choice that depends on the machine: its branches, the setting that forces one, and the rule where none is forced.

The code that takes a branch says so by `take`, so that the card of a run can tell what was really taken, and so that a test can
claim a branch and be held to it (tests/test_choices.py). What stands here decides how fast something is computed, or in which
precision; precision is resolved once for a whole experiment and recorded with every model (`models.folders.precision_of`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

Branch = TypeVar("Branch", bound=str)


@dataclass(frozen=True)
class Choice:
    """Ways of which the code takes one.

    Args:
        setting: what forces a branch.
        branches: their names, as settings and cards spell them.
        rule: what decides where the setting says auto.
        on_gpu: the branches that only a machine with a GPU can take; `benchmarks.gpu_check` takes them.
    """

    setting: str
    branches: tuple[str, ...]
    rule: str
    on_gpu: tuple[str, ...] = ()


CHOICES = {
    "device": Choice("compute.device", ("cpu", "cuda"), "cuda where PyTorch sees a GPU", on_gpu=("cuda",)),
    "precision": Choice(
        "compute.precision",
        ("fp32", "bf16"),
        "bf16 for models of width 384 and more where the device multiplies it in hardware; the base model's holds for all",
    ),
    "attention": Choice("compute.attention", ("spans", "flex", "flex_eager"), "flex on cuda, spans elsewhere", on_gpu=("flex",)),
    "compile": Choice("compute.compile", ("off", "on"), "off"),
    "rollouts": Choice("compute.rollouts", ("transformers", "vllm"), "transformers", on_gpu=("vllm",)),
    "ranks": Choice(
        "compute.ranks", ("alone", "gloo", "nccl"), "one process; of several, nccl on cuda, gloo elsewhere", on_gpu=("nccl",)
    ),
    "encoder": Choice("embedding.dtype", ("float32", "bfloat16"), "bfloat16 where the device multiplies it in hardware"),
    "search": Choice(
        "compute.search_arithmetic",
        ("int8", "bfloat16", "float32"),
        "bfloat16 with AMX, int8 with AVX2, else float32; all find the same neighbours",
    ),
    "model files": Choice(
        "embedding.model, base_model.model", ("package", "elsewhere"), "an installed package that carries the model comes first"
    ),
    "terminal": Choice("DENSITYRM_TERMINAL", ("yes", "no"), "whether the stream is a terminal"),
}

Taken = dict[str, set[str]]
_listening: list[Taken] = []


def take(name: str, branch: Branch) -> Branch:
    """Say that a branch is taken; gives it back.

    Raises:
        KeyError: there is no such choice, or it has no such branch: give it a line in CHOICES.
    """
    if branch not in CHOICES[name].branches:
        raise KeyError(f"choice {name!r} has no branch {branch!r}")
    for heard in _listening:
        heard.setdefault(name, set()).add(branch)
    return branch


@contextlib.contextmanager
def noted() -> Generator[Taken]:
    """The branches that are taken within, by choice, in this process."""
    heard: Taken = {}
    _listening.append(heard)
    try:
        yield heard
    finally:
        _listening[:] = [other for other in _listening if other is not heard]

"""The 2 x 2 experiment as a table: which reward model trains a policy, and how its prompts are sampled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arm:
    name: str
    reward_model: Literal["rm_uniform", "rm_density"]
    prompts: Literal["uniform", "density"]

    @property
    def how(self) -> str:
        return "uniformly" if self.prompts == "uniform" else "by 1/density"


ARMS = {
    arm.name: arm
    for arm in (
        Arm("a", "rm_uniform", "uniform"),
        Arm("b", "rm_density", "uniform"),
        Arm("c", "rm_uniform", "density"),
        Arm("d", "rm_density", "density"),
    )
}

BEST_OF = "best_of_"  # how the names of policies begin that a reward model picks the replies of


def best_of_name(n: int, reward_model: str) -> str:
    """The base policy when a reward model, rm_uniform or rm_density, picks the best of n replies."""
    return f"{BEST_OF}{n}_{reward_model.removeprefix('rm_')}"


def is_best_of(policy: str) -> bool:
    return policy.startswith(BEST_OF)


def reward_model_of(policy: str) -> str | None:
    """The reward model a policy was trained on or is picked by; None for the base policy."""
    if is_best_of(policy):
        return "rm_" + policy.rsplit("_", 1)[1]
    return ARMS[policy].reward_model if policy in ARMS else None


def policy_title(policy: str) -> str:
    """A policy's name in tables and figures."""
    if is_best_of(policy):
        n, model = policy.removeprefix(BEST_OF).split("_", 1)
        return f"best of {n}, {model}"
    return policy if policy == "base" else f"arm {policy.upper()}"


def in_order(policies: Iterable[str]) -> list[str]:
    """Policies as they are shown: base, arms, best-of-n."""
    return sorted(set(policies), key=_place)


def _place(policy: str) -> tuple[bool, bool, bool, str]:
    return policy != "base", is_best_of(policy), is_best_of(policy) and reward_model_of(policy) == "rm_density", policy

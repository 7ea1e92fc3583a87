"""The 2 x 2 experiment as a table: which reward model trains a policy, and how its prompts are sampled."""

from __future__ import annotations

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

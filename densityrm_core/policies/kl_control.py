"""How far a policy may drift from its reference: an adaptive penalty, and a budget that ends a training."""

from __future__ import annotations

from typing import Any

from densityrm_core.settings import GrpoSettings

_WINDOW = 10  # steps over which the noisy estimate of one step is averaged
_GAIN, _CLIP = 0.1, 0.2


class KLControl:
    """Remembers the KL a sequence of the last steps, in nats, in the loop's memory, so that it survives an interruption."""

    def __init__(self, settings: GrpoSettings, memory: dict[str, list[Any]]) -> None:
        self._settings, self._memory = settings, memory
        memory.update({"divergence": [], "beta": [settings.kl_coefficient]})

    @property
    def beta(self) -> float:
        """Weight of the KL penalty of this step."""
        return float(self._memory["beta"][0])

    def observe(self, kl: float) -> None:
        """Take note of a step's KL, and adapt beta: beta (1 + 0.1 clip(kl / target - 1, +-0.2)) [Ziegler et al. 2019, 2.2]."""
        self._memory["divergence"] = [*self._memory["divergence"], kl][-_WINDOW:]
        if self._settings.kl_target is not None:
            error = min(max(kl / self._settings.kl_target - 1, -_CLIP), _CLIP)
            self._memory["beta"] = [self.beta * (1 + _GAIN * error)]

    @property
    def last(self) -> float:
        """The KL of the last step that was observed, 0 before the first."""
        return float(self._memory["divergence"][-1]) if self._memory["divergence"] else 0.0

    def past_budget(self) -> bool:
        """Whether the mean of the last 10 steps has passed the budget."""
        recent = self._memory["divergence"]
        return len(recent) == _WINDOW and not self.inside_budget(sum(recent) / len(recent))

    def inside_budget(self, kl: float) -> bool:
        """Whether there is no budget, or `kl` lies inside."""
        return self._settings.kl_budget is None or kl <= self._settings.kl_budget

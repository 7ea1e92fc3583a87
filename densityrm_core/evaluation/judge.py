"""The judge that compares arms: the planted rule where the truth is known, else a reward model of its own split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from densityrm_core.models.folders import ModelError
from densityrm_core.policies.rewards import RewardFunction
from densityrm_core.reward_models.scoring import load_scorer
from densityrm_core.settings import PlantedSettings
from densityrm_core.sources.planted import PlantedWorld

_RULE = "planted_rule.json"


def save_planted_judge(settings: PlantedSettings, folder: Path) -> dict[str, Any]:
    """Write the settings that define the planted rule, and the rule for a person to read, as a judge folder; return the rule."""
    folder.mkdir(parents=True, exist_ok=True)
    rule = PlantedWorld(settings).rule
    content = {"settings": settings.model_dump(mode="json"), "rule": rule}
    (folder / _RULE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return rule


def load_judge(folder: Path, device: str = "cpu") -> RewardFunction:
    """A function of contexts and as many replies to their rewards: by the planted rule, or by the folder's reward model.

    Raises:
        ModelError: the folder holds neither.
    """
    if (folder / _RULE).exists():
        settings = json.loads((folder / _RULE).read_text(encoding="utf-8"))["settings"]
        world = PlantedWorld(PlantedSettings.model_validate(settings))
        return lambda contexts, replies: [
            world.reward(context[0]["content"], reply) for context, reply in zip(contexts, replies, strict=True)
        ]
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} holds neither a planted rule nor a reward model; materialize rm_judge again")
    return load_scorer(folder, device).score

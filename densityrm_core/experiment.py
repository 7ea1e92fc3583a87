"""The experiment file as one validated, frozen object.

Below this module nothing reads environment variables; here three are read: `DENSITYRM_EXPERIMENT` (which file),
`DENSITYRM_HOME` (where all state lives) and whatever `${NAME}` a path in the file mentions.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from densityrm_core.settings import (
    PLANTED,
    BaseModelSettings,
    ComputeSettings,
    DensitySettings,
    EmbeddingSettings,
    EvaluationSettings,
    GrpoSettings,
    JudgeSettings,
    PairsSettings,
    PlantedSettings,
    RewardModelSettings,
    SamplingSettings,
    Settings,
    SourcesSettings,
    SplitSettings,
)

_NO_OUTCOME: Any = {
    "seeds": True,
    "arms": True,
    "name": True,
    "compute": {
        "parsers",
        "search_threads",
        "search_arithmetic",
        "checkpoint_every",
        "checkpoints_kept",
        "gradient_checkpointing",
        "shard",
    },
    "density": {"map_points"},
    "evaluation": {"sets"},
}


class ExperimentError(ValueError):
    """The experiment cannot be used as written; the message names the file, the key and what to do."""


class Experiment(Settings):
    """Everything that decides the outcome of an experiment, and nothing else."""

    name: str = Field(
        default="planted", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="folder of its tables and models under DENSITYRM_HOME"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1, description="replicates")
    arms: tuple[Literal["a", "b", "c", "d"], ...] = Field(default=("a", "b", "c"), min_length=1, description="GRPO arms to train")
    sources: SourcesSettings = SourcesSettings()
    planted: PlantedSettings = PlantedSettings()
    pairs: PairsSettings = PairsSettings()
    splits: SplitSettings = SplitSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    density: DensitySettings = DensitySettings()
    sampling: SamplingSettings = SamplingSettings()
    compute: ComputeSettings = ComputeSettings()
    base_model: BaseModelSettings = BaseModelSettings()
    reward_model: RewardModelSettings = RewardModelSettings()
    grpo: GrpoSettings = GrpoSettings()
    judge: JudgeSettings = JudgeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _is_consistent(self) -> Experiment:
        enabled = self.sources.enabled()
        if len(set(self.seeds)) != len(self.seeds) or len(set(self.arms)) != len(self.arms):
            raise ValueError("seeds and arms must not repeat")
        if not enabled:
            raise ValueError("sources: at least one source must be enabled")
        if self.judge.kind == "planted" and any(s.path != PLANTED for s in enabled.values()):
            raise ValueError("judge.kind: 'planted' knows the truth of planted sources only; real rows need 'model'")
        if self.judge.kind == "model" and self.splits.judge == 0:
            raise ValueError("splits.judge: must be above 0 when judge.kind is 'model'")
        return self

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever any setting that decides the outcome does; seeds and arms may be added freely."""
        settings = self.model_dump(mode="json", exclude=_NO_OUTCOME)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load_experiment(path: str | Path | None = None) -> Experiment:
    """Read an experiment file: `path`, else the one `DENSITYRM_EXPERIMENT` names, else the built-in planted experiment.

    Raises:
        ExperimentError: the file is missing, is not YAML, or a key is unknown, out of range or of the wrong type.
    """
    path = path or os.environ.get("DENSITYRM_EXPERIMENT")
    if not path:
        return Experiment()
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(
            f"{path}: cannot be read ({error.strerror}); DENSITYRM_EXPERIMENT names the experiment file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ExperimentError(f"{path}: must hold a mapping of settings, not {type(content).__name__}")
    try:
        return Experiment.model_validate(_expand(cast(dict[str, Any], content), path, ""))
    except ValidationError as error:
        raise ExperimentError(f"{path}: " + describe(error, Experiment)) from None


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line a fault: the key, what is wrong, the value given, and the key that was probably meant."""
    lines: list[str] = []
    for fault in error.errors():
        key = ".".join(filter(None, [prefix, *map(str, fault["loc"])]))
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(fault["loc"][-1]), _fields(model, fault["loc"][:-1]), n=1)
            lines.append(f"{key}: unknown key" + (f"; did you mean {close[0]!r}?" if close else ""))
        else:
            message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
            given = fault["input"] if isinstance(fault["input"], (str, int, float, bool, type(None))) else "..."
            lines.append(f"{key}: {message} (got {given!r})" if key else message)
    return "\n".join(lines)


def home() -> Path:
    """The folder that holds all state: `DENSITYRM_HOME`, else `.densityrm` in the working folder."""
    return Path(os.environ.get("DENSITYRM_HOME") or ".densityrm").absolute()


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def _expand(value: Any, path: Path, key: str) -> Any:
    """Replace ${NAME} in every string by the environment variable of that name."""
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value).items()
        return {k: _expand(v, path, f"{key}.{k}" if key else str(k)) for k, v in items}
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise ExperimentError(f"{path}: {key}: needs the environment variable {name}, which is not set")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", lookup, value)

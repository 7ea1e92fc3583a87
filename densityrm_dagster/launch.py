"""What a person may change at launch: the launchpad's fields, generated from the experiment's own sections, and their guard."""

from typing import Any, TypeVar, cast

import dagster as dg
from pydantic import Field, ValidationError, create_model

from densityrm_core.experiment import Experiment, describe
from densityrm_core.processes import exit_with_parent
from densityrm_core.settings import Settings
from densityrm_dagster.groups import REWARD_MODELS, arms

S = TypeVar("S", bound=Settings)


def launch_config(settings: Settings) -> type[dg.Config]:
    """A Dagster config class with the fields, descriptions and present values of `settings`.

    Ranges are left out on purpose: Dagster would check them inside the step and call the failure an engine error.
    `guarded_experiment` checks them before the first step of a run, `chosen` once more where they are used.
    """
    fields: dict[str, Any] = {
        name: (field.annotation, Field(default=getattr(settings, name), description=field.description))
        for name, field in type(settings).model_fields.items()
    }
    return create_model(f"{type(settings).__name__}Launch", __base__=dg.Config, **fields)


def chosen(config: dg.Config, settings: S) -> S:
    """The section with the values chosen at launch; a bad value is a failure that is not retried."""
    return cast(S, _validated(type(settings), config.model_dump(), "config"))


def guarded_experiment(experiment: Experiment) -> dg.ResourceDefinition:
    """The experiment as a resource that refuses a run whose launch config has a bad value, before any step computes."""
    sections = {
        "base_model": experiment.base_model,
        **dict.fromkeys((*REWARD_MODELS, "rm_judge"), experiment.reward_model),
        **dict.fromkeys(arms(experiment), experiment.grpo),
    }

    def check_and_give(context: dg.InitResourceContext) -> Experiment:
        exit_with_parent()
        run = context.run
        ops = cast(dict[str, Any], run.run_config.get("ops", {})) if run and isinstance(run.run_config, dict) else {}
        for name, section in sections.items():
            given = (ops.get(name) or {}).get("config") or {}
            _validated(type(section), {**section.model_dump(), **given}, f"ops.{name}.config")
        return experiment

    return dg.ResourceDefinition(check_and_give, description="The experiment file, validated.")


def _validated(section: type[Settings], values: dict[str, Any], place: str) -> Settings:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise dg.Failure(describe(error, section, place), allow_retries=False) from None

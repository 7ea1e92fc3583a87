"""Whether the models and the data that the experiment names can be found."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from densityrm_core.experiment import Experiment
from densityrm_core.hardware import BASE_MODELS, located
from densityrm_core.settings import PLANTED, SourceSettings
from densityrm_core.vectors.encoder_files import split_kind
from densityrm_dagster.doctor.lines import Line, first_line, green, red, size, yellow

if TYPE_CHECKING:
    from densityrm_core.models.shapes import Shape
    from densityrm_core.sources import SourceName
    from densityrm_core.sources.files import RawFile

_ANSWER_S = 3.0
_OFFLINE = "install the one that needs no network: pip install 'densityrm[offline]', or make venv in a checkout"


def encoder(experiment: Experiment, ask: bool) -> Line:
    """Args: ask, whether the hub may be asked for a model that is not on this machine."""
    kind, name = split_kind(experiment.embedding.model)
    if kind == "parquet":
        there = Path(name).is_file()
        missing = red(
            "encoder files", f"embedding.model: there is no file {name}", "write it, or name another in embedding.model"
        )
        return green("encoder files", f"vectors in {name}") if there else missing
    place = located(name)
    if place != name:
        return green("encoder files", f"{name}, from an installed package")
    hub_id = name if "/" in name or kind != "st" else f"sentence-transformers/{name}"
    return _model("encoder files", "embedding.model", hub_id, _OFFLINE, ask)


def base_model(experiment: Experiment, shape: "Shape | None", made: Path, ask: bool) -> Line:
    """Args: shape, if it is known; made, folder of the experiment's own, which may not be there yet."""
    name, subject, key = experiment.base_model.model, "base model", "base_model.model"
    numbers = "" if shape is None else f": width {shape.width}, {shape.layers} layers, {shape.parameters / 1e6:,.1f} M weights"
    if (made / "config.json").is_file():
        return green(subject, f"made already{numbers}")
    if name == "scratch":
        return green(subject, f"built from the training split{numbers}")
    place = located(name, BASE_MODELS)
    if place != name:
        return green(subject, f"{name}, from an installed package{numbers}")
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        missing = red(subject, f"{key}: there is no file {name}", "download the GGUF file and name it by its path")
        return green(subject, f"{name}{numbers}") if path.is_file() else missing
    if path.is_dir():
        if (path / "config.json").is_file() or any(path.glob("model_*.pt")):
            return green(subject, f"{name}{numbers}")
        remedy = "name a folder with a config.json, a nanochat checkpoint, or a GGUF file by its path"
        return red(subject, f"{key}: {name} holds no model", remedy)
    install = "make smollm2 installs it" if name in BASE_MODELS else "go online, or name a local folder or GGUF file"
    line = _model(subject, key, name, install, ask)
    return green(subject, line.found + numbers) if line.colour == "green" else line


def judge(experiment: Experiment) -> Line:
    """What compares the arms."""
    if experiment.judge.kind == "planted":
        return green("judge", "the planted rule, exact")
    return green("judge", f"a reward model of the judge split, {experiment.judge.steps:,} steps")


def sources(experiment: Experiment, raw: Path, ask: bool) -> tuple[list[Line], int | None]:
    """A line for every enabled source and set of pairs; and the bytes of their files, None where they are not all known."""
    found = [_source(name, settings, experiment, raw, ask) for name, settings in experiment.sources.enabled().items()]
    found += [_set(name, path, ask) for name, path in experiment.evaluation.sets.items()]
    sizes = [count for _, count in found]
    return [line for line, _ in found], None if None in sizes else sum(cast(list[int], sizes))


def _source(name: str, settings: SourceSettings, experiment: Experiment, raw: Path, ask: bool) -> tuple[Line, int | None]:
    if settings.path == PLANTED:
        return green(name, "planted, needs no file"), None
    from densityrm_core.sources import files_of

    read = lambda: files_of(cast("SourceName", name), settings, experiment.planted, raw)  # noqa: E731
    return _files(name, f"sources.{name}.path", settings.path, read, ask, f"or set sources.{name}.enabled: false")


def _set(name: str, path: str, ask: bool) -> tuple[Line, int | None]:
    from densityrm_core.sources.files import raw_files

    key = f"evaluation.sets.{name}"
    return _files(name, key, path, lambda: raw_files(path, key), ask, "or leave the set out")


def _files(
    subject: str, key: str, path: str, read: "Callable[[], list[RawFile]]", ask: bool, otherwise: str
) -> tuple[Line, int | None]:
    from densityrm_core.sources import SourceError
    from densityrm_core.sources.hub import HubUnreachableError, ask_for

    remote = "://" in path
    if remote and not ask:
        return green(subject, f"{path}, not looked up"), None
    try:
        if path.startswith("hf://"):
            ask_for(path, key, _ANSWER_S)
            return green(subject, f"{path}: the hub has it"), None
        files = read()
    except HubUnreachableError as error:
        why, advice, *_ = first_line(error).split("; ")
        return yellow(subject, why, f"{advice} in {key}, {otherwise}"), None
    except SourceError as error:
        return red(subject, first_line(error), f"correct {key} in the experiment file, {otherwise}"), None
    total = sum(file.size for file in files)
    return green(subject, f"{len(files):,} file{'s' * (len(files) > 1)}, {size(total)}, in {path}"), total


def _model(subject: str, key: str, name: str, otherwise: str, ask: bool) -> Line:
    """A folder, or a model of the hub: in its cache, or to be had from it."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if Path(name).is_dir():
        return green(subject, f"the folder {name}")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return red(subject, f"{key}: there is no folder {name}", f"correct {key} in the experiment file")
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return green(subject, f"{name}, in the hub's cache on this machine")
    if constants.HF_HUB_OFFLINE:
        return red(subject, f"{key}: {name} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it", otherwise)
    if not ask:
        return green(subject, f"{name}, to be downloaded")
    try:
        HfApi().model_info(name, timeout=_ANSWER_S)
    except HfHubHTTPError as error:
        return red(subject, f"{key}: the hub does not give {name} ({first_line(error)})", f"correct {key}, or {otherwise}")
    except (HTTPError, OSError) as error:
        return red(
            subject, f"{key}: {name} is not on this machine, and the hub cannot be reached ({first_line(error)})", otherwise
        )
    return green(subject, f"{name}, to be downloaded from the hub")

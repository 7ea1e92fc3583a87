"""All checks of the selected experiment on this machine."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from densityrm_core.experiment import Experiment
from densityrm_core.models.shapes import shape_of
from densityrm_dagster.doctor.lines import COLOURS, Colour, Line, Section, green
from densityrm_dagster.doctor.material import base_model, encoder, judge, sources
from densityrm_dagster.doctor.servers import ports, state
from densityrm_dagster.doctor.versions import versions

if TYPE_CHECKING:
    from densityrm_core.planning.estimate import Estimate

_PINNED = Path(__file__).parents[2] / "constraints.txt"
_BRIEFLY_S = 0.5  # for a server to answer, where a run waits for it
_UNKNOWN = "not known before the base model is downloaded"


@dataclass(frozen=True)
class Examination:
    """What was found, and the time that the experiment takes, if it was estimated."""

    sections: Sequence[Section]
    time: "Estimate | None" = None

    @property
    def lines(self) -> list[Line]:
        """Of all sections."""
        return [line for section in self.sections for line in section.lines]

    @property
    def worst(self) -> Colour:
        """The colour of the worst line."""
        return max((line.colour for line in self.lines), key=COLOURS.index)

    @property
    def summary(self) -> str:
        """The whole in a sentence."""
        takes = f"takes {self.time}" if self.time else ""
        faulty = [[line.subject for line in self.lines if line.colour == colour] for colour in ("red", "yellow")]
        counts = [f"{len(names)} {colour}" for names, colour in zip(faulty, ("red", "yellow"), strict=True) if names]
        if not counts:
            return "Everything this experiment needs is here" + (f"; it {takes}." if takes else ".")
        return f"{', '.join(counts)}: {', '.join(faulty[0] + faulty[1])}" + (f"; the experiment {takes}" if takes else "") + "."


def examine(experiment: Experiment, root: Path, probe: bool = True) -> Examination:
    """Everything, in a few seconds.

    Args:
        root: DENSITYRM_HOME.
        probe: whether to estimate the time by some work.
    """
    from densityrm_dagster.doctor import machine, room
    from densityrm_dagster.tracking.training import set_up_torch

    set_up_torch(experiment.compute)
    made = root / experiment.name / "models" / "base_model"
    device, shape = machine.used_device(experiment.compute), shape_of(experiment.base_model, made)
    read, raw = sources(experiment, root / "raw", ask=True)
    models = [encoder(experiment, ask=True), base_model(experiment, shape, made, ask=True), judge(experiment)]
    time = None
    if shape is None:
        rooms = [green("disk and memory", _UNKNOWN)]
    else:
        on_gpu = device.startswith("cuda")
        rooms = [room.disk(experiment, shape, root, raw), room.memory(experiment, shape, root, on_gpu)]
        rooms += room.gpu_memory(experiment, shape) if on_gpu else []
    if probe and shape is not None:
        line, time = room.duration(experiment, shape, root, device, made)
        rooms.append(line)
    elif probe:
        rooms.append(green("time", f"not estimated: the shape is {_UNKNOWN}"))
    sections = [
        Section("This machine", machine.machine(device)),
        Section("What will be used", machine.choices(experiment, device, shape, made)),
        Section("Models and data", [*models, *read]),
        Section("Room and time", rooms),
        Section("Servers and state", [*state(root, experiment.name), *ports(root)]),
        Section("Software", versions(_PINNED)),
    ]
    return Examination(sections, time)


def warnings(experiment: Experiment, root: Path) -> list[Line]:
    """The red and yellow lines of what can be checked in a moment, without PyTorch and without network.

    Taken ports are yellow here: a run needs none, only its links do.
    """
    return [line for line in _quick(experiment, root) if line.colour != "green"]


def _quick(experiment: Experiment, root: Path) -> Iterator[Line]:
    from densityrm_core.hardware import driver_is_there
    from densityrm_dagster.doctor import machine, room

    yield from machine.impossible(experiment.compute, driver_is_there())
    made = root / experiment.name / "models" / "base_model"
    shape = shape_of(experiment.base_model, made)
    read, raw = sources(experiment, root / "raw", ask=False)
    yield encoder(experiment, ask=False)
    yield base_model(experiment, shape, made, ask=False)
    yield from read
    if shape is not None:
        yield room.disk(experiment, shape, root, raw)
        yield room.memory(experiment, shape, root, experiment.compute.device != "cpu" and driver_is_there())
    yield from state(root, experiment.name)
    yield from (replace(line, colour="yellow") if line.colour == "red" else line for line in ports(root, _BRIEFLY_S))
    yield from versions(_PINNED)


def file_name() -> str:
    """Which experiment file was selected."""
    return os.environ.get("DENSITYRM_EXPERIMENT") or "built-in"

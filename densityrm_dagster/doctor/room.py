"""Whether disk and memory suffice for the experiment, and how long it takes."""

from pathlib import Path
from typing import TYPE_CHECKING

from densityrm_core import hardware
from densityrm_core.experiment import Experiment
from densityrm_core.models.shapes import Shape
from densityrm_core.planning.needs import Need, disk_needed, memory_needed, planted_rows, training_needed
from densityrm_dagster.doctor.lines import Line, green, red, size, yellow

if TYPE_CHECKING:
    from densityrm_core.planning.estimate import Estimate

_BATCHES = "lower base_model.batch_size, reward_model.tokens_per_batch and grpo.tokens_per_batch"
_SMALLER = {
    "two trainings": _BATCHES,
    "a training beside it": _BATCHES,
    "the search for neighbours": "lower compute.max_memory_gib",
}
_PROBED = 4  # a probe takes at most this part of the free memory


def disk(experiment: Experiment, shape: Shape, root: Path, raw: int | None) -> Line:
    """What is still to be written against what is free.

    Args:
        raw: bytes of the raw rows, None where they are not known.
    """
    need = disk_needed(experiment, shape, root / experiment.name, raw)
    remedy = f"free disk space, or set DENSITYRM_HOME to a folder on a larger disk than that of {root}"
    return _compared("disk needed", need, hardware.free_disk(root), "still to be written", remedy)


def memory(experiment: Experiment, shape: Shape, root: Path, on_gpu: bool) -> Line:
    """The peak against what is free."""
    need = memory_needed(experiment, shape, _prompts(experiment, root), on_gpu)
    most = max(need.parts, key=lambda part: need.parts[part])
    remedy = f"close other programs, or {_SMALLER.get(most, 'use a machine with more memory')}"
    return _compared("memory needed", need, hardware.available_memory(), "at the peak", remedy)


def gpu_memory(experiment: Experiment, shape: Shape) -> list[Line]:
    """The same of each GPU; nothing where there is none."""
    needed = 2 * training_needed(experiment, shape)
    remedy = "lower reward_model.tokens_per_batch and grpo.tokens_per_batch, or set compute.gradient_checkpointing"
    need = Need(needed, {"two trainings": needed})
    return (
        [_compared("GPU memory", need, min(gpu.memory for gpu in gpus), "at the peak", remedy)]
        if (gpus := hardware.gpus())
        else []
    )


def duration(experiment: Experiment, shape: Shape, root: Path, device: str, made: Path) -> "tuple[Line, Estimate | None]":
    """How long the experiment takes from the first row to the verdict, by a probe of a few seconds."""
    from densityrm_core.models.folders import ModelError, read_card
    from densityrm_core.planning.estimate import TooLargeError, estimate, lengths_of, probe
    from densityrm_core.training.precision import resolve_precision

    try:
        recorded = read_card(made).get("precision")
    except ModelError:  # not made yet
        recorded = None
    wanted = recorded if recorded and experiment.compute.precision == "auto" else experiment.compute.precision
    precision = resolve_precision(wanted, device, shape.width)
    lengths = lengths_of(experiment, root / experiment.name / "tables" / "preference_pairs.parquet")
    try:
        units = probe(experiment, shape, lengths, device, precision, hardware.available_memory() // _PROBED)
    except TooLargeError as error:
        return green("time", f"not estimated: {error}"), None
    found = estimate(experiment, units, lengths, _prompts(experiment, root), hardware.processors())
    basis = f"prompts of {lengths.prompt} and replies of {lengths.reply} tokens, while nothing else runs here"
    return green("time", f"{found} from the first row to the verdict; {basis}"), found


def _compared(subject: str, need: Need, there: int, when: str, remedy: str) -> Line:
    largest = sorted(need.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size(count)}" for name, count in largest)
    found = f"about {size(need.bytes)} {when}, {size(there)} free ({parts})" if parts else f"nothing {when}, {size(there)} free"
    if need.bytes > there:
        return red(subject, found, remedy)
    return yellow(subject, found, remedy) if need.bytes > there / 2 else green(subject, found)


def _prompts(experiment: Experiment, root: Path) -> int | None:
    """How many there are, None where nobody knows before the rows are read."""
    table = root / experiment.name / "tables" / "prompts.parquet"
    if table.is_file():
        import pyarrow.parquet as pq

        return pq.read_metadata(table).num_rows
    return planted_rows(experiment)

"""What the machine is, and which branch of every choice of `densityrm_core.choices` will be taken on it."""

from pathlib import Path
from typing import TYPE_CHECKING

from densityrm_core.choices import CHOICES
from densityrm_core.experiment import Experiment
from densityrm_core.settings import ComputeSettings
from densityrm_dagster.doctor.lines import Line, green, red, size, yellow

if TYPE_CHECKING:
    from densityrm_core.models.shapes import Shape

_MATTERS = ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16")
_FAST = {
    "cpu": "a processor without bfloat16 in hardware",
    "cpu-avx512-bf16": "a processor that multiplies bfloat16 in hardware",
    "cpu-amx": "a processor that multiplies bfloat16 matrices in hardware",
    "cuda": "a GPU without bfloat16 in hardware",
    "cuda-bf16": "a GPU that multiplies bfloat16 in hardware",
}


def machine(device: str) -> list[Line]:
    """Processor, GPUs, memory, and what the device is fast at."""
    from densityrm_core import hardware

    able = [name for name in _MATTERS if name in hardware.processor_features()]
    count, gpus = hardware.processors(), hardware.gpus()
    cores = f"{count} processor{'s' * (count > 1)}"
    kind = hardware.device_kind(device)
    return [
        green("processor", f"{hardware.processor_name()}, {cores}, {' '.join(able) or 'no vector instructions that matter'}"),
        green("GPU", ", ".join(f"{gpu.name} with {size(gpu.memory)}" for gpu in gpus) or "none that PyTorch sees"),
        green("memory", f"{size(hardware.available_memory())} free"),
        green("device kind", f"{kind}: {_FAST[kind]}"),
    ]


def used_device(compute: ComputeSettings) -> str:
    """The device that will be used, the processor where the GPU that is asked for is not there."""
    from densityrm_core.hardware import cuda_is_there, pick_device

    return pick_device("cpu" if compute.device == "cuda" and not cuda_is_there() else compute.device)


def choices(experiment: Experiment, device: str, shape: "Shape | None", made: Path) -> list[Line]:
    """What will be used, each with the setting that forces it.

    Args:
        made: folder of the base model, if there is one yet.
    """
    from densityrm_core.models.attention import attention_kernel, resolve_kernel
    from densityrm_core.vectors.arithmetic import choose_arithmetic
    from densityrm_core.vectors.encoder_files import split_kind
    from densityrm_core.vectors.encoders import dtype_of

    compute, from_file = experiment.compute, split_kind(experiment.embedding.model)[0] == "parquet"
    with attention_kernel(compute.attention):
        kernel = resolve_kernel(device)
    return [
        _device(compute, device),
        green("precision", _precision(experiment, device, shape, made) + _forced("precision")),
        green(
            "encoder",
            ("none, vectors come from a file" if from_file else dtype_of(experiment.embedding, device)) + _forced("encoder"),
        ),
        green("search", choose_arithmetic(compute.search_arithmetic, 2) + _forced("search")),
        _attention(compute, device, kernel),
        green("compilation", ("on" if compute.compile else "off") + _forced("compile")),
        _rollouts(compute, device.startswith("cuda")),
        _ranks(compute, device),
        _threads(compute),
    ]


def _forced(choice: str) -> str:
    return f"  [{CHOICES[choice].setting}]"


def _device(compute: ComputeSettings, device: str) -> Line:
    if compute.device == "cuda" and device == "cpu":
        remedy = "set compute.device to auto or cpu, or install a PyTorch that was built for this GPU"
        return red("device", "compute.device is cuda, but PyTorch sees no GPU", remedy)
    return green("device", device + _forced("device"))


def _precision(experiment: Experiment, device: str, shape: "Shape | None", made: Path) -> str:
    from densityrm_core.models.folders import ModelError, read_card
    from densityrm_core.training.precision import resolve_precision

    wanted = experiment.compute.precision
    if wanted != "auto":
        return f"{resolve_precision(wanted, device, 1)}, as set"
    try:
        recorded = read_card(made).get("precision")
    except ModelError:  # not made yet
        recorded = None
    if recorded:
        return f"{resolve_precision(recorded, device, 1)}, recorded with the base model"
    if shape is None:
        return "decided when the base model is made, by its width"
    return f"{resolve_precision(wanted, device, shape.width)}, by the rule for width {shape.width}"


def impossible(compute: ComputeSettings, gpu: bool) -> list[Line]:
    """The choices that are forced and cannot be taken here: a run that needs them would fail once it comes to them.

    Args:
        gpu: whether there is one.
    """
    device = "cuda" if gpu and compute.device != "cpu" else "cpu"
    lines = [_device(compute, device), _attention(compute, device, compute.attention), _rollouts(compute, gpu)]
    return [line for line in lines if line.colour == "red"]


def _attention(compute: ComputeSettings, device: str, kernel: str) -> Line:
    if compute.attention == "flex" and not device.startswith("cuda"):
        found = "compute.attention is flex, which has no backward pass on a processor"
        return red("attention", found, "set compute.attention to auto, spans or flex_eager")
    return green("attention", kernel + _forced("attention"))


def _rollouts(compute: ComputeSettings, gpu: bool) -> Line:
    from densityrm_core.hardware import package_folder

    if compute.rollouts == "vllm" and not (gpu and package_folder("vllm")):
        remedy = "set compute.rollouts to transformers, or use a GPU and pip install 'densityrm[vllm]'"
        return red("rollouts", "compute.rollouts is vllm, which is not installed or has no GPU", remedy)
    return green("rollouts", compute.rollouts + _forced("rollouts"))


def _ranks(compute: ComputeSettings, device: str) -> Line:
    from densityrm_core.hardware import gpus

    if compute.ranks == 1:
        return green("ranks", "alone" + _forced("ranks"))
    if device.startswith("cuda") and (count := len(gpus())) < compute.ranks:
        found = f"compute.ranks is {compute.ranks}, one a GPU, but there {'is' if count == 1 else 'are'} {count}"
        return red("ranks", found, f"set compute.ranks to {count}")
    backend = "nccl" if device.startswith("cuda") else "gloo"
    return green("ranks", f"{compute.ranks} processes, {backend}{_forced('ranks')}")


def _threads(compute: ComputeSettings) -> Line:
    from densityrm_core.hardware import processors

    if compute.threads > (most := processors()):
        found = f"compute.threads is {compute.threads}, more than the processors that are here"
        return yellow("threads", found, f"set compute.threads to {most} or less")
    found = f"{compute.threads} a training, {compute.search_threads} of embedding and search"
    return green("threads", f"{found}  [compute.threads, compute.search_threads]")

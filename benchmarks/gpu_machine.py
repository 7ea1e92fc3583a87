"""The first part of `benchmarks.gpu_check`: what machine this is, and what the core makes of it."""

from __future__ import annotations

import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_work import Check, Figures, require
from densityrm_core.hardware import device_kind, gpus, pick_device, processor_name, processors
from densityrm_core.models.attention import resolve_kernel
from densityrm_core.training.precision import WIDE, resolve_precision


def machine(check: Check) -> Figures:
    """Device and memory, and what is resolved from them; and whether Triton finds what it compiles its launchers with."""
    device = pick_device(check.device if check.small else "auto")
    require(device == check.device, f"auto takes {device}")
    found = gpus() if check.cuda else []
    figures: Figures = {
        "name": found[0].name if found else processor_name(),
        "gpus": len(found),
        "memory_gib": round(found[0].memory / 2**30, 1) if found else None,
        "processors": processors(),
        "device_kind": device_kind(device),
        "host_kind": device_kind("cpu"),
        "precision": resolve_precision("auto", device, WIDE),
        "attention": resolve_kernel(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if check.cuda else None,
        "float32_matmul": torch.get_float32_matmul_precision(),
    }
    if check.cuda:
        headers = Path(sysconfig.get_paths()["include"], "Python.h")
        needs = {"triton": find_spec("triton"), "a C compiler": shutil.which("cc") or shutil.which("gcc")}
        absent = [name for name, there in needs.items() if not there] + ([] if headers.exists() else [f"{headers}"])
        figures["triton_lacks"] = absent
        require("triton" not in absent, "FlexAttention compiles by Triton, which is not installed")
        product = torch.ones(64, 64, device=device).bfloat16() @ torch.ones(64, 64, device=device).bfloat16()
        require(float(product.sum()) == 64**3, "bfloat16 products are wrong")
    return figures

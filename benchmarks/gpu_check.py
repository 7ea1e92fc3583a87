"""Whether what was only ever run on CPUs holds on a GPU: one command, at most eight minutes on one H100.

    PYTHONPATH=. python -m benchmarks.gpu_check [--small] [--only PART ...] [--minutes 8] [--out benchmarks/results-gpu.json]

Each part runs in a process of its own, prints a line of what it found and took, and fails alone: by an error, by running past
its limit, or, on a GPU, by not taking a branch that it claims (`densityrm_core.choices`). The last line is a JSON object: `parts`
(figures and seconds of each, and the reason where it failed), `failed` (their names), `device`, `versions`, and `taken` (branches
by choice). Exit code 1 if a part failed, after all have run.

`--small` walks the same road on the CPU in less than a minute, two parts at a time; its figures mean nothing, its checks do.
Where there is no GPU and it is not asked for, nothing is run: one sentence, `{"gpu": false}`, exit code 0, as `benchmarks.all`
likes it. benchmarks/README.md says what the machine must have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu_work import Check, Figures, Part, missing
from densityrm_core.choices import noted

VERSIONS = ("torch", "transformers", "tokenizers", "triton", "numpy", "polars", "faiss-cpu", "sentence-transformers", "vllm")
_STARTED = time.time()
_REPOSITORY = Path(__file__).parents[1]
_LONGEST = 90  # characters of a figure in a part's line
_TO_END = 10.0  # seconds that a process may take to end when its part is done


def parts() -> list[Part]:
    """All parts, in order; the study takes the time that the others leave."""
    from benchmarks import gpu_data, gpu_machine, gpu_policy, gpu_resume, gpu_study, gpu_training

    return [
        Part("machine", gpu_machine.machine, ("device=cuda", "attention=flex"), 60),
        Part("bf16", gpu_training.bf16, ("attention=flex",), 90),
        Part("flex", gpu_training.flex, ("attention=flex",), 150),
        Part("compile", gpu_training.compiled, ("device=cuda", "compile=on", "attention=flex"), 100),
        Part("rollout", gpu_policy.rollout, ("attention=flex",), 75),
        Part("grpo", gpu_policy.grpo, ("device=cuda", "attention=flex", "rollouts=transformers"), 75),
        Part("vllm", gpu_policy.vllm, ("rollouts=vllm",), 120),
        Part("embedding", gpu_data.embedding, ("encoder=bfloat16", "encoder=float32"), 60),
        Part("neighbors", gpu_data.neighbors, (), 75),
        Part("resume", gpu_resume.resume, (), 100),
        Part("ranks", gpu_resume.ranks, ("ranks=nccl",), 60),
        Part("memory", gpu_training.memory_of_a_step, ("attention=flex",), 60),
        Part("study", gpu_study.study, ("device=cuda", "attention=flex"), 420),
    ]


@dataclass
class Outcome:
    """What became of a part: its figures, or why there are none."""

    figures: Figures = field(default_factory=dict[str, Any])
    taken: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    failed: str = ""
    seconds: float = 0.0


def main() -> int:
    asked = _arguments()
    from densityrm_core.hardware import cuda_is_there

    device = "cuda" if cuda_is_there() and not asked.cpu else "cpu"
    if device == "cpu" and not asked.small:
        print("There is no GPU here: --small walks the same road on the CPU.")
        print(json.dumps({"gpu": False}))
        return 0
    chosen = [part for part in parts() if not asked.only or part.name in asked.only]
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        check = Check(device, asked.small, _data(asked.data), asked.base, Path(folder), _STARTED + 60 * asked.minutes)
        with ThreadPoolExecutor(2 if asked.small else 1) as pool:  # clocks of parts that share a machine are wrong
            for part, outcome in zip(chosen, pool.map(lambda part: _carried_out(part, check), chosen), strict=True):
                outcomes[part.name] = outcome
                print(_line(part.name, outcome), flush=True)
    result = json.dumps(_report(outcomes, device, asked.small), allow_nan=True)
    if asked.out:
        asked.out.write_text(result + "\n", encoding="utf-8")
    print(result)
    return int(any(outcome.failed for outcome in outcomes.values()))


def _arguments() -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--small", action="store_true", help="the same road in half a minute, on any machine")
    asked.add_argument("--cpu", action="store_true", help="on the CPU though there is a GPU; with --small")
    asked.add_argument("--only", nargs="+", default=[], choices=[part.name for part in parts()], help="these parts alone")
    asked.add_argument("--minutes", type=float, default=8.0, help="of the whole; the study takes what is left")
    asked.add_argument("--data", type=Path, help="real rows; default DENSITYRM_TEST_DATA, else ../shared/data, else planted ones")
    asked.add_argument("--base", default="", help="the study's base model: a folder, a GGUF file or a hub id")
    asked.add_argument("--out", type=Path, help="where to write the last line to, too")
    return asked.parse_args()


def _data(named: Path | None) -> Path | None:
    """The folder of real rows; a folder that was named must be there."""
    given = named or (Path(os.environ["DENSITYRM_TEST_DATA"]) if os.environ.get("DENSITYRM_TEST_DATA") else None)
    beside = [_REPOSITORY.parent / "shared" / "data", _REPOSITORY / "shared" / "data"]
    return given or next((folder for folder in beside if folder.is_dir()), None)


def _carried_out(part: Part, check: Check) -> Outcome:
    """The part in a process of its own, ended with all that it started when its time is over."""
    context = multiprocessing.get_context("forkserver")  # the libraries are imported once, not by every part
    context.set_forkserver_preload(["benchmarks.gpu_study", "benchmarks.gpu_policy"])
    folder = check.folder / part.name
    folder.mkdir()
    mine, theirs = context.Pipe(duplex=False)
    started = time.monotonic()
    process = context.Process(target=_work, args=(part.name, replace(check, folder=folder), theirs))
    process.start()
    theirs.close()
    limit = max(30.0, min(part.seconds, check.ends - time.time())) if check.cuda else part.seconds
    outcome = _heard(mine, process, limit)
    process.join(_TO_END if outcome.seconds else 0)
    _end(process)
    process.join()
    outcome.seconds = round(time.monotonic() - started, 1)
    if check.cuda and not outcome.failed and "skipped" not in outcome.figures:
        absent = missing(part.claims, {name: set(branches) for name, branches in outcome.taken.items()})
        outcome.failed = f"did not take {', '.join(absent)}, but {outcome.taken}" if absent else ""
    return outcome


def _heard(pipe: Connection, process: Any, limit: float) -> Outcome:
    """What the process says within its time; where it says nothing, why."""
    if not pipe.poll(limit):
        return Outcome(failed=f"not done after {limit:.0f} s: cut off")
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return Outcome(failed=f"its process ended with exit code {process.exitcode}")


def _work(name: str, check: Check, pipe: Connection) -> None:
    """A part in its process, which leads a group of its own, so that nothing that it starts is left."""
    os.setsid()
    outcome = Outcome()
    started = time.monotonic()
    with noted() as taken:
        try:
            _prepare(check)
            outcome.figures = next(part for part in parts() if part.name == name).run(check)
        except BaseException as error:
            traceback.print_exc()
            outcome.failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    outcome.taken = {choice: sorted(branches) for choice, branches in taken.items()}
    outcome.seconds = max(0.001, time.monotonic() - started)
    pipe.send(outcome)


def _prepare(check: Check) -> None:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if check.small:
        torch.set_num_threads(1)


def _end(process: Any) -> None:
    """End a process and all of the group that it leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _line(name: str, outcome: Outcome) -> str:
    if outcome.failed:
        return f"{name:10} FAILED {outcome.seconds:6.1f} s  {outcome.failed}"
    told = (f"{key} {_short(value)}" for key, value in outcome.figures.items())
    return f"{name:10} ok     {outcome.seconds:6.1f} s  {', '.join(told)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(each)}" for key, each in value.items()) + "}"
    text = str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _report(outcomes: dict[str, Outcome], device: str, small: bool) -> dict[str, Any]:
    taken: dict[str, set[str]] = {}
    for outcome in outcomes.values():
        for choice, branches in outcome.taken.items():
            taken.setdefault(choice, set()).update(branches)
    return {
        "failed": [name for name, outcome in outcomes.items() if outcome.failed],
        "parts": {name: _figures(outcome) for name, outcome in outcomes.items()},
        "device": outcomes["machine"].figures.get("name", device) if "machine" in outcomes else device,
        "small": small,
        "seconds": round(time.time() - _STARTED, 1),
        "versions": {"python": platform.python_version(), **_versions()},
        "taken": {choice: sorted(branches) for choice, branches in sorted(taken.items())},
    }


def _figures(outcome: Outcome) -> Figures:
    why = {"failed": outcome.failed} if outcome.failed else {}
    return {"took_s": outcome.seconds, **why, **outcome.figures}


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Processes that take turns: each has its own memory and threads, and waits while another one works."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.measure import memory
from densityrm_core.hardware import available_memory

_SPARE = 2**30  # bytes that no side may take: for the others, and for the system


@dataclass(frozen=True)
class Step:
    """What one step took, in seconds; this process's memory (bytes, its peak so far); and the wall seconds of its parts."""

    wall: float
    cpu: float
    peak: int
    loss: float
    parts: dict[str, float]


class Turns:
    """The working process's end: `begin` waits for the word, `end` reports. What lies between is a step."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._started = pipe, (0.0, 0.0)
        self._parts: dict[str, float] = {}

    def part(self, name: str, owner: Any, method: str) -> None:
        """From now on take the time of this method of an object, class or module as a part of each step."""
        whole = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return whole(*arguments, **named)
            finally:
                self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - started

        setattr(owner, method, timed)

    def begin(self) -> None:
        self._pipe.recv()
        self._parts.clear()
        self._started = time.perf_counter(), time.process_time()

    def end(self, loss: float) -> None:
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        self._pipe.send(Step(wall, cpu, memory("VmHWM"), loss, dict(self._parts)))


class Side:
    """A process that runs `work(turns, *arguments)`; it may take the memory that is free when it starts, less a GiB.

    `failed` says why there are no more steps; a side that needs more memory fails and nothing else does.
    """

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, work, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.steps: list[Step] = []
        self.failed = ""

    def step(self) -> None:
        """Let it do one step, unless it has failed."""
        if self.failed:
            return
        try:
            self._pipe.send("go")
            said = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            said = f"its process ended with exit code {self._process.exitcode}"
        if isinstance(said, Step):
            self.steps.append(said)
        else:
            self.failed = said
            self.end()

    def end(self) -> None:
        """The process has done its last step."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def take_turns(sides: Mapping[str, Side], rounds: int) -> None:
    """Let every side do a step a round, then end them all."""
    for _ in range(rounds):
        for side in sides.values():
            side.step()
    for side in sides.values():
        side.end()


def _work(pipe: Connection, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    most = available_memory() - _SPARE
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        work(Turns(pipe), *arguments)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        pipe.send(f"needs more than the {most / 2**30:.1f} GiB of memory that were free")

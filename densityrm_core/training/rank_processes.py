"""Ranks as processes of this machine, started and listened to by the process that wants their work done."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from queue import Empty
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist

from densityrm_core.choices import take
from densityrm_core.processes import exit_with_parent
from densityrm_core.training.ranks import backend_of, joined

_LOOK_EVERY_S = 0.2


class RanksError(RuntimeError):
    """A process of a training ended before its work was done."""


def on_ranks(size: int, device: str, work: Callable[..., None], *arguments: Any, stop: Callable[[], bool]) -> Iterator[Any]:
    """Run `work(ranks, say, stopped, *arguments)` in `size` processes; yields what they say, as it comes.

    Args:
        work: a function of a module, its arguments picklable. It says things by `say(thing)` and looks at `stopped()`.
        stop: asked now and then; once true, `stopped()` is true in every rank.

    Raises:
        RanksError: a rank was ended by a signal.
        Exception: whatever `work` raised in the first rank that failed.
    """
    take("ranks", backend_of(device))
    context = multiprocessing.get_context("forkserver")  # the libraries are imported once, not by every rank
    context.set_forkserver_preload([work.__module__])
    said, stopped = context.Queue(), context.Event()
    with TemporaryDirectory(prefix="densityrm.") as meeting:  # a file: a free port may be taken before it is listened on
        shared = size, f"file://{meeting}/ranks", device, said, stopped, work, arguments
        processes = [context.Process(target=_rank, args=(rank, *shared)) for rank in range(size)]
        for process in processes:
            process.start()
        try:
            yield from _heard(said, processes, stopped, stop)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _heard(said: Any, processes: Sequence[BaseProcess], stopped: Any, stop: Callable[[], bool]) -> Iterator[Any]:
    while True:
        codes = [process.exitcode for process in processes]  # before the queue is looked into: it may hold last words
        try:
            thing = said.get(timeout=_LOOK_EVERY_S)
        except Empty:
            if all(code == 0 for code in codes):
                return
            if any(codes):
                raise RanksError(f"the ranks of a training ended with {codes}: one was killed, perhaps for memory") from None
            if stop():
                stopped.set()
            continue
        if isinstance(thing, Exception):
            raise thing
        yield thing


def _rank(
    rank: int,
    size: int,
    meeting: str,
    device: str,
    said: Any,
    stopped: Any,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    exit_with_parent()
    dist.init_process_group(backend_of(device), init_method=meeting, rank=rank, world_size=size)
    try:
        work(joined(device, rank), said.put, stopped.is_set, *arguments)
    except Exception as error:
        said.put(error)
        raise SystemExit(1) from None
    dist.destroy_process_group()

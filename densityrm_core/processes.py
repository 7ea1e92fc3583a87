"""Work spread over processes, in order, with a bounded number of items under way."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_LOOK_EVERY_S = 2.0
_AHEAD = 2  # items a process may be ahead of the one that is waited for


def ordered_map(function: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """`map(function, items)` by `processes` processes: the same results in the same order, few items in memory at a time.

    With one process, or a single item, everything happens here. `function` and the items must be picklable.
    """
    iterator = iter(items)
    first = list(islice(iterator, 2))
    if processes == 1 or len(first) < 2:
        yield from map(function, first)
        yield from map(function, iterator)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), exit_with_parent) as pool:
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in first)
        try:
            for item in iterator:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@cache
def exit_with_parent() -> None:
    """End this process, if `multiprocessing` started it, soon after its parent is gone: nobody would receive its result.

    Writes are atomic, so any moment will do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        threading.Thread(target=_watch, args=(parent.pid,), name="exit with parent", daemon=True).start()


def _watch(parent: int) -> None:
    while alive(parent):
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


def alive(pid: int) -> bool:
    """Whether a process of this number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""A step whose run has died stops by itself: nobody would receive its result, and its processor is wanted."""

import multiprocessing
import os
import threading
import time
from functools import cache

_LOOK_EVERY_S = 2.0


@cache
def exit_with_run() -> None:
    """End this process, if it is a step's own, soon after its run's process is gone; writes are atomic, so any moment will do."""
    run = multiprocessing.parent_process()
    if run is not None and run.pid is not None:
        threading.Thread(target=_watch, args=(run.pid,), name="exit with run", daemon=True).start()


def _watch(run: int) -> None:
    while _alive(run):
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

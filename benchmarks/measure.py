"""How the benchmarks take time and memory."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def interleaved(
    ways: Mapping[str, Callable[[], object]], rounds: int, after: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median seconds of each way, all of them once a round; `after` each, untimed."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            taken[way].append(seconds(run))
            after()
    return {way: statistics.median(times) for way, times in taken.items()}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def memory(key: str) -> int:
    """Bytes of this process, of a line of /proc/self/status: VmRSS, VmHWM (the peak), RssAnon."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def reset_peak() -> int:
    """Let the peak start anew; bytes resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")

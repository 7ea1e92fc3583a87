"""The data stage at the size of Stack Exchange: raw questions -> pairs -> union, clusters, splits -> prompts, in bounded memory.

The rows are the planted world's, in Stack Exchange's raw format, each with a text of its own of about the length of a real
question, so that prompts are as many and as different as there. A third of the rows is run first, in a process of its own: what
memory grows by shows in the ratio.
"""

import argparse
import gzip
import html
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from densityrm_core.pairs.prompts import unique_prompts
from densityrm_core.pairs.selection import Taken
from densityrm_core.pairs.union import unite_pairs
from densityrm_core.settings import PairsSettings, PlantedSettings, SplitSettings, StackExchangeSettings
from densityrm_core.sources import Folders, read_source
from densityrm_core.sources.planted import planted_rows
from densityrm_core.streams import stream

STACK_EXCHANGE_PAIRS = 31_300_000
_FILE_QUESTIONS = 100_000
_QUESTION_WORDS, _ANSWER_WORDS = 90, 60  # beside the planted text
_LOOK_EVERY_S = 0.05


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pairs", type=int, default=3_000_000)
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--folder", type=Path, help="where the rows and tables are written; default: a temporary folder")
    options = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="data_scale.", dir=options.folder))
    try:
        third, full = (_measured(folder / str(n), n, options.processes) for n in (options.pairs // 3, options.pairs))
    finally:
        shutil.rmtree(folder)
    result = {
        **full,
        "rss_growth": round(full["peak_rss_gib"] / third["peak_rss_gib"], 3),
        "peak_rss_gib_of_a_third": third["peak_rss_gib"],
        "hours_for_31.3M_pairs": round(STACK_EXCHANGE_PAIRS / full["pairs_per_s"] / 3600, 2),
    }
    print(json.dumps(result))


def _measured(folder: Path, pairs: int, processes: int) -> dict[str, Any]:
    """The data stage on `pairs` pairs, in a process of its own, so that its memory is its own too."""
    raw, size = _write_raw(folder / "raw", pairs)
    spawn = multiprocessing.get_context("spawn")
    mine, other = spawn.Pipe()
    worker = spawn.Process(target=_data_stage, args=(raw, folder, processes, other))
    worker.start()
    peak, stop = [0], threading.Event()
    watch = threading.Thread(target=_watch_memory, args=(worker.pid, peak, stop))
    watch.start()
    found = mine.recv()
    stop.set()
    watch.join()
    worker.join()
    peak_gib = max(peak[0], found.pop("self_peak")) / 2**30
    result = {**found, "raw_mib": round(size / 2**20), "peak_rss_gib": round(peak_gib, 3), "processes": processes}
    print(json.dumps(result), flush=True)
    return result


def _data_stage(raw: Path, folder: Path, processes: int, result: Connection) -> None:
    started = time.monotonic()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 1)

    settings = StackExchangeSettings(path=str(raw))
    folders = Folders(folder / "pairs", folder, folder / "shards")
    read = read_source("stack_exchange", settings, PlantedSettings(), folders, processes)
    lap("read")
    united = unite_pairs([Taken(read.pairs.path)], PairsSettings(), SplitSettings(), folder / "union")
    lap("unite")
    prompts = unique_prompts(united.pairs.path, folder / "prompts.parquet")
    lap("prompts")
    result.send(
        {
            "pairs": united.pairs.rows,
            "rejects": sum(read.reasons.values()) + united.rejects.rows,
            "prompts": prompts.rows,
            "clusters": united.grouping.count,
            "seconds": seconds,
            "pairs_per_s": round(united.pairs.rows / sum(seconds.values())),
            "self_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )


def _watch_memory(pid: int, peak: list[int], stop: threading.Event) -> None:
    """The greatest sum of the resident memory of a process and all below it; pages they share count more than once."""
    process = psutil.Process(pid)
    while not stop.wait(_LOOK_EVERY_S):
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], total)


def _write_raw(folder: Path, pairs: int) -> tuple[Path, int]:
    """Files of rows until they hold `pairs` pairs that read_source will keep; their folder and their size in bytes of JSON."""
    folder.mkdir(parents=True)
    size = written = number = 0
    rows = _rows()
    while written < pairs:
        with gzip.open(folder / f"part-{number:05d}.jsonl.gz", "wb", compresslevel=1) as file:
            for _ in range(_FILE_QUESTIONS):
                row = next(rows)
                line = json.dumps(row).encode() + b"\n"
                file.write(line)
                size += len(line)
                scores = [answer["pm_score"] for answer in row["answers"]]
                written += min(10, sum(a > b for a in scores for b in scores))
                if written >= pairs:
                    break
        number += 1
    return folder, size


def _rows() -> Iterator[dict[str, Any]]:
    rng = stream(0, "data_scale")
    words = [
        f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("ck", "nd", "rm", "st", "lt", "mper", "llow", "ning")
    ]

    def text(count: int) -> str:
        return " ".join(words[i] for i in rng.integers(0, len(words), count).tolist())

    for row in planted_rows("stack_exchange", PlantedSettings(stack_exchange_questions=10**9)):
        row["question"] += f"<p>{html.escape(text(_QUESTION_WORDS))}</p>\n<pre><code>{text(10)}\n</code></pre>\n"
        for answer in row["answers"]:
            answer["text"] += f"<p>{text(_ANSWER_WORDS)} <a href='https://example.org'>{text(2)}</a></p>\n"
        yield row


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""The k nearest others of a million vectors by an index: ours beside faiss IVF4096,SQfp16 and exact search. CPU seconds.

Ours is built and asked for all vectors. The peer is built and trained on as many vectors per cell as ours, and asked for a
sample of the vectors at every nprobe; exact search is asked for the same sample; their search is scaled to all. Recall is
measured on the sample, against exact search by faiss; a neighbour counts as found if its cosine reaches the k-th true one. The
peer's time is that at our recall, between the two values of nprobe that lie around it. Ten million vectors are extrapolated, as
a power of their number, from a tenth and a third of the vectors searched in as little memory as ours can do with.
"""

import argparse
import json
import math
import multiprocessing
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks.measure import memory
from benchmarks.vectors import DIMENSIONS, clustered_vectors
from densityrm_core.vectors.neighbors import build_search

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Ints = npt.NDArray[np.int64]

NEIGHBORS, THREADS, TARGET = 32, 2, 0.95
PEER = "IVF4096,SQfp16"
TEN_MILLION = 10_000_000
_SAMPLE = 2_000  # queries of the peers, and of recall
_TRAINED_ON = 48  # vectors for each of the peer's cells
_BLOCK = 16_384  # rows read, added or asked for at a time
_SAME = 1e-6  # cosines closer than this are one
_SMALL = DIMENSIONS // 2 + DIMENSIONS + 64  # bytes for each vector that leave no room for a refining copy in half precision


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--n", type=int, default=1_000_000)
    arguments.add_argument("--folder", type=Path, help="where the vectors are mapped; default: a temporary folder")
    n = arguments.parse_args().n
    with tempfile.TemporaryDirectory(prefix="neighbors_index.", dir=arguments.parse_args().folder) as folder:
        file = Path(folder) / "vectors.npy"
        clustered_vectors(n, file=file)
        sample = np.arange(0, n, max(1, n // _SAMPLE))[:_SAMPLE]
        kth, exact = _exact(_mapped(file), sample)
        ours = _in_a_process_of_its_own(file, n, 4 << 30)
        recall = float((ours.pop("cosines")[sample] >= kth[:, None] - _SAME).mean())
        peers = _peer(_mapped(file), sample, kth, recall)
        small = [_in_a_process_of_its_own(file, part, part * _SMALL) for part in (n // 10, n // 3)]
    own = {"route": f"ours: {ours['method']}", "recall": recall, "build": ours["build"], "search": ours["search"]}
    _print_table([{"route": "faiss IndexFlatIP *", "recall": 1.0, "build": 0.0, "search": exact}, *peers, own])
    cpu = ours["build"] + ours["search"]
    result = {
        "n": n,
        "method": ours["method"],
        "recall": round(recall, 4),
        "recall_stated": round(ours["recall"], 4),
        "seconds": round(ours["seconds"], 1),
        "cpu_seconds": round(cpu, 1),
        "cpu_ratio_vs_ivf_sqfp16": round(_at_recall(peers, recall) / cpu, 2),
        "ivf_sqfp16_recall": round(min(recall, peers[-1]["recall"]), 4),
        "cpu_ratio_vs_exact": round(exact / cpu, 2),
        "peak_rss_gib": round(ours["peak_rss"] / 2**30, 2),
        "ten_million": _ten_million(small[0], small[1]),
    }
    print(json.dumps(result))


def _exact(vectors: Halves, sample: Ints) -> tuple[Floats, float]:
    """Cosine of the k-th nearest other of each of the sample, and the CPU seconds that all vectors would take."""
    faiss.omp_set_num_threads(THREADS)
    queries, best = vectors[sample].astype(np.float32), np.full((len(sample), NEIGHBORS), -2, np.float32)
    spent = 0.0
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK].astype(np.float32)
        started = time.process_time()
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(block)
        cosines, rows = index.search(queries, min(NEIGHBORS + 1, len(block)))
        spent += time.process_time() - started
        cosines[rows + start == sample[:, None]] = -2
        best = -np.sort(-np.hstack([best, cosines]), axis=1)[:, :NEIGHBORS]
    return best[:, -1], spent * len(vectors) / len(sample)


def _peer(vectors: Halves, sample: Ints, kth: Floats, target: float) -> list[dict[str, Any]]:
    """CPU seconds and recall of the peer, nprobe by nprobe, until the target is reached."""
    faiss.omp_set_num_threads(THREADS)
    started = time.process_time()
    index = faiss.index_factory(vectors.shape[1], PEER, faiss.METRIC_INNER_PRODUCT)
    train = vectors[:: max(1, len(vectors) // (_TRAINED_ON * index.nlist))].astype(np.float32)
    index.cp.max_points_per_centroid = _TRAINED_ON
    index.train(train)
    for start in range(0, len(vectors), _BLOCK):
        index.add(vectors[start : start + _BLOCK].astype(np.float32))
    build, queries = time.process_time() - started, vectors[sample].astype(np.float32)
    routes: list[dict[str, Any]] = []
    for nprobe in (8, 16, 32, 64, 128, 256):
        index.nprobe = nprobe
        started = time.process_time()
        cosines, rows = index.search(queries, NEIGHBORS + 1)
        search = (time.process_time() - started) * len(vectors) / len(sample)
        found = (cosines >= kth[:, None] - _SAME) & (rows != sample[:, None])
        recall = float(np.minimum(found.sum(axis=1), NEIGHBORS).mean() / NEIGHBORS)
        routes.append({"route": f"faiss {PEER}, nprobe {nprobe} *", "recall": recall, "build": build, "search": search})
        if recall >= target:
            break
    return routes


def _at_recall(routes: list[dict[str, Any]], recall: float) -> float:
    """CPU seconds that a route of growing recall would take for `recall`, between the two that were measured around it."""
    return float(np.interp(recall, [r["recall"] for r in routes], [r["build"] + r["search"] for r in routes]))


def _in_a_process_of_its_own(file: Path, count: int, max_memory: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    mine, other = spawn.Pipe()
    worker = spawn.Process(target=_ours, args=(file, count, max_memory, other))
    worker.start()
    found = mine.recv()
    worker.join()
    return found


def _ours(file: Path, count: int, max_memory: int, result: Connection) -> None:
    """Build our index over the first `count` vectors and ask it for all of them."""
    peak, stop = [0], threading.Event()
    watch = threading.Thread(target=_watch_own_memory, args=(peak, stop))
    watch.start()
    vectors, started, wall = _mapped(file)[:count], time.process_time(), time.perf_counter()
    search = build_search(
        vectors,
        NEIGHBORS,
        search="index",
        recall=TARGET,
        threads=THREADS,
        max_memory=max_memory,
        say=lambda line: print(f"  {line}", flush=True),
    )
    build = time.process_time() - started
    cosines = np.empty((count, NEIGHBORS), np.float32)
    for start in range(0, count, _BLOCK):
        part = slice(start, start + _BLOCK)
        cosines[part] = search.search(vectors[part], NEIGHBORS, np.arange(start, min(start + _BLOCK, count)))[0]
    found = {
        "n": count,
        "method": search.method,
        "recall": search.recall,
        "build": build,
        "search": time.process_time() - started - build,
        "seconds": time.perf_counter() - wall,
        "cosines": cosines,
    }
    stop.set()
    watch.join()
    result.send({**found, "peak_rss": memory("VmHWM"), "own_memory": peak[0] - cosines.nbytes})


def _ten_million(less: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Time as a power of the number of vectors; memory of the process itself, the mapped vectors not counted, as a line."""
    cpu = [run["build"] + run["search"] for run in (less, more)]
    power = math.log(cpu[1] / cpu[0]) / math.log(more["n"] / less["n"])
    growth = (TEN_MILLION / more["n"]) ** power
    slope = (more["own_memory"] - less["own_memory"]) / (more["n"] - less["n"])
    found = {
        "seconds": round(more["seconds"] * growth),
        "cpu_seconds": round(cpu[1] * growth),
        "gib": round((more["own_memory"] + slope * (TEN_MILLION - more["n"])) / 2**30, 1),
        "extrapolated_from": [less["n"], more["n"]],
        "power": round(power, 2),
        "method": more["method"],
    }
    print(f"ten million, extrapolated: {found['seconds']:,} s, {found['gib']} GiB beside the mapped vectors ({more['method']})")
    return found


def _print_table(routes: list[dict[str, Any]]) -> None:
    print(f"{'route':<64} recall   build  search   total   (CPU seconds; * search scaled from {_SAMPLE:,} queries)")
    for route in routes:
        total = route["build"] + route["search"]
        print(f"{route['route']:<64} {route['recall']:.4f} {route['build']:7.1f} {route['search']:7.1f} {total:7.1f}")


def _mapped(file: Path) -> Halves:
    return np.load(file, mmap_mode="r")


def _watch_own_memory(peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        peak[0] = max(peak[0], memory("RssAnon"))


if __name__ == "__main__":
    main()

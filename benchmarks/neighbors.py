"""The k nearest others of every vector, exactly: ours beside faiss IndexFlatIP and scikit-learn's brute force, two threads each.

The vectors are given as they are stored, in half precision: ours converts them on the clock, the peers get float32 for nothing.
Ours and faiss search all queries, by turns, and medians are compared; scikit-learn searches a sample, scaled to all. A neighbour
counts as found if its cosine reaches the k-th true one, so that ties do not matter. Memory is what a process of its own takes at
its peak beyond the vectors and the results, libraries already loaded.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from benchmarks.measure import memory, reset_peak
from benchmarks.vectors import clustered_vectors
from densityrm_core.hardware import device_kind
from densityrm_core.vectors.neighbors import build_search

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Found = tuple[Floats, npt.NDArray[np.int64]]

NEIGHBORS, THREADS = 32, 2
_SAMPLE = 1_000  # queries of scikit-learn
_SAME = 1e-6  # cosines closer than this are one


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--n", type=int, default=28_000)
    arguments.add_argument("--rounds", type=int, help="of ours and faiss, by turns; default: 5, and 2 from 100,000 vectors on")
    options = arguments.parse_args()
    n, rounds = options.n, options.rounds or (2 if options.n >= 100_000 else 5)
    extra = _memory_in_a_process_of_its_own(n)
    halves = clustered_vectors(n)
    vectors = halves.astype(np.float32)

    seconds: dict[str, list[float]] = {"ours": [], "faiss": []}
    for number in range(rounds):
        (found, method), took = _timed(lambda: _ours(halves))
        seconds["ours"].append(took)
        truth, took = _timed(lambda: _faiss(vectors))
        seconds["faiss"].append(took)
        print(f"round {number + 1}: ours {seconds['ours'][-1]:.2f} s, faiss {took:.2f} s", flush=True)
    ours, flat = statistics.median(seconds["ours"]), statistics.median(seconds["faiss"])
    sklearn = _sklearn(vectors)
    print(f"scikit-learn: {sklearn:.1f} s, scaled from {min(n, _SAMPLE):,} queries")
    result = {
        "n": n,
        "method": method,
        "ratio_vs_faiss_flat": round(flat / ours, 2),
        "ratio_vs_sklearn": round(sklearn / ours, 2),
        "recall": round(_recall(vectors, found, truth), 6),
        "seconds": round(ours, 3),
        "faiss_seconds": round(flat, 3),
        "extra_mib": round(extra),
        "device_kind": device_kind("cpu"),
    }
    print(json.dumps(result))


def _ours(vectors: Halves) -> tuple[Found, str]:
    search = build_search(vectors, NEIGHBORS, search="exact", threads=THREADS)
    return search.search(vectors, NEIGHBORS, np.arange(len(vectors))), search.method


def _faiss(vectors: Floats) -> Found:
    """One neighbour more than asked for, the query itself among them: what a user would do next is not timed."""
    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index.search(vectors, NEIGHBORS + 1)


def _sklearn(vectors: Floats) -> float:
    """Seconds for all queries, from a sample. Euclidean order is that of cosines, for unit vectors."""
    sample = vectors[:: max(1, len(vectors) // _SAMPLE)]
    with threadpool_limits(THREADS):
        index = NearestNeighbors(n_neighbors=NEIGHBORS + 1, algorithm="brute", metric="euclidean").fit(vectors)
        index.kneighbors(sample[:10])
        _, took = _timed(lambda: index.kneighbors(sample))
    return took * len(vectors) / len(sample)


def _recall(vectors: Floats, found: Found, truth: Found) -> float:
    """Share of our neighbours that are as near as the k-th of faiss; cosines are computed here, from the rows."""
    cosines, rows = truth
    others = np.where(rows == np.arange(len(rows))[:, None], -np.inf, cosines)
    kth = -np.partition(-others, NEIGHBORS - 1, axis=1)[:, NEIGHBORS - 1]
    hits = 0
    for start in range(0, len(vectors), 1024):
        part = slice(start, start + 1024)
        near = np.einsum("qd,qkd->qk", vectors[part], vectors[found[1][part]])
        own = found[1][part] == np.arange(len(vectors))[part, None]
        hits += int(((near >= kth[part, None] - _SAME) & ~own).sum())
    return hits / found[1].size


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    done = work()
    return done, time.perf_counter() - started


def _memory_in_a_process_of_its_own(n: int) -> float:
    """MiB that our search takes at its peak beyond the vectors and the results."""
    spawn = multiprocessing.get_context("spawn")
    mine, other = spawn.Pipe()
    worker = spawn.Process(target=_report_memory, args=(n, other))
    worker.start()
    extra = mine.recv()
    worker.join()
    return extra


def _report_memory(n: int, result: Connection) -> None:
    _ours(clustered_vectors(6_000))
    vectors = clustered_vectors(n)
    before = reset_peak()
    (cosines, rows), _ = _ours(vectors)
    result.send((memory("VmHWM") - before - cosines.nbytes - rows.nbytes) / 2**20)


if __name__ == "__main__":
    main()

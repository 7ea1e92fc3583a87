"""Embedding the real HH-RLHF first turns with MiniLM: ours beside sentence-transformers' `encode` and beside the plain loop.

The peers are `encode` with its default settings (float32, sorted by length, batches of 32) and the loop one writes first, float32
in batches of 32 as the texts come. Two threads on every side, models loaded and warm, interleaved, medians. Fidelity is measured
against the float32 vectors: the smallest cosine, and Spearman's correlation of the density (mean log distance to 10 neighbours).
Keys: `ratio_vs_library`, `ratio_vs_loop`, `cosine_min`, `density_spearman`, `amx`, `dtype`, `prompts`, `prompts_per_s`.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from benchmarks.measure import interleaved
from densityrm_core.density.definitions import log_density
from densityrm_core.hardware import device_kind, located
from densityrm_core.settings import DensitySettings, EmbeddingSettings, PlantedSettings, SourceSettings
from densityrm_core.sources import Folders, read_source
from densityrm_core.vectors.encoders import dtype_of, load_encoder
from densityrm_core.vectors.neighbors import nearest

Floats = npt.NDArray[np.float32]
_THREADS = 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--prompts", type=int, default=10_000, help="at most this many")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    torch.set_num_threads(_THREADS)
    texts = _first_turns()[: options.prompts]
    settings = EmbeddingSettings()
    library = SentenceTransformer(located(settings.model), device="cpu")
    encoder = load_encoder(settings, _THREADS)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: encoder.encode(texts)[0],
        "library": lambda: library.encode(texts, show_progress_bar=False),
        "loop": lambda: [library.encode(texts[i : i + 32], show_progress_bar=False) for i in range(0, len(texts), 32)],
    }
    for way in ways.values():
        way()
    median = interleaved(ways, options.rounds)
    ours, exact = encoder.encode(texts)[0], np.asarray(library.encode(texts, show_progress_bar=False), np.float32)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosines = (ours.astype(np.float64) * exact).sum(1) / np.linalg.norm(ours.astype(np.float64), axis=1)
    dtype = dtype_of(settings, "cpu")
    result = {
        "ratio_vs_library": round(median["library"] / median["ours"], 2),
        "ratio_vs_loop": round(median["loop"] / median["ours"], 2),
        "cosine_min": round(float(cosines.min()), 6),
        "density_spearman": round(float(spearmanr(_density(ours), _density(exact)).statistic), 6),
        "device_kind": device_kind("cpu"),
        "dtype": dtype,
        "prompts": len(texts),
        "prompts_per_s": round(len(texts) / median["ours"]),
    }
    print(json.dumps(result))


def _first_turns() -> list[str]:
    """The distinct first human turns of the HH rows in DENSITYRM_TEST_DATA, default ../shared/data."""
    data = Path(os.environ.get("DENSITYRM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "hh-rlhf"
    if not data.is_dir():
        sys.exit(f"{data} does not exist: set DENSITYRM_TEST_DATA to a folder with hh-rlhf/*/test.jsonl.gz")
    with tempfile.TemporaryDirectory() as name:
        folders = Folders(Path(name) / "out", Path(name) / "raw", Path(name) / "shards")
        settings = SourceSettings(path=f"{data}/**/*.jsonl.gz")
        pairs = read_source("hh_rlhf", settings, PlantedSettings(), folders).pairs
        return pairs.frame()["prompt"].unique(maintain_order=True).to_list()


def _density(vectors: Floats) -> npt.NDArray[np.float64]:
    cosines, _ = nearest(vectors, vectors, 10, np.arange(len(vectors)))
    return log_density(cosines, DensitySettings())


if __name__ == "__main__":
    main()

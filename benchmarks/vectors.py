"""Unit vectors that are spread as the embeddings of real prompts are: clusters of Zipf sizes and unlike widths, of low intrinsic
dimension, with a little noise in every direction and a few strays."""

from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from densityrm_core.streams import stream

DIMENSIONS = 384
_INTRINSIC = 24
_ZIPF = 1.1
_WIDTHS = (0.25, 0.7)  # of clusters, beside centres of length 1
_NOISE = 0.2  # length of what lies outside the intrinsic dimensions
_STRAYS = 0.05
_BLOCK = 16_384  # rows drawn at a time; part of what a seed means


def clustered_vectors(
    count: int, seed: int = 0, file: Path | None = None, dimensions: int = DIMENSIONS
) -> npt.NDArray[np.float16]:
    """(count, dimensions) unit vectors, rounded to half precision; the first rows of a larger set are not a smaller set.

    Args:
        file: where to map the array, for more vectors than should be held in memory.
    """
    vectors: npt.NDArray[np.float16] = np.empty((0, 0), np.float16)
    if file is None:
        vectors = np.empty((count, dimensions), np.float16)
    else:
        mapped = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(count, dimensions))
        vectors = cast(npt.NDArray[np.float16], mapped)
    draw = stream(seed, "vectors", "clusters")
    clusters = max(20, round(2 * count**0.5))
    share = 1 / np.arange(1, clusters + 1) ** _ZIPF
    centers = _unit(draw.standard_normal((clusters, _INTRINSIC)))
    widths = np.exp(draw.uniform(*np.log(_WIDTHS), clusters))
    axes = np.linalg.qr(draw.standard_normal((dimensions, _INTRINSIC)))[0].T.astype(np.float32)
    for start in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - start)
        rng = stream(seed, "vectors", start)
        cluster = rng.choice(clusters, rows, p=share / share.sum())
        spread = rng.standard_normal((rows, _INTRINSIC), np.float32) / np.float32(_INTRINSIC**0.5)
        inner = centers[cluster] + widths[cluster, None] * spread
        stray = rng.random(rows) < _STRAYS
        inner[stray] = spread[stray]
        noise = rng.standard_normal((rows, dimensions), np.float32) * np.float32(_NOISE / dimensions**0.5)
        vectors[start : start + rows] = _unit(_unit(inner).astype(np.float32) @ axes + noise)
    return vectors


def _unit(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

"""Vectors as the points that density takes."""

from pathlib import Path

import numpy as np
import polars as pl

from densityrm_core.density.weighing import Points, Weighing, weigh_prompts
from densityrm_core.pairs.near_duplicates import normalised, signatures
from densityrm_core.pairs.prompts import prompt_ids
from densityrm_core.settings import DensitySettings
from densityrm_core.storage import write_frame
from densityrm_core.tables import PROMPT_EMBEDDINGS, PROMPTS


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def points(
    vectors: np.ndarray,
    splits: list[str] | None = None,
    pairs: list[int] | None = None,
    ids: list[str] | None = None,
    texts: list[str] | None = None,
    truncated: list[bool] | None = None,
) -> Points:
    ids = ids or [f"{i:016x}" for i in range(len(vectors))]
    prompts = pl.DataFrame(
        {"prompt_id": ids, "split": splits or ["train"] * len(vectors), "pairs": pairs or [1] * len(vectors)},
        schema={"prompt_id": pl.String, "split": pl.String, "pairs": pl.Int64},
    )
    words = pl.Series(texts or ids, dtype=pl.String)
    cut = np.array(truncated or [False] * len(vectors), np.bool_)
    return Points(prompts, vectors.astype(np.float16), cut, lambda rows: signatures(normalised(words.gather(rows))))


def write_tables(
    folder: Path, vectors: np.ndarray, splits: list[str], texts: list[str], pairs: list[int], sources: list[list[str]]
) -> None:
    """`prompts.parquet` and `prompt_embeddings.parquet`, as a run leaves them."""
    prompts = pl.DataFrame({"prompt": texts, "split": splits, "pairs": pairs, "sources": sources})
    ids = prompt_ids(prompts["prompt"])
    write_frame(prompts.with_columns(prompt_id=ids, cluster=ids), folder / "prompts.parquet", PROMPTS)
    column = pl.Series("embedding", vectors.astype(np.float32), dtype=pl.Array(pl.Float32, vectors.shape[1]))
    embedded = prompts.select("split", pl.lit(value=False).alias("truncated")).with_columns(column, prompt_id=ids)
    write_frame(embedded, folder / "prompt_embeddings.parquet", PROMPT_EMBEDDINGS)


def weigh(given: Points, folder: Path, **settings: object) -> Weighing:
    return weigh_prompts(given, DensitySettings.model_validate(settings), folder)


def weights_of(vectors: np.ndarray, folder: Path, **settings: object) -> np.ndarray:
    return weigh(points(vectors), folder, **settings).table["weight"].to_numpy()


def vmf_mixture(count: int, dimensions: int = 384, intrinsic: int = 16, clusters: int = 60, seed: int = 0):
    """Unit vectors of a von Mises-Fisher mixture on a sphere of lower dimension, rotated; and their true log density.

    Cluster sizes are Zipf, concentrations log-uniform, 5 % lie anywhere; the vMF normaliser is Wood's [1994].
    """
    from scipy.special import ive, logsumexp
    from scipy.stats import vonmises_fisher

    rng = np.random.default_rng(seed)
    share = 0.95 / np.arange(1, clusters + 1) / (1 / np.arange(1, clusters + 1)).sum()
    centres = rng.normal(size=(clusters, intrinsic))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    kappa = np.exp(rng.uniform(np.log(20), np.log(200), clusters))
    of = rng.choice(clusters + 1, size=count, p=[*share, 0.05])
    rows = rng.normal(size=(count, intrinsic))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for c in range(clusters):
        if (of == c).any():
            rows[of == c] = vonmises_fisher(centres[c], kappa[c]).rvs(int((of == c).sum()), random_state=rng)
    half = intrinsic / 2
    normaliser = (half - 1) * np.log(kappa) - half * np.log(2 * np.pi) - np.log(ive(half - 1, kappa)) - kappa
    from scipy.special import gammaln

    uniform = gammaln(half) - np.log(2) - half * np.log(np.pi)
    terms = np.log(share) + normaliser + kappa * (rows @ centres.T)
    truth = logsumexp(np.hstack([terms, np.full((count, 1), np.log(0.05) + uniform)]), axis=1)
    rotation = np.linalg.qr(rng.normal(size=(dimensions, intrinsic)))[0]
    return unit(rows @ rotation.T), truth

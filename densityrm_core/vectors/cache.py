"""Vectors that were computed before, kept as long as model, revision, precision and length stay: folders of Parquet shards."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arrays import Keys, id_keys
from densityrm_core.files import sweep
from densityrm_core.settings import EmbeddingSettings
from densityrm_core.storage import batches, key_value_metadata, table_writer
from densityrm_core.tables import CACHED_VECTORS
from densityrm_core.vectors.mapped import Gathering


class VectorCache:
    """The vectors of one encoder, as it is set. Shards only ever come to it; each appears whole or not at all."""

    def __init__(self, folder: Path, settings: EmbeddingSettings, revision: str, dtype: str) -> None:
        self._made_by = {"model": settings.model, "revision": revision, "dtype": dtype, "max_tokens": str(settings.max_tokens)}
        digest = hashlib.sha256(json.dumps(self._made_by, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = folder / digest
        self._folder.mkdir(parents=True, exist_ok=True)
        sweep(self._folder)

    def keys(self) -> Keys:
        """Keys of the prompts that have a vector, see `prompts.id_keys`."""
        found = [id_keys(batch["prompt_id"]) for shard in self._shards() for batch in batches(shard, ["prompt_id"])]
        return np.concatenate([np.zeros(0, np.uint64), *found])

    def add(self, prompt_ids: pl.Series, vectors: npt.NDArray[np.float32], truncated: npt.NDArray[np.bool_]) -> None:
        """Keep the vectors (n, d) of some prompts."""
        name = hashlib.sha256("".join(prompt_ids).encode()).hexdigest()[:24]
        column = pl.Series("embedding", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
        with table_writer(self._folder / f"{name}.parquet", CACHED_VECTORS, self._made_by) as writer:
            writer.write(pl.DataFrame([prompt_ids.alias("prompt_id"), pl.Series("truncated", truncated), column]))

    def gather(self, gathering: Gathering) -> None:
        """Give all vectors to `gathering`."""
        for shard in self._shards():
            for batch in batches(shard):
                gathering.put(id_keys(batch["prompt_id"]), batch["embedding"].to_numpy(), batch["truncated"].to_numpy())

    def _shards(self) -> Iterator[Path]:
        """The shards that can be read; of another, which someone else must have put or spoilt, a warning is all that is left."""
        for shard in sorted(self._folder.glob("*.parquet")):
            try:
                made_by = key_value_metadata(shard)
            except (OSError, ValueError) as error:
                warnings.warn(f"{shard} cannot be read ({error}); its prompts are embedded again, remove it", stacklevel=2)
                continue
            if self._made_by.items() <= made_by.items():
                yield shard

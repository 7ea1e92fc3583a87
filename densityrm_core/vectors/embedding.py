"""Prompts -> a stored table of unit vectors. What was embedded before is not embedded again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from densityrm_core.arrays import Flags, Keys, id_keys
from densityrm_core.files import temporary_folder
from densityrm_core.settings import EmbeddingSettings
from densityrm_core.storage import Stored, batches, read_frame, table_writer
from densityrm_core.tables import PROMPT_EMBEDDINGS
from densityrm_core.vectors.cache import VectorCache
from densityrm_core.vectors.encoder_files import EmbeddingError, normalize, revision_of, split_kind
from densityrm_core.vectors.mapped import Gathering, VectorsError

Report = Callable[[int, int], None]

SHARD = 4_096  # prompts embedded between two points from which a killed run goes on


@dataclass(frozen=True)
class Embedded:
    """The table (tables.PROMPT_EMBEDDINGS, in the order of the prompts), and how it came about.

    revision: of the model's files. dtype: of its weights. new, cached: prompts embedded now, and before. truncated: prompts of
    which the encoder read only the beginning.
    """

    stored: Stored
    model: str
    revision: str
    dtype: str
    dimensions: int
    new: int
    cached: int
    truncated: int
    seconds: float


def embed_prompts(
    prompts: Path,
    out: Path,
    settings: EmbeddingSettings,
    cache: Path,
    threads: int = 2,
    device: str = "cpu",
    report: Report = lambda done, total: None,
) -> Embedded:
    """Write the unit vectors of a table of prompts (tables.PROMPTS), in its order, to `out`.

    Prompts are embedded SHARD at a time, in order, and kept in `cache`: a killed run embeds only its unfinished shard again, a
    later run only what is new. Memory does not grow with the number of prompts, but for a key and a flag each.

    Args:
        cache: a folder for vectors, one below it for each model, revision, precision and length.
        report: called with the number of prompts that have a vector, and of all.

    Raises:
        EmbeddingError: the model cannot be loaded, or a prompt has no usable vector (its id is named).
    """
    started, revision = time.monotonic(), revision_of(settings.model)
    kind, name = split_kind(settings.model)
    keys = id_keys(read_frame(prompts, ["prompt_id"])["prompt_id"])
    with temporary_folder(out) as folder:
        gathering, dtype, new = Gathering(keys, folder / "vectors.npy"), "as given", 0
        if kind == "parquet":
            _precomputed(Path(name), gathering)
        else:
            from densityrm_core.vectors.encoders import dtype_of

            dtype = dtype_of(settings, device)
            store = VectorCache(cache, settings, revision, dtype)
            new = _embed_missing(prompts, keys, store, settings, threads, device, report)
            store.gather(gathering)
        vectors = gathering.vectors()
        with table_writer(out, PROMPT_EMBEDDINGS) as writer:
            for start, batch in _numbered(prompts, ["prompt_id", "split"]):
                part = slice(start, start + batch.height)
                embedding = pl.Array(pl.Float32, vectors.shape[1])
                column = pl.Series("embedding", vectors[part].astype(np.float32), dtype=embedding)
                writer.write(batch.with_columns(pl.Series("truncated", gathering.truncated[part]), column))
    counts = new, len(keys) - new, int(gathering.truncated.sum())
    return Embedded(writer.stored, settings.model, revision, dtype, vectors.shape[1], *counts, time.monotonic() - started)


def _embed_missing(
    prompts: Path, keys: Keys, store: VectorCache, settings: EmbeddingSettings, threads: int, device: str, report: Report
) -> int:
    """Embed what the cache does not have, a shard at a time; how many these were."""
    missing = ~np.isin(keys, store.keys())
    count = int(missing.sum())
    if not count:
        return 0
    from densityrm_core.vectors.encoders import load_encoder

    encoder, done = load_encoder(settings, threads, device), len(keys) - count
    for shard in _shards(prompts, missing):
        before = done
        try:
            vectors, truncated = encoder.encode(shard["prompt"].to_list(), lambda some, b=before: report(b + some, len(keys)))
        except EmbeddingError as error:
            if error.row is None:
                raise
            raise EmbeddingError(f"prompt {shard['prompt_id'][error.row]}: {error.reason}") from None
        store.add(shard["prompt_id"], vectors, truncated)
        done += shard.height
    return count


def _shards(prompts: Path, wanted: Flags) -> Iterator[pl.DataFrame]:
    """The prompts `wanted`, in order, SHARD at a time."""
    waiting = pl.DataFrame(schema={"prompt_id": pl.String, "prompt": pl.String})
    for start, batch in _numbered(prompts, ["prompt_id", "prompt"]):
        waiting = pl.concat([waiting, batch.filter(pl.Series(wanted[start : start + batch.height]))])
        while waiting.height >= SHARD:
            yield waiting[:SHARD]
            waiting = waiting[SHARD:]
    if waiting.height:
        yield waiting


def _precomputed(source: Path, gathering: Gathering) -> None:
    """Take vectors from a Parquet file with the columns prompt_id and embedding; scaled to unit length, if they are not.

    Raises:
        EmbeddingError: the columns are others, a row has another width, or a vector is not usable; a prompt without one.
    """
    if not source.is_file():
        raise EmbeddingError(f"embedding.model: {source} is not a file; give a Parquet file with columns prompt_id and embedding")
    schema = pl.read_parquet_schema(source)
    kind = schema.get("embedding")
    if schema.get("prompt_id") != pl.String or not isinstance(kind, pl.Array | pl.List):
        found = ", ".join(f"{column} ({dtype})" for column, dtype in schema.items())
        raise EmbeddingError(f"{source}: needs the columns prompt_id (String) and embedding (lists of numbers), it has {found}")
    width = 0
    for start, batch in _numbered(source, ["prompt_id", "embedding"]):
        lists = batch["embedding"].cast(pl.List(pl.Float32))
        widths = lists.list.len().fill_null(0).to_numpy()
        width = width or int(widths[0])
        other = np.flatnonzero((widths != width) | (widths == 0))
        if len(other):
            row = int(other[0])
            raise EmbeddingError(f"{source}: row {start + row + 1} has {widths[row]} components, the first row has {width}")
        try:
            unit = normalize(lists.explode().to_numpy().reshape(-1, width))
        except EmbeddingError as error:
            raise EmbeddingError(f"{source}: prompt {batch['prompt_id'][error.row or 0]}: {error.reason}") from None
        gathering.put(id_keys(batch["prompt_id"]), unit, np.zeros(batch.height, np.bool_))
    if not gathering.found.all():
        raise EmbeddingError(f"{source}: {_without(gathering)}; embed them too, or name an encoder in embedding.model")


def _without(gathering: Gathering) -> str:
    try:
        gathering.vectors()
    except VectorsError as error:
        return str(error).split(";")[0]
    return ""


def _numbered(file: Path, columns: list[str]) -> Iterator[tuple[int, pl.DataFrame]]:
    """The rows of a file batch by batch, with the number of each batch's first row."""
    start = 0
    for batch in batches(file, columns):
        yield start, batch
        start += batch.height

"""Pairs -> unique prompts: their ids, where each comes first, and how many pairs it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arrays import Keys, Rows, id_keys, runs, same_key
from densityrm_core.storage import Stored, batches, table_writer
from densityrm_core.tables import PROMPTS


class PromptError(ValueError):
    """Two different prompts share a key or an id."""


@dataclass(frozen=True)
class PromptIndex:
    """Which rows share a prompt. Prompts are numbered in order of first appearance."""

    of_row: npt.NDArray[np.uint32]  # number of each row's prompt, shape (rows,)
    first: Rows  # row in which each prompt comes first, ascending, shape (prompts,)
    counts: Rows  # rows with each prompt, shape (prompts,)


class PromptKeys:
    """Two independent 64-bit hashes of the prompt of every row: the first one tells prompts apart, the second one checks it.

    The expected number of collisions of the first among n prompts is n^2 / 2^65, 3e-6 for 10 million.
    """

    def __init__(self) -> None:
        self._keys: list[Keys] = []
        self._checks: list[Keys] = []

    def add(self, prompts: pl.Series) -> None:
        """Append the prompts of further rows."""
        self._keys.append(prompts.hash(seed=0).to_numpy())
        self._checks.append(prompts.hash(seed=1).to_numpy())

    def index(self, taken: Rows | None = None) -> tuple[PromptIndex, Rows]:
        """The index of the rows `taken` (default: all), and the first two rows of different prompts under one key.

        The latter has shape (2,) if there are such rows, else (0,). Rows count among those taken.
        """
        keys, checks = _joined(self._keys), _joined(self._checks)
        if taken is not None:
            keys, checks = keys[taken], checks[taken]
        order = np.argsort(keys)
        starts, counts = runs(keys[order])
        first = np.minimum.reduceat(order, starts) if len(keys) else order
        number = np.empty(len(first), dtype=np.uint32)
        by_appearance = np.argsort(first, kind="stable")
        number[by_appearance] = np.arange(len(first), dtype=np.uint32)
        of_row = np.empty(len(keys), dtype=np.uint32)
        of_row[order] = np.repeat(number, counts)
        index = PromptIndex(of_row, first[by_appearance], counts[by_appearance])
        odd = np.flatnonzero(checks != checks[index.first][of_row])[:1]
        return index, np.concatenate([index.first[of_row[odd]], odd])


def prompt_ids(prompts: pl.Series) -> pl.Series:
    """First 16 hex digits of the MD5 of each prompt's UTF-8 bytes.

    Raises:
        PromptError: two of the prompts, which must be distinct, share an id; the message names both.
    """
    import polars_hash

    md5 = polars_hash.col("prompt").nchash.md5()  # pyright: ignore[reportAttributeAccessIssue]  the plugin registers it
    share = -(-len(prompts) // pl.thread_pool_size()) or 1
    parts = [prompts[i : i + share].to_frame("prompt").lazy() for i in range(0, len(prompts) or 1, share)]
    hashed = pl.collect_all([part.select(md5.str.head(16).alias("prompt_id")) for part in parts])  # in parallel
    ids = pl.concat(hashed)["prompt_id"]
    collision = same_key(id_keys(ids))
    if len(collision):
        raise collided(*prompts.gather(collision))
    return ids


def index_prompts(parts: Iterable[pl.Series]) -> tuple[pl.DataFrame, PromptIndex]:
    """Unique prompts of rows that come in parts: columns prompt_id, prompt, pairs; and which row has which.

    Raises:
        PromptError: two different prompts share a key or an id; the message names both.
    """
    keys, kept = PromptKeys(), list[pl.Series]()
    for part in parts:
        keys.add(part)
        kept.append(part)
    rows = pl.concat(kept)
    index, collision = keys.index()
    if len(collision):
        raise collided(rows[int(collision[0])], rows[int(collision[1])])
    unique = rows.gather(index.first)
    return pl.DataFrame({"prompt_id": prompt_ids(unique), "prompt": unique, "pairs": index.counts}), index


def unique_prompts(pairs: Path, out: Path) -> Stored:
    """Write every prompt of a table of pairs (tables.PREFERENCE_PAIRS) once, in order of first appearance, per tables.PROMPTS.

    Reads the pairs twice, a batch at a time: once to count, once for the texts.
    """
    counts, sources, names = _count(pairs)
    with table_writer(out, PROMPTS) as writer:
        known = 0
        for batch in batches(pairs, ["prompt_id", "prompt", "prompt_index", "cluster", "split"]):
            new = batch.filter(pl.col("prompt_index") >= known).unique("prompt_index", keep="first", maintain_order=True)
            part = slice(known, known + new.height)
            known += new.height
            lists = [[name for bit, name in enumerate(names) if mask >> bit & 1] for mask in sources[part].tolist()]
            found = new.with_columns(pl.Series("pairs", counts[part]), pl.Series("sources", lists, pl.List(pl.String())))
            writer.write(found.select(PROMPTS.schema.names()))
    return writer.stored


def collided(first: str, second: str) -> PromptError:
    """The error that names two prompts that cannot be told apart."""
    return PromptError(
        f"two different prompts have the same 64-bit key: {first[:200]!r} and {second[:200]!r}; reject one of them"
    )


def _count(pairs: Path) -> tuple[Rows, Keys, list[str]]:
    """Pairs of each prompt, the set of its sources as bits, and the sources that the bits stand for, sorted."""
    with pairs.open("rb") as file:
        about = pl.scan_parquet(file).select(
            pl.col("prompt_index").max().fill_null(0) + 1, pl.col("src").unique().sort().implode()
        )
        prompts, names = about.collect().row(0)
    counts, sources = np.zeros(prompts, dtype=np.int64), np.zeros(prompts, dtype=np.uint64)
    for batch in batches(pairs, ["prompt_index", "src"]):
        index = batch["prompt_index"].to_numpy()
        np.add.at(counts, index, 1)
        bits = batch["src"].replace_strict(names, [1 << bit for bit in range(len(names))], return_dtype=pl.UInt64)
        np.bitwise_or.at(sources, index, bits.to_numpy())
    return counts, sources, names


def _joined(parts: list[Keys]) -> Keys:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)

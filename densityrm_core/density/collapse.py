"""Prompts that mean the same are one place in space: groups of near-duplicates, each with one representative.

Without this a local density annihilates copies: each is the other's neighbour at distance zero, and a prompt that was copied
k times would hardly ever be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from densityrm_core.arrays import Flags, runs
from densityrm_core.pairs.near_duplicates import Signatures, normalised, signatures, similarity
from densityrm_core.storage import ascending_rows
from densityrm_core.vectors.mapped import Halves, Keys, Rows, blocks, row_hashes, take
from densityrm_core.vectors.neighbors import Search

Sign = Callable[[Rows], Signatures]  # MinHash signatures of the texts of some rows
OpenSearch = Callable[[Halves, int], Search]  # an array of vectors, and how many neighbours will be asked for

_NEIGHBORS = 32  # of every prompt that are looked at; larger groups hang together through chains


@dataclass(frozen=True)
class Groups:
    """`representative` (n,): the row that stands for each row. `copies`: rows whose vector another row has bit for bit."""

    representative: Rows
    copies: int


@dataclass(frozen=True)
class Alike:
    """When two prompts count as one.

    cosine: from this similarity of their vectors on.
    jaccard: if the encoder saw only the beginning of either, the 5-character shingles of their whole texts must agree this much.
    truncated: whether it did, (n,).
    sign: gives the signatures of texts by row.
    """

    cosine: float
    jaccard: float
    truncated: Flags
    sign: Sign

    def texts_agree(self, first: Rows, second: Rows) -> Flags:
        """Whether the texts allow each pair of rows to be one group; True where both were embedded whole."""
        agree = np.ones(len(first), np.bool_)
        asked = np.flatnonzero(self.truncated[first] | self.truncated[second])
        if len(asked):
            rows, place = np.unique(np.concatenate([first[asked], second[asked]]), return_inverse=True)
            agree[asked] = similarity(self.sign(rows), place[: len(asked)], place[len(asked) :]) >= self.jaccard
        return agree


def collapse(vectors: Halves, rows: Rows, keys: Keys, alike: Alike, open_search: OpenSearch, folder: Path) -> Groups:
    """Groups among some rows of `vectors`: those linked by a chain of near-duplicates. Does not depend on the order of rows.

    Args:
        vectors: (n, d) unit vectors.
        rows: the rows to group, (m,), ascending; the others stand for themselves.
        keys: a key of every row, (n,), distinct; the smallest of a group names its representative.
        folder: for temporary arrays.
    """
    canonical = _exact_copies(vectors, rows, keys, alike)
    unique = rows[canonical == rows]
    label = _linked(take(vectors, unique, folder / "unique.npy"), unique, alike, open_search)
    by_key = np.lexsort((keys[unique], label))
    starts, sizes = runs(label[by_key])
    of_unique = np.empty(len(unique), np.int64)
    of_unique[by_key] = np.repeat(unique[by_key[starts]], sizes)
    representative = np.arange(len(vectors))
    representative[unique] = of_unique
    representative[rows] = representative[canonical]
    return Groups(representative, len(rows) - len(unique))


def signatures_from(prompts: Path) -> Sign:
    """Signatures of the texts of a table of prompts (tables.PROMPTS), read batch by batch."""

    def sign(rows: Rows) -> Signatures:
        """`rows` must ascend."""
        return np.concatenate([signatures(normalised(some["prompt"])) for some in ascending_rows(prompts, rows, ["prompt"])])

    return sign


def _exact_copies(vectors: Halves, rows: Rows, keys: Keys, alike: Alike) -> Rows:
    """For each of `rows` the row with the very same vector that has the smallest key, itself if there is none. Shape (m,)."""
    hashes = row_hashes(vectors, rows)
    order = np.lexsort((keys[rows], hashes))
    starts, sizes = runs(hashes[order])
    canonical = np.empty(len(rows), np.int64)
    canonical[order] = np.repeat(rows[order[starts]], sizes)
    copies = np.flatnonzero(canonical != rows)
    same = np.zeros(len(copies), np.bool_)
    for part in blocks(len(copies)):  # equal hashes of different vectors are unlikely, not impossible
        same[part] = (vectors[rows[copies[part]]] == vectors[canonical[copies[part]]]).all(axis=1)
    same &= alike.texts_agree(rows[copies], canonical[copies])
    canonical[copies[~same]] = rows[copies[~same]]
    return canonical


def _linked(unique: Halves, rows: Rows, alike: Alike, open_search: OpenSearch) -> Rows:
    """Connected components of the graph of near-duplicates, a label for each of `unique`, (m,)."""
    count = len(unique)
    if count < 2:
        return np.arange(count)
    search = open_search(unique, min(_NEIGHBORS, count - 1))
    firsts, seconds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in blocks(count):
        own = np.arange(part.start, part.stop)
        cosines, found = search.search(unique[part], min(_NEIGHBORS, count - 1), own)
        near = cosines >= alike.cosine
        firsts.append(np.repeat(own, near.sum(axis=1)))
        seconds.append(found[near])
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    linked = alike.texts_agree(rows[first], rows[second])
    first, second = first[linked], second[linked]
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)

"""Prompts that are nearly the same text: MinHash signatures, banded, and clusters that growth never merges or moves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arrays import Flags, Keys, Rows, runs

Signatures = npt.NDArray[np.uint8]

SHINGLE = 5  # characters
_PERMUTATIONS, _BAND = 128, 8  # 16 bands: a pair of Jaccard 0.8 meets in one with probability 0.95, of 0.9 with 0.9999
_SEED = 1
_COMPARED = 1 << 16  # pairs of signatures compared at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normalised(prompts: pl.Series) -> pl.Series:
    """What prompts have in common that differ only in case, punctuation, white space or Unicode form; never empty."""
    frame = prompts.rename("prompt").to_frame()
    lower = pl.col("prompt").str.normalize("NFKC").str.to_lowercase()
    words = lower.str.replace_all(r"[^\w]+", " ").str.strip_chars()
    return frame.select(pl.when(words != "").then(words).otherwise(pl.col("prompt")))["prompt"]


def signatures(texts: pl.Series) -> Signatures:
    """MinHash signatures [Broder 1997] of the 5-character shingles of `texts`, one byte a permutation, shape (n, 128).

    A byte of two signatures agrees with probability J + (1 - J) / 256 for texts of Jaccard similarity J.
    """
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  a compiled module without types

    hashes, bounds = _shingles(texts)
    digests = RMinHash.digest_matrix_from_flat_token_hashes(hashes, bounds.tolist(), _PERMUTATIONS, _SEED).to_rows()
    return np.array(digests, dtype=np.uint32).astype(np.uint8).reshape(len(texts), _PERMUTATIONS)


def cluster(own: Keys, found: Signatures, jaccard: float, known: Keys | None = None, is_known: Flags | None = None) -> Keys:
    """The key of every text's cluster: the own key of the text that founded it.

    Clustering is online. In order of arrival a text joins the cluster of the earliest near-duplicate that it meets, or founds
    one. What came before is never looked at again, so texts that come later change nothing for those that were there.
    (No rule for sets of texts can keep every near-duplicate together and never move one: a new text may lie between two old
    clusters. It joins the older one, and `with_twin` counts what is left.)

    Args:
        own: a key of each text; the texts are distinct, and in order of arrival. Shape (n,).
        found: their signatures, shape (n, 128).
        jaccard: texts at least this similar are near-duplicates.
        known: cluster keys that were decided before, where `is_known`; these texts count as the first to arrive, and stay.
    """
    decided = np.zeros(len(own), dtype=np.bool_) if is_known is None else is_known
    keys = own.copy() if known is None else np.where(decided, known, own)
    by_arrival = np.lexsort((np.arange(len(own)), ~decided))
    rank = np.empty(len(own), dtype=np.int64)
    rank[by_arrival] = np.arange(len(own))
    earliest = rank.copy()
    for earlier, later in _met(found, by_arrival):
        twins = similarity(found, earlier, later) >= jaccard
        np.minimum.at(earliest, later[twins], rank[earlier[twins]])
    joining = by_arrival[(earliest < rank)[by_arrival] & ~decided[by_arrival]]
    for row in joining.tolist():  # in order of arrival, so that the cluster of what it joins is settled
        keys[row] = keys[by_arrival[earliest[row]]]
    return keys


def with_twin(found: Signatures, asked: Flags, among: Flags, jaccard: float) -> Flags:
    """Which of the texts `asked` have a near-duplicate in the texts `among`: exact twins aside, at least these. Shape (n,)."""
    hit = np.zeros(len(found), dtype=np.bool_)
    for order, start, end in _buckets(found, np.arange(len(found))):
        place = np.arange(len(order))
        before = np.maximum.accumulate(np.where(among[order], place, -1))
        after = np.minimum.accumulate(np.where(among[order], place, len(order))[::-1])[::-1]
        for other, inside in ((before, before >= start), (after, after < end)):
            chosen = np.flatnonzero(asked[order] & inside & ~hit[order])
            rows = order[chosen]
            hit[rows] |= similarity(found, rows, order[other[chosen]]) >= jaccard
    return hit


def similarity(found: Signatures, first: Rows, second: Rows) -> npt.NDArray[np.float64]:
    """Jaccard similarities estimated from signatures, shape of `first`; standard error at most 0.045."""
    agree = np.empty(len(first))
    for i in range(0, len(first), _COMPARED):
        part = slice(i, i + _COMPARED)
        agree[part] = (found[first[part]] == found[second[part]]).mean(axis=1)
    return (agree - 1 / 256) / (1 - 1 / 256)


def _met(found: Signatures, by_arrival: Rows) -> Iterator[tuple[Rows, Rows]]:
    """(earlier, later) rows that share a bucket: each row with the first of the bucket, and with the one before it."""
    for order, start, _ in _buckets(found, by_arrival):
        place = np.arange(len(order))
        follows = np.flatnonzero(place > start)
        yield order[start[follows]], order[follows]
        further = follows[follows - 1 > start[follows]]
        yield order[further - 1], order[further]


def _buckets(found: Signatures, rows: Rows) -> Iterator[tuple[Rows, Rows, Rows]]:
    """For every band: `rows` bucket by bucket, in their own order within one, and where each row's bucket starts and ends."""
    for band in range(0, _PERMUTATIONS, _BAND):
        keys = np.ascontiguousarray(found[:, band : band + _BAND]).view(np.uint64)[:, 0][rows]
        order = np.argsort(keys, kind="stable")
        starts, sizes = runs(keys[order])
        yield rows[order], np.repeat(starts, sizes), np.repeat(starts + sizes, sizes)


def _shingles(texts: pl.Series) -> tuple[Keys, Rows]:
    """Hashes of every run of SHINGLE characters (a shorter text is one run), and the n + 1 bounds of the texts in them."""
    lengths = texts.str.len_chars().to_numpy().astype(np.int64)
    padded = np.maximum(lengths, SHINGLE)
    codes = np.zeros(int(padded.sum()) + SHINGLE, dtype=np.uint64)
    starts = np.cumsum(padded) - padded
    inside = np.arange(int(lengths.sum())) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    codes[inside] = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
    hashes = np.zeros(len(codes) - SHINGLE, dtype=np.uint64)
    for i in range(SHINGLE):
        hashes = hashes * _MULTIPLIER + codes[i : len(codes) - SHINGLE + i]
    hashes ^= hashes >> np.uint64(29)
    hashes *= _MULTIPLIER
    whole = np.ones(len(hashes), dtype=np.bool_)  # runs that do not reach into the next text
    ends = np.cumsum(padded)
    for i in range(1, SHINGLE):
        whole[ends - i] = False
    counts = padded - SHINGLE + 1
    return hashes[whole], np.append(0, np.cumsum(counts))

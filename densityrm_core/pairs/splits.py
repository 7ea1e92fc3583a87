"""Prompts -> clusters of near-duplicates -> train, validation, test, judge: a cluster is in one split, and stays there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arrays import Codes, id_keys
from densityrm_core.pairs.near_duplicates import Flags, Keys, Signatures, cluster, normalised, signatures, with_twin
from densityrm_core.settings import SplitSettings
from densityrm_core.storage import batches, key_value_metadata
from densityrm_core.streams import unit_intervals

Known = tuple[Keys, Keys]  # ids of prompts, ascending, and their clusters

HELD_OUT = ("test", "validation", "judge")
SPLITS = (*HELD_OUT, "train")
_VERSION = 1  # raise when the same prompts shall form other clusters
_METADATA = "densityrm.clusters"


@dataclass(frozen=True)
class Grouping:
    """The cluster of every prompt, and what of the test split has a near twin in the training split nevertheless."""

    clusters: Keys  # shape (prompts,)
    compared: bool  # whether prompts were compared at all, or are alike only if their normalised texts are equal
    test_prompts: int
    leaked: int  # test prompts with a near-duplicate among the training prompts; 0 if not compared
    metadata: dict[str, str]  # to be stored with the clusters, for `known_clusters`

    @property
    def count(self) -> int:
        return len(np.unique(self.clusters))


def group_prompts(
    texts: Iterable[pl.Series], ids: Keys, settings: SplitSettings, known: Known | None, say: Callable[[str], None]
) -> Grouping:
    """Clusters of prompts that come in parts, in order of first appearance.

    Args:
        ids: prompt ids as 64 bits, shape (n,).
        known: clusters decided earlier, from `known_clusters`: they are kept.
    """
    compare = settings.near_duplicates == "always" or (
        settings.near_duplicates == "auto" and len(ids) <= settings.near_duplicate_prompts
    )
    own, found = _keys_and_signatures(texts, len(ids), compare, say)
    texts_of, first, of_prompt = np.unique(own, return_index=True, return_inverse=True)
    in_order = np.argsort(first, kind="stable")
    number = np.empty(len(first), dtype=np.int64)
    number[in_order] = np.arange(len(first))
    of_prompt, distinct = number[of_prompt], texts_of[in_order]
    found = found[first[in_order]] if compare else found
    decided, is_decided = _decided(ids, of_prompt, len(distinct), known)
    keys = np.where(is_decided, decided, distinct)
    leaked = np.zeros(len(distinct), dtype=np.bool_)
    if compare:
        say(f"{len(distinct):,} distinct texts are compared")
        keys = cluster(distinct, found, settings.near_duplicate_jaccard, decided, is_decided)
        split = splits_of(keys, settings)
        leaked = with_twin(found, split == SPLITS.index("test"), split == SPLITS.index("train"), settings.near_duplicate_jaccard)
    clusters = keys[of_prompt]
    test = splits_of(clusters, settings) == SPLITS.index("test")
    return Grouping(clusters, compare, int(test.sum()), int(leaked[of_prompt].sum()), {_METADATA: _signature(settings)})


def splits_of(clusters: Keys, settings: SplitSettings) -> Codes:
    """The split of every cluster, as its place in SPLITS: a pure function of the cluster's key and the split seed."""
    position = unit_intervals(clusters, settings.seed, "split")
    bounds = np.cumsum([getattr(settings, name) for name in HELD_OUT])
    return np.searchsorted(bounds, position, side="right").astype(np.uint8)


def known_clusters(pairs: Path, settings: SplitSettings) -> Known | None:
    """The clusters of a stored table of pairs, unless it was made with other settings of near-duplicates."""
    if key_value_metadata(pairs).get(_METADATA) != _signature(settings):
        return None
    ids, clusters = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.uint64)]
    seen = -1
    for batch in batches(pairs, ["prompt_index", "prompt_id", "cluster"]):
        new = batch.filter(pl.col("prompt_index") > seen).unique("prompt_index", keep="first")
        seen = int(batch["prompt_index"].cast(pl.Int64).to_numpy().max(initial=seen))  # prompts are numbered as they appear
        ids.append(id_keys(new["prompt_id"]))
        clusters.append(id_keys(new["cluster"]))
    joined = np.concatenate(ids)
    order = np.argsort(joined)
    return joined[order], np.concatenate(clusters)[order]


def _keys_and_signatures(
    texts: Iterable[pl.Series], count: int, compare: bool, say: Callable[[str], None]
) -> tuple[Keys, Signatures]:
    own = np.zeros(count, dtype=np.uint64)
    found = np.zeros((count if compare else 0, 128), dtype=np.uint8)
    done = 0
    for part in texts:
        plain = normalised(part)
        rows = slice(done, done := done + len(part))
        own[rows] = [_text_key(text) for text in plain]
        if compare:
            found[rows] = signatures(plain)
        say(f"{done:,}/{count:,} prompts normalised" + (" and hashed" if compare else ""))
    return own, found


def _decided(ids: Keys, of_prompt: npt.NDArray[np.int64], texts: int, known: Known | None) -> tuple[Keys, Flags]:
    """The clusters of distinct texts that are known, and which those are."""
    decided, is_decided = np.zeros(texts, dtype=np.uint64), np.zeros(texts, dtype=np.bool_)
    if known is not None and len(known[0]):
        at = np.minimum(np.searchsorted(known[0], ids), len(known[0]) - 1)
        old = known[0][at] == ids
        decided[of_prompt[old]] = known[1][at[old]]
        is_decided[of_prompt[old]] = True
    return decided, is_decided


def _text_key(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:8])


def _signature(settings: SplitSettings) -> str:
    return json.dumps([_VERSION, settings.near_duplicates, settings.near_duplicate_jaccard])

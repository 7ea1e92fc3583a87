"""Weights -> a reproducible, resumable stream of indices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.streams import Words, mix64, stream_seed

Ints = npt.NDArray[np.int64]
_ROUNDS = 4


class SystematicSampler:
    """Systematic sampling in a pseudo-random order: draw t is a pure function of (seed, epoch, t).

    Over one epoch of N draws item i appears floor(N p_i) or ceil(N p_i) times: as even as an epoch can be [Madow & Madow 1944].
    The order is a Feistel permutation of [0, N) [Black & Rogaway 2002], so any draw can be had without the ones before it.
    """

    def __init__(self, weights: npt.NDArray[np.float64], epoch_size: int, seed: int) -> None:
        """Args: weights (n,), non-negative, not all zero; epoch_size N >= 1.

        Raises:
            ValueError: a weight is negative or not finite, or all are zero.
        """
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
            raise ValueError("weights must be finite, none negative, not all zero")
        cumulative = np.cumsum(weights, dtype=np.float64)  # float32 would give most of 30 M items zero width
        self._cumulative = cumulative / cumulative[-1]
        self._last = int(np.flatnonzero(weights)[-1])
        self.epoch_size, self.seed = epoch_size, seed

    def draw(self, t: Ints, epoch: int = 0) -> Ints:
        """Items (len(t),) at the positions `t` of an epoch, 0 <= t < N."""
        keys, offset = _keys(self.seed, epoch)
        position = (_permute(np.asarray(t, np.uint64), self.epoch_size, keys).astype(np.float64) + offset) / self.epoch_size
        return np.minimum(np.searchsorted(self._cumulative, position, side="right"), self._last).astype(np.int64)

    def batch(self, step: int, size: int) -> Ints:
        """Items of global step `step` (from 0): draws step*size .. step*size + size - 1, running on from epoch to epoch."""
        t = np.arange(step * size, (step + 1) * size)
        epochs, within = np.divmod(t, self.epoch_size)
        return np.concatenate([self.draw(within[epochs == epoch], int(epoch)) for epoch in np.unique(epochs)])


def pair_weights(pairs: pl.DataFrame, weights: pl.DataFrame) -> npt.NDArray[np.float64]:
    """Sampling weight of every row of `pairs`, in its order: its prompt's weight shared among the prompt's pairs. Sums to 1.

    Args:
        pairs: tables.PREFERENCE_PAIRS, the training split.
        weights: tables.DENSITY_WEIGHTS.

    Raises:
        ValueError: a pair's prompt has no weight; the message names it.
    """
    joined = pairs.select("prompt_id", pl.len().over("prompt_id").alias("m")).join(
        weights.select("prompt_id", "weight"), on="prompt_id", how="left", maintain_order="left"
    )
    missing = joined.filter(pl.col("weight").is_null())
    if missing.height:
        raise ValueError(f"{missing.height} pairs have a prompt without a weight, the first is {missing['prompt_id'][0]}")
    shared = (joined["weight"] / joined["m"]).to_numpy()
    return shared / shared.sum()


def uniform_weights(n: int) -> npt.NDArray[np.float64]:
    """1/n for each of n items."""
    return np.full(n, 1 / n)


def training_prompts(pairs: pl.DataFrame, weights: pl.DataFrame, by_density: bool) -> pl.DataFrame:
    """The training prompts a policy is asked: one context of each, in order of first appearance.

    Args:
        pairs: tables.PREFERENCE_PAIRS.
        weights: tables.DENSITY_WEIGHTS.
        by_density: whether `weight` is the prompt's density weight or the same for all.

    Returns:
        columns prompt_id, context, weight.
    """
    asked = (
        pairs.filter(pl.col("split") == "train")
        .unique("prompt_id", keep="first", maintain_order=True)
        .select("prompt_id", "context")
        .join(weights.select("prompt_id", "weight"), on="prompt_id", how="left", maintain_order="left")
    )
    if asked["weight"].null_count():
        raise ValueError(f"{asked['weight'].null_count()} training prompts have no weight; materialize density_weights again")
    return asked if by_density else asked.with_columns(weight=pl.lit(1 / asked.height))


def _keys(seed: int, epoch: int) -> tuple[Words, float]:
    state = np.random.SeedSequence([stream_seed(seed, "sampler"), epoch]).generate_state(_ROUNDS + 1, np.uint64)
    words = state.astype(np.uint64, copy=False)
    return words[:-1], float(words[-1] >> np.uint64(11)) * 2.0**-53


def _permute(t: Words, n: int, keys: Words) -> Words:
    """A bijection of [0, n) at the points t: a balanced Feistel network on the next even power of two, walked until inside."""
    half = np.uint64((max(2, (n - 1).bit_length()) + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    out, todo, x = t.copy(), np.arange(len(t)), t.copy()
    while len(todo):
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (mix64(right, key) & mask)
        x = (left << half) | right
        inside = x < np.uint64(n)
        out[todo[inside]] = x[inside]
        todo, x = todo[~inside], x[~inside]
    return out

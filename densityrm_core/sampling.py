"""Weights -> a reproducible, resumable, shardable stream of indices.

An epoch is N points in [0, 1), and item i owns an interval as long as its share p_i of the weights:

    items      |---- 0 ----|- 1 -|-------- 2 --------|3|     cumulative weights, (n,)
    points       .    .    .    .    .    .    .    .        systematic: a grid of step 1/N with one random offset

Each item is met floor(N p_i) or ceil(N p_i) times. A pseudo-random permutation of [0, N), a function of (seed, epoch), says which
point draw t takes, so any draw can be had without the ones before it: resuming needs no state, and a rank draws every world-th.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from densityrm_core.arrays import Doubles, Ints
from densityrm_core.settings import SamplingSettings
from densityrm_core.streams import Words, mix64, stream_seed

State = dict[str, str | int]

_ROUNDS = 4
_SORTED_FROM = 4096  # draws: from here on a sorted walk through the cumulative weights is faster than jumps
_TO_UNIT = 2.0**-53
_WORDS_A_COUNT = 4  # that Philox gives for each value of its counter


class Sampler(ABC):
    """Draws of items by weight. Draw t of an epoch is a pure function of (weights, seed, epoch, t): no state, nothing to replay.

    A step is a number, too: resuming at step s, or drawing every `world`-th item of a batch, needs nothing but s, rank and world.
    """

    method: ClassVar[str]

    def __init__(self, weights: Doubles, epoch_size: int, seed: int) -> None:
        """Args: weights (n,), non-negative, not all zero, any scale; epoch_size N >= 1.

        Raises:
            ValueError: a weight is negative or not finite, or all are zero; N < 1.
        """
        weights = np.ascontiguousarray(weights, np.float64)
        total = float(weights.sum()) if weights.ndim == 1 and len(weights) else 0.0
        if not np.isfinite(total) or total <= 0 or weights.min() < 0:  # NaN and infinity spread to the sum
            raise ValueError("weights must be finite, none negative, not all zero, and at least one")
        if epoch_size < 1:
            raise ValueError(f"an epoch needs at least one draw, not {epoch_size}")
        self.epoch_size, self.seed = int(epoch_size), int(seed)
        self.weights_hash = hashlib.sha256(weights.data).hexdigest()[:32]

    def draw(self, t: Ints, epoch: int = 0) -> Ints:
        """Items (len(t),) at the positions `t` of an epoch. Raises ValueError unless all are in 0 <= t < N."""
        t = np.asarray(t, np.int64)
        if len(t) and not 0 <= t.min() <= t.max() < self.epoch_size:  # the permutation might never come back from outside
            raise ValueError(
                f"draws {t.min()} to {t.max()} are not all in an epoch of {self.epoch_size}; `batch` runs on past its end"
            )
        return self._draw(t, epoch)

    @abstractmethod
    def _draw(self, t: Ints, epoch: int) -> Ints: ...

    def batch(self, step: int, size: int, rank: int = 0, world: int = 1) -> Ints:
        """Items of global step `step` (from 0): draws step*size + rank, every `world`-th, below (step + 1)*size.

        Draws run on from epoch to epoch. The ranks' items, dealt in turn, are the batch of a single rank.

        Raises:
            ValueError: the rank is not in 0 <= rank < world.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world}; ranks count from 0")
        epochs, within = np.divmod(np.arange(step * size + rank, (step + 1) * size, world), self.epoch_size)
        if not len(epochs) or epochs[0] == epochs[-1]:
            return self.draw(within, int(epochs[0]) if len(epochs) else 0)
        return np.concatenate([self.draw(within[epochs == epoch], int(epoch)) for epoch in np.unique(epochs)])

    def state(self, step: int) -> State:
        """What a checkpoint keeps: enough to refuse to go on with other weights."""
        return {**self._identity(), "step": int(step)}

    def resume(self, state: State) -> int:
        """The step to go on from. Raises ValueError, naming what differs, if the state is another sampler's or has no step."""
        differing = [
            f"{name} {state.get(name)!r}, not {value!r}" for name, value in self._identity().items() if state.get(name) != value
        ]
        if differing:
            raise ValueError("the checkpoint was drawn with " + "; ".join(differing) + ": start anew, or restore what it had")
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"the checkpoint's step is {step!r}, not a number of steps taken: start anew, or restore it")
        return step

    def _identity(self) -> State:
        return {"method": self.method, "seed": self.seed, "epoch_size": self.epoch_size, "weights_hash": self.weights_hash}


class _ByPosition(Sampler):
    """A draw is a position in [0, 1) and falls on the item whose stretch of the cumulative weights covers it."""

    def __init__(self, weights: Doubles, epoch_size: int, seed: int) -> None:
        super().__init__(weights, epoch_size, seed)
        self._cumulative = np.cumsum(weights, dtype=np.float64)  # float32 would give most of 30 M items zero width
        self._cumulative /= self._cumulative[-1]
        self._last = int(np.searchsorted(self._cumulative, 1.0))  # the last item with any weight

    def _draw(self, t: Ints, epoch: int) -> Ints:
        position = self._positions(t.astype(np.uint64), epoch)
        if len(position) < _SORTED_FROM:
            return self._items(position)
        order = np.argsort(position)
        items = np.empty(len(position), np.int64)
        items[order] = self._items(position[order])
        return items

    def _items(self, position: Doubles) -> Ints:
        return np.minimum(np.searchsorted(self._cumulative, position, side="right"), self._last).astype(np.int64)

    @abstractmethod
    def _positions(self, t: Words, epoch: int) -> Doubles: ...


class SystematicSampler(_ByPosition):
    """Systematic sampling in a pseudo-random order.

    Over one epoch of N draws item i appears floor(N p_i) or ceil(N p_i) times: as even as an epoch can be [Madow & Madow 1944].
    The order is a Feistel permutation of [0, N) [Black & Rogaway 2002], so any draw can be had without the ones before it.
    """

    method = "systematic"

    def _positions(self, t: Words, epoch: int) -> Doubles:
        words = _words(self.seed, epoch, "sampler", _ROUNDS + 1)
        offset = float(words[-1] >> np.uint64(11)) * _TO_UNIT
        return (_permute(t, self.epoch_size, words[:-1]).astype(np.float64) + offset) / self.epoch_size


class IidSampler(_ByPosition):
    """Independent draws with replacement: draw t is word t of a Philox stream, which can start anywhere [Salmon et al. 2011]."""

    method = "iid"

    def _positions(self, t: Words, epoch: int) -> Doubles:
        if not len(t):
            return np.zeros(0)
        start = int(t.min()) // _WORDS_A_COUNT
        stream = np.random.Philox(key=_words(self.seed, epoch, "iid sampler", 2), counter=start)
        words = stream.random_raw(int(t.max()) + 1 - start * _WORDS_A_COUNT)
        return (words[t - np.uint64(start * _WORDS_A_COUNT)] >> np.uint64(11)).astype(np.float64) * _TO_UNIT


class WithoutReplacementSampler(Sampler):
    """Every epoch is N distinct items: those with the N smallest keys E_i / w_i, E_i exponential [Efraimidis & Spirakis 2006].

    The first draw has the probabilities that the weights say, later ones those of what is left: heavy items come in nearly every
    epoch, so shares are flatter than weights. An epoch's order is computed when its first draw is asked for, and kept.
    """

    method = "without_replacement"

    def __init__(self, weights: Doubles, epoch_size: int, seed: int) -> None:
        super().__init__(weights, epoch_size, seed)
        positive = int(np.count_nonzero(weights))
        if epoch_size > positive:
            raise ValueError(f"without replacement {epoch_size} draws need as many items of positive weight, not {positive}")
        self._weights = np.asarray(weights, np.float64)
        self._kept: tuple[int, Ints] | None = None

    def _draw(self, t: Ints, epoch: int) -> Ints:
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._order(epoch)
        return self._kept[1][t]

    def _order(self, epoch: int) -> Ints:
        first, second = _words(self.seed, epoch, "without replacement", 2)
        bits = mix64(mix64(np.arange(len(self._weights), dtype=np.uint64), first), second) >> np.uint64(11)
        exponential = -np.log1p(-(bits.astype(np.float64) + 0.5) * _TO_UNIT)
        with np.errstate(divide="ignore"):  # log 0 puts an item without weight last
            keys = np.log(exponential) - np.log(self._weights)  # E / w would overflow where a weight is tiny
        chosen = np.argpartition(keys, self.epoch_size - 1)[: self.epoch_size]
        return chosen[np.lexsort((chosen, keys[chosen]))].astype(np.int64)


_METHODS: dict[str, type[Sampler]] = {
    sampler.method: sampler for sampler in (SystematicSampler, IidSampler, WithoutReplacementSampler)
}


def make_sampler(weights: Doubles, seed: int, settings: SamplingSettings) -> Sampler:
    """The sampler that the experiment asks for; an epoch is `settings.epoch` times as many draws as there are items."""
    return _METHODS[settings.method](weights, max(1, round(settings.epoch * len(weights))), seed)


def uniform_weights(n: int) -> Doubles:
    """1/n for each of n items."""
    return np.full(n, 1 / n)


def _words(seed: int, epoch: int, name: str, count: int) -> Words:
    state = np.random.SeedSequence([stream_seed(seed, name), epoch]).generate_state(count, np.uint64)
    return state.astype(np.uint64, copy=False)


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

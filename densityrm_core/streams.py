"""Seeded, named random streams: every random draw of an experiment comes from one of these."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """An independent generator for `seed` and a name such as ("rm", "init"); the same name gives the same draws."""
    return np.random.default_rng(np.random.SeedSequence([seed, *_words(names)]))


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for a library with its own generator (torch), derived as `stream` derives its own."""
    return int(np.random.SeedSequence([seed, *_words(names)]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def unit_intervals(keys: Words, seed: int, *names: str | int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), each a pure function of its 64-bit key, the seed and the name, whatever other keys exist. Shape (n,)."""
    return (mix64(keys, np.uint64(stream_seed(seed, *names))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix64(x: Words, key: np.uint64) -> Words:
    """The finaliser of splitmix64 [Steele, Lea & Flood 2014] of x + key, modulo 2^64."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(names: tuple[str | int, ...]) -> list[int]:
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]

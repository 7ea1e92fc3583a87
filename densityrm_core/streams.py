"""Seeded, named random streams: every random draw of an experiment comes from one of these."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """An independent generator for `seed` and a name such as ("rm", "init"); the same name gives the same draws."""
    return np.random.default_rng(np.random.SeedSequence([seed, *_words(names)]))


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for a library with its own generator (torch), derived as `stream` derives its own."""
    return int(np.random.SeedSequence([seed, *_words(names)]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def unit_interval(*parts: str | int) -> float:
    """A number in [0, 1) that is a pure function of `parts`: equal parts, equal number, whatever else exists."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _words(names: tuple[str | int, ...]) -> list[int]:
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]

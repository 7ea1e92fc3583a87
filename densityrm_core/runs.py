"""Runs of equal values in a sorted array: what grouping comes down to where only keys fit in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def runs(values: npt.NDArray[Any]) -> tuple[Rows, Rows]:
    """Where every run of equal neighbours starts, and how long it is."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
    return starts, np.diff(np.append(starts, len(values)))

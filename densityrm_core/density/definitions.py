"""Cosines of the k nearest neighbours -> log density, by one of several definitions.

All of them rank alike where prompts are plenty; they differ in how they treat few neighbours and copies. r_j is the Euclidean
distance to the j-th nearest of k others on the unit sphere, sqrt(2 - 2 cos).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from densityrm_core.arrays import Doubles, Floats
from densityrm_core.settings import DensitySettings

BANDWIDTH = "bandwidth"  # key in the metadata of a stored table of weights
_BANDWIDTH_FROM = 10_000  # prompts: the median of a distance needs no more
_CLOSEST = 1e-6  # the original's guard against division by zero


def distances(cosines: Floats) -> Doubles:
    """Euclidean distances of unit vectors, same shape; rounding may put a cosine above 1, never a distance below 0."""
    return np.sqrt(np.maximum(0.0, 2.0 - 2.0 * cosines.astype(np.float64)))


def log_density(cosines: Floats, settings: DensitySettings, bandwidth: float = 1.0) -> Doubles:
    """Natural log of the density at each prompt, up to a constant that all prompts share. Shape (n,).

    Args:
        cosines: of the k nearest others, nearest first, (n, k).
        bandwidth: h of the kernel definitions, see `bandwidth_of`; the others do not use it.
    """
    return _DEFINITIONS[settings.definition](distances(cosines), settings.distance_floor, bandwidth)


def stratum(log_rho: Doubles, training: Doubles, parts: int) -> npt.NDArray[np.int64]:
    """Which of `parts` equal parts of the training prompts' log densities each of `log_rho` falls into, 1 the rarest."""
    edges = np.quantile(training, np.arange(1, parts) / parts)
    return 1 + np.searchsorted(edges, log_rho, side="left").astype(np.int64)


def needs_bandwidth(settings: DensitySettings) -> bool:
    """Whether the definition is one with a kernel."""
    return settings.definition in ("kde", "soft_count")


def bandwidth_of(kth_distances: Doubles) -> float:
    """h: the median distance to the k-th neighbour; the rank of prompts changes little with it."""
    return max(float(np.median(kth_distances)), _CLOSEST)


def sample_for_bandwidth(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Rows to take the bandwidth from: those with the smallest keys, so that it does not depend on the order of rows."""
    return np.sort(np.argsort(keys, kind="stable")[:_BANDWIDTH_FROM])


def mean_log_distance(r: Doubles, floor: float, _h: float) -> Doubles:
    """-mean_j log max(r_j, floor): the inverse geometric-mean distance.

    With exponent m it is the log-averaged k-nearest-neighbour density in m dimensions [Loftsgaarden & Quesenberry 1965; averaged
    over neighbours as in Levina & Bickel 2004].
    """
    return -np.log(np.maximum(r, floor)).mean(axis=1)


def mean_distance(r: Doubles, floor: float, _h: float) -> Doubles:
    """-log mean_j max(r_j, floor): the inverse mean distance."""
    return -np.log(np.maximum(r, floor).mean(axis=1))


def kth_distance(r: Doubles, floor: float, _h: float) -> Doubles:
    """-log max(r_k, floor): the nearest-neighbour estimate itself [Loftsgaarden & Quesenberry 1965], noisier than averages."""
    return -np.log(np.maximum(r[:, -1], floor))


def kde(r: Doubles, _floor: float, h: float) -> Doubles:
    """log mean_j exp(-r_j^2 / 2 h^2): a Gaussian kernel estimate [Parzen 1962] truncated to the k nearest."""
    return np.asarray(logsumexp(-(r**2) / (2 * h**2), axis=1)) - np.log(r.shape[1])


def soft_count(r: Doubles, _floor: float, h: float) -> Doubles:
    """log (1 + sum_j exp(-r_j^2 / 2 h^2)): the same kernel sum, the prompt itself counted: a number of copies from 1 to k + 1."""
    return np.log1p(np.exp(-(r**2) / (2 * h**2)).sum(axis=1))


def original(r: Doubles, _floor: float, _h: float) -> Doubles:
    """-log max(mean_j r_j, 1e-6): minus the log of what the first implementation called density, so that strata stay honest.

    It divided by that distance: weight ~ density here, with exponent -1, which weighs common prompts up.
    """
    return -np.log(np.maximum(r.mean(axis=1), _CLOSEST))


_DEFINITIONS: dict[str, Callable[[Doubles, float, float], Doubles]] = {
    "mean_log_distance": mean_log_distance,
    "mean_distance": mean_distance,
    "kth_distance": kth_distance,
    "kde": kde,
    "soft_count": soft_count,
    "original": original,
}

"""Our sampler at Stack Exchange's number of pairs, beside torch's `multinomial` and `WeightedRandomSampler`.

`multinomial` refuses more than 2^24 categories; `WeightedRandomSampler` calls it, so it is timed to its first item at 16 million.
Memory is the peak beyond the weights while building and drawing batches. The variance ratio is that of the mean over an epoch of
a value that goes with the weight, independent draws over systematic ones, at 20,000 items. Keys: `build_s`, `first_batch_ms`,
`batch_ms` (256 draws, median), `epoch_s` (in chunks of a million), `rss_gib`, `variance_ratio`, `multinomial_refuses`,
`wrs_first_item_s`, `slice_equal`, `identical_over_world_sizes`.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from torch.utils.data import WeightedRandomSampler

from benchmarks.measure import memory, reset_peak, seconds
from densityrm_core.sampling import IidSampler, SystematicSampler
from densityrm_core.streams import stream

_BATCH, _CHUNK, _BATCHES = 256, 1_000_000, 200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--weights", type=int, default=31_300_000)
    count = arguments.parse_args().weights
    torch.set_num_threads(2)
    weights = stream(0, "benchmark weights").exponential(size=count)
    result: dict[str, object] = {"weights": count}
    before = reset_peak()
    started = time.perf_counter()
    sampler = SystematicSampler(weights, count, seed=0)
    result["build_s"] = round(time.perf_counter() - started, 2)
    result["first_batch_ms"] = round(1e3 * seconds(lambda: sampler.batch(0, _BATCH)), 2)
    steps = iter(range(1, _BATCHES + 1))
    result["batch_ms"] = round(
        1e3 * statistics.median(seconds(lambda: sampler.batch(next(steps), _BATCH)) for _ in range(_BATCHES)), 3
    )
    result["rss_gib"] = round((memory("VmHWM") - before) / 2**30, 3)
    result["slice_equal"] = _slice_equal(sampler)
    result["identical_over_world_sizes"] = all(_dealt_alike(sampler, world) for world in (1, 2, 3, 8))
    started = time.perf_counter()
    drawn = [sampler.draw(np.arange(start, min(start + _CHUNK, count))).sum() for start in range(0, count, _CHUNK)]
    result["epoch_s"] = round(time.perf_counter() - started, 1)
    assert len(drawn) == -(-count // _CHUNK)
    result["variance_ratio"] = round(_variance_ratio(), 1)
    result["multinomial_refuses"] = _refusal(weights)
    result["wrs_first_item_s"] = round(_first_item(weights[: 1 << 24]), 2)
    print(json.dumps(result))


def _slice_equal(sampler: SystematicSampler) -> bool:
    """Draws 10^6 .. 10^6 + 1000 computed alone, and as part of a longer stretch of the stream."""
    first = min(1_000_000, sampler.epoch_size // 2)
    alone = sampler.draw(np.arange(first, first + 1001))
    return bool((sampler.draw(np.arange(first + 2000))[first : first + 1001] == alone).all())


def _dealt_alike(sampler: SystematicSampler, world: int) -> bool:
    dealt = np.full(_BATCH, -1)
    for rank in range(world):
        dealt[rank::world] = sampler.batch(123, _BATCH, rank, world)
    return bool((dealt == sampler.batch(123, _BATCH)).all())


def _variance_ratio(count: int = 20_000, epochs: int = 200) -> float:
    rng = stream(0, "benchmark variance")
    weights = rng.exponential(size=count) ** 2
    value, t = np.log(weights) + rng.normal(size=count), np.arange(count)
    means = [
        [float(value[kind(weights, count, 0).draw(t, epoch)].mean()) for epoch in range(epochs)]
        for kind in (IidSampler, SystematicSampler)
    ]
    return statistics.variance(means[0]) / statistics.variance(means[1])


def _refusal(weights: np.ndarray) -> str:
    try:
        torch.multinomial(torch.from_numpy(weights), 1, replacement=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "did not refuse"


def _first_item(weights: np.ndarray) -> float:
    sampler = WeightedRandomSampler(torch.from_numpy(weights), len(weights))
    return seconds(lambda: next(iter(sampler)))


if __name__ == "__main__":
    main()

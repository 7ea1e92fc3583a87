"""Draws follow the weights, and any draw can be had without the ones before it."""

import numpy as np
import polars as pl
import pytest

from densityrm_core.sampling import SystematicSampler, pair_weights


def weights(n: int = 500) -> np.ndarray:
    return np.random.default_rng(0).exponential(size=n) ** 2


@pytest.mark.parametrize("epoch_size", [500, 1301, 4096])
def test_every_item_is_drawn_floor_or_ceil_of_its_share(epoch_size: int):
    w = weights()
    counts = np.bincount(SystematicSampler(w, epoch_size, seed=3).draw(np.arange(epoch_size)), minlength=len(w))
    assert np.abs(counts - epoch_size * w / w.sum()).max() < 1


def test_uniform_weights_visit_everything_once_an_epoch():
    drawn = SystematicSampler(np.ones(777), 777, seed=0).draw(np.arange(777))
    assert sorted(drawn) == list(range(777))


def test_a_batch_is_the_same_whatever_was_drawn_before():
    fresh, used = SystematicSampler(weights(), 1000, seed=1), SystematicSampler(weights(), 1000, seed=1)
    for step in range(50):
        used.batch(step, 32)
    assert (fresh.batch(50, 32) == used.batch(50, 32)).all()


def test_batches_run_on_from_epoch_to_epoch():
    sampler = SystematicSampler(np.ones(100), 100, seed=2)
    drawn = np.concatenate([sampler.batch(step, 32) for step in range(25)])  # eight epochs
    assert (np.bincount(drawn, minlength=100) == 8).all()


def test_epochs_and_seeds_differ_in_order():
    t = np.arange(200)
    first = SystematicSampler(np.ones(200), 200, seed=0)
    assert (first.draw(t, 0) != first.draw(t, 1)).any()
    assert (first.draw(t) != SystematicSampler(np.ones(200), 200, seed=1).draw(t)).any()


def test_an_item_without_weight_is_never_drawn():
    w = weights()
    w[[0, 17, 499]] = 0
    assert not {0, 17, 499} & set(SystematicSampler(w, 5000, seed=0).draw(np.arange(5000)))


@pytest.mark.parametrize("bad", [[-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_weights_that_are_no_distribution_are_refused(bad: list[float]):
    with pytest.raises(ValueError, match="finite"):
        SystematicSampler(np.array(bad), 10, seed=0)


def test_pairs_of_one_prompt_share_its_weight():
    pairs = pl.DataFrame({"prompt_id": ["a", "b", "a", "a"]})
    table = pl.DataFrame({"prompt_id": ["a", "b"], "weight": [0.6, 0.4]})
    assert pair_weights(pairs, table) == pytest.approx([0.2, 0.4, 0.2, 0.2])


def test_a_pair_without_weight_is_named():
    with pytest.raises(ValueError, match="the first is z"):
        pair_weights(pl.DataFrame({"prompt_id": ["a", "z"]}), pl.DataFrame({"prompt_id": ["a"], "weight": [1.0]}))

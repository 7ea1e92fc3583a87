"""Draws follow the weights, and any draw can be had without the ones before it."""

import json

import numpy as np
import polars as pl
import pytest

from densityrm_core.density.pair_weights import StrataError, weigh_pairs
from densityrm_core.sampling import IidSampler, Sampler, SystematicSampler, WithoutReplacementSampler, make_sampler
from densityrm_core.settings import SamplingSettings
from densityrm_core.streams import stream

SAMPLERS = [SystematicSampler, IidSampler, WithoutReplacementSampler]


def weights(n: int = 500) -> np.ndarray:
    return stream(0, "test weights").exponential(size=n) ** 2


@pytest.mark.parametrize("epoch_size", [500, 1301, 4096, 100_000])
def test_every_item_is_drawn_floor_or_ceil_of_its_share(epoch_size: int):
    w = weights()
    counts = np.bincount(SystematicSampler(w, epoch_size, seed=3).draw(np.arange(epoch_size)), minlength=len(w))
    assert np.abs(counts - epoch_size * w / w.sum()).max() < 1


def test_a_million_weights_of_any_size_are_drawn_to_within_one():
    w = np.exp(stream(1, "test weights").uniform(-200, 0, 1_000_000))
    counts = np.bincount(SystematicSampler(w, len(w), seed=0).draw(np.arange(len(w))), minlength=len(w))
    assert np.abs(counts - len(w) * (w / w.sum())).max() < 1 + 1e-6


def test_single_precision_would_lose_items_that_double_precision_keeps():
    cumulative = SystematicSampler(weights(20_000_000), 20_000_000, seed=0)._cumulative
    assert (np.diff(cumulative) == 0).mean() < 0.001
    assert (np.diff(cumulative.astype(np.float32)) == 0).mean() > 0.5


def test_uniform_weights_visit_everything_once_an_epoch():
    drawn = SystematicSampler(np.ones(777), 777, seed=0).draw(np.arange(777))
    assert sorted(drawn) == list(range(777))


def test_the_stream_is_what_it_was():
    drawn = SystematicSampler(np.array([1.0, 2.0, 3.0, 4.0]), 10, seed=0).draw(np.arange(10))
    assert np.bincount(drawn).tolist() == [1, 2, 3, 4]
    assert drawn.tolist() == [3, 1, 1, 2, 3, 3, 0, 2, 2, 3]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_draws_alone_equal_the_same_slice_of_the_stream(kind: type[Sampler]):
    sampler = kind(weights(20_000), 15_000, seed=5)
    whole, part = sampler.draw(np.arange(15_000), epoch=2), kind(weights(20_000), 15_000, seed=5).draw(np.arange(9000, 9100), 2)
    assert (whole[9000:9100] == part).all()
    assert (sampler.draw(np.array([14_000, 3, 700]), 2) == whole[[14_000, 3, 700]]).all()


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_batch_of_one_rank(kind: type[Sampler], world: int):
    sampler = kind(weights(), 300, seed=1)
    for step in (0, 4, 11):  # within an epoch, across its end, later
        dealt = np.full(64, -1)
        for rank in range(world):
            dealt[rank::world] = sampler.batch(step, 64, rank, world)
        assert (dealt == sampler.batch(step, 64)).all()


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_batch_is_the_same_whatever_was_drawn_before(kind: type[Sampler]):
    fresh, used = kind(weights(), 400, seed=1), kind(weights(), 400, seed=1)
    for step in range(50):
        used.batch(step, 32)
    assert (fresh.batch(50, 32) == used.batch(50, 32)).all()


def test_batches_run_on_from_epoch_to_epoch():
    sampler = SystematicSampler(np.ones(100), 100, seed=2)
    drawn = np.concatenate([sampler.batch(step, 32) for step in range(25)])  # eight epochs
    assert (np.bincount(drawn, minlength=100) == 8).all()


@pytest.mark.parametrize("kind", SAMPLERS)
def test_epochs_and_seeds_differ_in_order(kind: type[Sampler]):
    t, first = np.arange(200), kind(np.ones(200), 200, seed=0)
    assert (first.draw(t, 0) != first.draw(t, 1)).any()
    assert (first.draw(t) != kind(np.ones(200), 200, seed=1).draw(t)).any()


def test_an_epochs_mean_varies_less_than_that_of_independent_draws():
    w = weights(2000)
    value = np.log(w) + stream(3, "test values").normal(size=2000)
    t = np.arange(2000)
    means = {kind: [value[kind(w, 2000, seed=0).draw(t, epoch)].mean() for epoch in range(200)] for kind in SAMPLERS[:2]}
    assert np.var(means[IidSampler]) > 5 * np.var(means[SystematicSampler])


def test_independent_draws_follow_the_weights():
    w = weights(50)
    counts = np.bincount(IidSampler(w, 100_000, seed=0).draw(np.arange(100_000)), minlength=50)
    expected = 100_000 * w / w.sum()
    assert (((counts - expected) ** 2 / expected).sum()) < 90  # chi-square with 49 degrees of freedom: one in 3,000


def test_without_replacement_nothing_comes_twice_and_heavy_items_come_first_and_often():
    w = np.repeat([1.0, 10.0], 100)
    sampler = WithoutReplacementSampler(w, 50, seed=0)
    epochs = np.stack([sampler.draw(np.arange(50), epoch) for epoch in range(100)])
    assert all(len(set(epoch)) == 50 for epoch in epochs.tolist())
    assert (epochs[:, 0] >= 100).mean() == pytest.approx(10 / 11, abs=0.08)
    assert 0.75 < (epochs >= 100).mean() < 10 / 11


def test_without_replacement_an_epoch_needs_as_many_items():
    with pytest.raises(ValueError, match="need as many items of positive weight, not 2"):
        WithoutReplacementSampler(np.array([1.0, 0.0, 2.0]), 3, seed=0)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_item_without_weight_is_never_drawn(kind: type[Sampler]):
    w = weights()
    w[[0, 17, 499]] = 0
    assert not {0, 17, 499} & set(kind(w, 497, seed=0).draw(np.arange(497)))


@pytest.mark.parametrize("bad", [[-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [], [[1.0]]])
def test_weights_that_are_no_distribution_are_refused(bad: list[float]):
    with pytest.raises(ValueError, match="finite"):
        SystematicSampler(np.array(bad), 10, seed=0)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("outside", [-1, 10])
def test_a_draw_outside_the_epoch_is_refused(kind: type[Sampler], outside: int):
    with pytest.raises(ValueError, match="not all in an epoch of 10"):
        kind(np.ones(10), 10, seed=0).draw(np.array([3, outside]))


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world: int):
    with pytest.raises(ValueError, match=f"rank {rank} is not one of {world}"):
        SystematicSampler(weights(), 500, seed=0).batch(0, 8, rank, world)


def test_the_tiniest_weight_comes_before_no_weight_without_replacement():
    w = np.repeat([0.0, 1e-310], 50)  # an exponential number over such a weight is infinite
    assert WithoutReplacementSampler(w, 50, seed=0).draw(np.arange(50)).min() == 50


def test_a_resumed_sampler_goes_on_at_its_step():
    state = SystematicSampler(weights(), np.int64(500), seed=np.int64(1)).state(37)
    assert SystematicSampler(weights(), 500, seed=1).resume(json.loads(json.dumps(state))) == 37


@pytest.mark.parametrize("step", [None, -1, "37"])
def test_a_state_without_a_step_is_refused(step: object):
    sampler = SystematicSampler(weights(), 500, seed=1)
    with pytest.raises(ValueError, match="the checkpoint's step is"):
        sampler.resume({**sampler.state(37), "step": step})


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (SystematicSampler(weights() * 2, 500, 1), "weights_hash"),
        (SystematicSampler(weights(), 500, 2), "seed"),
        (SystematicSampler(weights(), 501, 1), "epoch_size"),
        (IidSampler(weights(), 500, 1), "method"),
    ],
)
def test_another_sampler_refuses_to_resume_and_names_what_differs(other: Sampler, named: str):
    with pytest.raises(ValueError, match=f"drawn with {named}"):
        other.resume(SystematicSampler(weights(), 500, seed=1).state(37))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_every_batch_from_any_step_on(rank: int):
    sampler = SystematicSampler(weights(), 500, seed=1)
    for step in range(17, 40):
        assert sampler.batch(step, 16, rank, 2).tolist() == sampler.batch(step, 16)[rank::2].tolist()


def test_the_experiment_chooses_the_method_and_the_epoch():
    settings = SamplingSettings(method="without_replacement", epoch=0.5)
    sampler = make_sampler(weights(), 0, settings)
    assert (type(sampler), sampler.epoch_size) == (WithoutReplacementSampler, 250)


def test_an_epoch_without_replacement_must_leave_a_choice():
    with pytest.raises(ValueError, match="must be below 1"):
        SamplingSettings(method="without_replacement")


@pytest.fixture
def pairs_file(tmp_path):
    pairs = pl.DataFrame(
        {
            "pair_id": ["1", "2", "3", "4", "5"],
            "prompt_id": ["a", "b", "a", "a", "c"],
            "prompt_index": pl.Series([0, 1, 0, 0, 2], dtype=pl.UInt32),
            "split": ["train"] * 4 + ["test"],
        }
    )
    pairs.write_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def prompt_weights(ids: str = "abc") -> pl.DataFrame:
    return pl.DataFrame(
        {"prompt_id": list(ids), "pairs": [3, 1, 1], "decile": [1, 9, 2], "quartile": [1, 4, 1], "weight": [0.6, 0.4, None]}
    )


def test_pairs_of_one_prompt_share_its_weight_and_carry_its_decile(pairs_file):
    table = weigh_pairs(pairs_file, prompt_weights(), pairs_file.with_name("out.parquet")).frame()
    assert table["weight"].to_list() == pytest.approx([0.2, 0.4, 0.2, 0.2, None])
    assert table["decile"].to_list() == [1, 9, 1, 1, 2]


def test_a_pair_whose_prompt_has_no_weight_is_named(pairs_file):
    with pytest.raises(StrataError, match="pair 2: its prompt b has no weight; materialize density_weights again"):
        weigh_pairs(pairs_file, prompt_weights("axc"), pairs_file.with_name("out.parquet"))

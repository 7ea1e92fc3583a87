"""Weights grow with rarity, copies do not count twice, and the target is met."""

import numpy as np
import polars as pl
import pytest

from densityrm_core.density import DensityError, _cap, describe_weights, near_duplicate_groups, weigh_prompts
from densityrm_core.experiment import DensitySettings
from densityrm_core.neighbors import nearest
from densityrm_core.validation import check_weights

DIMENSIONS = 32


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def tables_of(vectors: np.ndarray, splits: list[str] | None = None, pairs: list[int] | None = None):
    ids = [f"{i:016x}" for i in range(len(vectors))]
    splits = splits or ["train"] * len(vectors)
    prompts = pl.DataFrame(
        {
            "prompt_id": ids,
            "prompt": ids,
            "split": splits,
            "pairs": pairs or [1] * len(vectors),
            "sources": [["hh"]] * len(vectors),
        }
    )
    column = pl.Series("embedding", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
    return prompts, prompts.select("prompt_id", "split").with_columns(column)


def weights_of(vectors: np.ndarray, **settings: object) -> np.ndarray:
    table = weigh_prompts(*tables_of(vectors), DensitySettings.model_validate(settings)).table
    return table["weight"].to_numpy()


def cluster_and_loners(spread: float) -> np.ndarray:
    """200 prompts around one point, then 5 far from it and from each other."""
    rng = np.random.default_rng(0)
    axes = np.eye(DIMENSIONS)
    return unit(np.vstack([axes[0] + spread * rng.normal(size=(200, DIMENSIONS)), axes[1:6]]))


@pytest.mark.parametrize("spread", [0.001, 0.05, 0.1], ids=["copies", "tight", "loose"])
def test_every_loner_outweighs_every_member_of_a_cluster(spread: float):
    weights = weights_of(cluster_and_loners(spread))
    assert weights[200:].min() > weights[:200].max()


def test_weights_meet_the_target_effective_sample_fraction():
    vectors = unit(np.random.default_rng(1).normal(size=(500, DIMENSIONS)) + np.eye(DIMENSIONS)[0] * 2)
    table = weigh_prompts(*tables_of(vectors), DensitySettings(target_ess=0.6)).table
    assert describe_weights(table)["effective_sample_fraction"] == pytest.approx(0.6, abs=0.005)


def test_no_weight_exceeds_its_cap():
    weights = weights_of(cluster_and_loners(0.1), target_ess=0.1, max_weight=3.0)
    assert weights.max() * len(weights) <= 3.0 * (1 + 1e-9)


@pytest.mark.parametrize("copies", [1, 5, 50])
def test_copies_of_a_prompt_leave_the_mass_of_its_group_unchanged(copies: int):
    vectors = unit(np.random.default_rng(2).normal(size=(400, 8)))
    before = weights_of(vectors)[0]
    group = weights_of(np.vstack([vectors, np.repeat(vectors[:1], copies, axis=0)]))
    assert (group[0] + group[400:].sum()) == pytest.approx(before, rel=0.05)


def test_members_of_a_near_duplicate_group_share_one_weight():
    vectors = unit(np.random.default_rng(3).normal(size=(100, 8)))
    weights = weights_of(np.vstack([vectors, vectors[7]]))
    assert weights[7] == weights[100]


def test_near_duplicates_form_groups_through_chains():
    angles = np.deg2rad([0, 10, 20, 120, 240])
    groups = near_duplicate_groups(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32), cosine=0.98)
    assert groups.tolist() == [0, 0, 0, 3, 4]


def test_weights_do_not_depend_on_row_order():
    vectors = cluster_and_loners(0.1)
    order = np.random.default_rng(4).permutation(len(vectors))
    assert weights_of(vectors[order]) == pytest.approx(weights_of(vectors)[order], rel=1e-6)


def test_held_out_prompts_neither_have_nor_change_weights():
    vectors = cluster_and_loners(0.1)
    extra = np.vstack([vectors, vectors[:20]])
    table = weigh_prompts(*tables_of(extra, ["train"] * len(vectors) + ["test"] * 20), DensitySettings()).table
    assert table["weight"][len(vectors) :].null_count() == 20
    assert table["weight"][: len(vectors)].to_numpy() == pytest.approx(weights_of(vectors), rel=1e-9)


def test_quartiles_run_from_rare_to_common():
    table = weigh_prompts(*tables_of(cluster_and_loners(0.1)), DensitySettings()).table
    assert set(table["quartile"][200:]) == {1}
    assert table.group_by("quartile").len().sort("quartile")["len"].to_list() == pytest.approx([51] * 4, abs=2)


def test_a_prompt_with_many_pairs_shares_its_mass_unless_asked_otherwise():
    vectors = unit(np.random.default_rng(5).normal(size=(100, 8)))
    pairs = [10] + [1] * 99
    shared = weigh_prompts(*tables_of(vectors, pairs=pairs), DensitySettings()).table["weight"]
    each = weigh_prompts(*tables_of(vectors, pairs=pairs), DensitySettings(mass="per_pair")).table["weight"]
    assert each[0] / each[1] == pytest.approx(10 * shared[0] / shared[1])


@pytest.mark.parametrize("mass", ["per_prompt", "per_pair"])
def test_weights_pass_the_validation_list(mass: str):
    vectors = np.vstack([cluster_and_loners(0.1), cluster_and_loners(0.1)[:30]])
    prompts, embeddings = tables_of(vectors, pairs=[1 + i % 3 for i in range(len(vectors))])
    table = weigh_prompts(prompts, embeddings, DensitySettings.model_validate({"mass": mass})).table
    train = prompts.select(pl.col("prompt_id").repeat_by("pairs").explode())
    assert [name for name, (passed, _) in check_weights(table, prompts, train, mass).items() if not passed] == []


def test_validation_finds_what_is_wrong():
    prompts, embeddings = tables_of(cluster_and_loners(0.1))
    table = weigh_prompts(prompts, embeddings, DensitySettings()).table
    inverted = table.with_columns(weight=(1 / pl.col("weight")) / (1 / pl.col("weight")).sum())
    lost = table.with_columns(weight=pl.when(pl.int_range(pl.len()) > 3).then("weight"))
    train = prompts.select("prompt_id")
    assert not check_weights(inverted, prompts, train, "per_prompt")["rarer_weighs_more"][0]
    found = check_weights(lost, prompts, train, "per_prompt")
    assert {name for name, (passed, _) in found.items() if not passed} == {
        "every_prompt_has_a_weight",
        "every_pair_has_a_weight",
        "weights_are_a_distribution",
        "sampler_follows_weights",
    }


def test_a_query_is_left_out_of_its_neighbours_by_id_even_among_copies():
    vectors = np.repeat(unit(np.ones((1, 4))), 5, axis=0)
    _, rows = nearest(vectors, vectors, 4, np.arange(5))
    assert all(i not in row for i, row in enumerate(rows))


def test_neighbours_equal_a_slow_obvious_search():
    rng = np.random.default_rng(6)
    queries, base = unit(rng.normal(size=(20, 16))), unit(rng.normal(size=(300, 16)))
    cosines, rows = nearest(queries, base, 7)
    for query, found, near in zip(queries, rows, cosines, strict=True):
        expected = sorted(range(300), key=lambda i: -float(base[i] @ query))[:7]
        assert found.tolist() == expected
        assert near == pytest.approx([float(base[i] @ query) for i in expected], abs=1e-6)


def test_a_prompt_without_embedding_is_named():
    prompts, embeddings = tables_of(cluster_and_loners(0.1))
    with pytest.raises(DensityError, match="0000000000000003"):
        weigh_prompts(prompts, embeddings.filter(pl.col("prompt_id") != f"{3:016x}"), DensitySettings())


def test_one_training_prompt_has_no_density():
    with pytest.raises(DensityError, match="at least 2"):
        weigh_prompts(*tables_of(np.eye(4, dtype=np.float32), ["train", "test", "test", "test"]), DensitySettings())


def test_the_cap_binds_only_where_it_must():
    capped = _cap(np.array([10.0, 1.0, 1.0, 1.0, 1.0]), np.ones(5), cap=2.0)
    assert capped.tolist() == pytest.approx([8 / 3, 1, 1, 1, 1])  # 2 * mean(8/3, 1, 1, 1, 1) = 8/3

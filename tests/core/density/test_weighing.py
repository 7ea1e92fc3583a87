"""Density is right against planted truth, weights grow with rarity, copies do not count twice, and the target is met."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from densityrm_core.density.checks import check_pair_weights, check_weights
from densityrm_core.density.definitions import bandwidth_of, distances, log_density
from densityrm_core.density.tempering import describe_weights
from densityrm_core.density.weighing import DensityError
from densityrm_core.settings import DensitySettings
from tests.core.points import points, unit, vmf_mixture, weigh, weights_of

DIMENSIONS = 32


def cluster_and_loners(spread: float) -> np.ndarray:
    """200 prompts around one point, then 5 far from it and from each other."""
    rng = np.random.default_rng(0)
    axes = np.eye(DIMENSIONS)
    return unit(np.vstack([axes[0] + spread * rng.normal(size=(200, DIMENSIONS)), axes[1:6]]))


def scattered(count: int, seed: int = 2, dimensions: int = 8) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dimensions)))


def near(vector: np.ndarray, cosine: float, count: int, seed: int = 0) -> np.ndarray:
    """Vectors at a given cosine to one."""
    noise = np.random.default_rng(seed).normal(size=(count, len(vector)))
    v = vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))
    noise -= np.outer(noise @ v, v)
    return unit(cosine * v + np.sqrt(1 - cosine**2) * noise / np.linalg.norm(noise, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def planted():
    return vmf_mixture(16_000)


def test_the_default_ranks_prompts_as_their_true_density_does(planted, tmp_path: Path):
    vectors, truth = planted
    table = weigh(points(vectors), tmp_path, near_duplicate_cosine=1).table
    assert spearmanr(table["log_density"], truth).statistic >= 0.97
    assert spearmanr(table["weight"], -truth).statistic >= 0.97


@pytest.mark.parametrize("definition", ["mean_distance", "kth_distance", "kde", "soft_count", "original"])
def test_every_definition_ranks_prompts_about_as_their_true_density_does(definition: str, planted, tmp_path: Path):
    vectors, truth = planted
    table = weigh(points(vectors[:4000]), tmp_path, definition=definition, near_duplicate_cosine=1).table
    assert spearmanr(table["log_density"], truth[:4000]).statistic >= 0.85


def test_definitions_equal_their_formulas_written_out():
    cosines = np.array([[0.9, 0.5, 0.1], [0.99999, 0.3, 0.0]], np.float32)
    r, h = distances(cosines), 0.8
    kernel = [[np.exp(-(x**2) / (2 * h**2)) for x in row] for row in r]
    expected = {
        "mean_log_distance": [-sum(np.log(max(x, 0.1)) for x in row) / 3 for row in r],
        "mean_distance": [-np.log(sum(max(x, 0.1) for x in row) / 3) for row in r],
        "kth_distance": [-np.log(max(row[-1], 0.1)) for row in r],
        "kde": [np.log(sum(row) / 3) for row in kernel],
        "soft_count": [np.log(1 + sum(row)) for row in kernel],
        "original": [-np.log(sum(row) / 3) for row in r],
    }
    for definition, values in expected.items():
        found = log_density(cosines, DensitySettings.model_validate({"definition": definition}), h)
        assert found == pytest.approx(values, rel=1e-12), definition


def test_the_bandwidth_is_the_median_distance_to_the_last_neighbour():
    assert bandwidth_of(np.array([3.0, 1.0, 2.0])) == 2.0


@pytest.mark.parametrize("spread", [0.001, 0.05, 0.1], ids=["copies", "tight", "loose"])
def test_every_loner_outweighs_every_member_of_a_cluster(spread: float, tmp_path: Path):
    weights = weights_of(cluster_and_loners(spread), tmp_path)
    assert weights[200:].min() > weights[:200].max()


def test_the_original_recipe_weighs_the_cluster_up_instead(tmp_path: Path):
    weights = weights_of(cluster_and_loners(0.1), tmp_path, definition="original")
    assert weights[200:].max() < weights[:200].min()


@pytest.mark.parametrize("target", [0.9, 0.7, 0.5, 0.3])
def test_the_target_effective_sample_fraction_is_reached(target: float, planted, tmp_path: Path):
    made = weigh(points(planted[0][:4000]), tmp_path, target_ess=target)
    assert describe_weights(made.table)["effective_sample_fraction"] == pytest.approx(target, abs=0.005)
    assert not made.target_missed(DensitySettings(target_ess=target))


def test_a_target_that_the_cap_keeps_out_of_reach_is_reported(tmp_path: Path):
    made = weigh(points(cluster_and_loners(0.1)), tmp_path, target_ess=0.1, max_weight=3.0)
    assert made.target_missed(DensitySettings(target_ess=0.1, max_weight=3.0))


@pytest.mark.parametrize("copies", [1, 5, 50, 200])
def test_exact_copies_leave_the_mass_of_a_prompts_group_unchanged(copies: int, tmp_path: Path):
    vectors = scattered(400)
    before = weights_of(vectors, tmp_path)[0]
    group = weights_of(np.vstack([vectors, np.repeat(vectors[:1], copies, axis=0)]), tmp_path)
    assert 0.95 <= (group[0] + group[400:].sum()) / before <= 1.1


def test_fifty_paraphrases_leave_the_mass_of_a_prompts_group_unchanged(tmp_path: Path):
    vectors = scattered(400, dimensions=16)
    before = weights_of(vectors, tmp_path)[0]
    group = weights_of(np.vstack([vectors, near(vectors[0], 0.99, 50)]), tmp_path)
    assert 0.95 <= (group[0] + group[400:].sum()) / before <= 1.1


def test_members_of_a_near_duplicate_group_share_one_weight(tmp_path: Path):
    vectors = scattered(100)
    weights = weights_of(np.vstack([vectors, vectors[7]]), tmp_path)
    assert weights[7] == weights[100]


def test_near_duplicates_form_groups_through_chains(tmp_path: Path):
    angles = np.deg2rad([0, 10, 20, 120, 240])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float16)
    groups = weigh(points(vectors), tmp_path, near_duplicate_cosine=0.98).table["group"]
    assert groups.to_list() == [f"{i:016x}" for i in (0, 0, 0, 3, 4)]


STEM = "please read the following long passage carefully and then answer the question that comes at its end "


@pytest.mark.parametrize(
    ("truncated", "groups"), [([False] * 22, 20), ([True, True] + [False] * 20, 21)], ids=["whole", "cut before the difference"]
)
def test_prompts_that_differ_only_where_the_encoder_stopped_are_not_one(truncated: list[bool], groups: int, tmp_path: Path):
    vectors = np.vstack([scattered(1), scattered(20)])[:21]
    texts = [STEM + "what is the capital of the northern province, and who built its walls?"]
    texts += ["write a poem in the style of the sea shanties of old, eleven stanzas long, no rhymes, about bread " + STEM[:20]]
    texts += [f"prompt number {i}" for i in range(19)]
    vectors = np.vstack([vectors[:1], vectors[:1], scattered(19, seed=9)])
    found = weigh(points(vectors, texts=texts, truncated=truncated[:21]), tmp_path)
    assert found.groups == groups


def test_weights_depend_neither_on_the_order_of_rows_nor_on_the_size_of_blocks(
    planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vectors = np.vstack([planted[0][:5000], near(planted[0][3], 0.97, 20), planted[0][:30]])
    ids = [f"{i:016x}" for i in np.random.default_rng(1).permutation(len(vectors))]
    weights = weigh(points(vectors, ids=ids), tmp_path).table["weight"].to_numpy()
    order = np.random.default_rng(4).permutation(len(vectors))
    monkeypatch.setattr("densityrm_core.vectors.mapped.BLOCK", 777)
    shuffled = weigh(points(vectors[order], ids=[ids[i] for i in order]), tmp_path).table["weight"].to_numpy()
    assert shuffled == pytest.approx(weights[order], rel=1e-9)


def test_no_weight_exceeds_its_cap(tmp_path: Path):
    weights = weights_of(cluster_and_loners(0.1), tmp_path, target_ess=0.1, max_weight=3.0)
    assert weights.max() * len(weights) <= 3.0 * (1 + 1e-9)


def test_a_mix_keeps_a_share_of_the_draws_uniform(tmp_path: Path):
    weights = weights_of(cluster_and_loners(0.1), tmp_path, target_ess=0.8, mix=0.5)
    assert weights.min() * len(weights) >= 0.5
    assert describe_weights(weigh(points(cluster_and_loners(0.1)), tmp_path, target_ess=0.8, mix=0.5).table)[
        "effective_sample_fraction"
    ] == pytest.approx(0.8, abs=0.005)


def test_held_out_prompts_neither_have_nor_change_weights(tmp_path: Path):
    vectors = cluster_and_loners(0.1)
    extra = points(np.vstack([vectors, vectors[:20]]), ["train"] * len(vectors) + ["test"] * 20)
    table = weigh(extra, tmp_path).table
    assert table["weight"][len(vectors) :].null_count() == 20
    assert table["weight"][: len(vectors)].to_numpy() == pytest.approx(weights_of(vectors, tmp_path), rel=1e-12)


def test_held_out_prompts_are_measured_among_the_training_prompts(tmp_path: Path):
    vectors = cluster_and_loners(0.1)
    stranger = unit(np.eye(DIMENSIONS)[20:21])
    table = weigh(points(np.vstack([vectors, stranger, vectors[:1]]), ["train"] * 205 + ["test"] * 2), tmp_path).table
    assert table["decile"][205] == 1
    assert table["decile"][206] > 1


def test_deciles_and_quartiles_run_from_rare_to_common(tmp_path: Path):
    table = weigh(points(cluster_and_loners(0.1)), tmp_path).table
    assert set(table["quartile"][200:]) == {1}
    assert table.group_by("quartile").len().sort("quartile")["len"].to_list() == pytest.approx([51] * 4, abs=2)


def test_a_prompt_with_many_pairs_shares_its_mass_unless_asked_otherwise(tmp_path: Path):
    given = points(scattered(100), pairs=[10] + [1] * 99)
    shared = weigh(given, tmp_path).table["weight"]
    each = weigh(given, tmp_path, mass="per_pair").table["weight"]
    assert each[0] / each[1] == pytest.approx(10 * shared[0] / shared[1])


@pytest.mark.parametrize("mass", ["per_prompt", "per_pair"])
def test_weights_pass_the_validation_list(mass: str, tmp_path: Path):
    given = points(np.vstack([cluster_and_loners(0.1), cluster_and_loners(0.1)[:30]]), pairs=[1, 2, 3, 4, 5] * 47)
    table = weigh(given, tmp_path, mass=mass).table
    assert [name for name, (passed, _) in check_weights(table, given.prompts, mass).items() if not passed] == []


def test_the_validation_list_notices_lost_and_inverted_weights(tmp_path: Path):
    given = points(cluster_and_loners(0.1))
    table = weigh(given, tmp_path).table
    inverted = table.with_columns(weight=1 / pl.col("weight") / (1 / pl.col("weight")).sum())
    lost = table.with_columns(weight=pl.when(pl.int_range(pl.len()) > 3).then("weight"))
    assert not check_weights(inverted, given.prompts, "per_prompt")["rarer_weighs_more"][0]
    found = check_weights(lost, given.prompts, "per_prompt")
    assert {name for name, (passed, _) in found.items() if not passed} == {
        "every_prompt_has_a_weight",
        "weights_are_a_distribution",
    }


def test_the_validation_list_notices_pairs_without_weight_and_prompts_with_several():
    pairs = pl.DataFrame(
        {"prompt_id": ["a", "a", "b", "c"], "split": ["train"] * 3 + ["test"], "weight": [0.25, 0.25, 0.5, None]}
    )
    assert all(passed for passed, _ in check_pair_weights(pairs).values())
    lost = pairs.with_columns(weight=pl.Series([0.25, 0.25, None, None]))
    assert not check_pair_weights(lost)["every_pair_has_a_weight"][0]
    uneven = pairs.with_columns(weight=pl.Series([0.3, 0.2, 0.5, None]))
    assert not check_pair_weights(uneven)["one_prompt_one_weight"][0]


def test_fewer_prompts_than_neighbours_are_measured_by_those_there_are(tmp_path: Path):
    made = weigh(points(unit(np.eye(4))), tmp_path)
    assert made.neighbors == 3
    assert made.table["weight"].to_list() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_training_prompts_have_no_density(count: int, tmp_path: Path):
    with pytest.raises(DensityError, match=f"has {count} prompts; density needs at least 2"):
        weigh(points(unit(np.eye(4))[: count + 1], ["train"] * count + ["test"]), tmp_path)


def test_prompts_that_are_all_the_same_have_no_density(tmp_path: Path):
    with pytest.raises(DensityError, match="near-duplicates of one another"):
        weigh(points(np.repeat(unit(np.ones((1, 8))), 50, axis=0)), tmp_path)


def test_a_vector_that_is_not_finite_is_refused(tmp_path: Path):
    vectors = scattered(30)
    vectors[17] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        weigh(points(vectors), tmp_path)

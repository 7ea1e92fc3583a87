"""The card says who is rare and what is wrong, and shows the first implementation's recipe beside ours."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.neighbors import NearestNeighbors

from densityrm_core.density.card import DensityCard, density_card, find_warnings
from densityrm_core.density.original import checklist, original_weights
from densityrm_core.density.prompt_map import PromptMap, lay_out, map_html, map_png
from densityrm_core.density.weighing import Points, Weighing, read_points, weigh_prompts
from densityrm_core.settings import DensitySettings
from tests.core.points import points, unit, vmf_mixture, weigh, write_tables

CLUSTER, LONERS = 400, 12
ALONE = pl.DataFrame({"source": ["hh"], "share of draws": [1.0]})


def cluster_and_loners() -> np.ndarray:
    axes = np.eye(32)
    loose = axes[0] + 0.1 * np.random.default_rng(0).normal(size=(CLUSTER, 32))
    return unit(np.vstack([loose, axes[1 : LONERS + 1]]))


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> DensityCard:
    """Common prompts of one source, rare ones of another; the first prompt is of both."""
    folder = tmp_path_factory.mktemp("card")
    count = CLUSTER + LONERS
    texts = [f"common {i}" for i in range(CLUSTER)] + [f"rare {i}" for i in range(LONERS)]
    sources = [["hh", "so"]] + [["hh"]] * (CLUSTER - 1) + [["so"]] * LONERS
    write_tables(folder, cluster_and_loners(), ["train"] * count, texts, [1] * count, sources)
    given = read_points(folder / "prompts.parquet", folder / "prompt_embeddings.parquet", folder)
    settings = DensitySettings(near_duplicate_cosine=1)
    return density_card(weigh_prompts(given, settings, folder), given, folder / "prompts.parquet", settings)


def test_the_rarest_prompts_are_those_that_stand_alone(card: DensityCard):
    assert all(text.startswith("rare") for text in card.rarest["prompt"][:LONERS])
    assert all(text.startswith("common") for text in card.commonest["prompt"])
    assert (card.rarest.height, card.commonest.height) == (20, 20)
    assert card.rarest["times uniform"].min() > 1 > card.commonest["times uniform"].max()


def test_a_prompt_of_two_sources_counts_half_for_each(card: DensityCard):
    by_source = {row["source"]: row for row in card.by_source.to_dicts()}
    assert by_source["hh"]["prompts"] == CLUSTER - 0.5
    assert by_source["so"]["prompts"] == LONERS + 0.5
    assert card.by_source["share of draws"].sum() == pytest.approx(1)
    assert by_source["so"]["times uniform"] > 2


def test_the_original_favours_common_prompts_and_ours_rare_ones(card: DensityCard):
    assert all(text.startswith("common") for text in card.favourites["the original favours"])
    assert all(text.startswith("rare") for text in card.favourites["ours favours"])
    assert "weights with ours: -" in card.agreement


def test_numbers_name_the_search_and_the_strength(card: DensityCard):
    assert card.numbers["recall"] == 1.0
    assert str(card.numbers["search"]).startswith("exact: ")
    assert card.numbers["effective_sample_fraction"] == pytest.approx(0.7, abs=0.005)


def test_nothing_is_said_of_prompts_that_are_as_they_should_be(tmp_path: Path):
    given = points(vmf_mixture(1000, dimensions=32, intrinsic=16, clusters=10)[0])
    assert find_warnings(weigh(given, tmp_path, near_duplicate_cosine=1), given, ALONE, DensitySettings()) == []


def warned(given: Points, folder: Path, by_source: pl.DataFrame = ALONE, **settings: object) -> str:
    chosen = DensitySettings.model_validate(settings)
    made: Weighing = weigh_prompts(given, chosen, folder)
    return "\n".join(find_warnings(made, given, by_source, chosen))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "50% of the training prompts are copies or near-duplicates of another"),
        ({"neighbors": 50}, "density.neighbors 50 is many for 412 distinct training prompts: 20 would"),
        ({"target_ess": 0.1, "max_weight": 3.0}, "density.target_ess 0.1 is out of reach"),
        ({"target_ess": 1.0}, "all weights are equal"),
        ({"definition": "original"}, "it weighs common prompts up, not rare ones"),
    ],
)
def test_a_warning_says_what_to_do(settings: dict[str, object], said: str, tmp_path: Path):
    vectors = cluster_and_loners()
    assert said in warned(points(np.vstack([vectors, vectors])), tmp_path, **settings)


def test_a_source_that_takes_most_of_the_draws_is_named(tmp_path: Path):
    by_source = pl.DataFrame({"source": ["hh", "so"], "share of draws": [0.9, 0.1]})
    assert "hh gets 90% of the draws" in warned(points(cluster_and_loners()), tmp_path, by_source)


def test_many_truncated_prompts_ask_for_more_tokens(tmp_path: Path):
    given = points(cluster_and_loners(), truncated=[True] * 40 + [False] * 372)
    assert "raise embedding.max_tokens" in warned(given, tmp_path, near_duplicate_cosine=1)


def test_the_originals_weights_are_those_of_its_own_recipe():
    """k + 1 neighbours by scikit-learn, the first one dropped, the mean distance inverted."""
    vectors = vmf_mixture(2000, dimensions=64, intrinsic=8, clusters=20)[0].astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    distances, _ = NearestNeighbors(n_neighbors=11, metric="euclidean").fit(vectors).kneighbors(vectors)
    inverse = 1 / np.maximum(distances[:, 1:].mean(axis=1), 1e-6)
    assert original_weights(vectors) == pytest.approx(inverse / inverse.sum(), rel=1e-4)


def test_the_original_weighed_few_prompts_uniformly():
    assert original_weights(unit(np.eye(10))).tolist() == [0.1] * 10


def test_the_originals_list_says_why_its_numbers_cannot_hold():
    rows = {row["claim"]: row for row in checklist(np.full(10_000, 1e-4)).to_dicts()}
    assert {claim: row["holds"] for claim, row in rows.items()} == {
        "weights loaded": "yes",
        "sum": "yes",
        "minimum": "no",
        "maximum": "no",
        "ratio": "no",
    }
    assert "ESS <= 1 / max^2" in rows["maximum"]["why"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 60])
def test_a_map_of_few_prompts_is_a_map(count: int):
    vectors = unit(np.random.default_rng(0).normal(size=(60, 8)))
    found = lay_out(vectors, np.arange(count), 1000)
    weights = pl.DataFrame(
        {"log_density": np.linspace(0, 1, 60), "density": [1.0] * 60, "decile": [1] * 30 + [2] * 30, "weight": [1 / 60] * 60}
    )
    assert found.xy.shape == (count, 2)
    assert np.isfinite(found.xy).all()
    assert map_png(found, weights).startswith(b"\x89PNG")


def test_a_map_is_the_same_twice_keeps_neighbours_together_and_is_sampled():
    centres = np.repeat(unit(np.eye(8)[:4]), 75, axis=0)
    vectors = unit(centres + 0.05 * np.random.default_rng(0).normal(size=(300, 8)))
    found, again = lay_out(vectors, np.arange(300), 200), lay_out(vectors, np.arange(300), 200)
    assert len(found.rows) == 200
    assert np.array_equal(found.xy, again.xy)
    nearest = NearestNeighbors(n_neighbors=2).fit(found.xy).kneighbors(found.xy, return_distance=False)[:, 1]
    assert (found.rows[nearest] // 75 == found.rows // 75).mean() > 0.98


def test_a_map_of_thousands_is_a_small_picture():
    xy = np.random.default_rng(0).normal(size=(20_000, 2)).astype(np.float32)
    weights = pl.DataFrame({"log_density": xy[:, 0], "decile": [1, 2] * 10_000})
    assert len(map_png(PromptMap(np.arange(20_000), xy), weights)) < 100 * 1024


def test_the_page_needs_no_network_and_runs_nothing_of_a_prompt():
    found = lay_out(unit(np.random.default_rng(0).normal(size=(60, 8))), np.arange(60), 1000)
    weights = pl.DataFrame({"log_density": [0.0] * 60, "density": [1.0] * 60, "decile": [1] * 60, "weight": [1 / 60] * 60})
    page = map_html(found, weights, ["</script><script>alert(1)</script>"] * 60)
    assert "<script>alert(1)" not in page
    assert 'src="http' not in page

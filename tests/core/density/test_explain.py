"""A prompt's weight is explained by its neighbours, in the numbers that training uses."""

from pathlib import Path

import polars as pl
import pytest

from densityrm_core.density.explain import explain, explanation_text
from densityrm_core.density.weighing import read_points, store_weights, weigh_prompts
from densityrm_core.experiment import Experiment
from densityrm_core.pairs.inspection import InspectionError
from tests.core.points import vmf_mixture, write_tables

COUNT, HELD_OUT = 300, 20


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred prompts, the last twenty held out; prompt 1 is a copy of prompt 0 in other words."""
    folder = tmp_path_factory.mktemp("tables")
    vectors, _ = vmf_mixture(COUNT, dimensions=24, intrinsic=8, clusters=6)
    vectors[1] = vectors[0]
    texts = [f"What is the number {i} | or\n so?" for i in range(COUNT)]
    splits = ["train"] * (COUNT - HELD_OUT) + ["test"] * HELD_OUT
    write_tables(folder, vectors, splits, texts, [3] + [1] * (COUNT - 1), [["hh"]] * COUNT)
    points = read_points(folder / "prompts.parquet", folder / "prompt_embeddings.parquet", folder)
    store_weights(weigh_prompts(points, Experiment().density, folder), folder / "density_weights.parquet")
    return folder


def row_of(tables: Path, number: int) -> dict[str, object]:
    return pl.read_parquet(tables / "density_weights.parquet").row(number, named=True)


def test_the_density_is_that_of_the_neighbours_shown(tables: Path):
    import numpy as np

    row = row_of(tables, 5)
    found = explain(str(row["prompt_id"]), tables, Experiment())
    shown = found.neighbors["distance"].to_numpy()
    assert len(shown) == 10
    assert -np.log(np.maximum(shown, 0.1)).mean() == pytest.approx(row["log_density"], abs=1e-5)
    assert (found.decile, found.log_density) == (row["decile"], row["log_density"])


def test_a_prompt_is_found_by_its_text_as_by_its_id(tables: Path):
    by_id = explain(str(row_of(tables, 5)["prompt_id"]), tables, Experiment())
    assert explanation_text(explain("What is the number 5 | or\n so?", tables, Experiment())) == explanation_text(by_id)


def test_neighbours_are_other_training_prompts_and_no_near_duplicates(tables: Path):
    for number in (0, 1, COUNT - 1):
        shown = explain(str(row_of(tables, number)["prompt_id"]), tables, Experiment()).neighbors["prompt_id"]
        assert not set(shown) & {row_of(tables, 0)["prompt_id"], row_of(tables, 1)["prompt_id"]} or number == COUNT - 1
        held_out = {row_of(tables, i)["prompt_id"] for i in range(COUNT - HELD_OUT, COUNT)}
        assert not set(shown) & held_out


def test_expected_draws_are_the_weight_times_the_epoch(tables: Path):
    row = row_of(tables, 0)
    text = explanation_text(explain(str(row["prompt_id"]), tables, Experiment()))
    draws = float(str(row["weight"])) * (COUNT - HELD_OUT + 2)
    assert f"drawn       {draws:.2f} times in an epoch of 282 pairs, {draws / 3:.2f} each of its 3 pairs" in text
    assert "shared with 1 near-duplicates" in text


def test_a_held_out_prompt_is_never_drawn(tables: Path):
    text = explanation_text(explain(str(row_of(tables, COUNT - 1)["prompt_id"]), tables, Experiment()))
    assert "it is held out (test) and never drawn" in text


def test_an_unknown_id_and_a_missing_table_say_what_to_do(tables: Path, tmp_path: Path):
    with pytest.raises(InspectionError, match="no prompt has the id"):
        explain("0123456789abcdef", tables, Experiment())
    with pytest.raises(InspectionError, match="materialize density_weights"):
        explain("0123456789abcdef", tmp_path, Experiment())

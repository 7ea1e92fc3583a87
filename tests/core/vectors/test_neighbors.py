"""Fast search finds what a slow, obvious search finds, in every arithmetic, however the work is divided."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from densityrm_core.vectors.arithmetic import Arithmetic, choose_arithmetic
from densityrm_core.vectors.exact_search import ExactSearch, best_of
from densityrm_core.vectors.index_search import build_index, exact_by_parts
from densityrm_core.vectors.neighbors import build_search, exact_is_affordable, nearest
from tests.core.points import unit, vmf_mixture

ARITHMETICS: list[Arithmetic] = ["int8", "bfloat16", "float32"]
EACH = pytest.mark.parametrize("arithmetic", ARITHMETICS)
MEMORY = 1 << 32


@pytest.fixture(scope="module")
def clustered() -> np.ndarray:
    """More than two tiles of scores, with exact copies among them."""
    vectors = vmf_mixture(5000, dimensions=96)[0]
    vectors[4000:4040] = vectors[17]
    return vectors


@pytest.fixture(scope="module")
def truth(clustered: np.ndarray) -> np.ndarray:
    """Cosines of the 32 nearest others of each, in double precision."""
    return plainly(clustered, clustered, 32, np.arange(len(clustered)))[0]


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    return vmf_mixture(20_000, dimensions=63)[0]


def plainly(queries: np.ndarray, base: np.ndarray, k: int, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All cosines in double precision, sorted by cosine, ties by row."""
    cosines = queries.astype(np.float64) @ base.astype(np.float64).T
    cosines[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
    rows = np.lexsort((np.broadcast_to(np.arange(len(base)), cosines.shape), -cosines))[:, :k]
    return np.take_along_axis(cosines, rows, axis=1), rows


def assert_same(found: tuple[np.ndarray, np.ndarray], truth: np.ndarray, base: np.ndarray, queries: np.ndarray, own: np.ndarray):
    """The k-th best cosines agree to rounding; each row's cosine is its own, none is the query, none comes twice."""
    cosines, rows = found
    assert cosines == pytest.approx(np.minimum(truth, 1), abs=2e-6)
    own_cosines = np.einsum("qd,qkd->qk", queries.astype(np.float64), base[rows].astype(np.float64))
    assert cosines == pytest.approx(np.minimum(own_cosines, 1), abs=2e-6)
    assert not (rows == own[:, np.newaxis]).any()
    assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all()


@EACH
@pytest.mark.parametrize("k", [1, 10, 32])
def test_every_arithmetic_finds_what_double_precision_finds(
    arithmetic: Arithmetic, k: int, clustered: np.ndarray, truth: np.ndarray
):
    own = np.arange(len(clustered))
    found = ExactSearch(clustered, 2, MEMORY, arithmetic).search(clustered, k, own)
    assert_same(found, truth[:, :k], clustered, clustered, own)


@EACH
def test_ties_are_broken_by_row_and_the_query_is_left_out_among_its_copies(arithmetic: Arithmetic, clustered: np.ndarray):
    own = np.array([17, 4000, 4039])
    cosines, rows = ExactSearch(clustered, 1, MEMORY, arithmetic).search(clustered[own], 40, own)
    copies = [17, *range(4000, 4040)]
    for query, found in zip(own, rows, strict=True):
        assert found.tolist() == [row for row in copies if row != query]
    assert cosines == pytest.approx(1, abs=1e-3)


@pytest.mark.takes("search=int8", "search=bfloat16", "search=float32")
def test_every_arithmetic_gives_the_same_bits(clustered: np.ndarray):
    own = np.arange(len(clustered))
    found = [ExactSearch(clustered, 2, MEMORY, each).search(clustered, 16, own) for each in ("int8", "bfloat16")]
    found.append(ExactSearch(clustered, 1, 1 << 20, "float32").search(clustered, 16, own))
    for cosines, rows in found[1:]:
        assert np.array_equal(cosines, found[0][0])
        assert np.array_equal(rows, found[0][1])


PRODUCTS = """
import torch
from densityrm_core.vectors.arithmetic import Int8Scores
torch.manual_seed(0)
for width in (64, 96, 384):
    scores = Int8Scores(1.0)
    queries, base = (scores.vectors((2 * torch.rand(count, width) - 1).sign().numpy()) for count in (64, 512))
    out = torch.empty(64, 512, dtype=torch.int32)
    scores.multiply(queries, base.T, out)
    assert torch.equal(out.long(), queries.long() @ base.long().T), width
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_integer_products_are_exact_on_processors_with_fewer_instructions_too(instructions: str):
    """Of the largest components there are. Without VNNI pairs of products are added in 16 bits, which saturate."""
    variables = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", PRODUCTS], env=variables, check=True)  # noqa: S603  our own program


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx2", "avx512_bf16", "avx512_vnni"}, "int8"),
        ({"avx2"}, "int8"),
        ({"avx2", "avx512_bf16", "amx_bf16", "amx_int8"}, "bfloat16"),
        (set(), "float32"),
    ],
)
def test_the_arithmetic_follows_from_the_instruction_sets(features: set[str], expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("densityrm_core.vectors.arithmetic.processor_features", lambda: frozenset(features))
    assert choose_arithmetic("auto", 384) == expected
    assert choose_arithmetic("bfloat16", 384) == "bfloat16"
    assert choose_arithmetic("auto", 1) == "float32"


@EACH
def test_neither_the_division_of_queries_nor_the_order_of_rows_changes_a_bit(arithmetic: Arithmetic, clustered: np.ndarray):
    own = np.arange(len(clustered))
    whole = ExactSearch(clustered, 2, MEMORY, arithmetic).search(clustered, 8, own)[0]
    search = ExactSearch(clustered, 1, MEMORY, arithmetic)
    parts = [search.search(clustered[i : i + 613], 8, own[i : i + 613])[0] for i in range(0, len(clustered), 613)]
    assert np.array_equal(whole, np.concatenate(parts))
    order = np.random.default_rng(0).permutation(len(clustered))
    shuffled = ExactSearch(clustered[order], 2, MEMORY, arithmetic).search(clustered[order], 8, own)[0]
    assert np.array_equal(shuffled, whole[order])


@EACH
def test_vectors_that_are_nearly_all_the_same_are_searched_too(arithmetic: Arithmetic):
    vectors = np.repeat(unit(np.ones((1, 40))), 3000, axis=0)
    vectors[5] = unit(np.eye(40))[0]
    cosines, rows = ExactSearch(vectors, 2, MEMORY, arithmetic).search(vectors, 3, np.arange(3000))
    assert rows[0].tolist() == [1, 2, 3]
    assert rows[5].tolist() == [0, 1, 2]
    assert cosines[5] == pytest.approx(40**-0.5, abs=1e-3)


@EACH
def test_opposite_and_larger_queries_are_searched_too(arithmetic: Arithmetic, clustered: np.ndarray):
    """Cosines below zero, and a query with a component beyond every one of the base's."""
    base = np.abs(clustered)
    queries = np.vstack([-base[:50], unit(np.eye(96))[:3]])
    nobody = np.full(len(queries), -1)
    found = ExactSearch(base, 2, MEMORY, arithmetic).search(queries, 7, nobody)
    assert_same(found, plainly(queries, base, 7, nobody)[0], base, queries, nobody)


@EACH
@pytest.mark.parametrize("width", [1, 2, 3, 65])
def test_odd_widths_are_searched_too(arithmetic: Arithmetic, width: int):
    vectors = unit(np.random.default_rng(0).normal(size=(300, width)))
    own = np.arange(300)
    found = ExactSearch(vectors, 2, MEMORY, arithmetic).search(vectors, 5, own)
    assert found[0] == pytest.approx(np.minimum(plainly(vectors, vectors, 5, own)[0], 1), abs=2e-6)


def test_a_base_with_fewer_others_gives_those_it_has():
    cosines, rows = nearest(unit(np.eye(4)), unit(np.eye(4)), 10, np.arange(4))
    assert rows.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert cosines.tolist() == [[0.0] * 3] * 4


@pytest.mark.parametrize("count", [0, 1])
def test_a_base_without_others_is_refused(count: int):
    with pytest.raises(ValueError, match="to be neighbours"):
        nearest(unit(np.eye(4))[:count], unit(np.eye(4))[:count], 1, np.arange(count))


def test_a_vector_that_is_not_finite_is_named():
    vectors = unit(np.random.default_rng(0).normal(size=(70_000, 4)))
    broken = vectors.copy()
    broken[66_000, 2] = np.nan
    with pytest.raises(ValueError, match="row 66000 of the base is not finite"):
        build_search(broken, 3, search="exact")
    with pytest.raises(ValueError, match="row 66000 of the queries is not finite"):
        nearest(broken, vectors[:100], 3)


def test_a_mapped_array_is_searched_as_one_in_memory(clustered: np.ndarray, tmp_path: Path):
    np.save(tmp_path / "vectors.npy", clustered)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    found, expected = nearest(mapped[:100], mapped, 5), nearest(clustered[:100], clustered, 5)
    assert np.array_equal(found[1], expected[1])


def test_a_search_that_does_not_fit_says_so_and_auto_takes_one_that_does(many: np.ndarray):
    with pytest.raises(ValueError, match=r"exact search of 20,000 vectors needs .* density.search to index"):
        build_search(many, 10, search="exact", max_memory=1 << 20)
    with pytest.raises(ValueError, match=r"an index of 20,000 vectors needs .* raise compute.max_memory_gib"):
        build_search(many, 10, search="index", max_memory=1 << 20)
    assert exact_is_affordable(many, MEMORY)
    assert not exact_is_affordable(many, 1 << 20)
    assert build_search(many, 10, max_memory=3 << 20).method.startswith("faiss IVF")


def test_search_is_exact_until_an_index_is_faster():
    def rows(count: int) -> np.ndarray:
        return np.broadcast_to(np.zeros(384, np.float32), (count, 384))

    assert exact_is_affordable(rows(50_000), MEMORY)
    assert not exact_is_affordable(rows(1_000_000), 1 << 40)


@pytest.mark.parametrize("recall", [0.8, 0.99])
def test_an_index_reaches_the_recall_it_is_asked_for(recall: float, many: np.ndarray):
    said: list[str] = []
    own = np.arange(len(many))
    search = build_search(many, 10, search="index", recall=recall, say=said.append)
    truth, _ = nearest(many, many, 10, own)
    cosines, rows = search.search(many, 10, own)
    assert search.recall >= recall
    assert (cosines >= truth[:, -1:] - 1e-6).mean() == pytest.approx(search.recall, abs=0.02)
    assert not (rows == own[:, np.newaxis]).any()
    assert "nprobe" in search.method
    assert any("recall" in line for line in said)


def test_the_same_vectors_give_the_same_index(many: np.ndarray):
    own = np.arange(len(many))
    first = build_index(many, 10, 0.9, 2, MEMORY, lambda _: None).search(many, 10, own)
    second = build_index(many, 10, 0.9, 1, MEMORY, lambda _: None).search(many, 10, own)
    assert np.array_equal(first[1], second[1])
    assert np.array_equal(first[0], second[0])


def test_an_index_with_less_memory_refines_by_bytes_and_still_gives_true_cosines(many: np.ndarray):
    own = np.arange(len(many))
    search = build_index(many, 10, 0.9, 2, len(many) * (32 + 63 + 9), lambda _: None)
    cosines, rows = search.search(many[:500], 10, own[:500])
    assert "Refine(SQ8)" in search.method
    assert cosines == pytest.approx(np.einsum("qd,qkd->qk", *(x.astype(np.float64) for x in (many[:500], many[rows]))), abs=2e-6)


def test_a_query_whose_cells_hold_too_few_is_searched_exactly(many: np.ndarray):
    search = build_index(many, 2, 0.1, 2, MEMORY, lambda _: None)
    wanted = 3000
    cosines, rows = search.search(many[:3], wanted, np.arange(3))
    truth, _ = nearest(many[:3], many, wanted, np.arange(3))
    assert (rows >= 0).all()
    assert cosines.shape == truth.shape


def test_few_vectors_are_searched_exactly_whatever_was_asked_for():
    vectors = unit(np.random.default_rng(0).normal(size=(100, 8)))
    assert build_search(vectors, 5, search="index").method.startswith("exact")


def test_exact_search_by_parts_is_exact_search(many: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("densityrm_core.vectors.index_search._BLOCK", 7_000)
    own = np.arange(200)
    found, expected = exact_by_parts(many, many[:200].astype(np.float32), 10, own, 2), nearest(many[:200], many, 10, own)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_the_best_are_sorted_by_cosine_then_row_and_missing_ones_come_last():
    cosines = np.array([[0.5, -0.5, 0.5, 0.9, -0.0, 0.0, 1.0]], np.float32)
    ids = np.array([[7, 1, 3, -1, 9, 8, 2]])
    found, rows = best_of(cosines, ids, 7)
    assert rows.tolist() == [[2, 3, 7, 8, 9, 1, -1]]
    assert found[0][:6].tolist() == [1.0, 0.5, 0.5, 0.0, 0.0, -0.5]

"""Claims about data cards: exact numbers of small tables, and a slow obvious twin on random ones."""

from __future__ import annotations

import hashlib
import math
import resource
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from densityrm_core.pairs import plots as data_plots
from densityrm_core.pairs.card import BIN_STARTS, DataCard, DataCardBuilder, detect_languages
from densityrm_core.tables import TURN

SCHEMA = {
    "prompt_id": pl.String(), "prompt": pl.String(), "context": pl.List(TURN), "chosen": pl.String(), "rejected": pl.String(),
    "src": pl.String(),
}  # fmt: skip
ENGLISH = "What is the best way to cook rice for four people?"
GERMAN = "Wie kocht man am besten Reis für vier Personen?"


def pair(prompt: str, chosen: str = "yes", rejected: str = "no", turns: int = 1, src: str = "hh") -> dict[str, Any]:
    context = [{"role": ("user", "assistant")[i % 2], "content": prompt} for i in range(turns)]
    key = hashlib.md5(prompt.encode(), usedforsecurity=False).hexdigest()[:16]
    return {"prompt_id": key, "prompt": prompt, "context": context, "chosen": chosen, "rejected": rejected, "src": src}


def table(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=SCHEMA, orient="row")


def card_of(frame: pl.DataFrame, batch: int = 8192) -> DataCard:
    builder = DataCardBuilder()
    for part in frame.iter_slices(batch):
        builder.add(part)
    return builder.card()


def random_pairs(rows: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    words = [*ENGLISH.split(), *GERMAN.split(), "def", "x=1", "αβγ", "你好"]
    prompts = [" ".join(rng.choice(words, int(rng.integers(1, 90)))) for _ in range(max(1, rows // 3))]
    return table(
        *(
            pair(
                prompts[int(rng.integers(len(prompts)) * rng.random() ** 2)],
                "é" * int(rng.lognormal(3, 2)),
                "r" * int(rng.lognormal(3, 2)),
                int(rng.integers(1, 14)),
                str(rng.choice(["hh", "ultrafeedback", "stack_exchange"])),
            )
            for _ in range(rows)
        )
    )


def slow_card(frame: pl.DataFrame) -> dict[str, Any]:
    """The same numbers by loops over rows."""
    rows = frame.to_dicts()
    prompts = {row["prompt_id"]: row["prompt"] for row in rows}
    repeats = Counter(row["prompt_id"] for row in rows)
    sample = [prompts[key] for key in sorted(prompts)[:2000]]
    longer = [(len(row["chosen"]) > len(row["rejected"])) + 0.5 * (len(row["chosen"]) == len(row["rejected"])) for row in rows]
    buckets = {"1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "9-16": (9, 16), "17-32": (17, 32), "33+": (33, 10**9)}
    return {
        "pairs": len(rows),
        "prompts": len(prompts),
        **{f"{name}_chars": slow_histogram([len(row[name]) for row in rows]) for name in ("prompt", "chosen", "rejected")},
        "turns": dict(sorted(Counter(min(len(row["context"]), 10) for row in rows).items())),
        "pairs_per_prompt": {k: sum(low <= n <= high for n in repeats.values()) for k, (low, high) in buckets.items()},
        "most_pairs_per_prompt": max(repeats.values()),
        "languages": dict(Counter(detect_languages(sample))),
        "language_sample": len(sample),
        "longer_chosen": sum(longer) / len(rows),
        "mean_length_gap": sum(len(row["chosen"]) - len(row["rejected"]) for row in rows) / len(rows),
        "by_source": dict(Counter(row["src"] for row in rows)),
    }


def slow_histogram(lengths: list[int]) -> dict[str, Any]:
    ends = [*BIN_STARTS[1:], math.inf]
    ordered = sorted(lengths)
    return {
        "counts": tuple(sum(low <= n < high for n in lengths) for low, high in zip(BIN_STARTS, ends, strict=True)),
        "mean": sum(lengths) / len(lengths),
        **{name: ordered[math.ceil(len(lengths) * q / 100) - 1] for name, q in (("median", 50), ("p95", 95), ("p99", 99))},
        "max": max(lengths),
    }


@pytest.mark.parametrize("rows", [1, 2, 37, 900])
def test_card_agrees_with_loops_over_rows(rows):
    frame = random_pairs(rows, seed=rows)
    card = vars(card_of(frame, batch=100))
    assert {k: vars(v) if k.endswith("_chars") else v for k, v in card.items()} == slow_card(frame)


def test_four_pairs_are_counted_exactly():
    card = card_of(
        table(
            pair(ENGLISH, "long reply", "short"),
            pair(ENGLISH, "a", "b", turns=3),
            pair(ENGLISH, "a", "bcd", turns=11, src="ultrafeedback"),
            pair(GERMAN, "ja, das", "nein", turns=10),
        )
    )
    assert (card.pairs, card.prompts, card.most_pairs_per_prompt) == (4, 2, 3)
    assert card.turns == {1: 1, 3: 1, 10: 2}
    assert card.pairs_per_prompt == {"1": 1, "2": 0, "3-4": 1, "5-8": 0, "9-16": 0, "17-32": 0, "33+": 0}
    assert card.by_source == {"hh": 3, "ultrafeedback": 1}
    assert card.longer_chosen == (1 + 0.5 + 0 + 1) / 4
    assert card.mean_length_gap == (5 + 0 - 2 + 3) / 4
    assert (card.languages, card.language_sample) == ({"de": 1, "en": 1}, 2)
    chosen = card.chosen_chars
    assert (chosen.mean, chosen.median, chosen.p95, chosen.p99, chosen.max) == (19 / 4, 1, 10, 10, 10)
    assert {low: n for low, n in zip(BIN_STARTS, chosen.counts, strict=True) if n} == {1: 2, 6: 1, 8: 1}


def test_lengths_are_characters_not_bytes():
    card = card_of(table(pair("你好", "éé", "abc")))
    assert (card.prompt_chars.max, card.chosen_chars.max, card.longer_chosen) == (2, 2, 0.0)


def test_texts_beyond_the_last_bin_keep_mean_and_longest():
    lengths = card_of(table(pair("p", "x" * 3_000_000), pair("q", "x"))).chosen_chars
    assert (lengths.max, lengths.mean, lengths.p99, lengths.counts[-1]) == (3_000_000, 1_500_000.5, 2**20 - 1, 1)


@pytest.mark.parametrize("batch", [1, 7, 599])
def test_batch_size_does_not_matter(batch):
    frame = random_pairs(600)
    assert card_of(frame, batch) == card_of(frame)


def test_order_of_rows_does_not_matter():
    frame = table(*(pair(f"{text} {i}") for i in range(3000) for text in (ENGLISH if i % 3 else GERMAN,)))
    card = card_of(frame, 500)
    assert card.language_sample == 2000
    assert card == card_of(frame.sample(fraction=1, shuffle=True, seed=1), 333) == card_of(frame.reverse(), 10_000)


def test_language_sample_is_uniform_over_distinct_prompts():
    frame = table(*(pair(f"{ENGLISH} {i}") for i in range(3000)), *(pair(f"{GERMAN} {i}") for i in range(3000)))
    repeated = pl.concat([frame, *[frame.head(3000)] * 5])
    languages = card_of(repeated).languages
    assert languages == card_of(frame).languages
    assert abs(languages["de"] / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)


def test_a_card_may_be_taken_before_the_last_pair():
    frame, builder = random_pairs(300), DataCardBuilder()
    builder.add(frame.head(100))
    assert builder.card() == card_of(frame.head(100))
    builder.add(frame.tail(200))
    assert builder.card() == builder.card() == card_of(frame)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from /proc")
def test_memory_does_not_hold_the_texts_that_went_by():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    builder, text = DataCardBuilder(), "x" * 20_000
    builder.add(table(*(pair(f"0 {i} {text}") for i in range(500))))
    before = resident()
    for batch in range(1, 25):
        builder.add(table(*(pair(f"{batch} {i} {text}") for i in range(500))))
    assert resident() - before < 24 * 500 * 20_000 / 3


def test_columns_beyond_those_read_are_ignored():
    frame = random_pairs(20)
    assert card_of(frame.with_columns(pl.lit(1).alias("score_chosen")).select(sorted([*SCHEMA, "score_chosen"]))) == card_of(
        frame
    )


def test_short_texts_and_code_are_unsure():
    assert detect_languages(["", "hi", "x^2+y^2=z^2", "for (int i=0;i<n;i++){ a[i]=b; }"]) == ["unsure"] * 4


def test_plain_sentences_have_their_language():
    texts = [ENGLISH, GERMAN, "¿Cuál es la mejor manera de cocinar arroz?", "怎么煮米饭最好？", "How do I make spaghetti?"]
    assert detect_languages(texts) == ["en", "de", "es", "zh", "en"]


def test_no_pairs_make_an_empty_card():
    card = card_of(table())
    empty = DataCardBuilder()
    empty.add(table())
    assert card == empty.card() == DataCardBuilder().card()
    assert (card.pairs, card.prompts, card.turns, card.languages, card.by_source) == (0, 0, {}, {}, {})
    assert math.isnan(card.longer_chosen)
    assert math.isnan(card.prompt_chars.mean)
    assert card.metadata() == {"pairs": 0, "prompts": 0}
    assert card.markdown() == "There are no pairs."


def test_metadata_is_flat_and_finite():
    metadata = card_of(table(pair(ENGLISH, "long reply", "short"), pair(ENGLISH, "a", "bc", turns=3))).metadata()
    assert metadata == {
        "pairs": 2, "prompts": 1, "mean_pairs_per_prompt": 2.0, "most_pairs_per_prompt": 2, "single_turn_share": 0.5,
        "longer_chosen_share": 0.5, "mean_length_gap_chars": 2.0,
        "median_prompt_chars": 50, "p95_prompt_chars": 50, "longest_prompt_chars": 50,
        "median_chosen_chars": 1, "p95_chosen_chars": 10, "longest_chosen_chars": 10,
        "median_rejected_chars": 2, "p95_rejected_chars": 5, "longest_rejected_chars": 5, "languages": "en 100.0 %",
    }  # fmt: skip


def test_markdown_says_the_numbers_in_words():
    lines = card_of(table(pair(ENGLISH, turns=10), pair(GERMAN, src="a|b"), pair("hi"))).markdown().splitlines()
    assert "| of a\\|b | 1 (33.3 %) |" in lines
    assert "| the chosen reply is the longer one | in 100.0 % of the pairs (equal lengths count half) |" in lines
    assert "| prompt, characters | mean 33; half have at most 47, 95 % at most 50, the longest 50 |" in lines
    assert "| unsure (short, code, or mixed) | 1 | 33.3 % |" in lines
    assert "| 1 (single turn) | 2 | 66.7 % |" in lines
    assert "| 10 or more | 1 | 33.3 % |" in lines


@pytest.mark.parametrize("figure", [data_plots.length_histogram, data_plots.pairs_per_prompt])
@pytest.mark.parametrize(
    "frame",
    [table(), table(pair("p", "", "")), table(pair("p", "x" * 3_000_000)), random_pairs(1), random_pairs(500)],
    ids=["none", "empty-replies", "huge", "one", "many"],
)
def test_figures_are_small_pngs_without_warnings(figure, frame):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = figure(card_of(frame))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) < 100 * 1024


def test_importing_the_modules_loads_neither_detector_nor_matplotlib():
    code = "import sys, densityrm_core.pairs.plots; sys.exit(bool({'matplotlib', 'py3langid'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603

"""A policy that repeats itself is found out: by its words, by the meaning of its replies, within a prompt and across prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from densityrm_core.evaluation.diversity import distinct_n, measure_diversity, self_bleu, spreads, words

from ..policy_rows import evaluation

TEXTS = ["the cat sat on the mat", "the dog sat on a mat today", "no", "a cat sat on a mat .", "the the the the"]


def embed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A vector for each text, by its letters."""
    counts = np.array([[1 + text.count(letter) for letter in "abcdefgh"] for text in texts], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True), np.zeros(len(texts), bool)


def replies(policy: str, by_prompt: dict[str, list[str]], seed: int = 0):
    return [
        {"seed": seed, "policy": policy, "prompt_id": prompt, "sample": i + 1, "completion": text, "entropy": 1.0 + i}
        for prompt, texts in by_prompt.items()
        for i, text in enumerate(texts)
    ]


def slow_bleu(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 by lists alone, add-one above unigrams, closest reference length."""
    precision = 1.0
    for n in (1, 2, 3, 4):
        grams = [tuple(candidate[i : i + n]) for i in range(len(candidate) - n + 1)]
        hits = 0
        for gram in set(grams):
            in_references = [
                sum(tuple(reference[i : i + n]) == gram for i in range(len(reference) - n + 1)) for reference in references
            ]
            hits += min(grams.count(gram), max(in_references))
        precision *= (hits / len(grams) if n == 1 else (hits + 1) / (len(grams) + 1)) ** 0.25
    closest = sorted((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[0][1]
    return precision * min(1.0, math.exp(1 - closest / len(candidate)))


def test_self_bleu_is_the_mean_of_a_slow_bleu_of_each_reply_against_the_others():
    told = [words(text) for text in TEXTS]
    slow = [slow_bleu(told[i], told[:i] + told[i + 1 :]) for i in range(len(told))]
    assert self_bleu(told) == pytest.approx(np.mean(slow), abs=1e-12)
    assert 0.1 < np.mean(slow) < 0.9


def test_bleu_of_a_known_sentence_pair_is_the_number_by_hand():
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruples, one added above words; same length
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu([words("a b c d"), words("a b c e")]) == pytest.approx(expected)


def test_a_short_reply_is_penalised():
    short, long = words("a b c d"), words("a b c d e f g h")
    alone = (self_bleu([short, long]) or 0) * 2 - slow_bleu(long, [short])
    assert alone == pytest.approx(math.exp(1 - 2))


def test_a_collapsed_policy_has_no_spread_full_self_bleu_and_as_few_words_as_one_reply():
    text = "Sure, here is the answer."
    rows = evaluation(replies("a", {"p": [text] * 4, "q": [text] * 4}))
    found = measure_diversity(rows, embed)
    assert found["spread"].to_list() == pytest.approx([0, 0], abs=1e-12)
    assert found["spread_across"].to_list() == pytest.approx([0, 0], abs=1e-12)
    assert found["self_bleu"].to_list() == [1, 1]
    assert found["distinct_1"].to_list() == [1 / 4, 1 / 4]  # seven words, all different, four times


def test_equal_short_replies_have_self_bleu_one():
    assert self_bleu([words("no"), words("no")]) == 1


def test_replies_without_a_common_word_have_self_bleu_zero():
    assert self_bleu([words("red green blue tan"), words("one two three four")]) == 0


def test_empty_replies_are_alike_and_unlike_all_others():
    assert self_bleu([(), ()]) == 1
    assert self_bleu([(), words("yes")]) == 0
    found = measure_diversity(evaluation(replies("a", {"p": ["", ""], "q": ["cab", " "]})), embed)
    assert found["spread"].to_list() == [0, 1]
    assert found["distinct_1"].to_list() == [None, 1]


def test_distinct_n_is_different_n_grams_over_n_grams_of_all_replies_together():
    told = [words("a b a"), words("A b!")]
    assert distinct_n(told, 1) == 3 / 6
    assert distinct_n(told, 2) == 3 / 4
    assert distinct_n([words("a")], 2) is None


def test_spreads_are_those_of_the_slow_double_loop():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(17, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = rng.permutation(np.array([0] * 4 + [1] * 6 + [2] * 7))
    within, across = spreads(vectors, groups)
    for g in range(3):
        own, others = [i for i in range(17) if groups[i] == g], [i for i in range(17) if groups[i] != g]
        assert within[g] == pytest.approx(np.mean([1 - vectors[i] @ vectors[j] for i in own for j in own if i != j]), abs=1e-12)
        assert across[g] == pytest.approx(np.mean([1 - vectors[i] @ vectors[j] for i in own for j in others]), abs=1e-12)


def test_a_group_of_one_has_no_spread_within_whatever_its_length_rounds_to():
    vectors = np.random.default_rng(1).normal(size=(50, 7))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    within, across = spreads(vectors, np.arange(50))
    assert np.isnan(within).all() and np.isfinite(across).all()
    assert np.isnan(spreads(vectors, np.zeros(50, np.int64))[1]).all()


def test_one_reply_a_prompt_has_words_but_no_self_bleu_and_no_spread():
    found = measure_diversity(evaluation(replies("a", {"p": ["a cab"], "q": ["the bee"]})), embed)
    assert found.select("self_bleu", "spread").null_count().row(0) == (2, 2)
    assert found["distinct_1"].to_list() == [1, 1]
    assert found["spread_across"].min() > 0


def test_policies_and_seeds_are_measured_apart():
    same, other = {"p": ["abc", "abc"], "q": ["abc", "abc"]}, {"p": ["hhh", "cab"], "q": ["gg", "ff"]}
    rows = [*replies("a", same), *replies("b", other), *replies("a", other, seed=1)]
    found = measure_diversity(evaluation(rows), embed)
    means = {(row["seed"], row["policy"], row["prompt_id"]): row["spread_across"] for row in found.to_dicts()}
    assert means[0, "a", "p"] == pytest.approx(0, abs=1e-12)
    assert means[0, "b", "p"] == pytest.approx(means[1, "a", "p"]) and means[0, "b", "p"] > 0


def test_every_distinct_text_is_embedded_once():
    asked: list[str] = []

    def counting(texts: Sequence[str]):
        asked.extend(texts)
        return embed(texts)

    texts = {"p": ["one", "two"], "q": ["two", "one"]}
    measure_diversity(evaluation([*replies("a", texts), *replies("b", texts)]), counting)
    assert sorted(asked) == ["one", "two"]


def test_greedy_replies_and_those_picked_by_a_reward_model_are_left_out():
    greedy = [{"policy": "a", "sample": 0, "completion": "zero"}]
    best = [{"policy": "best_of_4_uniform", "sample": 1, "completion": "best"}]
    found = measure_diversity(evaluation([*greedy, *best, *replies("a", {"p": ["one", "two"]})]), embed)
    assert found.select("policy", "distinct_1", "entropy").rows() == [("a", 1.0, 1.5)]


def test_without_an_encoder_there_are_words_and_no_spreads():
    found = measure_diversity(evaluation(replies("a", {"p": ["one", "two"], "q": ["three", "four"]})), None)
    assert found["spread"].null_count() == found["spread_across"].null_count() == 2
    assert found["self_bleu"].null_count() == 0

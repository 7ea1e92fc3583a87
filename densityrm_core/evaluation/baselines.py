"""Rankers that read no prompt and learn next to nothing: what a reward model must beat before its accuracy means anything.

`longer_reply` and `shorter_reply` look at lengths alone, `bag_of_words` at which words a reply has. What they learn, they learn
on the training split, and choose on the validation split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from densityrm_core.arrays import Doubles, id_keys
from densityrm_core.streams import unit_intervals

Baseline = Callable[[pl.DataFrame], tuple[Doubles, Doubles]]

MAX_PAIRS = 50_000  # training pairs that a baseline learns from; their word counts take some 150 MB
_WORDS = 2**16  # words share this many weights by their hash, so that no vocabulary is kept
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # C, the inverse of the L2 penalty
_BATCH = 8192  # pairs whose words are counted at a time
_FAINT = 1e-6  # nats: a ranker that claims no more than chance still ranks


def fit_baselines(pairs: pl.LazyFrame) -> dict[str, Baseline]:
    """The baselines by name. Each maps pairs to the rewards of chosen and of rejected, (pairs,) each, in nats.

    Args:
        pairs: tables.PREFERENCE_PAIRS; the training and the validation split are read, at most MAX_PAIRS pairs of each.
    """
    train, validation = (_some(pairs, split) for split in ("train", "validation"))
    longer = _share_longer(train)
    return {
        "longer_reply": _by_length(1, longer),
        "shorter_reply": _by_length(-1, 1 - longer),
        "bag_of_words": fit_bag_of_words(train, validation),
    }


def fit_bag_of_words(train: pl.DataFrame, validation: pl.DataFrame) -> Baseline:
    """Logistic regression on the difference of the words of both replies, each word counted once a reply.

    P(chosen beats rejected) = sigmoid(w . (words(chosen) - words(rejected))), a Bradley-Terry model whose reward is linear in the
    words. Without an intercept a pair and its mirror image give one and the same loss, so every second pair is fitted
    mirrored: the fit has two classes and the loss is that of both orientations. Of the strengths of the L2 penalty, the one
    with the lowest log-loss on `validation` is taken, the greatest if there is no validation pair.

    Args:
        train, validation: columns chosen and rejected. With fewer than two training pairs all rewards are zero.
    """
    if train.height < 2:
        return lambda pairs: (np.zeros(pairs.height), np.zeros(pairs.height))
    differences = _differences(train)
    fits = [_fit(differences, strength) for strength in (_STRENGTHS if validation.height else _STRENGTHS[:1])]
    weights = fits[0]
    if validation.height:
        held_out = _differences(validation)
        weights = fits[int(np.argmin([np.logaddexp(0, -(held_out @ fit)).mean() for fit in fits]))]

    def score(pairs: pl.DataFrame) -> tuple[Doubles, Doubles]:
        batches = list(pairs.select("chosen", "rejected").iter_slices(_BATCH))
        chosen, rejected = ([_words(batch[side]) @ weights for batch in batches] for side in ("chosen", "rejected"))
        return np.concatenate([np.empty(0), *chosen]), np.concatenate([np.empty(0), *rejected])

    return score


def _by_length(sign: int, share: float) -> Baseline:
    """Prefers the longer reply (sign 1) or the shorter one (-1), by the log-odds of the `share` of pairs where that is right.

    A share below one half would turn the ranking round; it claims next to nothing instead.
    """
    share = min(max(share, 0.5), 1 - _FAINT)
    reward = max(float(np.log(share / (1 - share))), _FAINT)

    def score(pairs: pl.DataFrame) -> tuple[Doubles, Doubles]:
        longer = sign * _longer(pairs)
        return np.where(longer > 0, reward, 0.0), np.where(longer < 0, reward, 0.0)

    return score


def _share_longer(train: pl.DataFrame) -> float:
    """Share of the pairs of unequal lengths whose longer reply is the preferred one, with one imagined pair of each kind."""
    longer = _longer(train)
    return float(((longer > 0).sum() + 1) / ((longer != 0).sum() + 2))


def _longer(pairs: pl.DataFrame) -> Doubles:
    chosen, rejected = (pairs[side].str.len_chars().to_numpy().astype(np.int64) for side in ("chosen", "rejected"))
    return np.sign(chosen - rejected).astype(np.float64)


def _some(pairs: pl.LazyFrame, split: str) -> pl.DataFrame:
    """At most MAX_PAIRS pairs of a split: whole prompts in an order that does not change as the data grow."""
    pairs = pairs.filter(pl.col("split") == split)
    prompts = pairs.select("prompt_id").collect()["prompt_id"]
    order = unit_intervals(id_keys(prompts), 0, "baselines")
    if len(order) > MAX_PAIRS:
        taken = prompts.filter(order <= np.partition(order, MAX_PAIRS - 1)[MAX_PAIRS - 1])
        pairs = pairs.filter(pl.col("prompt_id").is_in(taken.unique().implode()))
    return pairs.select("chosen", "rejected").head(MAX_PAIRS).collect()


def _fit(differences: Any, strength: float) -> Doubles:
    from scipy.sparse import diags_array
    from sklearn.linear_model import LogisticRegression

    sides = np.where(np.arange(differences.shape[0]) % 2, 1.0, -1.0)
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=200)
    return np.asarray(model.fit(diags_array(sides) @ differences, sides).coef_[0], dtype=np.float64)


def _differences(pairs: pl.DataFrame) -> Any:
    return _words(pairs["chosen"]) - _words(pairs["rejected"])


def _words(texts: pl.Series) -> Any:
    """Which words each text has, a sparse matrix of zeros and ones, (texts, _WORDS)."""
    from sklearn.feature_extraction.text import HashingVectorizer

    plain: Any = None  # no norm; scikit-learn's annotation knows names of norms only
    return HashingVectorizer(n_features=_WORDS, alternate_sign=False, norm=plain, binary=True).transform(texts.to_list())

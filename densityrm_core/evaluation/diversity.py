"""How different the replies of a policy are: what is left of diversity once a policy has found what its reward model likes.

Words are runs of letters and digits, or single other marks, in lower case; a script written without spaces counts as long words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arms import BEST_OF
from densityrm_core.arrays import Doubles
from densityrm_core.tables import POLICY_DIVERSITY

Words = tuple[str, ...]
Embed = Callable[[Sequence[str]], tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]

_WORD = re.compile(r"\w+|[^\w\s]")
_ORDERS = 4
_KEYS = ("seed", "policy", "prompt_id", "decile", "quartile")


def measure_diversity(evaluation: pl.DataFrame, embed: Embed | None) -> pl.DataFrame:
    """Diversity of the sampled replies of every policy but those picked by a reward model, a row a prompt.

    Args:
        evaluation: tables.POLICY_EVALUATION of one or several seeds.
        embed: texts to unit vectors, `Encoder.encode`; each distinct text is embedded once. Without it the spreads are null.

    Returns:
        tables.POLICY_DIVERSITY.
    """
    sampled = evaluation.filter((pl.col("sample") > 0) & ~pl.col("policy").str.starts_with(BEST_OF))
    sampled = sampled.sort(*_KEYS, "sample")
    groups = sampled.group_by(*_KEYS, "fingerprint", maintain_order=True).agg("completion", pl.col("entropy").mean())
    told: dict[str, Words] = {text: words(text) for text in sampled["completion"].unique()}
    replies = [[told[text] for text in group] for group in groups["completion"]]
    found = groups.drop("completion").with_columns(
        pl.Series("distinct_1", [distinct_n(group, 1) for group in replies], pl.Float64),
        pl.Series("distinct_2", [distinct_n(group, 2) for group in replies], pl.Float64),
        pl.Series("self_bleu", [self_bleu(group) for group in replies], pl.Float64),
        *_spread_columns(groups, embed),
    )
    return POLICY_DIVERSITY.check(found.select(POLICY_DIVERSITY.schema.names()))


def words(text: str) -> Words:
    """The words of a text, see above."""
    return tuple(_WORD.findall(text.lower()))


def distinct_n(replies: Sequence[Words], n: int) -> float | None:
    """Different n-grams / n-grams over all replies together [Li et al. 2016]; None if there are no n-grams."""
    grams = [gram for reply in replies for gram in _grams(reply, n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(replies: Sequence[Words]) -> float | None:
    """Mean BLEU-4 of each reply with all others as its references [Zhu et al. 2018]; None for fewer than two replies."""
    if len(replies) < 2:
        return None
    counts = [[Counter(_grams(reply, n)) for n in range(1, _ORDERS + 1)] for reply in replies]
    return float(np.mean([_bleu(i, replies, counts) for i in range(len(replies))]))


def spreads(vectors: Doubles, groups: npt.NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """Mean cosine distance within a group, and from a group to all others, of unit vectors.

    With S_g the sum of the m_g vectors of group g, and T, N those of all,

        within_g = 1 - (|S_g|^2 - m_g) / (m_g (m_g - 1)),    across_g = 1 - S_g . (T - S_g) / (m_g (N - m_g)).

    Args:
        vectors: (n, d).
        groups: number of each vector's group, 0 to G - 1, (n,).

    Returns:
        within, across, each (G,); NaN for a group of one vector, and for one group.
    """
    sizes = np.bincount(groups).astype(np.float64)
    sums = np.zeros((len(sizes), vectors.shape[1]))
    np.add.at(sums, groups, vectors)
    others = sums.sum(0) - sums
    siblings, strangers = (np.where(pairs > 0, pairs, np.nan) for pairs in (sizes * (sizes - 1), sizes * (sizes.sum() - sizes)))
    within = 1 - ((sums * sums).sum(1) - sizes) / siblings
    across = 1 - (sums * others).sum(1) / strangers
    return np.maximum(within, 0), np.maximum(across, 0)  # equal vectors may end up at -1e-16


def _spread_columns(groups: pl.DataFrame, embed: Embed | None) -> list[pl.Series]:
    """The columns spread and spread_across of `groups`, each policy of each seed by itself."""
    found = np.full((groups.height, 2), np.nan)
    if embed is not None and groups.height:
        texts = groups["completion"].explode()
        distinct = texts.unique().sort()
        vectors = _unit_vectors(distinct, embed)
        row = dict(zip(distinct, range(len(distinct)), strict=True))
        numbered = groups.with_row_index("group").select("seed", "policy", "group", "completion").explode("completion")
        for part in numbered.partition_by("seed", "policy"):
            own = part["group"].to_numpy().astype(np.int64)
            names, number = np.unique(own, return_inverse=True)
            at = np.array([row[text] for text in part["completion"]])
            found[names] = np.stack(spreads(vectors[at], number), axis=-1)
    return [pl.Series(n, c, pl.Float64).fill_nan(None) for n, c in zip(("spread", "spread_across"), found.T, strict=True)]


def _unit_vectors(texts: pl.Series, embed: Embed) -> Doubles:
    """Vectors of length 1 in float64, (texts, d + 1); an empty text lies on an axis of its own, at distance 1 from all others."""
    blank = (texts.str.strip_chars().str.len_chars() == 0).to_numpy()
    given = np.asarray(embed(texts.filter(~pl.Series(blank)).to_list())[0], np.float64) if not blank.all() else np.zeros((0, 0))
    vectors = np.zeros((len(texts), given.shape[1] + 1))
    vectors[~blank, :-1] = given / np.linalg.norm(given, axis=1, keepdims=True)
    vectors[blank, -1] = 1
    return vectors


def _bleu(i: int, replies: Sequence[Words], counts: Sequence[Sequence[Counter[Words]]]) -> float:
    """BLEU-4 of the i-th reply against the others [Papineni et al. 2002].

    BP exp(1/4 sum_n log p_n), p_n the share of its n-grams found in a reference, each as often as in the reference that has it
    most; for n > 1 one is added to numerator and denominator [Lin & Och 2004]. BP = min(1, exp(1 - r/c)) with r the reference
    length nearest to its own length c. A reply without words scores 1 if another one has none, else 0.
    """
    own, others = replies[i], [j for j in range(len(replies)) if j != i]
    if not own:
        return float(any(not replies[j] for j in others))
    logs = 0.0
    for n in range(_ORDERS):
        grams = counts[i][n]
        most = {gram: max(counts[j][n][gram] for j in others) for gram in grams}
        hits, total = sum(min(count, most[gram]) for gram, count in grams.items()), sum(grams.values())
        if n == 0 and not hits:
            return 0.0
        logs += np.log((hits + (n > 0)) / (total + (n > 0)))
    nearest = min((len(replies[j]) for j in others), key=lambda length: (abs(length - len(own)), length))
    return float(np.exp(logs / _ORDERS + min(0.0, 1 - nearest / len(own))))


def _grams(reply: Words, n: int) -> list[Words]:
    return [reply[i : i + n] for i in range(len(reply) - n + 1)]

"""What a table of preference pairs is like: lengths, turns, repeated prompts, languages. Computed while the pairs stream by."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.arrays import Ints, id_keys, runs

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

LANGUAGE_SAMPLE = 2_000  # prompts whose language is looked at
UNSURE = "unsure"

_LONGEST = 2**20 - 1  # characters; quantiles and bins count longer texts as this long
# ceil(2^(i/2)): two bins a doubling, as far as whole numbers allow; the first bin holds the empty texts
BIN_STARTS = (0, *sorted({math.ceil(2 ** (i / 2)) for i in range(40)}))

_MOST_TURNS = 10
_REPEATS = {"1": 1, "2": 2, "3-4": 4, "5-8": 8, "9-16": 16, "17-32": 32, "33+": math.inf}  # pairs of a prompt, at most

_LANGUAGE_CHARACTERS = 400  # of a prompt: enough to tell, and what each sampled prompt may keep in memory
_SURE = 0.5
_LANGUAGES_SHOWN = 15
# Short prompts do not tell these from the language they are counted as
_VARIETIES = {"pcm": "en", "wuu": "zh", "yue": "zh", "ary": "ar", "arz": "ar", "nn": "no", "zxx": UNSURE}


class DataCardBuilder:
    """Takes pairs in parts of any size and order and gives the same card. Memory: 8 bytes a pair, and a constant."""

    def __init__(self) -> None:
        self._keys = array("Q")  # the prompt of every pair; grows in place
        self._sample = pl.DataFrame(schema={"key": pl.UInt64(), "prompt": pl.String()})
        self._prompt, self._chosen, self._rejected = _Lengths(), _Lengths(), _Lengths()
        self._longer_chosen = 0  # in halves: 2 for a longer chosen reply, 1 for equal lengths
        self._turns = np.zeros(_MOST_TURNS + 1, dtype=np.int64)
        self._sources: Counter[str] = Counter()

    def add(self, pairs: pl.DataFrame) -> None:
        """Count further pairs. Reads prompt_id, prompt, context, chosen, rejected, src (tables.PREFERENCE_PAIRS)."""
        keys = id_keys(pairs["prompt_id"])
        self._keys.frombytes(keys.tobytes())
        self._sample_prompts(keys, pairs["prompt"])
        prompt, chosen, rejected = (pairs[c].str.len_chars().to_numpy() for c in ("prompt", "chosen", "rejected"))
        self._prompt.add(prompt)
        self._chosen.add(chosen)
        self._rejected.add(rejected)
        self._longer_chosen += 2 * int((chosen > rejected).sum()) + int((chosen == rejected).sum())
        turns = pairs["context"].list.len().to_numpy()
        self._turns += np.bincount(np.minimum(turns, _MOST_TURNS), minlength=_MOST_TURNS + 1)
        self._sources.update(cast(dict[str, int], dict(pairs["src"].value_counts().rows())))

    def card(self) -> DataCard:
        """The card of all pairs so far; more may be added afterwards."""
        pairs, repeats = len(self._keys), self._repeats()
        prompt, chosen, rejected = (lengths.histogram() for lengths in (self._prompt, self._chosen, self._rejected))
        per_bucket = np.bincount(np.searchsorted([*_REPEATS.values()], repeats), minlength=len(_REPEATS))
        languages = Counter(detect_languages(self._sample["prompt"]))
        return DataCard(
            pairs=pairs,
            prompts=len(repeats),
            prompt_chars=prompt,
            chosen_chars=chosen,
            rejected_chars=rejected,
            turns={turns: count for turns, count in enumerate(self._turns.tolist()) if count},
            pairs_per_prompt=dict(zip(_REPEATS, per_bucket.tolist(), strict=True)),
            most_pairs_per_prompt=int(repeats.max(initial=0)),
            languages=_ranked(languages),
            language_sample=self._sample.height,
            longer_chosen=self._longer_chosen / (2 * pairs) if pairs else math.nan,
            mean_length_gap=(self._chosen.total - self._rejected.total) / pairs if pairs else math.nan,
            by_source=_ranked(self._sources),
        )

    def _repeats(self) -> Ints:
        """Pairs of every prompt, shape (prompts,)."""
        keys = np.frombuffer(self._keys, dtype=np.uint64)
        keys.sort()  # in place: a copy would double the memory, and their order means nothing
        return runs(keys)[1]

    def _sample_prompts(self, keys: npt.NDArray[np.uint64], prompts: pl.Series) -> None:
        """Keep the prompts with the smallest ids: these are hashes, so it is a uniform sample of the distinct prompts."""
        new = pl.DataFrame({"key": keys, "prompt": prompts})
        if self._sample.height == LANGUAGE_SAMPLE:
            new = new.filter(pl.col("key") < self._sample["key"][-1])
        if not new.is_empty():
            new = new.unique("key").sort("key").head(LANGUAGE_SAMPLE)
            # through Python, since a slice of polars' text keeps all of the batch's text alive
            copied = new.with_columns(pl.Series("prompt", [text[:_LANGUAGE_CHARACTERS] for text in new["prompt"].to_list()]))
            self._sample = pl.concat([self._sample, copied]).unique("key").sort("key").head(LANGUAGE_SAMPLE)


@dataclass(frozen=True)
class LengthHistogram:
    """Lengths in characters. `counts[i]` texts are from BIN_STARTS[i] to below BIN_STARTS[i + 1] long, the last bin is open.

    All is exact, but that quantiles take texts of more than 2^20 - 1 characters for as long as that. Without texts the mean is
    NaN and the rest 0.
    """

    counts: tuple[int, ...]
    mean: float
    median: int  # the shortest length that at least half of the texts do not exceed; likewise p95 and p99
    p95: int
    p99: int
    max: int


@dataclass(frozen=True)
class DataCard:
    """What the pairs are like. Shares are from 0 to 1, and NaN without pairs."""

    pairs: int
    prompts: int  # distinct ones
    prompt_chars: LengthHistogram  # of every pair's prompt: a prompt of many pairs counts as often
    chosen_chars: LengthHistogram
    rejected_chars: LengthHistogram
    turns: dict[int, int]  # turns in the context -> pairs; 1 is a single turn, 10 stands for 10 and more
    pairs_per_prompt: dict[str, int]  # "1", "2", "3-4", ... "33+" -> prompts
    most_pairs_per_prompt: int
    languages: dict[str, int]  # ISO 639 code or "unsure" -> prompts of the sample, most frequent first
    language_sample: int  # distinct prompts in the sample
    longer_chosen: float  # share of pairs whose chosen reply has more characters; equal lengths count half
    mean_length_gap: float  # characters, chosen minus rejected
    by_source: dict[str, int]  # source -> pairs, most frequent first

    def metadata(self) -> dict[str, float | int | str]:
        """The numbers under flat names; without pairs only the counts."""
        numbers: dict[str, float | int | str] = {"pairs": self.pairs, "prompts": self.prompts}
        if not self.pairs:
            return numbers
        numbers |= {
            "mean_pairs_per_prompt": self.pairs / self.prompts,
            "most_pairs_per_prompt": self.most_pairs_per_prompt,
            "single_turn_share": self.turns.get(1, 0) / self.pairs,
            "longer_chosen_share": self.longer_chosen,
            "mean_length_gap_chars": self.mean_length_gap,
        }
        for name, chars in self._texts():
            numbers |= {
                f"median_{name}_chars": chars.median,
                f"p95_{name}_chars": chars.p95,
                f"longest_{name}_chars": chars.max,
            }
        shown = list(self.languages.items())[:5]
        return {**numbers, "languages": ", ".join(f"{name} {_share(count, self.language_sample)}" for name, count in shown)}

    def markdown(self) -> str:
        """Three tables: the numbers in words, the languages, the turns."""
        if not self.pairs:
            return "There are no pairs."
        words = [
            ("pairs", f"{self.pairs:,}"),
            *((f"of {_cell(source)}", f"{count:,} ({_share(count, self.pairs)})") for source, count in self.by_source.items()),
            ("distinct prompts", f"{self.prompts:,}"),
            ("pairs per prompt", f"{self.pairs / self.prompts:,.1f} on average, at most {self.most_pairs_per_prompt:,}"),
            *((f"{name}, characters", _lengths_in_words(chars)) for name, chars in self._texts()),
            (
                "the chosen reply is the longer one",
                f"in {100 * self.longer_chosen:.1f} % of the pairs (equal lengths count half)",
            ),
            ("chosen minus rejected reply", f"{self.mean_length_gap:+,.1f} characters on average"),
        ]
        languages = list(self.languages.items())
        rest = sum(count for _, count in languages[_LANGUAGES_SHOWN:])
        languages = languages[:_LANGUAGES_SHOWN] + ([("other languages", rest)] if rest else [])
        tongues = [
            (f"{name} (short, code, or mixed)" if name == UNSURE else name, f"{count:,}", _share(count, self.language_sample))
            for name, count in languages
        ]
        turns = [(_turns_in_words(turns), f"{count:,}", _share(count, self.pairs)) for turns, count in self.turns.items()]
        return "\n\n".join(
            [
                _table(("what", "value"), words),
                f"Languages, detected in {self.language_sample:,} of the distinct prompts:",
                _table(("language", "prompts", "share"), tongues),
                "Turns that both replies answer:",
                _table(("turns", "pairs", "share"), turns),
            ]
        )

    def _texts(self) -> list[tuple[str, LengthHistogram]]:
        return [("prompt", self.prompt_chars), ("chosen", self.chosen_chars), ("rejected", self.rejected_chars)]


def detect_languages(texts: Iterable[str]) -> list[str]:
    """ISO 639 code of each text, from its first 400 characters; "unsure" below a probability of one half."""
    return [_language(text) for text in texts]


def _language(text: str) -> str:
    chances: defaultdict[str, float] = defaultdict(float)
    for label, probability in cast(list[tuple[str, float]], _identifier().rank(text[:_LANGUAGE_CHARACTERS])):
        chances[_VARIETIES.get(label, label)] += probability
    language = max(chances, key=chances.__getitem__)
    return language if chances[language] >= _SURE else UNSURE


@cache
def _identifier() -> LanguageIdentifier:
    """Half a second and 75 MB, which only a card needs. The model is part of the package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class _Lengths:
    """How many texts have each length: exact quantiles in 8 MiB, whatever the number of texts."""

    def __init__(self) -> None:
        self.total = 0
        self._max = 0
        self._counts = np.zeros(_LONGEST + 1, dtype=np.int64)

    def add(self, lengths: npt.NDArray[Any]) -> None:
        """Count further lengths, integers of shape (texts,)."""
        counts = np.bincount(np.minimum(lengths, _LONGEST))
        self._counts[: len(counts)] += counts
        self.total += int(lengths.sum(dtype=np.int64))
        self._max = max(self._max, int(lengths.max(initial=0)))

    def histogram(self) -> LengthHistogram:
        at_most = np.cumsum(self._counts)  # texts up to each length
        texts = int(at_most[-1])
        median, p95, p99 = (int(np.searchsorted(at_most, -(-percent * texts // 100))) for percent in (50, 95, 99))
        counts = np.add.reduceat(self._counts, BIN_STARTS)
        return LengthHistogram(tuple(counts.tolist()), self.total / texts if texts else math.nan, median, p95, p99, self._max)


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _lengths_in_words(chars: LengthHistogram) -> str:
    return f"mean {chars.mean:,.0f}; half have at most {chars.median:,}, 95 % at most {chars.p95:,}, the longest {chars.max:,}"


def _turns_in_words(turns: int) -> str:
    return {1: "1 (single turn)", _MOST_TURNS: f"{_MOST_TURNS} or more"}.get(turns, str(turns))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))

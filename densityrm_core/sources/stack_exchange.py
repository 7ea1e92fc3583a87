"""HuggingFaceH4 stack-exchange-preferences: a question with scored answers, all in HTML."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple, cast

from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
from bs4.element import NavigableString
from bs4.exceptions import ParserRejectedMarkup
from markdownify import MarkdownConverter

from densityrm_core.settings import SourceSettings, StackExchangeSettings
from densityrm_core.sources.rows import MalformedError, Pair, Reject, Turn, number_field, objects_field, reply_fault, text_field

SRC = "stack_exchange"


class _Answer(NamedTuple):
    score: float
    id: int | str
    html: str


def parse(row: dict[str, Any], settings: SourceSettings) -> Iterator[Pair | Reject]:
    """The answer pairs of unequal score of one question, widest gap first, then by answer ids; the higher score is chosen.

    The pairs and the rejects' `pairs` add up to n (n - 1) / 2 for n answers, or to 1 for fewer than two.

    Raises:
        MalformedError: a column is missing or has another type, or HTML is nested too deeply.
    """
    qid, question = _identifier(row, "qid", ""), text_field(row, "question")
    answers = [_answer(item, f"answers[{i}].") for i, item in enumerate(objects_field(row, "answers"))]
    candidates = list(combinations(sorted(answers, key=lambda a: (-a.score, _by_id(a))), 2))
    if not candidates:
        yield Reject("too_few_answers", f"a question needs two answers, this one has {len(answers)}")
    elif not (prompt := text_from_html(question)):
        yield Reject("empty_prompt", "the question has no text", len(candidates))
    else:
        cap = cast(StackExchangeSettings, settings).max_pairs_per_question
        yield from _pairs(qid, (Turn("user", prompt),), candidates, cap)


def text_from_html(html: str) -> str:
    r"""Markdown of `html`: code in fences, verbatim; LaTeX and its _, * and \ as they are; entities decoded.

    Raises:
        MalformedError: the HTML is nested too deeply or cannot be parsed.
    """
    with warnings.catch_warnings():
        for category in (MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning):
            warnings.simplefilter("ignore", category)
        try:
            return (_SPACED_CONVERTER if _SPACES.search(html) else _CONVERTER).convert(html).strip()
        except RecursionError:
            raise MalformedError("wrong_type", "HTML is nested too deeply") from None
        except (ParserRejectedMarkup, ValueError) as error:  # ValueError: a list that starts at "²"
            raise MalformedError("wrong_type", f"HTML cannot be parsed: {error}") from None


def _pairs(
    qid: int | str, context: tuple[Turn, ...], candidates: list[tuple[_Answer, _Answer]], cap: int
) -> Iterator[Pair | Reject]:
    text = cache(text_from_html)  # only answers of kept pairs are converted, each once
    rejected: dict[str, list[list[int | str]]] = {}
    kept = 0
    for better, worse in sorted(candidates, key=lambda pair: (pair[1].score - pair[0].score, *map(_by_id, pair))):
        if better.score == worse.score:
            reason = "equal_scores"
        elif kept == cap:
            reason = "over_question_cap"
        elif fault := reply_fault(text(better.html), text(worse.html)):
            reason = fault.reason
        else:
            kept += 1
            yield Pair(context, text(better.html), text(worse.html), better.score, worse.score)
            continue
        rejected.setdefault(reason, []).append([better.id, worse.id])
    for reason, ids in rejected.items():
        raw = json.dumps({"qid": qid, "answer_ids": ids}, ensure_ascii=False)
        yield Reject(reason, f"question {qid}: {len(ids)} of {len(candidates)} answer pairs", len(ids), raw)


def _answer(item: dict[str, Any], where: str) -> _Answer:
    return _Answer(number_field(item, "pm_score", where), _identifier(item, "answer_id", where), text_field(item, "text", where))


def _identifier(row: dict[str, Any], name: str, where: str) -> int | str:
    value = row.get(name)
    if name in row and (isinstance(value, bool) or not isinstance(value, (int, str))):
        raise MalformedError("wrong_type", f"'{where}{name}' must be a whole number or a text")
    return value if isinstance(value, int) else text_field(row, name, where)


def _by_id(answer: _Answer) -> tuple[bool, int, str]:
    """Numbers before texts."""
    return (False, answer.id, "") if isinstance(answer.id, int) else (True, 0, answer.id)


_SPACES = re.compile(r"[\t ]{64,}")


class _Converter(MarkdownConverter):
    def convert_pre(self, el: Any, text: str, parent_tags: set[str]) -> str:
        """A fence longer than any run of backticks in the code."""
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        code = text.removesuffix("\n")
        return f"\n\n{fence}\n{code}\n{fence}\n\n" if text else ""


class _SpacedConverter(_Converter):
    def convert_soup(self, soup: BeautifulSoup) -> str:
        """Long runs of spaces outside code become one at once: the base class takes time quadratic in their length."""
        for text in soup.find_all(string=_SPACES):
            if type(text) is NavigableString and not text.find_parent("pre"):
                text.replace_with(_SPACES.sub(" ", text))
        return super().convert_soup(soup)


_OPTIONS: dict[str, Any] = {
    "bs4_options": "lxml",
    "heading_style": "ATX",
    "bullets": "-",
    "escape_asterisks": False,
    "escape_underscores": False,
    "sup_symbol": "^",
    "sub_symbol": "~",
    "strip": ["soup", "fn_cache"],  # elements that the base class would take for its own `convert_soup` and `convert_fn_cache`
}
_CONVERTER, _SPACED_CONVERTER = _Converter(**_OPTIONS), _SpacedConverter(**_OPTIONS)

"""10,000 broken raw lines: none crashes a parser, each is counted, and what comes of it can be stored."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest

from densityrm_core.settings import SourceSettings, StackExchangeSettings
from densityrm_core.sources import REASONS, Parsed, SourceName, parse_rows
from densityrm_core.sources.files import RawRow
from densityrm_core.tables import REJECTS, SOURCE_PAIRS

LINES = {"hh_rlhf": 3000, "ultrafeedback": 3000, "stack_exchange": 4000}
NAMES = tuple(LINES)

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Oh?"}]
HH = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Oh?\n\nAssistant: "
VALID: dict[str, dict[str, Any]] = {
    "hh_rlhf": {"chosen": HH + "Yes, é 😀", "rejected": HH + "No"},
    "ultrafeedback": {
        "prompt": "Why?",
        "chosen": [*TURNS, {"role": "assistant", "content": "Yes, é 😀"}],
        "rejected": [*TURNS, {"role": "assistant", "content": "No"}],
        "score_chosen": 8.5,
        "score_rejected": 3,
    },
    "stack_exchange": {
        "qid": 7,
        "question": "<p>Is $x_1 &lt; 2$?</p>\n<pre><code>a &amp; b\n</code></pre>",
        "answers": [
            {"answer_id": 11, "pm_score": 5, "selected": True, "text": "<ul><li>Yes, <em>é</em> 😀</li></ul>"},
            {"answer_id": 12, "pm_score": -1, "selected": False, "text": "<blockquote><p>No</p></blockquote>"},
            {"answer_id": 13, "pm_score": 2, "selected": False, "text": '<a href="https://x.example">Perhaps</a>'},
        ],
        "metadata": ["https://x.example/7"],
    },
}

HTML = [
    "<b>" * 5000,
    "<div>x" * 200,
    "<ul><li>x" * 150,
    "<blockquote>x" * 3000,
    "<table><tr><td>" * 300,
    "</p>" * 500,
    "<pre>" * 400,
    "<p><font>" * 100,
    f'<a href="{"x" * 50_000}" title=\'"\'>y</a>',
    "<a " + " ".join(f"a{i}=1" for i in range(500)) + ">y</a>",
    '<ol start="²"><li>x</li></ol>',
    f'<ol start="{"9" * 5000}"><li>x</li></ol>',
    '<table><tr><td colspan="²">x</td><th colspan="99999999">y</th></tr></table>',
    f"<h{'9' * 5000}>x",
    "<soup>x</soup>",
    "<fn_cache>x</fn_cache>",
    "<list>x</list><img><hr/><caption>y",
    '<?xml version="1.0" encoding="utf-16"?><p>x</p>',
    '<html><head><meta charset="utf-16"></head><body>x',
    "<![CDATA[x]]><!DOCTYPE <p><!ENTITY a '&a;'>",
    "<!-- unclosed",
    "<script>x</script><style>y</style><plaintext>z",
    "&#0; &#xD800; &#x110000; &#99999999999999999999; &amp;&",
    "<" * 2000,
    "`" * 2000,
    "a" + " " * 2000 + "b",
    "<p\x00x>\x01\x0b</p>",
]
TEXTS = ["", " ", "\x00", "\ud800", "x\udfffy", "\u2028\u2029\x85", "\ufeffx", "\x01\x1b\x7f", "\ufffe\uffff", "x" * 20_000]
TEXTS += ["\n\nHuman:", "\n\nAssistant:", "\r\n\r\nHuman: x", "\\u0000", "\\ud800", "null", "=1+1", "../../x", "é" * 300]
VALUES = [None, True, False, 0, -1, 2**63, 2**64, -(10**400), 10**4000, 0.0, -0.0, 1e38, 1e39, float("nan"), float("inf")]
VALUES += [[], {}, [[]], [None], [{}], {"": {}}, [{"role": "user"}], {"role": "user", "content": "x"}]
TOKENS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "9" * 4301, "0x1", "01", "1_000", "nul", "undef"]
TOKENS += [
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    '"\\\\u0000"',
    '"\\x"',
    '"\t"',
    "'x'",
    "[1,]",
    "{1:2}",
    "",
    ",",
    "/*x*/1",
]
TOKENS += ["[" * 300 + "]" * 300, "[" * 980 + "]" * 980, '{"a":' * 400 + '"\\ud83d\\ude00"' + "}" * 400]
PIECES = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\0", b"\x1b", b"\xef\xbb\xbf", b"\xe2\x80\xa8"]
PIECES += [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\\u", b"\\ud800", b"\\u0000", b"null", b"\r"]


def test_valid_rows_give_pairs() -> None:
    assert [parse(name, [json.dumps(VALID[name]).encode()]).pairs.height for name in NAMES] == [1, 1, 3]


@pytest.mark.parametrize("name", NAMES)
def test_every_fuzzed_line_gives_a_pair_or_a_reject(name: SourceName) -> None:
    parsed = fuzzed(name)
    origins = pl.concat([parsed.pairs["origin"], parsed.rejects["origin"]]).unique()
    assert set(origins) == {f"fuzz:{number}" for number in range(LINES[name])}


@pytest.mark.parametrize("name", NAMES)
def test_candidates_of_fuzzed_lines_add_up(name: SourceName) -> None:
    parsed = fuzzed(name)
    assert parsed.candidates == parsed.pairs.height + parsed.rejects["pairs"].sum()
    assert parsed.rejects["pairs"].min() == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_reject_of_a_fuzzed_line_says_why(name: SourceName) -> None:
    rejects = fuzzed(name).rejects
    assert set(rejects["reason"]) <= set(REASONS)
    assert rejects["detail"].str.strip_chars().str.len_bytes().min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_fuzzed_lines_survive_parquet(name: SourceName, tmp_path: Path) -> None:
    parsed = fuzzed(name)
    for table, frame in ((SOURCE_PAIRS, parsed.pairs), (REJECTS, parsed.rejects)):
        frame.write_parquet(tmp_path / f"{table.name}.parquet")
        assert table.check(pl.read_parquet(tmp_path / f"{table.name}.parquet")).equals(frame)


@pytest.mark.parametrize("name", NAMES)
def test_fuzzed_lines_reach_beyond_the_json_parser(name: SourceName) -> None:
    parsed = fuzzed(name)
    reasons = set(parsed.rejects["reason"])
    assert {"broken_json", "missing_column", "wrong_type", "empty_reply"} <= reasons
    assert parsed.pairs["origin"].n_unique() > LINES[name] // 20


@pytest.mark.parametrize("name", NAMES)
def test_line_of_five_megabytes_is_counted(name: SourceName) -> None:
    row = VALID[name]
    huge = [
        json.dumps({**row, "extra": "x" * 5_000_000}).encode(),
        json.dumps({**row, "extra": [0] * 1_000_000}).encode(),
        json.dumps(row).replace("Yes", "y " * 2_000_000).encode(),
        json.dumps(row).replace("Yes", "y" + " " * 1_000_000 + "y").encode(),
        json.dumps(row).replace("Yes", "&lt;&amp;" * 200_000).encode(),
        json.dumps(row).replace("No", "<" * 1_000_000).encode(),
        json.dumps(row).encode()[:-1] + b" " * 5_000_000,
        b"\xff" * 2_000_000,
        b"\0" * 1_000_000,
    ]
    parsed = parse(name, huge)
    assert parsed.pairs["origin"].n_unique() == 6
    assert parsed.rejects["reason"].to_list() == ["broken_json"] * 3


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"chosen":[', b"[{}, "])
def test_json_nested_too_deeply_is_broken(opening: bytes) -> None:
    assert parse("hh_rlhf", [opening * 100_000]).rejects["detail"].to_list() == ["nested too deeply"]


@pytest.mark.parametrize(
    "html",
    [
        "<b>" * 50_000,
        "<ul><li>" * 20_000,
        '<ol start="²"><li>x</li></ol>',
        f'<ol start="{"9" * 5000}"><li>x</li></ol>',
        '<table><tr><td colspan="²">x</td></tr></table>',
    ],
    ids=["deep tags", "deep lists", "list start", "long list start", "colspan"],
)
def test_html_that_cannot_be_converted_is_malformed(html: str) -> None:
    parsed = parse("stack_exchange", [json.dumps({**VALID["stack_exchange"], "question": html}).encode()])
    assert parsed.rejects["reason"].to_list() == ["wrong_type"]
    assert "HTML" in parsed.rejects["detail"][0]


def parse(name: SourceName, lines: list[bytes]) -> Parsed:
    settings = StackExchangeSettings if name == "stack_exchange" else SourceSettings
    return parse_rows(name, settings(path="."), [RawRow(f"fuzz:{number}", line) for number, line in enumerate(lines)])


@cache
def fuzzed(name: SourceName) -> Parsed:
    rng = random.Random(f"fuzz {name}")
    return parse(name, [_broken(VALID[name], rng) for _ in range(LINES[name])])


def _broken(row: dict[str, Any], rng: random.Random) -> bytes:
    """`row` with a few mutations: of its fields, then perhaps of its JSON text, then perhaps of its bytes."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        rng.choice(_OF_FIELDS)(row, rng)
    escape = rng.random() < 0.5
    text = json.dumps(row, ensure_ascii=escape)
    if rng.random() < 0.3:
        text = rng.choice(_OF_TEXT)(text, rng)
    line = text.encode(errors="surrogatepass")
    return rng.choice(_OF_BYTES)(line, rng) if rng.random() < 0.15 else line


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, at any depth."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [spot for key in keys for spot in ((value, key), *_spots(value[key]))]


def _replace_value(row: dict[str, Any], rng: random.Random) -> None:
    if spots := _spots(row):
        container, key = rng.choice(spots)
        container[key] = copy.deepcopy(rng.choice((rng.choice(VALUES), rng.choice(TEXTS), rng.choice(HTML))))


def _splice_text(row: dict[str, Any], rng: random.Random) -> None:
    if texts := [(container, key) for container, key in _spots(row) if isinstance(container[key], str)]:
        container, key = rng.choice(texts)
        at = rng.randrange(len(container[key]) + 1)
        container[key] = container[key][:at] + rng.choice(TEXTS + HTML) + container[key][at:]


def _drop_field(row: dict[str, Any], rng: random.Random) -> None:
    if spots := _spots(row):
        container, key = rng.choice(spots)
        del container[key]


def _add_field(row: dict[str, Any], rng: random.Random) -> None:
    objects = [row, *(container[key] for container, key in _spots(row) if isinstance(container[key], dict))]
    rng.choice(objects)[rng.choice(TEXTS)] = copy.deepcopy(rng.choice(VALUES + TEXTS))


def _repeat_item(row: dict[str, Any], rng: random.Random) -> None:
    if lists := [container[key] for container, key in _spots(row) if isinstance(container[key], list) and container[key]]:
        items = rng.choice(lists)
        items.extend(copy.deepcopy(rng.choice(items)) for _ in range(rng.choice((1, 2, 20))))


def _replace_token(text: str, rng: random.Random) -> str:
    token = rng.choice(list(re.finditer(r'"[^"]{0,300}"|-?\d+(?:\.\d+)?|true|false|null|[{}\[\],:]', text)) or [None])
    return text[: token.start()] + rng.choice(TOKENS) + text[token.end() :] if token else text


def _reword(text: str, rng: random.Random) -> str:
    """The same change on both sides."""
    return text.replace(
        rng.choice(("Why?", "So.", "Oh?", "Yes", "No", "user", "assistant", "<p>")), rng.choice(("", " ", "No", "?"))
    )


def _repeat_key(text: str, rng: random.Random) -> str:
    keys = re.findall(r'"(?:chosen|rejected|score_chosen|qid|question|answers)"', text)
    return text[:-1] + f", {rng.choice(keys or ['x'])}: {rng.choice(TOKENS)}}}"


def _splice_bytes(line: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(line) + 1)
        line = line[:start] + rng.choice(PIECES) + line[start + rng.randrange(4) :]
    return line


_OF_FIELDS: list[Callable[[dict[str, Any], random.Random], None]] = [
    _replace_value,
    _splice_text,
    _drop_field,
    _add_field,
    _repeat_item,
]
_OF_TEXT: list[Callable[[str, random.Random], str]] = [_replace_token, _replace_token, _reword, _repeat_key]
_OF_BYTES: list[Callable[[bytes, random.Random], bytes]] = [
    _splice_bytes,
    _splice_bytes,
    lambda line, rng: line[: rng.randrange(len(line) + 1)],
    lambda line, rng: line[rng.randrange(len(line) + 1) :],
    lambda line, rng: b"\xef\xbb\xbf" + line,
    lambda line, rng: line + line,
    lambda line, rng: line.decode(errors="replace").encode("utf-16"),
    lambda line, rng: rng.randbytes(rng.randrange(200)),
    lambda line, rng: rng.choice((b"", b" ", b"\r", b"null", b"1", b'"x"', b"[]", b"{}", b"[" * 100_000)),
]

assert set(NAMES) < set(get_args(SourceName))

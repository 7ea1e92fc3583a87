"""What a parser gives, written by hand from the raw rows: three real rows, and small tricky ones."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from densityrm_core.settings import SourceSettings, StackExchangeSettings
from densityrm_core.sources import SourceName, parse_rows
from densityrm_core.sources.files import RawRow
from densityrm_core.sources.stack_exchange import text_from_html

Text = tuple[int, str]  # characters and SHA-256: other people's prose is identified, not copied


def pair_of(name: SourceName, content: bytes) -> dict[str, Any]:
    """The one pair that a raw row gives."""
    settings = StackExchangeSettings if name == "stack_exchange" else SourceSettings
    parsed = parse_rows(name, settings(path="."), [RawRow("golden:1", content)])
    assert (parsed.pairs.height, parsed.rejects.height) == (1, 0), parsed.rejects
    return parsed.pairs.row(0, named=True)


def turns(pair: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in pair["context"]]


def line(file: Path, number: int) -> bytes:
    return gzip.decompress(file.read_bytes()).split(b"\n")[number - 1]


def hh(transcript: str) -> list[tuple[str, str]]:
    """The turns of an HH-RLHF transcript, its last reply included."""
    row = {"chosen": transcript, "rejected": transcript + " or not"}
    pair = pair_of("hh_rlhf", json.dumps(row).encode())
    return [*turns(pair), ("assistant", pair["chosen"])]


def text(expected: str) -> Text:
    return len(expected), hashlib.sha256(expected.encode()).hexdigest()


def test_real_hh_row_of_four_human_turns(real_data: Path) -> None:
    pair = pair_of("hh_rlhf", line(real_data / "hh-rlhf" / "helpful-base" / "test.jsonl.gz", 539))
    assert turns(pair) == [
        ("user", "When was Domino's Pizza founded?"),
        ("assistant", "In 1960, by two brothers."),
        ("user", "Do you know the two brothers names?"),
        ("assistant", "Their names were Thomas and James Monaghan."),
        ("user", "Where is it headquartered?"),
        ("assistant", "In Ann Arbor, Michigan."),
        ("user", "How many exist in the U.S. ?"),
    ]
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
        "When was Domino's Pizza founded?",
        "Over 7,000.",
        "25,000 stores.",
    )


def test_real_ultrafeedback_row(real_data: Path) -> None:
    pair = pair_of("ultrafeedback", line(real_data / "ultrafeedback" / "train_prefs.jsonl.gz", 293))
    assert turns(pair) == [
        ("user", 'Rearrange the following words into a meaningful sentence:\n"travel, forests, are, enchanted, The"')
    ]
    assert (pair["chosen"], pair["rejected"]) == (
        "The enchanted forests are travel destinations.",
        "The enchanted forests are travel.",
    )
    assert (pair["score_chosen"], pair["score_rejected"]) == (7.0, 3.0)


# https://quantumcomputing.stackexchange.com/questions/4033 (CC BY-SA 4.0), answers 4040 (Norbert Schuch) and 4039 (user1271772)
@pytest.fixture
def stack_exchange_pair(real_data: Path) -> dict[str, Any]:
    return pair_of("stack_exchange", line(real_data / "stack-exchange" / "quantumcomputing" / "preferences.jsonl.gz", 297))


def test_real_stack_exchange_question_is_the_whole_context(stack_exchange_pair: dict[str, Any]) -> None:
    ((role, question),) = turns(stack_exchange_pair)
    assert (role, text(question)) == ("user", (459, "c20810fc4fa7da4c1a34a73f4892e878191cc88c94a721c6a36ba1d820a2f2c4"))


def test_real_stack_exchange_answer_with_the_higher_score_is_chosen(stack_exchange_pair: dict[str, Any]) -> None:
    assert (stack_exchange_pair["score_chosen"], stack_exchange_pair["score_rejected"]) == (1, -1)
    assert [text(stack_exchange_pair[side]) for side in ("chosen", "rejected")] == [
        (988, "b20a89e887726ac02ce6c2fb5958a7c3b8d020fc1299231595f3d63f2ecac009"),
        (706, "a2a48e95c28637a0188560b3186777893aae76f21206de80d48f3e8801eb43b9"),
    ]


def test_real_code_is_fenced_verbatim_and_its_entities_decoded(stack_exchange_pair: dict[str, Any]) -> None:
    assert (
        "> **Doubling the memory gives you one additional qubit.**\n\nSo if Microsoft says that\n\n"
        "```\n16GB -> 30 qubits\n```\n\nthen\n\n"
        "```\n 8GB -> 29 qubits\n 4GB -> 28 qubits\n 2GB -> 27 qubits\n ...\n32GB -> 31 qubits\n64GB -> 32 qubits\n```\n\n"
    ) in stack_exchange_pair["chosen"]


def test_real_latex_keeps_its_backslashes_and_underscores(stack_exchange_pair: dict[str, Any]) -> None:
    assert (
        "2. to describe $N$ qubits, $2^N$ numbers are needed,\n3. and 1GB=$1024^3$ bytes\n\n"
        "which together yields $16\\cdot 2^N = x \\, \\mathrm{GB} = x\\cdot 1024^3$"
    ) in stack_exchange_pair["chosen"]
    assert "\n\n$$\nN_{\\rm{qubits}} = \\log_2\\left( \\frac{\\rm{RAM}}{32} \\right)\n$$\n\n" in stack_exchange_pair["rejected"]


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        pytest.param(
            '<pre><code>if (a &lt; b &amp;&amp; c &gt; d) s = "&amp;lt;";\n</code></pre>',
            '```\nif (a < b && c > d) s = "&lt;";\n```',
            id="entities in a code block",
        ),
        pytest.param("<p><code>&amp;amp; &lt;T&gt;</code></p>", "`&amp; <T>`", id="entities in inline code"),
        pytest.param("<p><code>a`b</code></p>", "`` a`b ``", id="backtick in inline code"),
        pytest.param(
            "<pre><code>\n\n    x\n\n\n\ny  \n</code></pre>",
            "```\n\n\n    x\n\n\n\ny  \n```",
            id="blank lines and spaces of code",
        ),
        pytest.param("<pre><code>a" + " " * 99 + "b</code></pre>", "```\na" + " " * 99 + "b\n```", id="long gap in code"),
        pytest.param("<p>a" + " " * 99 + "b</p>", "a b", id="long gap in prose"),
        pytest.param(
            r"<p>$\{a\_1 \\ b^*\}$, $x&lt;y$ and $a_1*b_2*c$</p>", r"$\{a\_1 \\ b^*\}$, $x<y$ and $a_1*b_2*c$", id="LaTeX"
        ),
        pytest.param(
            "<p>$$\\begin{pmatrix}1 &amp; 0 \\\\\n0 &amp; 1\\end{pmatrix}$$</p>",
            "$$\\begin{pmatrix}1 & 0 \\\\\n0 & 1\\end{pmatrix}$$",
            id="LaTeX matrix",
        ),
        pytest.param("<p>$a < b$ and $1<2$</p>", "$a < b$ and $1<2$", id="bare less-than"),
        pytest.param("<p>&#8714; &eacute; &#x1F600; &bogus; &lt;b&gt;</p>", "∊ é 😀 &bogus; <b>", id="entities in prose"),
        pytest.param(
            "<ul>\n<li>a\n\n<ul>\n<li>b</li>\n<li>c</li>\n</ul></li>\n<li>d</li>\n</ul>",
            "- a\n  - b\n  - c\n- d",
            id="nested list",
        ),
        pytest.param(
            '<ol start="3">\n<li><p>a:</p>\n\n<pre><code>x\n  y\n</code></pre></li>\n<li><p>b</p></li>\n</ol>',
            "3. a:\n\n   ```\n   x\n     y\n   ```\n4. b",
            id="code in a numbered list",
        ),
        pytest.param(
            "<blockquote>\n  <p>a</p>\n\n<pre><code>x\n\ny\n</code></pre>\n</blockquote>",
            "> a\n>\n> ```\n> x\n>\n> y\n> ```",
            id="code in a quote",
        ),
        pytest.param("<p>a<br>b<br/>\nc</p>", "a  \nb  \nc", id="line break"),
        pytest.param("<p>x<sup>2</sup>, H<sub>2</sub>O</p>", "x^2^, H~2~O", id="superscript and subscript"),
        pytest.param("<pre>x<sup>2</sup>\n</pre>", "```\nx2\n```", id="superscript in code"),
        pytest.param(
            '<p><img src="https://i.example/x.png" alt="A circuit"></p>', "![A circuit](https://i.example/x.png)", id="image"
        ),
        pytest.param(
            '<p><a href="https://a.example/"><img src="https://i.example/x.png" alt="A"></a></p>',
            "[![A](https://i.example/x.png)](https://a.example/)",
            id="image in a link",
        ),
        pytest.param(
            '<p><a href="https://w.example/Qubit_(physics)">a qubit</a></p>',
            "[a qubit](https://w.example/Qubit_(physics))",
            id="link with parentheses",
        ),
        pytest.param('<p><a href="https://x.example">https://x.example</a></p>', "<https://x.example>", id="bare link"),
        pytest.param("<!-- language: lang-py --><p>a</p>", "a", id="comment"),
        pytest.param('<?xml version="1.0" encoding="utf-8"?><p>a</p>', "a", id="XML declaration"),
        pytest.param("<p>a <soup>b</soup> <fn_cache>c</fn_cache></p>", "a b c", id="unknown elements"),
        pytest.param(
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
            "| a | b |\n| --- | --- |\n| 1 | 2 |",
            id="table",
        ),
        pytest.param("<h2>T</h2><p>a <em>b</em></p><hr>", "## T\n\na *b*\n\n---", id="heading and rule"),
        pytest.param("https://x.example/a", "https://x.example/a", id="no HTML at all"),
    ],
)
def test_html_becomes_markdown(html: str, markdown: str) -> None:
    assert text_from_html(html) == markdown


def test_transcript_markers_need_a_blank_line_before_them() -> None:
    assert hh("\n\nHuman: Act it:\nHuman: hi\nAssistant: ho\n\nAssistant: No Human: no") == [
        ("user", "Act it:\nHuman: hi\nAssistant: ho"),
        ("assistant", "No Human: no"),
    ]


def test_transcript_with_windows_newlines_has_the_same_turns() -> None:
    assert hh("\r\n\r\nHuman: a\r\nb\r\n\r\nAssistant: c\r\n\r\nHuman: d\r\n\r\nAssistant: e") == [
        ("user", "a\r\nb"),
        ("assistant", "c"),
        ("user", "d"),
        ("assistant", "e"),
    ]


def test_blank_lines_inside_a_turn_stay() -> None:
    assert hh("\n\nHuman: a\n\nb\n\n\n\nAssistant: c\n\nd") == [("user", "a\n\nb"), ("assistant", "c\n\nd")]

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from densityrm_core.sources import SourceError, SourceName
from densityrm_core.sources.stack_exchange import text_from_html
from densityrm_core.tables import REJECTS, SOURCE_PAIRS

from ..small_sources import Read, read

HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
CODE_AND_LATEX = (
    '<p>Let $a_1 * b_2 \\times \\{x\\}$ &amp; <code>x_1 &lt; 2</code>:</p>\n\n<pre class="lang-py"><code>def f(x):\n'
    "    return x_1 * 2  # a &lt; b\n</code></pre>\n\n<p>$$\n\\alpha_{i} \\\\ \\beta^*\n$$ is <strong>it</strong>.</p>\n"
)


@cache
def read_real(name: SourceName, folder: Path) -> Read:
    return read(name, folder)


def rejected(source: Read) -> dict[str, int]:
    """Candidate pairs behind each reason."""
    return dict(source.rejects.group_by("reason").agg(pl.col("pairs").sum()).iter_rows())


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def question(*scores: int, **changes: object) -> dict[str, object]:
    answers = [{"answer_id": 10 + i, "pm_score": score, "text": f"<p>answer {i}</p>"} for i, score in enumerate(scores)]
    return {"qid": 1, "question": "<p>why?</p>", "answers": answers, **changes}


@pytest.mark.parametrize(
    ("name", "folder", "rows", "pairs", "reasons"),
    [
        (
            "hh_rlhf",
            "hh-rlhf",
            5803,
            5772,
            {"contexts_differ": 14, "bad_turn_order": 2, "empty_reply": 11, "identical_replies": 4},
        ),
        ("ultrafeedback", "ultrafeedback", 1000, 884, {"tied_scores": 111, "identical_replies": 3, "empty_reply": 2}),
        ("stack_exchange", "stack-exchange", 997, 2441, {"equal_scores": 1071, "over_question_cap": 878}),
    ],
)
def test_every_candidate_of_the_real_files_is_a_pair_or_a_reject(
    real_data: Path, name: SourceName, folder: str, rows: int, pairs: int, reasons: dict[str, int]
) -> None:
    source = read_real(name, real_data / folder)
    assert (source.rows_read, source.pairs.height, rejected(source)) == (rows, pairs, reasons)
    assert source.candidates == pairs + sum(reasons.values())


def test_stack_exchange_candidates_are_all_answer_pairs(real_data: Path) -> None:
    files = (real_data / "stack-exchange").rglob("*.gz")
    answers = [len(json.loads(line)["answers"]) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert read_real("stack_exchange", real_data / "stack-exchange").candidates == sum(n * (n - 1) // 2 for n in answers)


def test_real_contexts_start_and_end_with_the_user(real_data: Path) -> None:
    roles = read_real("hh_rlhf", real_data / "hh-rlhf").pairs["context"].list.eval(pl.element().struct.field("role"))
    assert set(roles.list.first()) == set(roles.list.last()) == {"user"}


def test_real_prompts_have_no_html_left(real_data: Path) -> None:
    pairs = read_real("stack_exchange", real_data / "stack-exchange").pairs
    assert not pairs["prompt"].str.contains(r"</?(?:p|pre|em|strong|blockquote)>").any()


def test_real_latex_survives_unescaped(real_data: Path) -> None:
    pairs = read("stack_exchange", real_data / "stack-exchange" / "quantumcomputing").pairs
    assert pairs["chosen"].str.contains("\\left| \\psi \\right> = \\alpha \\left| 0 \\right>", literal=True).any()
    assert not pairs["chosen"].str.contains(r"\_", literal=True).any()


def test_pairs_of_one_question_are_widest_gap_first(real_data: Path) -> None:
    pairs = read_real("stack_exchange", real_data / "stack-exchange").pairs
    gaps = pairs.select("origin", gap=pl.col("score_chosen") - pl.col("score_rejected"))
    assert gaps["gap"].min() > 0
    assert all(frame["gap"].is_sorted(descending=True) for frame in gaps.partition_by("origin"))


def test_multi_turn_transcripts_share_a_context_and_differ_in_the_last_reply(tmp_path: Path) -> None:
    shared = "\n\nHuman: A joke about a\nHuman: please \n\nAssistant: Why?\n\nHuman: Because\n\nAssistant:"
    row = {"chosen": shared + " Ha ", "rejected": shared + " Ho"}
    pair = read("hh_rlhf", write(tmp_path / "a.jsonl", row)).pairs.row(0, named=True)
    assert pair == {
        "pair_id": "8accdd1b-804d-5c80-a790-0259dd4e177a",
        "prompt_id": "33ff8242aeccbc4c",
        "prompt": "A joke about a\nHuman: please",
        "context": [
            {"role": "user", "content": "A joke about a\nHuman: please"},
            {"role": "assistant", "content": "Why?"},
            {"role": "user", "content": "Because"},
        ],
        "chosen": "Ha",
        "rejected": "Ho",
        "score_chosen": None,
        "score_rejected": None,
        "src": "hh",
        "origin": "a.jsonl:1",
        "comparison": 13992034255805224728,
    }


def test_ultrafeedback_row_keeps_its_scores(tmp_path: Path) -> None:
    turns = {s: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": s}] for s in ("chosen", "rejected")}
    row = {"prompt": "Hi", **turns, "score_chosen": 8.5, "score_rejected": 3}
    pair = read("ultrafeedback", write(tmp_path / "a.jsonl", row)).pairs.row(0, named=True)
    assert [pair[key] for key in ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "src")] == [
        "Hi",
        "chosen",
        "rejected",
        8.5,
        3.0,
        "ultrafeedback",
    ]


def test_code_and_latex_become_text_verbatim(tmp_path: Path) -> None:
    source = read("stack_exchange", write(tmp_path / "a.jsonl", question(2, -1, question=CODE_AND_LATEX)))
    assert source.pairs["prompt"][0] == (
        "Let $a_1 * b_2 \\times \\{x\\}$ & `x_1 < 2`:\n\n```\ndef f(x):\n    return x_1 * 2  # a < b\n```\n\n"
        "$$\n\\alpha_{i} \\\\ \\beta^*\n$$ is **it**."
    )


def test_fence_is_longer_than_any_in_the_code() -> None:
    assert text_from_html("<pre><code>```\nx\n```\n</code></pre>") == "````\n```\nx\n```\n````"


def test_widest_gaps_are_kept_and_the_rest_is_counted(tmp_path: Path) -> None:
    source = read("stack_exchange", write(tmp_path / "a.jsonl", question(5, -1, 2, 2)), max_pairs_per_question=2)
    assert source.pairs.select("score_chosen", "score_rejected").rows() == [(5, -1), (5, 2)]
    assert rejected(source) == {"equal_scores": 1, "over_question_cap": 3}


def test_question_with_one_answer_is_one_candidate(tmp_path: Path) -> None:
    source = read("stack_exchange", write(tmp_path / "a.jsonl", question(5)))
    assert (rejected(source), source.candidates) == ({"too_few_answers": 1}, 1)


def test_reject_of_some_answer_pairs_names_the_answers_only(tmp_path: Path) -> None:
    source = read("stack_exchange", write(tmp_path / "a.jsonl", question(2, 2, 1)))
    assert json.loads(source.rejects["raw"][0]) == {"qid": 1, "answer_ids": [[10, 11]]}


def test_empty_and_identical_answers_are_counted(tmp_path: Path) -> None:
    row = question(4, 3, 2)
    for answer, text in zip(row["answers"], ("<p> </p>", "<p>same</p>", "<b></b>same"), strict=True):  # type: ignore[arg-type]
        answer["text"] = text
    assert rejected(read("stack_exchange", write(tmp_path / "a.jsonl", row))) == {"empty_reply": 2, "identical_replies": 1}


@pytest.mark.parametrize(
    ("line", "defect"),
    [
        (b'{"chosen": ', "broken JSON: Expecting value"),
        (b"\xff\xfe{}", "broken JSON: invalid UTF-8 at byte 0"),
        (b'{"chosen": "\x00"}', "broken JSON: Invalid control character"),
        (b'{"chosen": "\\u0000", "rejected": ""}', "broken JSON: a text holds a NUL character"),
        (b'{"chosen": "\\ud800", "rejected": ""}', "broken JSON: a \\u escape is half of a surrogate pair"),
        (b"[" * 100_000, "broken JSON: nested too deeply"),
        (b'{"chosen": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit"),
        (b"[1]", "the row must be an object, not a list"),
        (b'{"rejected": "x"}', "column 'chosen' is missing"),
        (b'{"chosen": null, "rejected": "x"}', "'chosen' must be a text, not null"),
    ],
)
def test_malformed_row_is_named_with_file_row_and_defect(tmp_path: Path, line: bytes, defect: str) -> None:
    write(tmp_path / "b.jsonl", HH, line, line)
    with pytest.raises(SourceError) as error:
        read("hh_rlhf", tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/b.jsonl:2: {defect}")
    assert "2 malformed rows, 0 allowed" in str(error.value)
    assert "sources.hh_rlhf.max_malformed" in str(error.value)


@pytest.mark.parametrize("score", ['"8"', "true", "NaN", "1e39", "1" + "0" * 400])
def test_score_must_be_a_finite_number(tmp_path: Path, score: str) -> None:
    turns = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}])
    line = f'{{"chosen": {turns}, "rejected": {turns}, "score_chosen": {score}, "score_rejected": 1}}'
    with pytest.raises(SourceError, match=r"a\.jsonl:1: 'score_chosen' must be a (finite )?number"):
        read("ultrafeedback", write(tmp_path / "a.jsonl", line.encode()))


def test_tolerated_malformed_rows_become_rejects(tmp_path: Path) -> None:
    source = read("hh_rlhf", write(tmp_path / "a.jsonl", HH, b"{broken", b"{}"), max_malformed=2)
    assert source.rejects.select("origin", "reason", "raw").rows() == [
        ("a.jsonl:2", "broken_json", "{broken"),
        ("a.jsonl:3", "missing_column", "{}"),
    ]
    assert (source.rows_read, source.candidates, source.pairs.height) == (3, 3, 1)


@pytest.mark.parametrize("path", ["missing", "missing/*.jsonl", "."])
def test_path_without_files_is_named_with_its_key(tmp_path: Path, path: str) -> None:
    with pytest.raises(SourceError, match=r"sources\.hh_rlhf\.path: .*" + str(tmp_path)):
        read("hh_rlhf", tmp_path / path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_file_that_is_not_what_its_suffix_says_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"garbage" * 100)
    with pytest.raises(SourceError, match=name):
        read("hh_rlhf", tmp_path / name)


def test_truncated_gzip_is_named_with_the_last_good_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", *[HH] * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"a\.jsonl\.gz: not a readable \.gz file .* after row \d+"):
        read("hh_rlhf", path)


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/b.jsonl.gz", "c.jsonl", "a.jsonl"):
        write(tmp_path / name, HH)
    (tmp_path / "README.md").write_text("not rows")
    assert read("hh_rlhf", tmp_path).pairs["origin"].to_list() == ["a.jsonl:1", "c.jsonl:1", "sub/b.jsonl.gz:1"]


def test_glob_picks_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, HH)
    assert read("hh_rlhf", tmp_path / "b*.jsonl").pairs["origin"].to_list() == ["b.jsonl:1"]


def test_parquet_rows_equal_json_rows(tmp_path: Path) -> None:
    row = question(3, 1)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    json_pairs = read("stack_exchange", write(tmp_path / "a.jsonl", row)).pairs
    assert read("stack_exchange", tmp_path / "a.parquet").pairs.drop("origin").equals(json_pairs.drop("origin"))


def test_zstandard_is_read(tmp_path: Path) -> None:
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(json.dumps(HH).encode())
    assert read("hh_rlhf", tmp_path).pairs.height == 1


def test_blank_lines_and_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    source = read("hh_rlhf", write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(HH).encode() + b"\r", b"", b" "))
    assert (source.rows_read, source.pairs.height) == (1, 1)


def test_line_separators_inside_a_text_do_not_end_the_row(tmp_path: Path) -> None:
    row = {"chosen": HH["chosen"] + "\u2028a\x85b", "rejected": HH["rejected"]}
    path = write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False).encode())
    assert read("hh_rlhf", path).pairs["chosen"][0] == "Hello!\u2028a\x85b"


def test_max_rows_stops_early(tmp_path: Path) -> None:
    assert read("hh_rlhf", write(tmp_path / "a.jsonl", HH, HH, b"{broken"), max_rows=2).rows_read == 2


def test_disabled_source_is_empty() -> None:
    source = read("hh_rlhf", "missing", enabled=False)
    assert (source.rows_read, source.candidates) == (0, 0)
    assert SOURCE_PAIRS.check(source.pairs).is_empty() and REJECTS.check(source.rejects).is_empty()


def test_a_source_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"sources\.hh_rlhf\.path: .*a\.jsonl holds no rows"):
        read("hh_rlhf", write(tmp_path / "a.jsonl"))


def test_an_empty_file_beside_others_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", HH)
    assert read("hh_rlhf", tmp_path).rows_read == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_without_a_single_object_is_one_error_whatever_is_allowed(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=rf"{name}:1: .* no other of the 3 rows .* not what its suffix says"):
        read("hh_rlhf", write(tmp_path / name, b"\x93\xfa", b"garbage", b"\x00"), max_malformed=1000)


def test_same_content_has_the_same_pair_id_wherever_it_is_read(tmp_path: Path) -> None:
    pairs = read("hh_rlhf", write(tmp_path / "a.jsonl", HH, {**HH, "rejected": "\n\nHuman: Hi\n\nAssistant: No."}, HH)).pairs
    ids = pairs["pair_id"].to_list()
    assert ids[0] == ids[2] != ids[1]

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from densityrm_core.pairs.inspection import InspectionError, describe_tables, inspect_table, render, select
from densityrm_core.storage import GROUP_ROWS, write_frame
from densityrm_core.tables import PREFERENCE_PAIRS, PROMPTS, REJECTS

PAIR: dict[str, object] = {
    "pair_id": "2db80f23-f3da-51d2-9d5a-4bbe7bd40832",
    "prompt_id": "87936026668a2e79",
    "prompt": "Why is the sky blue?",
    "context": [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Which sky?"},
        {"role": "user", "content": "Ours:\n    indented, as code is"},
    ],
    "chosen": "Air scatters short waves more than long ones, and we see what is scattered.",
    "rejected": "It is not.",
    "score_chosen": 3.5,
    "score_rejected": None,
    "src": "hh",
    "origin": "a.jsonl:7",
    "prompt_index": 0,
    "cluster": "87936026668a2e79",
    "split": "train",
}


def reject(number: int, reason: str, raw: str = "{}") -> dict[str, object]:
    return {"src": "hh", "origin": f"a.jsonl:{number}", "reason": reason, "detail": f"row {number}", "pairs": 1, "raw": raw}


def prompt(number: int) -> dict[str, object]:
    split = "test" if number % 2 else "train"
    ids = {"prompt_id": f"{number:016x}", "cluster": f"{number:016x}"}
    return {**ids, "prompt": f"prompt {number}", "split": split, "pairs": 1, "sources": ["hh", "stack_exchange"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_frame(PREFERENCE_PAIRS.frame([PAIR]), tmp_path / "preference_pairs.parquet", PREFERENCE_PAIRS)
    rejects = [reject(1, "empty_reply"), reject(2, "broken_json", "x" * 5000), reject(3, "empty_reply")]
    write_frame(REJECTS.frame(rejects), tmp_path / "hh_rlhf_rejects.parquet", REJECTS)
    write_frame(REJECTS.empty(), tmp_path / "preference_rejects.parquet", REJECTS)
    write_frame(PROMPTS.frame([prompt(i) for i in range(100)]), tmp_path / "prompts.parquet", PROMPTS)
    write_frame(PROMPTS.frame([prompt(0)]), tmp_path / "replicates" / "0.parquet", PROMPTS)
    (tmp_path / ".prompts.parquet.0123.tmp").write_bytes(b"half a table")
    return tmp_path


def test_pair_reads_as_a_conversation(folder: Path) -> None:
    assert inspect_table(folder, "preference_pairs", {"src": "hh"}, width=50).splitlines() == [
        "pair 2db80f23-f3da-51d2-9d5a-4bbe7bd40832 --------",
        "user:",
        "  Why is the sky blue?",
        "assistant:",
        "  Which sky?",
        "user:",
        "  Ours:",
        "      indented, as code is",
        "CHOSEN (score 3.5):",
        "  Air scatters short waves more than long ones,",
        "  and we see what is scattered.",
        "REJECTED:",
        "  It is not.",
        "",
        "prompt_id     87936026668a2e79",
        "src           hh",
        "origin        a.jsonl:7",
        "prompt_index  0",
        "cluster       87936026668a2e79",
        "split         train",
    ]


def test_reject_tells_its_reason_in_words(folder: Path) -> None:
    assert inspect_table(folder, "hh_rlhf_rejects", {"reason": "empty_reply"}, rows=1, width=40).splitlines() == [
        "empty_reply at a.jsonl:1 ---------------",
        "meaning  a reply has no text",
        "detail   row 1",
        "src      hh",
        "pairs    1",
        "raw:",
        "  {}",
    ]


def test_long_raw_row_is_cut_among_others_and_whole_alone(folder: Path) -> None:
    among = inspect_table(folder, "hh_rlhf_rejects")
    assert among.count("x" * 98) == 6 and "... 4,400 characters more" in among
    alone = inspect_table(folder, "hh_rlhf_rejects", {"reason": "broken_json"})
    assert len(re.findall("x", alone)) == 5000


def test_other_tables_are_keys_and_values(folder: Path) -> None:
    assert inspect_table(folder, "prompts", {"prompt_id": f"{7:016x}"}, width=40).splitlines() == [
        "prompt_id 0000000000000007 -------------",
        "prompt_id  0000000000000007",
        "prompt     prompt 7",
        "cluster    0000000000000007",
        "split      test",
        "pairs      1",
        "sources    [hh, stack_exchange]",
    ]


def test_without_filters_the_table_is_summed_up_in_the_last_line(folder: Path) -> None:
    text = inspect_table(folder, "prompts", rows=2)
    assert text.count("prompt_id 0") == 2
    assert text.endswith("\n\nprompts: 100 rows; columns: prompt_id, prompt, cluster, split, pairs, sources")


def test_empty_table_is_no_error(folder: Path) -> None:
    assert inspect_table(folder, "preference_rejects").startswith("preference_rejects: 0 rows; columns: src, ")


def test_filters_must_all_hold(folder: Path) -> None:
    frame = select(folder / "prompts.parquet", {"split": "test", "pairs": "1"}, 3)
    assert frame["prompt"].to_list() == ["prompt 1", "prompt 3", "prompt 5"]


def test_seed_draws_the_same_random_matches(folder: Path) -> None:
    draw = [select(folder / "prompts.parquet", {"split": "test"}, 5, seed)["prompt"].to_list() for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    assert len(set(draw[0])) == 5 and draw[0] != [f"prompt {i}" for i in (1, 3, 5, 7, 9)]
    assert all(int(text.split()[1]) % 2 for text in draw[0])


def test_seed_reaches_rows_of_every_group(tmp_path: Path) -> None:
    rows = PROMPTS.frame([prompt(i) for i in range(GROUP_ROWS + 3)])
    write_frame(rows, tmp_path / "prompts.parquet", PROMPTS)
    assert select(tmp_path / "prompts.parquet", {"prompt_id": f"{GROUP_ROWS + 1:016x}"}, 5, seed=0).equals(rows[GROUP_ROWS + 1])
    everything = select(tmp_path / "prompts.parquet", {"split": "test"}, 10, seed=0)
    assert everything.equals(rows.filter(pl.col("prompt_id").is_in(everything["prompt_id"].to_list())))


def test_seed_of_no_match_gives_no_row(folder: Path) -> None:
    assert select(folder / "prompts.parquet", {"split": "judge"}, 5, seed=0).is_empty()


def test_unknown_table_is_answered_with_those_that_exist(folder: Path) -> None:
    with pytest.raises(InspectionError, match=r"no table 'promts' .* did you mean 'prompts'\? it holds: hh_rlhf_rejects, pref"):
        inspect_table(folder, "promts")


def test_partition_is_asked_for_by_its_name(folder: Path) -> None:
    with pytest.raises(InspectionError, match="did you mean 'replicates/0'"):
        inspect_table(folder, "replicates")
    assert "prompt 0" in inspect_table(folder, "replicates/0")


def test_path_outside_the_folder_is_no_table(folder: Path) -> None:
    with pytest.raises(InspectionError, match="there is no table"):
        inspect_table(folder / "replicates", "../prompts")


def test_missing_column_is_answered_with_those_that_exist(folder: Path) -> None:
    with pytest.raises(InspectionError, match="prompts has no column 'reason' to select by; it has: prompt_id, prompt, "):
        inspect_table(folder, "prompts", {"reason": "empty_reply"})


def test_unknown_reason_is_answered_with_the_reasons_and_their_counts(folder: Path) -> None:
    with pytest.raises(InspectionError) as error:
        inspect_table(folder, "hh_rlhf_rejects", {"reason": "tied"})
    assert str(error.value) == (
        "no row of hh_rlhf_rejects has reason = 'tied'; the table has 3 rows\nvalues of reason: empty_reply (2), broken_json (1)"
    )


def test_unknown_id_is_answered_with_the_number_of_rows(folder: Path) -> None:
    with pytest.raises(InspectionError, match=r"no row of prompts has prompt_id = 'x'; the table has 100 rows$"):
        inspect_table(folder, "prompts", {"prompt_id": "x"})


def test_file_that_is_no_table_is_named(folder: Path) -> None:
    (folder / "broken.parquet").write_bytes(b"garbage" * 10)
    with pytest.raises(InspectionError, match=r"broken\.parquet: is no readable table"):
        inspect_table(folder, "broken")


def test_list_of_tables_has_rows_and_sizes(folder: Path) -> None:
    lines = describe_tables(folder).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["table", "rows"],
        ["hh_rlhf_rejects", "3"],
        ["preference_pairs", "1"],
        ["preference_rejects", "0"],
        ["prompts", "100"],
        ["replicates/0", "1"],
    ]
    assert all(re.search(r"\d (B|KiB)$", line) for line in lines[1:]) and len(set(map(len, lines))) == 1


def test_folder_without_tables_says_what_to_run(tmp_path: Path) -> None:
    for look in (lambda: describe_tables(tmp_path / "none"), lambda: inspect_table(tmp_path, "prompts")):
        with pytest.raises(InspectionError, match="holds no tables yet; run `densityrm demo`"):
            look()


def test_text_of_a_row_cannot_steer_the_terminal() -> None:
    frame = PREFERENCE_PAIRS.frame([{**PAIR, "chosen": "\x1b[2J\x07\u202egone\r!", "origin": "\x1b]0;title"}])
    text = render(frame, 80)
    assert r"\x1b[2J\x07\u202egone\r!" in text and r"\x1b]0;title" in text
    assert "\x1b" not in text


def test_colours_change_no_text() -> None:
    frame = PREFERENCE_PAIRS.frame([PAIR])
    coloured = render(frame, 60, colour=True)
    assert "\x1b[32mCHOSEN" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == render(frame, 60)


@pytest.mark.parametrize("text", ["日本語の文章はとても長い" * 10, "x" * 300, "😀" * 100, " " * 200 + "end", "e\u0301" * 100])
def test_no_line_is_wider_than_the_terminal(text: str) -> None:
    lines = render(PREFERENCE_PAIRS.frame([{**PAIR, "chosen": text, "src": text}]), 40).splitlines()
    wide = {"日", "本", "語", "の", "文", "章", "は", "と", "て", "も", "長", "い", "😀"}
    assert max(sum(2 if c in wide else c != "\u0301" for c in line) for line in lines[1:]) <= 40  # the first holds the id
    assert "".join(re.findall(r"\S", text)) in "".join(re.findall(r"\S", "".join(lines)))


@pytest.fixture
def cli(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    from densityrm_dagster.commands.tables import inspect

    home = tmp_path_factory.mktemp("home")
    (home / "planted").mkdir()
    (home / "planted" / "tables").symlink_to(folder)
    monkeypatch.setenv("DENSITYRM_HOME", str(home))
    monkeypatch.delenv("DENSITYRM_EXPERIMENT", raising=False)
    app = typer.Typer()
    app.command()(inspect)
    return app


def test_command_without_a_table_lists_them(cli: typer.Typer) -> None:
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 0 and result.stdout.startswith("table ")


def test_command_selects_by_option_without_colours_in_a_pipe(cli: typer.Typer) -> None:
    result = CliRunner().invoke(cli, ["hh_rlhf_rejects", "--reason", "empty_reply", "-n", "1"])
    assert result.exit_code == 0 and result.stdout.startswith("empty_reply at a.jsonl:1 -") and "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promts"], "error: there is no table 'promts'"),
        (["prompts", "--src", "hh"], "error: prompts has no column 'src'"),
        (["--split", "test"], "error: --split selects rows of a table: name the table first"),
    ],
)
def test_command_that_cannot_be_done_is_a_message_and_exit_code_1(cli: typer.Typer, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert (result.exit_code, result.stdout) == (1, "") and result.stderr.startswith(message)


def test_wrong_experiment_file_is_exit_code_2(cli: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSITYRM_EXPERIMENT", "missing.yaml")
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 2 and result.stderr.startswith("error: missing.yaml: cannot be read")

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from densityrm_core.experiment import Experiment
from densityrm_core.pairs.nanochat_folder import ExportSummary, NanochatError, check_nanochat, export_nanochat
from densityrm_core.settings import SourceSettings, StackExchangeSettings
from densityrm_core.sources.files import raw_files
from densityrm_core.sources.nanochat_pairs import pairs_file, parse, source_of
from densityrm_core.sources.parsing import SourceName, pair_row, parse_rows
from densityrm_core.sources.rows import MalformedError, Pair, Reject, Turn, pair_id, prompt_id
from densityrm_core.storage import write_frame
from densityrm_core.tables import DENSITY_WEIGHTS, PREFERENCE_PAIRS, PROMPT_EMBEDDINGS, PROMPTS

NASTY = 'a "quoted" \\ line\nnext\r\nline\u2028separator\u2029 \x85 tab\t é 日本 😀 \x1b[31m'
PAIRS = [
    Pair((Turn("user", "Hi"),), "Hello!", "What?"),
    Pair((Turn("user", NASTY), Turn("assistant", "Why?"), Turn("user", "Because " + NASTY)), NASTY + "1", NASTY + "2", 0.1, -3.5),
    Pair((Turn("user", "Hi"), Turn("assistant", "Hello!"), Turn("user", "Bye")), "Bye!", "y\u2028x", 2.0, None),
]
SPLITS = {"Hi": "train", NASTY: "test"}
SETTINGS = SourceSettings()


def parsed(row: dict[str, Any]) -> Pair | Reject:
    (item,) = parse(row, SETTINGS)
    return item


def row(**changes: object) -> dict[str, Any]:
    return {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", **changes}


def prompt_rows(texts: list[str]) -> list[dict[str, object]]:
    return [
        {
            "prompt_id": prompt_id(text),
            "prompt": text,
            "cluster": prompt_id(text),
            "split": SPLITS.get(text, "train"),
            "pairs": sum(pair.prompt == text for pair in PAIRS),
            "sources": ["hh"],
        }
        for text in texts
    ]


def weight_row(text: str, weight: float | None) -> dict[str, object]:
    numbers = {"pairs": 1, "log_density": 0.0, "density": 1.0, "decile": 1, "quartile": 1}
    return {"prompt_id": prompt_id(text), "split": "train", "group": prompt_id(text), "weight": weight, **numbers}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Pairs and prompts, without weights."""
    folder = tmp_path / "tables"
    prompts = ["Hi", NASTY]
    pairs = [
        {
            **pair_row(pair, src, "a.jsonl:1"),
            "prompt_index": prompts.index(pair.prompt),
            "cluster": prompt_id(pair.prompt),
            "split": SPLITS[pair.prompt],
        }
        for pair, src in zip(PAIRS, ("hh", "my-own_1", "hh"), strict=True)
    ]
    write_frame(PREFERENCE_PAIRS.frame(pairs), folder / "preference_pairs.parquet", PREFERENCE_PAIRS)
    write_frame(PROMPTS.frame(prompt_rows(prompts)), folder / "prompts.parquet", PROMPTS)
    return folder


def weigh(tables: Path, *rows: dict[str, object]) -> None:
    write_frame(DENSITY_WEIGHTS.frame(rows), tables / "density_weights.parquet", DENSITY_WEIGHTS)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_exported_pairs_are_read_back_the_same(tables: Path, tmp_path: Path) -> None:
    export_nanochat(tables, tmp_path / "out")
    rows = lines(tmp_path / "out" / "pairs_all.jsonl")
    assert [parsed(row) for row in rows] == PAIRS
    assert [pair_id(parsed(row)) for row in rows] == [row["id"] for row in rows] == [pair_id(p) for p in PAIRS]  # type: ignore[arg-type]
    assert [prompt_id(parsed(row).prompt) for row in rows] == [row["prompt_id"] for row in rows]  # type: ignore[union-attr]
    assert [source_of(row) for row in rows] == ["hh", "my-own_1", "hh"]


@pytest.mark.parametrize(
    ("name", "folder"), [("hh_rlhf", "hh-rlhf"), ("ultrafeedback", "ultrafeedback"), ("stack_exchange", "stack-exchange")]
)
def test_real_pairs_keep_their_ids(real_data: Path, tmp_path: Path, name: SourceName, folder: str) -> None:
    settings = StackExchangeSettings() if name == "stack_exchange" else SourceSettings()
    raw = [raw for file in raw_files(str(real_data / folder)) for raw in file.rows(tmp_path)]
    pairs = parse_rows(name, settings, raw).pairs
    prompts = pairs.group_by("prompt_id", maintain_order=True).agg(pl.col("prompt").first(), pairs=pl.len().cast(pl.Int64))
    rest = {"cluster": pl.col("prompt_id"), "split": pl.lit("train"), "prompt_index": pl.lit(0, pl.UInt32)}
    pairs = pairs.with_columns(**rest).select(PREFERENCE_PAIRS.schema.names())
    write_frame(pairs, tmp_path / "preference_pairs.parquet", PREFERENCE_PAIRS)
    prompts = prompts.with_columns(sources=pl.lit([name]), **rest).select(PROMPTS.schema.names())
    write_frame(prompts, tmp_path / "prompts.parquet", PROMPTS)
    export_nanochat(tmp_path, tmp_path / "out")
    back = [raw for file in raw_files(str(tmp_path / "out" / "pairs_all.jsonl")) for raw in file.rows(tmp_path)]
    same = ["pair_id", "prompt_id", "context", "chosen", "rejected", "score_chosen", "score_rejected", "src"]
    assert parse_rows("nanochat", SETTINGS, back).pairs.select(same).equals(pairs.select(same))


def test_no_reader_splits_a_line_within_a_text(tables: Path, tmp_path: Path) -> None:
    export_nanochat(tables, tmp_path / "out")
    for name, rows in (("pairs_all.jsonl", 3), ("prompts_all.jsonl", 2)):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert [json.loads(line) for line in text.splitlines()] == lines(tmp_path / "out" / name)
        assert len(text.splitlines()) == rows


def test_prompts_are_written_in_the_table_s_order(tables: Path, tmp_path: Path) -> None:
    export_nanochat(tables, tmp_path / "out")
    assert lines(tmp_path / "out" / "prompts_all.jsonl") == [
        {"id": prompt_id("Hi"), "prompt": "Hi", "split": "train", "pairs": 2},
        {"id": prompt_id(NASTY), "prompt": NASTY, "split": "test", "pairs": 1},
    ]


def test_weight_i_belongs_to_line_i_and_held_out_prompts_weigh_zero(tables: Path, tmp_path: Path) -> None:
    weigh(tables, weight_row(NASTY, None), weight_row("Hi", 1.0))
    summary = export_nanochat(tables, tmp_path / "out")
    weights = np.load(tmp_path / "out" / "embeddings_offline" / "density_weights.npy")
    assert (weights.tolist(), weights.dtype, summary.weighed) == ([1.0, 0.0], np.float32, 1)
    assert json.loads((tmp_path / "out" / "embeddings_offline" / "prompts_list.json").read_bytes()) == ["Hi", NASTY]


def test_metadata_say_how_the_weights_were_made(tables: Path, tmp_path: Path) -> None:
    weigh(tables, weight_row("Hi", 0.75), weight_row(NASTY, 0.25))
    vectors = pl.DataFrame(
        {"prompt_id": [prompt_id("Hi")], "split": ["train"], "truncated": [False], "embedding": [[1.0, 0.0, 0.0]]},
        schema={"prompt_id": pl.String, "split": pl.String, "truncated": pl.Boolean, "embedding": pl.Array(pl.Float32, 3)},
    )
    write_frame(vectors, tables / "prompt_embeddings.parquet", PROMPT_EMBEDDINGS)
    experiment = Experiment()
    export_nanochat(tables, tmp_path / "out", experiment=experiment)
    assert json.loads((tmp_path / "out" / "embeddings_offline" / "embeddings_metadata.json").read_bytes()) == {
        "n_prompts": 2,
        "embedding_dim": 3,
        "embedding_dtype": "float32",
        "weights_dtype": "float32",
        "normalization": "L2 unit vectors",
        "prompts_with_weight": 2,
        "weights_min": 0.25,
        "weights_max": 0.75,
        "weights_mean": 0.5,
        "weights_std": 0.25,
        "model": experiment.embedding.model,
        "density": experiment.density.model_dump(),
    }


def test_without_weights_the_pairs_are_exported_alone(tables: Path, tmp_path: Path) -> None:
    summary = export_nanochat(tables, tmp_path / "out")
    assert summary == ExportSummary(tmp_path / "out", 3, 2, {"hh": 2, "my-own_1": 1}, {"test": 1, "train": 2}, None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pairs_all.jsonl", "prompts_all.jsonl", "stats.txt"]
    assert [line.split() for line in (tmp_path / "out" / "stats.txt").read_text().splitlines()] == [
        ["total_pairs", "3"],
        ["unique_prompts", "2"],
        ["src_hh", "2"],
        ["src_my-own_1", "1"],
        ["split_test", "1"],
        ["split_train", "2"],
        ["prompts_with_weight", "-"],
        ["written_by", "densityrm"],
    ]


def test_a_line_has_the_keys_that_the_original_scripts_read(tables: Path, tmp_path: Path) -> None:
    export_nanochat(tables, tmp_path / "out")
    pairs, prompts = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("pairs_all.jsonl", "prompts_all.jsonl")
    )
    assert list(pairs[0])[:5] == ["id", "prompt", "chosen", "rejected", "src"]
    assert list(prompts[0])[:2] == ["id", "prompt"]


def test_newer_files_have_the_conversation_as_prefix() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
    pair = parsed({"id": "1", "prefix": {"messages": messages}, "chosen": "Bye!", "rejected": "No.", "src": "hh"})
    assert pair == Pair((Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "Bye")), "Bye!", "No.")


def test_empty_tables_export_empty_files(tables: Path, tmp_path: Path) -> None:
    for table in (PREFERENCE_PAIRS, PROMPTS, DENSITY_WEIGHTS):
        write_frame(table.empty(), tables / f"{table.name}.parquet", table)
    summary = export_nanochat(tables, tmp_path / "out")
    assert (summary.pairs, summary.prompts, summary.weighed) == (0, 0, 0)
    assert json.loads((tmp_path / "out" / "embeddings_offline" / "prompts_list.json").read_bytes()) == []


@pytest.mark.parametrize(
    ("weighed", "message"),
    [
        (["Hi"], "1 of 2 prompts have no row in it"),
        ([], "2 of 2 prompts have no row in it"),
        (["Hi", NASTY, "Gone"], "1 of its rows have no prompt"),
        (["Hi", NASTY, "Hi"], "1 of its rows repeat a prompt"),
    ],
)
def test_weights_of_other_prompts_are_refused(tables: Path, tmp_path: Path, weighed: list[str], message: str) -> None:
    weigh(tables, *(weight_row(text, 0.5) for text in weighed))
    with pytest.raises(NanochatError, match=rf"density_weights\.parquet: .*{message}"):
        export_nanochat(tables, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tables"]


def test_prompts_of_another_run_are_refused(tables: Path, tmp_path: Path) -> None:
    write_frame(PROMPTS.frame(prompt_rows(["Hi"])), tables / "prompts.parquet", PROMPTS)
    with pytest.raises(NanochatError, match=r"prompts\.parquet counts 2 pairs, preference_pairs\.parquet has 3"):
        export_nanochat(tables, tmp_path / "out")


@pytest.mark.parametrize("content", [None, b"no table"])
def test_unreadable_table_is_named(tables: Path, tmp_path: Path, content: bytes | None) -> None:
    (tables / "prompts.parquet").unlink()
    if content:
        (tables / "prompts.parquet").write_bytes(content)
    with pytest.raises(NanochatError, match=r"prompts\.parquet: (does not exist|is no readable Parquet file)"):
        export_nanochat(tables, tmp_path / "out")


def test_former_export_is_replaced(tables: Path, tmp_path: Path) -> None:
    weigh(tables, weight_row("Hi", 1.0), weight_row(NASTY, None))
    export_nanochat(tables, tmp_path / "out")
    (tables / "density_weights.parquet").unlink()
    export_nanochat(tables, tmp_path / "out")
    assert not (tmp_path / "out" / "embeddings_offline").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tables"]


def test_failed_export_leaves_the_former_one(tables: Path, tmp_path: Path) -> None:
    export_nanochat(tables, tmp_path / "out")
    before = (tmp_path / "out" / "pairs_all.jsonl").read_bytes()
    weigh(tables)
    with pytest.raises(NanochatError):
        export_nanochat(tables, tmp_path / "out")
    assert (tmp_path / "out" / "pairs_all.jsonl").read_bytes() == before


def test_folder_with_other_files_is_never_overwritten(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "out" / "stats.txt").write_text("stats of somebody else")
    with pytest.raises(NanochatError, match=r"out: holds stats\.txt and is no former export"):
        export_nanochat(tables, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_file_added_to_a_former_export_is_not_deleted(tables: Path, tmp_path: Path) -> None:
    export_nanochat(tables, tmp_path / "out")
    (tmp_path / "out" / "rm.pt").write_text("a checkpoint")
    with pytest.raises(NanochatError, match=r"holds rm\.pt, which no export writes"):
        export_nanochat(tables, tmp_path / "out")


def test_two_exports_of_one_state_are_the_same_bytes(tables: Path, tmp_path: Path) -> None:
    weigh(tables, weight_row("Hi", 1.0), weight_row(NASTY, None))
    contents = []
    for name in ("a", "b"):
        out = export_nanochat(tables, tmp_path / name).folder
        contents.append({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert contents[0] == contents[1] and len(contents[0]) == 6


def test_progress_counts_rows_of_each_file(tables: Path, tmp_path: Path) -> None:
    said: list[tuple[str, int]] = []
    export_nanochat(tables, tmp_path / "out", lambda file, rows: said.append((file, rows)))
    assert said == [("pairs_all.jsonl", 3), ("prompts_all.jsonl", 2)]


def test_three_texts_are_a_pair() -> None:
    assert parsed(row()) == Pair((Turn("user", "Hi"),), "Hello!", "What?")


@pytest.mark.parametrize("absent", ["context", "score_chosen", "score_rejected", "src"])
def test_null_is_as_good_as_absent(absent: str) -> None:
    assert parsed(row(**{absent: None})) == parsed(row())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": " "}, "empty_prompt"),
        ({"chosen": ""}, "empty_reply"),
        ({"chosen": "What? "}, "identical_replies"),
        ({"score_chosen": 1, "score_rejected": 1.0}, "tied_scores"),
        ({"context": []}, "bad_turn_order"),
        ({"context": [{"role": "assistant", "content": "Hi"}]}, "bad_turn_order"),
        ({"context": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]}, "bad_turn_order"),
        ({"context": [{"role": "user", "content": "Another"}]}, "contexts_differ"),
    ],
)
def test_row_without_a_preference_is_rejected(changes: dict[str, object], reason: str) -> None:
    item = parsed(row(**changes))
    assert isinstance(item, Reject) and item.reason == reason


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"prompt": 1}, "'prompt' must be a text, not a number"),
        ({"context": "Hi"}, "'context' must be a list, not a text"),
        ({"context": [{"role": "user"}]}, r"column 'context\[0\]\.content' is missing"),
        ({"score_chosen": "high"}, "'score_chosen' must be a number, not a text"),
    ],
)
def test_malformed_row_is_explained(changes: dict[str, object], detail: str) -> None:
    with pytest.raises(MalformedError, match=detail):
        parsed(row(**changes))


@pytest.mark.parametrize("src", [None, "", "two words", "../up", 5, "x" * 65])
def test_row_without_a_usable_name_is_of_nanochat(src: object) -> None:
    assert source_of(row(src=src)) == "nanochat"


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("/data/rm", "/data/rm/pairs_all.jsonl"),
        ("/data/v1.0/", "/data/v1.0/pairs_all.jsonl"),
        ("hf://datasets/me/rm", "hf://datasets/me/rm/pairs_all.jsonl"),
        ("/data/rm/pairs_all.jsonl", "/data/rm/pairs_all.jsonl"),
        ("/data/rm/part.jsonl.gz", "/data/rm/part.jsonl.gz"),
        ("/data/rm/*.jsonl", "/data/rm/*.jsonl"),
    ],
)
def test_of_a_folder_only_the_pairs_are_read(path: str, file: str) -> None:
    assert pairs_file(path) == file


def test_check_counts_what_the_source_would_give(tmp_path: Path) -> None:
    rows = [row(src="hh"), row(), row(chosen=""), row(chosen="What?"), {"prompt": "Hi"}]
    (tmp_path / "pairs_all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "prompts_all.jsonl").write_text("{}\n")
    summary = check_nanochat(tmp_path)
    assert (summary.rows, summary.pairs, summary.malformed) == (5, 2, 1)
    assert summary.rejects == {"empty_reply": 1, "identical_replies": 1, "missing_column": 1}
    assert summary.sources == {"hh": 1, "nanochat": 1}
    assert summary.first_malformed.startswith("5") and "'chosen' is missing" in summary.first_malformed


@pytest.fixture
def cli(tables: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    from densityrm_dagster.commands.tables import export_nanochat, import_nanochat

    (tables.parent / "home" / "planted").mkdir(parents=True)
    tables.rename(tables.parent / "home" / "planted" / "tables")
    monkeypatch.setenv("DENSITYRM_HOME", str(tables.parent / "home"))
    monkeypatch.delenv("DENSITYRM_EXPERIMENT", raising=False)
    app = typer.Typer()
    app.command()(export_nanochat)
    app.command()(import_nanochat)
    return app


def test_exported_folder_can_be_imported_from_the_command_line(cli: typer.Typer, tmp_path: Path) -> None:
    import yaml

    exported = CliRunner().invoke(cli, ["export-nanochat", str(tmp_path / "out: 1")])
    assert exported.exit_code == 0 and "pairs    3  (hh 2, my-own_1 1)" in exported.stdout
    imported = CliRunner().invoke(cli, ["import-nanochat", str(tmp_path / "out: 1")])
    assert imported.exit_code == 0 and "# pairs    3" in imported.stdout
    assert yaml.safe_load(imported.stdout) == {"sources": {"nanochat": {"path": str(tmp_path / "out: 1")}}}


@pytest.mark.parametrize("command", ["export-nanochat", "import-nanochat"])
def test_what_cannot_be_done_is_one_line_on_stderr(cli: typer.Typer, tmp_path: Path, command: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    result = CliRunner().invoke(cli, [command, str(tmp_path / "out")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1

"""A source is read file by file: what was read before is kept, and how it was read does not show in the tables."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from densityrm_core.settings import PlantedSettings, SourceSettings, StackExchangeSettings
from densityrm_core.sources import Folders, SourceError, SourceRead, files_of, read_source
from densityrm_core.sources.planted import write_raw

PLANTED = PlantedSettings()


def hh_rows(first: int, count: int) -> bytes:
    turns = (f"\n\nHuman: Question {i}?\n\nAssistant:" for i in range(first, first + count))
    rows = ({"chosen": f"{turn} Yes.", "rejected": f"{turn} No."} for turn in turns)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(hh_rows(0, 30))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(hh_rows(30, 20)))
    return folder


def read(state: Path, path: object, processes: int = 1, **settings: Any) -> SourceRead:
    folders = Folders(state / "out", state / "raw", state / "shards")
    return read_source("hh_rlhf", SourceSettings(path=str(path), **settings), PLANTED, folders, processes)


def reused(source: SourceRead) -> dict[str, bool]:
    return {file.name: file.reused for file in source.files}


def test_a_source_that_grew_reads_its_new_files_only(tmp_path: Path, raw: Path) -> None:
    assert reused(read(tmp_path / "one", raw)) == {"a.jsonl": False, "c.jsonl.gz": False}
    (raw / "b.jsonl").write_bytes(hh_rows(50, 10))
    grown = read(tmp_path / "one", raw)
    assert reused(grown) == {"a.jsonl": True, "b.jsonl": False, "c.jsonl.gz": True}
    assert grown.pairs.sha256 == read(tmp_path / "two", raw).pairs.sha256


def test_a_file_is_known_by_its_content_not_by_its_date(tmp_path: Path, raw: Path) -> None:
    before = read(tmp_path, raw)
    (raw / "a.jsonl").touch()
    (raw / "c.jsonl.gz").write_bytes(gzip.compress(hh_rows(30, 21)))
    after = read(tmp_path, raw)
    assert reused(after) == {"a.jsonl": True, "c.jsonl.gz": False}
    assert after.pairs.sha256 != before.pairs.sha256


def test_files_are_recorded_with_their_sha256(tmp_path: Path, raw: Path) -> None:
    files = read(tmp_path, raw).files
    assert [file.identity for file in files] == [hashlib.sha256((raw / file.name).read_bytes()).hexdigest() for file in files]


def test_a_read_that_broke_off_goes_on_after_the_last_file_it_finished(tmp_path: Path, raw: Path) -> None:
    whole = (raw / "c.jsonl.gz").read_bytes()
    (raw / "c.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(SourceError, match=r"c\.jsonl\.gz"):
        read(tmp_path, raw)
    (raw / "c.jsonl.gz").write_bytes(whole)
    assert reused(read(tmp_path, raw)) == {"a.jsonl": True, "c.jsonl.gz": False}


def test_settings_of_the_reading_read_again_and_settings_of_the_union_do_not(tmp_path: Path, raw: Path) -> None:
    assert not any(reused(read(tmp_path, raw)).values())
    assert all(reused(read(tmp_path, raw, weight=0.5, min_score_gap=1.0, max_malformed=3)).values())
    assert reused(read(tmp_path, raw, max_rows=40)) == {"a.jsonl": False, "c.jsonl.gz": False}


def test_files_that_are_gone_are_forgotten(tmp_path: Path, raw: Path) -> None:
    read(tmp_path, raw)
    (raw / "a.jsonl").unlink()
    read(tmp_path, raw)
    assert len(list((tmp_path / "shards" / "hh_rlhf").glob("*.json"))) == 1


def test_max_rows_counts_over_all_files(tmp_path: Path, raw: Path) -> None:
    source = read(tmp_path, raw, max_rows=33)
    assert [(file.name, file.rows) for file in source.files] == [("a.jsonl", 30), ("c.jsonl.gz", 3)]


def test_malformed_rows_count_over_all_files(tmp_path: Path, raw: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (raw / name).write_bytes(hh_rows(0, 1) + b'{"chosen":\n')
    with pytest.raises(SourceError, match=r"raw/a\.jsonl:2: broken JSON.*first of 2 malformed rows, 1 allowed"):
        read(tmp_path, raw, max_malformed=1)
    assert read(tmp_path, raw, max_malformed=2).reasons == {"broken_json": 2}


def test_more_processes_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densityrm_core.sources.reading._SPREAD_FROM", 0)
    monkeypatch.setattr("densityrm_core.sources.reading._CHUNK_ROWS", 64)
    write_raw("stack_exchange", PlantedSettings(stack_exchange_questions=500), tmp_path / "rows.jsonl.gz")
    settings = StackExchangeSettings(path=str(tmp_path / "rows.jsonl.gz"))
    one, two = (
        read_source("stack_exchange", settings, PLANTED, Folders(tmp_path / f"{n}", tmp_path, tmp_path / f"shards{n}"), n)
        for n in (1, 2)
    )
    assert (one.pairs.sha256, one.rejects.sha256) == (two.pairs.sha256, two.rejects.sha256)


def test_progress_is_said_file_by_file(tmp_path: Path, raw: Path) -> None:
    said: list[str] = []
    folders = Folders(tmp_path / "out", tmp_path / "raw", tmp_path / "shards")
    read_source("hh_rlhf", SourceSettings(path=str(raw)), PLANTED, folders, say=said.append)
    assert said[-1] == "file 2/2 c.jsonl.gz: 20 rows read"
    assert "a.jsonl: 30 rows read, 30 candidate pairs" in said


def test_any_file_system_of_fsspec_is_read_as_local_files_are(tmp_path: Path, raw: Path) -> None:
    remote = fsspec.filesystem("memory")
    for file in raw.iterdir():
        remote.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    source = read(tmp_path / "one", "memory://bucket/*.jsonl*")
    assert source.pairs.sha256 == read(tmp_path / "two", raw).pairs.sha256
    assert all(reused(read(tmp_path / "one", "memory://bucket/*.jsonl*")).values())


@pytest.mark.parametrize("path", ["memory://no-such-bucket/*.jsonl", "s3://bucket/rows.jsonl", "nosuch://x/y.jsonl"])
def test_a_remote_place_that_cannot_be_read_is_named_with_its_key(path: str) -> None:
    with pytest.raises(SourceError, match=r"sources\.hh_rlhf\.path: .*" + path.split("*")[0]):
        files_of("hh_rlhf", SourceSettings(path=path), PLANTED, Path("unused"))


def test_a_nanochat_folder_is_read_by_its_pairs_alone(tmp_path: Path) -> None:
    (tmp_path / "pairs_all.jsonl").write_text(json.dumps({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}) + "\n")
    (tmp_path / "prompts_all.jsonl").write_text(json.dumps({"id": "0" * 16, "prompt": "Hi"}) + "\n")
    folders = Folders(tmp_path / "out", tmp_path / "raw", tmp_path / "shards")
    source = read_source("nanochat", SourceSettings(path=str(tmp_path)), PLANTED, folders)
    assert source.pairs.frame().select("src", "prompt", "chosen").rows() == [("nanochat", "Hi", "Hello")]

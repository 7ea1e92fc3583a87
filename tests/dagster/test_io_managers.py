"""Writes are atomic, schemas are kept, and a reader keeps what it opened."""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from densityrm_core import tables
from densityrm_dagster.io_managers import TABLE, FolderIOManager, ParquetIOManager

FRAME = tables.METRICS.frame([{"step": 1, "metric": "train/loss", "value": 0.5}])
METADATA = {TABLE: "metrics"}


def output(partition: str | None = None) -> dg.OutputContext:
    key = {"partition_key": partition, "asset_partitions_def": dg.StaticPartitionsDefinition(["0", "1"])} if partition else {}
    return dg.build_output_context(asset_key="curve", definition_metadata=METADATA, **key)


def test_a_frame_comes_back_as_it_went(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    manager.handle_output(output(), FRAME)
    read = manager.load_input(dg.build_input_context(asset_key="curve", upstream_output=output()))
    assert read.equals(FRAME)


def test_a_frame_of_another_schema_is_refused_and_nothing_is_written(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    with pytest.raises(tables.TableError, match="column 'value' is missing"):
        manager.handle_output(output(), FRAME.drop("value"))
    assert list(tmp_path.rglob("*")) == []


def test_a_failed_write_leaves_the_former_table_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manager = ParquetIOManager(folder=str(tmp_path))
    manager.handle_output(output(), FRAME)
    before = (tmp_path / "curve.parquet").read_bytes()

    def break_off(self: pl.DataFrame, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", break_off)
    with pytest.raises(OSError, match="disk full"):
        manager.handle_output(output(), FRAME)
    assert (tmp_path / "curve.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["curve.parquet"]


def test_partitions_are_files_of_their_own(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    for seed in ("0", "1"):
        manager.handle_output(output(seed), FRAME)
    assert sorted(path.name for path in (tmp_path / "curve").iterdir()) == ["0.parquet", "1.parquet"]


def test_a_missing_table_says_what_to_materialize(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    with pytest.raises(dg.Failure, match=r"curve\.parquet does not exist: materialize curve first"):
        manager.load_input(dg.build_input_context(asset_key="curve", upstream_output=output()))


def staged(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text)
    return folder


def test_a_folder_takes_the_place_of_the_former_one_whole(tmp_path: Path):
    manager = FolderIOManager(folder=str(tmp_path))
    for text in ("old", "new"):
        manager.handle_output(output(), staged(tmp_path / f".{text}.tmp", text))
    assert (tmp_path / "curve" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["curve"]


def test_a_folder_replaced_halfway_is_restored(tmp_path: Path):
    manager = FolderIOManager(folder=str(tmp_path))
    staged(tmp_path / ".curve.former", "old")  # killed between the two renames
    read = manager.load_input(dg.build_input_context(asset_key="curve", upstream_output=output()))
    assert (read / "weights").read_text() == "old"

"""Writes are atomic, schemas are kept, and a reader keeps what it opened."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from densityrm_core import tables
from densityrm_core.files import sweep, temporary_folder
from densityrm_core.storage import GROUP_ROWS, batches, read_frame, table_writer, write_frame
from densityrm_dagster.io_managers import TABLE, FolderIOManager, ParquetIOManager

FRAME = tables.METRICS.frame([{"step": 1, "metric": "train/loss", "value": 0.5}])
METADATA = {TABLE: "metrics"}


def output(partition: str | None = None) -> dg.OutputContext:
    key = {"partition_key": partition, "asset_partitions_def": dg.StaticPartitionsDefinition(["0", "1"])} if partition else {}
    return dg.build_output_context(asset_key="curve", definition_metadata=METADATA, **key)


def wanted(kind: type) -> dg.InputContext:
    return dg.build_input_context(asset_key="curve", upstream_output=output(), dagster_type=dg.PythonObjectDagsterType(kind))


def test_a_frame_comes_back_as_it_went(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    manager.handle_output(output(), FRAME)
    assert manager.load_input(wanted(pl.DataFrame)).equals(FRAME)
    assert manager.load_input(wanted(pl.LazyFrame)).collect().equals(FRAME)
    assert read_frame(manager.load_input(wanted(Path))).equals(FRAME)


@pytest.mark.parametrize("kind", [pl.LazyFrame, Path])
def test_a_reader_keeps_the_table_that_it_opened_whatever_replaces_it(tmp_path: Path, kind: type):
    manager = ParquetIOManager(folder=str(tmp_path))
    long = pl.concat([FRAME] * 50_000)
    manager.handle_output(output(), long)
    opened = manager.load_input(wanted(kind))
    schema = opened.collect_schema() if isinstance(opened, pl.LazyFrame) else None
    first = next(batches(opened)) if isinstance(opened, Path) else None
    manager.handle_output(output(), FRAME)
    now = opened.collect() if schema else read_frame(opened)
    assert now.equals(long)
    assert first is None or first.equals(long[: first.height])
    assert manager.load_input(wanted(pl.DataFrame)).equals(FRAME)


def test_a_stored_table_takes_its_place_without_being_read(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    with manager.stage("curve") as folder:
        stored = write_frame(FRAME, folder / "new.parquet", tables.METRICS)
        manager.handle_output(output(), stored)
    assert manager.load_input(wanted(pl.DataFrame)).equals(FRAME)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.parquet"]


def test_a_stored_table_of_another_kind_is_refused(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    stored = write_frame(tables.REJECTS.empty(), tmp_path / "new.parquet", tables.REJECTS)
    with pytest.raises(tables.TableError, match="curve must hold the table metrics, not rejects"):
        manager.handle_output(output(), stored)


def test_files_are_zstandard_row_groups_with_statistics(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    manager.handle_output(output(), pl.concat([FRAME] * (GROUP_ROWS + 1)))
    footer = pq.read_metadata(tmp_path / "curve.parquet")
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [GROUP_ROWS, 1]
    column = footer.row_group(0).column(0)
    assert (column.compression, column.statistics.has_min_max) == ("ZSTD", True)


def test_the_size_of_written_frames_does_not_show_in_the_file(tmp_path: Path):
    frame = tables.METRICS.frame([{"step": i, "metric": f"m{i % 7}", "value": i / 3} for i in range(GROUP_ROWS + 100)])
    hashes = set()
    for size in (len(frame), 1000, 4099):
        with table_writer(tmp_path / f"{size}.parquet", tables.METRICS) as writer:
            for start in range(0, len(frame), size):
                writer.write(frame[start : start + size])
        hashes.add(writer.stored.sha256)
    assert len(hashes) == 1


def test_a_start_sweeps_what_a_killed_writer_left_and_nothing_that_lives(tmp_path: Path):
    killed = tmp_path / ".curve.parquet.0123.tmp"
    killed.write_bytes(b"half")
    (tmp_path / ".curve.4567.tmp").mkdir()
    with table_writer(tmp_path / "other.parquet", tables.METRICS) as living, temporary_folder(tmp_path / "folder") as folder:
        living.write(FRAME)
        ParquetIOManager(folder=str(tmp_path)).setup_for_execution(dg.build_init_resource_context())
        assert folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["other.parquet"]


def test_a_sweep_passes_over_a_folder_that_another_process_renames_under_it(tmp_path: Path):
    """Every step of a run sweeps as it starts, while the steps beside it rename finished models into their place."""
    made, kept = tmp_path / "made", tmp_path / "kept"
    ended = threading.Event()

    def rename() -> None:
        made.mkdir()
        while not ended.is_set():
            made.rename(kept)
            kept.rename(made)

    with ThreadPoolExecutor(1) as pool:
        renaming = pool.submit(rename)
        try:
            assert [sweep(tmp_path) for _ in range(3000)] == [[]] * 3000
        finally:
            ended.set()
        renaming.result()


def test_a_frame_of_another_schema_is_refused_and_nothing_is_written(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    with pytest.raises(tables.TableError, match="column 'value' is missing"):
        manager.handle_output(output(), FRAME.drop("value"))
    assert list(tmp_path.rglob("*")) == []


def test_a_failed_write_leaves_the_former_table_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manager = ParquetIOManager(folder=str(tmp_path))
    manager.handle_output(output(), FRAME)
    before = (tmp_path / "curve.parquet").read_bytes()

    def break_off(self: pq.ParquetWriter, table: pa.Table, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", break_off)
    with pytest.raises(OSError, match="disk full"):
        manager.handle_output(output(), FRAME)
    assert (tmp_path / "curve.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["curve.parquet"]


def test_partitions_are_files_of_their_own(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    for seed in ("0", "1"):
        manager.handle_output(output(seed), FRAME)
    assert sorted(path.name for path in (tmp_path / "curve").iterdir()) == ["0.parquet", "1.parquet"]


def test_a_partition_of_an_earlier_version_is_left_out_with_a_warning(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    for seed in ("0", "1"):
        manager.handle_output(output(seed), FRAME)
    FRAME.drop("value").write_parquet(tmp_path / "curve" / "1.parquet")
    both = dg.build_input_context(
        asset_key="curve",
        upstream_output=output("0"),
        dagster_type=dg.PythonObjectDagsterType(pl.DataFrame),
        asset_partitions_def=dg.StaticPartitionsDefinition(["0", "1"]),
        asset_partition_key_range=dg.PartitionKeyRange("0", "1"),
    )
    assert manager.load_input(both).equals(FRAME)


def test_a_missing_table_says_what_to_materialize(tmp_path: Path):
    manager = ParquetIOManager(folder=str(tmp_path))
    with pytest.raises(dg.Failure, match=r"curve\.parquet does not exist: materialize curve first"):
        manager.load_input(wanted(pl.DataFrame))


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
    read = manager.load_input(wanted(pl.DataFrame))
    assert (read / "weights").read_text() == "old"


@pytest.mark.parametrize("partitions", [None, dg.StaticPartitionsDefinition(["0", "1"])])
def test_a_finished_training_leaves_no_checkpoints_whatever_run_it_was_part_of(
    tmp_path: Path, partitions: dg.PartitionsDefinition | None
):
    @dg.asset(io_manager_key="folders", partitions_def=partitions)
    def trained(context: dg.AssetExecutionContext, folders: dg.ResourceParam[FolderIOManager]) -> Path:
        staged(folders.checkpoints(context), "half")
        return folders.stage(context)

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["0", "1"]), deps=[trained])
    def replicate() -> None: ...

    job = dg.define_asset_job("all", dg.AssetSelection.all())
    definitions = dg.Definitions([trained, replicate], jobs=[job], resources={"folders": FolderIOManager(folder=str(tmp_path))})
    assert definitions.resolve_job_def("all").execute_in_process(partition_key="1").success
    assert not list(tmp_path.rglob("weights"))

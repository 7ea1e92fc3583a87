"""Where asset values live: tables as Parquet files, models as folders. Writes are atomic; a reader keeps what it opened."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from densityrm_core import tables
from densityrm_core.files import held, locked_folder, sweep, temporary_folder
from densityrm_core.storage import Stored, read_frame, write_frame
from densityrm_dagster.partitions import partition_of

TABLE = "table"  # definition metadata that names the asset's schema in densityrm_core.tables


class ParquetIOManager(dg.ConfigurableIOManager):
    """Tables at `<folder>/<asset>.parquet`, or `<folder>/<asset>/<partition>.parquet`: zstd, with statistics, never in part.

    An asset returns a frame, or, where memory must not grow with rows, a `Stored` table that it wrote under `stage`. Anything
    that differs from its table's schema is refused before the former file is touched. What an asset receives follows its
    annotation: a DataFrame, a LazyFrame, or a Path to read batch by batch. Each is the table as it was when the asset started,
    whatever replaces it meanwhile. An unpartitioned asset that reads a partitioned one receives all partitions that exist and
    have the table's columns.
    """

    folder: str

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        sweep(Path(self.folder))

    def stage(self, asset: str) -> contextlib.AbstractContextManager[Path]:
        """A folder to write an asset's tables into, on the file system of their final place; gone when the block ends."""
        return temporary_folder(self.path(dg.AssetKey(asset)))

    def handle_output(self, context: dg.OutputContext, obj: pl.DataFrame | Stored) -> None:
        table = _table(context.definition_metadata)
        target = self.path(context.asset_key, context.partition_key if context.has_asset_partitions else None)
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(obj, Stored):
            if obj.table != table:
                raise tables.TableError(f"{target.stem} must hold the table {table.name}, not {obj.table.name}")
            obj.path.replace(target)
        else:
            write_frame(obj, target, table)
        size = round(target.stat().st_size / 2**20, 3)
        context.add_output_metadata(
            {"path": dg.MetadataValue.path(str(target)), "size_mib": size, "dagster/storage_kind": "parquet"}
        )

    def load_input(self, context: dg.InputContext) -> pl.DataFrame | pl.LazyFrame | Path:
        assert context.upstream_output is not None
        table, wanted = _table(context.upstream_output.definition_metadata), context.dagster_type.typing_type
        if not context.has_asset_partitions:
            return _load(self.path(context.asset_key), wanted)
        paths = [self.path(context.asset_key, key) for key in context.asset_partition_keys]
        if len(paths) == 1:
            return _load(paths[0], wanted)
        return pl.concat([table.empty(), *(_gathered(path, table, context) for path in paths if path.exists())])

    def path(self, key: dg.AssetKey, partition: str | None = None) -> Path:
        """Where a table is, or will be."""
        base = Path(self.folder, *key.path)
        return base / f"{partition}.parquet" if partition is not None else base.with_name(f"{base.name}.parquet")


class FolderIOManager(dg.ConfigurableIOManager):
    """Folders (models, judges, reports) at `<folder>/<asset>` or `<folder>/<asset>/<partition>`.

    An asset writes into `stage(context)` and returns that path; the finished folder then takes the place of the former one.
    """

    folder: str

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        sweep(Path(self.folder))

    def stage(self, context: dg.AssetExecutionContext) -> Path:
        """An empty folder to write the asset's value into, on the same file system as its final place."""
        name = "-".join([*context.asset_key.path, partition_of(context) or "all"])
        staged, _lock = locked_folder(Path(self.folder, name))  # never closed: safe from sweeps until this process ends
        return staged

    def checkpoints(self, context: dg.AssetExecutionContext) -> Path:
        """Where a training of the asset keeps its checkpoints until its value is stored."""
        return self._checkpoints(context.asset_key, partition_of(context))

    def handle_output(self, context: dg.OutputContext, obj: Path) -> None:
        target = self._path(context.asset_key, context.partition_key if context.has_asset_partitions else None)
        target.parent.mkdir(parents=True, exist_ok=True)
        former = _former(target)
        shutil.rmtree(former, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            target.rename(former)
        Path(obj).rename(target)
        shutil.rmtree(former, ignore_errors=True)
        shutil.rmtree(
            self._checkpoints(context.asset_key, context.partition_key if context.has_asset_partitions else None),
            ignore_errors=True,
        )
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        context.add_output_metadata({"path": dg.MetadataValue.path(str(target)), "size_mib": round(size / 2**20, 3)})

    def load_input(self, context: dg.InputContext) -> Path:
        target = self._path(context.asset_key, context.asset_partition_key if context.has_asset_partitions else None)
        if not target.exists() and _former(target).exists():  # killed between the two renames of handle_output
            _former(target).rename(target)
        if not target.exists():
            raise dg.Failure(_missing(target), allow_retries=False)
        return target

    def _checkpoints(self, key: dg.AssetKey, partition: str | None) -> Path:
        return Path(self.folder, ".checkpoints", *key.path, partition or "all")

    def _path(self, key: dg.AssetKey, partition: str | None) -> Path:
        return Path(self.folder, *key.path, *([partition] if partition is not None else []))


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.former")


def _table(metadata: Any) -> tables.Table:
    return getattr(tables, str((metadata or {})[TABLE]).upper())


def _load(path: Path, wanted: Any) -> pl.DataFrame | pl.LazyFrame | Path:
    try:
        if wanted is Path:
            return held(path)
        return pl.scan_parquet(path.open("rb")) if wanted is pl.LazyFrame else read_frame(path)
    except FileNotFoundError:
        raise dg.Failure(_missing(path), allow_retries=False) from None


def _gathered(path: Path, table: tables.Table, context: dg.InputContext) -> pl.DataFrame:
    """One partition of several; none of its rows if an earlier version of the program wrote it with other columns."""
    try:
        return table.check(read_frame(path)).select(table.schema.names())
    except tables.TableError as error:
        context.log.warning(f"{path} was left out, it is of another version: {error}; materialize partition {path.stem} again")
        return table.empty()


def _missing(path: Path) -> str:
    return (
        f"{path} does not exist: materialize {path.stem} first, with the same DENSITYRM_HOME ({os.environ.get('DENSITYRM_HOME')})"
    )

"""Where asset values live: tables as Parquet files, models as folders. Writes are atomic; a reader keeps what it opened."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from densityrm_core import tables

TABLE = "table"  # definition metadata that names the asset's schema in densityrm_core.tables


class ParquetIOManager(dg.ConfigurableIOManager):
    """Polars frames at `<folder>/<asset>.parquet`, or `<folder>/<asset>/<partition>.parquet`.

    A frame that differs from its table's schema is refused before anything is written. An unpartitioned asset that reads a
    partitioned one receives all partitions that exist, concatenated.
    """

    folder: str

    def handle_output(self, context: dg.OutputContext, obj: pl.DataFrame) -> None:
        table = _table(context.definition_metadata)
        target = self._path(context.asset_key, context.partition_key if context.has_asset_partitions else None)
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a killed run: steps of one table never overlap
            leftover.unlink(missing_ok=True)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
        try:
            table.check(obj).write_parquet(temporary, compression="zstd", statistics=True)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        context.add_output_metadata({"path": dg.MetadataValue.path(str(target)), "dagster/storage_kind": "parquet"})

    def load_input(self, context: dg.InputContext) -> pl.DataFrame:
        assert context.upstream_output is not None
        table = _table(context.upstream_output.definition_metadata)
        if not context.has_asset_partitions:
            return _read(self._path(context.asset_key))
        paths = [self._path(context.asset_key, key) for key in context.asset_partition_keys]
        if len(paths) == 1:
            return _read(paths[0])
        return pl.concat([table.empty(), *(_read(path) for path in paths if path.exists())])

    def _path(self, key: dg.AssetKey, partition: str | None = None) -> Path:
        base = Path(self.folder, *key.path)
        return base / f"{partition}.parquet" if partition is not None else base.with_name(f"{base.name}.parquet")


class FolderIOManager(dg.ConfigurableIOManager):
    """Folders (models, judges, reports) at `<folder>/<asset>` or `<folder>/<asset>/<partition>`.

    An asset writes into `stage(context)` and returns that path; the finished folder then takes the place of the former one.
    """

    folder: str

    def stage(self, context: dg.AssetExecutionContext) -> Path:
        """An empty folder to write the asset's value into, on the same file system as its final place."""
        base = Path(self.folder)
        base.mkdir(parents=True, exist_ok=True)
        name = "-".join([*context.asset_key.path, *([context.partition_key] if context.has_partition_key else [])])
        for leftover in base.glob(f".{name}.*.tmp"):  # of a killed run: steps of one asset and partition never overlap
            shutil.rmtree(leftover, ignore_errors=True)
        staged = base / f".{name}.{uuid.uuid4().hex}.tmp"
        staged.mkdir()
        return staged

    def handle_output(self, context: dg.OutputContext, obj: Path) -> None:
        target = self._path(context.asset_key, context.partition_key if context.has_asset_partitions else None)
        target.parent.mkdir(parents=True, exist_ok=True)
        former = _former(target)
        shutil.rmtree(former, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            target.rename(former)
        Path(obj).rename(target)
        shutil.rmtree(former, ignore_errors=True)
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        context.add_output_metadata({"path": dg.MetadataValue.path(str(target)), "size_mib": round(size / 2**20, 3)})

    def load_input(self, context: dg.InputContext) -> Path:
        target = self._path(context.asset_key, context.asset_partition_key if context.has_asset_partitions else None)
        if not target.exists() and _former(target).exists():  # killed between the two renames of handle_output
            _former(target).rename(target)
        if not target.exists():
            raise dg.Failure(_missing(target), allow_retries=False)
        return target

    def _path(self, key: dg.AssetKey, partition: str | None) -> Path:
        return Path(self.folder, *key.path, *([partition] if partition is not None else []))


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.former")


def _table(metadata: Any) -> tables.Table:
    return getattr(tables, str((metadata or {})[TABLE]).upper())


def _read(path: Path) -> pl.DataFrame:
    try:
        with path.open("rb") as file:  # an open file outlives its replacement by a later run
            return pl.read_parquet(file)
    except FileNotFoundError:
        raise dg.Failure(_missing(path), allow_retries=False) from None


def _missing(path: Path) -> str:
    return (
        f"{path} does not exist: materialize {path.stem} first, with the same DENSITYRM_HOME ({os.environ.get('DENSITYRM_HOME')})"
    )

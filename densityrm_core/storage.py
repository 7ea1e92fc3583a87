"""Tables on disk: Parquet written group by group, whole or not at all, and read batch by batch."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from densityrm_core.files import file_hash, replacing
from densityrm_core.tables import Table

GROUP_ROWS = 16_384  # rows of a row group: what a writer holds in memory
BATCH_ROWS = 8_192  # rows of a batch: what a reader holds in memory


@dataclass(frozen=True)
class Stored:
    """A finished Parquet file of a table. Equal content has equal `sha256`, of the file's bytes."""

    path: Path
    table: Table
    rows: int
    sha256: str

    def frame(self) -> pl.DataFrame:
        """The whole table in memory."""
        return read_frame(self.path)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        """The table in order, BATCH_ROWS rows at a time."""
        return batches(self.path, columns)


class TableWriter:
    """Takes the rows of one Parquet file; made by `table_writer`."""

    def __init__(self, path: Path, file: IO[bytes], table: Table, metadata: dict[str, str]) -> None:
        self._path, self._file, self._table, self._metadata = path, file, table, metadata
        self._waiting: list[pl.DataFrame] = []
        self._rows = self._waiting_rows = 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, frame: pl.DataFrame) -> None:
        """Append rows. Raises TableError if they differ from the table's schema."""
        self._waiting.append(self._table.check(frame).select(self._table.schema.names()))
        self._waiting_rows += frame.height
        while self._waiting_rows >= GROUP_ROWS:
            rows = pl.concat(self._waiting)
            self._flush(rows[:GROUP_ROWS])
            self._waiting, self._waiting_rows = [rows[GROUP_ROWS:]], rows.height - GROUP_ROWS

    def close(self) -> None:
        """Write what is waiting, and the footer."""
        if self._waiting_rows or self._writer is None:
            self._flush(pl.concat(self._waiting) if self._waiting else self._table.empty())
        cast(pq.ParquetWriter, self._writer).close()

    def abandon(self) -> None:
        """Let go of a file that will not be kept."""
        if self._writer is not None:
            with contextlib.suppress(Exception):  # what matters is the error that led here
                self._writer.close()

    @property
    def stored(self) -> Stored:
        """What was written; known once the block of `table_writer` has ended."""
        with self._path.open("rb") as file:
            return Stored(self._path, self._table, self._rows, file_hash(file))

    def _flush(self, rows: pl.DataFrame) -> None:
        table = rows.rechunk().to_arrow()
        if self._writer is None:
            schema = table.schema.with_metadata({k.encode(): v.encode() for k, v in self._metadata.items()})
            self._writer = pq.ParquetWriter(self._file, schema, compression="zstd", write_statistics=True)
        self._writer.write_table(table.cast(self._writer.schema), row_group_size=GROUP_ROWS)
        self._rows += rows.height


@contextlib.contextmanager
def table_writer(path: Path, table: Table, metadata: dict[str, str] | None = None) -> Generator[TableWriter]:
    """A Parquet file to write frames to: zstd, statistics, row groups of GROUP_ROWS whatever the frames' sizes.

    It appears at `path` when the block ends without an exception, see `replacing`. `metadata` is stored with it.
    """
    with replacing(path) as file:
        writer = TableWriter(path, file, table, metadata or {})
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abandon()
            raise


def write_frame(frame: pl.DataFrame, path: Path, table: Table) -> Stored:
    """One frame as a stored table."""
    with table_writer(path, table) as writer:
        writer.write(frame)
    return writer.stored


def read_frame(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """A whole table in memory; a file replaced meanwhile is read as it was when opened."""
    with path.open("rb") as file:
        return pl.read_parquet(file, columns=list(columns) if columns else None)


def batches(path: Path, columns: Sequence[str] | None = None, rows: int = BATCH_ROWS) -> Iterator[pl.DataFrame]:
    """A table in order, `rows` rows at a time; a file replaced meanwhile is read to its end as it was when opened."""
    with path.open("rb") as file:
        for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(rows, columns=list(columns) if columns else None):
            yield cast(pl.DataFrame, pl.from_arrow(batch))


def rows_at(path: Path, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pl.DataFrame:
    """Some rows of a table, in the order asked for; read batch by batch."""
    wanted, place = np.unique(rows, return_inverse=True)
    return pl.concat([pl.read_parquet(path, columns=list(columns), n_rows=0), *ascending_rows(path, wanted, columns)])[place]


def ascending_rows(path: Path, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Some rows of a table, given in ascending order, batch by batch."""
    start = 0
    for batch in batches(path, columns):
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + batch.height)] - start
        if len(inside):
            yield batch[inside]
        start += batch.height


def key_value_metadata(path: Path) -> dict[str, str]:
    """What the writer was given as `metadata`."""
    return {k.decode(): v.decode() for k, v in (pq.read_schema(path).metadata or {}).items()}

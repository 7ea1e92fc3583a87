"""Raw rows, one at a time, from JSON lines and Parquet files on this machine or on the Hugging Face hub."""

from __future__ import annotations

import gzip
import io
import json
import posixpath
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from densityrm_core.sources.rows import MalformedError, SourceError, check_text, decode

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_PARQUET_ROWS = 256  # rows held in memory at a time


@dataclass(frozen=True)
class RawRow:
    """`content` is a line as read, or a Parquet row, or why the Parquet row cannot be decoded."""

    origin: str
    content: bytes | dict[str, Any] | MalformedError

    @property
    def text(self) -> str:
        """The row as text for the rejects table."""
        if isinstance(self.content, bytes):
            return self.content.decode(errors="replace")
        return "" if isinstance(self.content, MalformedError) else _as_json(self.content)

    def fields(self) -> dict[str, Any]:
        """The row as a dict. Raises MalformedError."""
        if isinstance(self.content, bytes):
            return decode(self.content)
        if isinstance(self.content, MalformedError):
            raise self.content
        check_text(_as_json(self.content))
        return self.content


def raw_rows(path: str, key: str = "path") -> Iterator[RawRow]:
    """Rows of every file that `path` names, files in sorted order; memory does not grow with their size.

    Args:
        path: a file, a folder (searched recursively) or a glob, local or hf://datasets/<repo>/<glob>.
        key: the setting that holds `path`, for messages.

    Raises:
        SourceError: nothing matches, a file cannot be reached, or a file is not what its suffix says.
    """
    with _explained(path, key):
        fs, files = _find(path, key)
    for file, name in files:
        row = 0
        try:
            with _explained(path, key), cast(IO[bytes], fs.open(file, "rb")) as handle:
                for row, content in _rows_of(handle, name):
                    yield RawRow(f"{name}:{row}", content)
        except (gzip.BadGzipFile, zlib.error, EOFError, pa.ArrowException) as error:
            raise SourceError(
                f"{file}: not a readable {posixpath.splitext(name)[1]} file ({error}) after row {row}; download it again"
            ) from None


def _find(path: str, key: str) -> tuple[fsspec.AbstractFileSystem, list[tuple[str, str]]]:
    """The file system and the matching files with their names relative to the folder that was asked for, sorted."""
    if not path.strip():
        raise SourceError(f"{key}: is empty; give a file, a folder or a glob of raw rows")
    fs, root = url_to_fs(path)
    if fs.isfile(root):
        if not root.endswith(SUFFIXES):
            raise SourceError(f"{key}: {path} is none of {', '.join(SUFFIXES)}")
        return fs, [(root, posixpath.basename(root))]
    if fs.isdir(root):
        base, found = root, cast(list[str], fs.find(root))
    else:
        base = posixpath.dirname(root[: min(i for i in map(root.find, "*?[") if i >= 0)]) if fsspec.core.has_magic(root) else root
        matches = cast(list[str], fs.glob(root)) if base != root else []
        found = [f for m in matches for f in ([m] if fs.isfile(m) else cast(list[str], fs.find(m)))]
        if not matches:
            raise SourceError(f"{key}: {path} does not exist or matches no file; give a file, a folder or a glob of raw rows")
    files = sorted({f for f in found if f.endswith(SUFFIXES)})
    if not files:
        raise SourceError(f"{key}: {path} holds no file that ends in {', '.join(SUFFIXES)}")
    return fs, [(f, posixpath.relpath(f, base)) for f in files]


def _rows_of(handle: IO[bytes], name: str) -> Iterator[tuple[int, bytes | dict[str, Any] | MalformedError]]:
    if name.endswith(".parquet"):
        yield from enumerate(_parquet_rows(handle), start=1)
        return
    with _decompressed(handle, name) as lines:
        for row, line in enumerate(lines, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line
            if content.strip():
                yield row, content.rstrip(b"\r\n")


def _decompressed(handle: IO[bytes], name: str) -> IO[bytes]:
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(handle))
    if name.endswith(".zst"):
        return cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(handle, "zstd")))  # pyright: ignore[reportArgumentType]
    return handle


def _parquet_rows(handle: IO[bytes]) -> Iterator[dict[str, Any] | MalformedError]:
    for batch in pq.ParquetFile(handle).iter_batches(batch_size=_PARQUET_ROWS):
        for i in range(batch.num_rows):
            try:
                yield cast(dict[str, Any], batch.slice(i, 1).to_pylist()[0])
            except (ValueError, OverflowError) as error:  # invalid UTF-8, dates out of range
                yield MalformedError("broken_json", str(error))


@contextmanager
def _explained(path: str, key: str) -> Generator[None]:
    """Turn what a file system or the hub raises into one SourceError."""
    if path.startswith("hf://"):
        from huggingface_hub import errors as hub
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

        gated: tuple[type[Exception], ...] = (hub.GatedRepoError,)
        missing: tuple[type[Exception], ...] = (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, FileNotFoundError)
        network: tuple[type[Exception], ...] = (HTTPError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    else:
        gated, missing, network = (), (FileNotFoundError,), ()
    try:
        yield
    except (SourceError, gzip.BadGzipFile, pa.ArrowException):
        raise
    except gated:
        raise SourceError(f"{key}: {path} is gated; accept its terms on huggingface.co and run `hf auth login`") from None
    except missing:
        hint = "; check the name, or run `hf auth login` if the repository is private" if gated else ""
        raise SourceError(f"{key}: {path} does not exist{hint}") from None
    except network as error:
        raise SourceError(f"{key}: {path}: the hub cannot be reached ({error}); go online, or name a local copy") from None
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"{key}: {path} cannot be read: {error}") from None


def _as_json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)

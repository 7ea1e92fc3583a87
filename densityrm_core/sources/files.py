"""Raw files and their rows: JSON lines and Parquet, on this machine, on the Hugging Face hub, or wherever fsspec reaches."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import posixpath
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from densityrm_core.sources import hub
from densityrm_core.sources.rows import MalformedError, SourceError, check_text, decode

Progress = Callable[[str, int, int], None]  # name of a file, bytes that are here, bytes in all

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_BROKEN = (gzip.BadGzipFile, zlib.error, EOFError, pa.ArrowException)  # what readers raise of a file that is not what it says
_PARQUET_ROWS = 256  # rows held in memory at a time


@dataclass(frozen=True)
class RawRow:
    """`content` is a line as read, or a Parquet row, or why the Parquet row cannot be decoded."""

    origin: str
    content: bytes | dict[str, Any] | MalformedError

    @property
    def size(self) -> int:
        """Roughly its bytes in memory."""
        return len(self.content) if isinstance(self.content, bytes) else 4096

    @property
    def begins_as_object(self) -> bool:
        """Whether the row looks like an object at all, be it whole or not."""
        return self.content.lstrip()[:1] == b"{" if isinstance(self.content, bytes) else True

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


@dataclass(frozen=True)
class RawFile:
    """One file of a source. `stamp` is cheap and changes when the file may have changed; `identity` only with its content."""

    name: str  # relative to the folder that was asked for
    address: str
    size: int
    stamp: str
    key: str
    revision: str = ""
    remote: hub.HubFile | None = None

    @property
    def local(self) -> bool:
        return "://" not in self.address

    def identity(self) -> str:
        """SHA-256 of the bytes of a local or hub file; for another file system, what it tells of the file's version.

        Raises:
            SourceError: the file cannot be read.
        """
        if self.remote:
            return self.remote.sha256 or self.remote.oid
        if not self.local:
            return self.stamp
        with _explained(self.address, self.key), Path(self.address).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  any binary file does

    def rows(self, downloads: Path, report: Progress | None = None) -> Iterator[RawRow]:
        """Its rows in order; memory does not grow with their number. A hub file is downloaded first, or what is missing of it.

        Raises:
            SourceError: the file cannot be reached, or is not what its suffix says.
        """
        address = self.address
        if self.remote:
            address = str(hub.download(self.remote, downloads, self.key, partial(report, self.name) if report else None))
        row = 0
        try:
            opened = cast(fsspec.core.OpenFile, fsspec.open(address, "rb"))
            with _explained(self.address, self.key), cast(IO[bytes], opened.open()) as handle:
                for row, content in _rows_of(handle, self.name):
                    yield RawRow(f"{self.name}:{row}", content)
        except _BROKEN as error:
            raise SourceError(
                f"{self.address}: not a readable {posixpath.splitext(self.name)[1]} file ({error}) after row {row}; "
                "download it again"
            ) from None


def raw_files(path: str, key: str = "path") -> list[RawFile]:
    """Every file that `path` names, in the order of their names.

    Args:
        path: a file, a folder (searched recursively) or a glob: local, hf://datasets/<repo>/<glob>, or any file system that
            fsspec knows (s3://, gs://, ...).
        key: the setting that holds `path`, for messages.

    Raises:
        SourceError: nothing matches, or the place cannot be reached.
    """
    if not path.strip():
        raise SourceError(f"{key}: is empty; give a file, a folder or a glob of raw rows")
    if path.startswith("hf://"):
        return _hub_files(path, key)
    with _explained(path, key):
        fs, root = url_to_fs(path)
        return [_stamped(fs, file, name, key) for file, name in _find(fs, root, path, key)]


def _hub_files(path: str, key: str) -> list[RawFile]:
    files = [file for file in hub.hub_files(path, key) if file.path.endswith(SUFFIXES)]
    if not files:
        raise SourceError(f"{key}: {path} holds no file that ends in {', '.join(SUFFIXES)}")
    base = posixpath.commonpath([posixpath.dirname(file.path) for file in files])
    return [
        RawFile(
            name=posixpath.relpath(file.path, base) if base else file.path,
            address=file.address,
            size=file.size,
            stamp=file.sha256 or file.oid,
            key=key,
            revision=file.revision,
            remote=file,
        )
        for file in files
    ]


def _stamped(fs: fsspec.AbstractFileSystem, file: str, name: str, key: str) -> RawFile:
    if isinstance(fs, LocalFileSystem):
        status = Path(file).stat()
        return RawFile(name, file, status.st_size, f"{status.st_size}-{status.st_mtime_ns}", key)
    size = cast(int, fs.size(file) or 0)
    return RawFile(name, fs.unstrip_protocol(file), size, fs.ukey(file), key)


def _find(fs: fsspec.AbstractFileSystem, root: str, path: str, key: str) -> list[tuple[str, str]]:
    """The matching files with their names relative to the folder that was asked for, sorted."""
    if fs.isfile(root):
        if not root.endswith(SUFFIXES):
            raise SourceError(f"{key}: {path} is none of {', '.join(SUFFIXES)}")
        return [(root, posixpath.basename(root))]
    if fs.isdir(root):
        base, found = root, cast(list[str], fs.find(root))
    else:
        base = posixpath.dirname(root[: min(i for i in map(root.find, "*?[") if i >= 0)]) if fsspec.core.has_magic(root) else root
        matches = cast(list[str], fs.glob(root)) if base != root else []
        found = [f for m in matches for f in ([m] if fs.isfile(m) else cast(list[str], fs.find(m)))]
        if not matches:
            raise SourceError(f"{key}: {path} does not exist or matches no file; give a file, a folder or a glob of raw rows")
    files = sorted({f for f in found if f.endswith(SUFFIXES) and not posixpath.basename(f).startswith(".")})
    if not files:
        raise SourceError(f"{key}: {path} holds no file that ends in {', '.join(SUFFIXES)}")
    return [(f, posixpath.relpath(f, base)) for f in files]


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
    for batch in pq.ParquetFile(handle, pre_buffer=False).iter_batches(batch_size=_PARQUET_ROWS):
        for i in range(batch.num_rows):
            try:
                yield cast(dict[str, Any], batch.slice(i, 1).to_pylist()[0])
            except (ValueError, OverflowError) as error:  # invalid UTF-8, dates out of range
                yield MalformedError("broken_json", str(error))


@contextmanager
def _explained(path: str, key: str) -> Generator[None]:
    """Turn what a file system raises into one SourceError."""
    try:
        yield
    except (SourceError, *_BROKEN):
        raise
    except FileNotFoundError:
        raise SourceError(f"{key}: {path} does not exist") from None
    except ImportError as error:
        raise SourceError(f"{key}: {path} needs a package that is not installed: {error}") from None
    except Exception as error:  # whatever a file system's own client raises: the person needs the place and the reason
        raise SourceError(f"{key}: {path} cannot be read: {error or type(error).__name__}") from None


def _as_json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)

"""Files and folders that are there whole or not at all, locks, and hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"


@contextlib.contextmanager
def temporary_folder(path: Path) -> Generator[Path]:
    """A locked folder beside `path`, to make things in; removed at the end, or by `sweep` if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_name(path)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def held(path: Path) -> Path:
    """Another path to the file that `path` names now: it still names that file when `path` has been replaced.

    Good in this process only, and until it ends.
    """
    return Path(f"/proc/self/fd/{os.open(path, os.O_RDONLY)}")


def _locked_file(path: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary file under lock; another one where a sweep came between creation and lock."""
    while True:
        temporary = temporary_name(path)
        file = temporary.open("wb")
        if lock(file.fileno()) and temporary.exists():
            return temporary, file
        file.close()


@contextlib.contextmanager
def replacing(path: Path) -> Generator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends without an exception, and never in part.

    Until then it has another name and a lock, so that `sweep` removes the leftover of a killed process and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = _locked_file(path)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        file.close()
        temporary.unlink(missing_ok=True)


def file_hash(file: IO[bytes]) -> str:
    """32 hex digits of the SHA-256 of the rest of a file."""
    return hashlib.file_digest(file, "sha256").hexdigest()[:32]  # pyright: ignore[reportArgumentType]  any binary file does


def temporary_name(path: Path) -> Path:
    """Where something that will become `path` is made: beside it, hidden, and known to `sweep`."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}{TEMPORARY}")


def lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file or folder, if nobody has it; the system drops it when its process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sweep(folder: Path) -> list[Path]:
    """Remove what killed processes left unfinished below `folder`; what a living process still writes is locked and stays."""
    removed: list[Path] = []
    for path in sorted(folder.rglob(f".*{TEMPORARY}")):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if lock(descriptor):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    removed.append(path)
            finally:
                os.close(descriptor)
    return removed

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
    folder, descriptor = locked_folder(path)
    try:
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def held(path: Path) -> Path:
    """Another path to the file that `path` names now: it still names that file when `path` has been replaced.

    Good in this process only, and until it ends.
    """
    return Path(f"/proc/self/fd/{os.open(path, os.O_RDONLY)}")


def locked_folder(path: Path) -> tuple[Path, int]:
    """A new temporary folder for what will become `path`, and the descriptor that keeps `sweep` from it until closed."""
    while True:
        folder = temporary_name(path)
        folder.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            if lock(descriptor) and folder.exists():
                return folder, descriptor
            os.close(descriptor)


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
    for path in _unfinished(folder):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if lock(descriptor):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    removed.append(path)
            finally:
                os.close(descriptor)
    return removed


def _unfinished(folder: Path) -> list[Path]:
    """What has a temporary name. `os.walk` passes over a folder that another process renames at this moment, `rglob` raises."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        found += [Path(parent, name) for name in (*folders, *files) if _is_temporary(name)]
        folders[:] = [name for name in folders if not _is_temporary(name)]
    return sorted(found)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(TEMPORARY)

"""Files of a dataset on the Hugging Face hub: which there are at one commit, and a verified local copy of each."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock
from fsspec.core import has_magic
from fsspec.utils import glob_translate
from huggingface_hub import HfApi, constants, errors, hf_hub_url, parse_hf_uri
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers, silent_tqdm

from densityrm_core.hardware import free_disk
from densityrm_core.sources.rows import SourceError

Report = Callable[[int, int], None]  # bytes that are here, bytes in all
T = TypeVar("T")

_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try; begins anew whenever bytes arrive
_LONGEST_WAIT = 300  # the hub counts requests in windows of five minutes
_IN_TROUBLE = (500, 502, 503, 504)
_LOOK_UP = (429, *_IN_TROUBLE)
_log = logging.getLogger(__name__)


class HubUnreachableError(SourceError):
    """The hub does not answer, or may not be asked; whether it has the files is not known."""


@dataclass(frozen=True)
class HubFile:
    """One file at one commit. `sha256` is empty where git holds the file itself; `oid` is the id of its git blob."""

    repo: str
    revision: str
    path: str
    size: int
    sha256: str
    oid: str

    @property
    def address(self) -> str:
        return f"hf://datasets/{self.repo}@{self.revision}/{self.path}"


def hub_files(url: str, key: str) -> list[HubFile]:
    """Files that `url` names, sorted by path, all of the commit that the branch or tag stands at now.

    Args:
        url: hf://datasets/<owner>/<repo>[@revision][/<path>]; the path is a file, a folder (searched recursively) or a glob.
        key: the setting that holds `url`, for messages.

    Raises:
        SourceError: nothing matches, or the hub cannot be reached or does not show the files.
    """
    with _explained(url, key):
        place = parse_hf_uri(url)
        if place.type != "dataset":
            raise SourceError(f"{key}: {url} names a {place.type}; give hf://datasets/<owner>/<repo>/<path>")
        path, api = place.path_in_repo.strip("/"), HfApi(endpoint=constants.ENDPOINT)
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        commit = _patiently(lambda: api.dataset_info(place.id, revision=place.revision, timeout=timeout).sha, _LOOK_UP)
        if not commit:
            raise SourceError(f"{key}: {url}: the hub names no commit; give one after the repository: {place.id}@<commit>")
        found = _files_at(api, place.id, commit, path)
    if not found:
        raise SourceError(f"{key}: {url} matches no file; give a file, a folder or a glob that commit {commit[:8]} has")
    files = [HubFile(place.id, commit, f.path, f.size, f.lfs.sha256 if f.lfs else "", f.blob_id) for f in found]
    return sorted(files, key=lambda file: file.path)


def ask_for(url: str, key: str, timeout: float) -> None:
    """Ask once whether the hub has the dataset that `url` names, see `hub_files`.

    Raises:
        HubUnreachableError: the hub does not answer in `timeout` seconds.
        SourceError: it answers that the dataset is not to be had.
    """
    with _explained(url, key):
        place = parse_hf_uri(url)
        HfApi(endpoint=constants.ENDPOINT).dataset_info(place.id, revision=place.revision, timeout=timeout)


def download(file: HubFile, folder: Path, key: str, report: Report | None = None) -> Path:
    """The local copy of `file` under `folder`; continues where an earlier download stopped, a finished one asks nothing.

    Copies are kept by content: when a branch moves on, unchanged files are not fetched again.

    Raises:
        SourceError: the file cannot be fetched or stored (what arrived is kept), or is not what the hub lists (it is deleted).
    """
    target = folder / file.repo.replace("/", "--") / (file.sha256 or file.oid) / posixpath.basename(file.path)
    partial = Path(f"{target}.partial")
    with _explained(file.address, key):
        if _size(target) == file.size:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if _size(target) != file.size:
                _patiently(lambda: _fetch(file, partial, report), _IN_TROUBLE, lambda: _size(partial))
                _verify(file, partial, key)
                partial.replace(target)
    return target


def _files_at(api: HfApi, repo: str, commit: str, path: str) -> list[RepoFile]:
    tree, matches = path, None
    if has_magic(path):
        tree = posixpath.dirname(path[: min(i for i in map(path.find, "*?[") if i >= 0)])
        matches = re.compile(glob_translate(path))
    elif path:
        named = _patiently(lambda: api.get_paths_info(repo, [path], revision=commit, repo_type="dataset"), _LOOK_UP)
        if not named or isinstance(named[0], RepoFile):
            return cast(list[RepoFile], named)
    entries = api.list_repo_tree(repo, tree or None, recursive=True, revision=commit, repo_type="dataset")
    found = [entry for entry in entries if isinstance(entry, RepoFile)]
    if matches is None:
        return found
    # A folder that matches stands for all that it holds.
    return [file for file in found if any(matches.match(p) for p in _and_parents(file.path))]


def _and_parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]


class _Partial(io.BufferedWriter):
    """Appends to a file and tells how much it holds."""

    def __init__(self, path: Path, report: Report | None, total: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._report, self._total = report, total

    def write(self, buffer: bytes, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        written = super().write(buffer)
        if self._report:
            self._report(self.tell(), self._total)
        return written


def _fetch(file: HubFile, partial: Path, report: Report | None) -> None:
    """Append what `partial` lacks. hf_hub_download is not used: it begins anew in every process and deletes what it had."""
    with _Partial(partial, report, file.size) as handle:
        if handle.tell() > file.size:
            handle.truncate(0)
            handle.seek(0)
        have = handle.tell()
        if have == file.size:
            return
        if free_disk(partial.parent) < file.size - have:
            raise OSError(errno.ENOSPC, "no space left")
        address = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.revision, endpoint=constants.ENDPOINT)
        # Ranges of a compressed answer would not be ranges of the file.
        headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
        silent = cast(Any, silent_tqdm)
        http_get(address, handle, resume_size=have, headers=headers, tqdm_class=silent)


def _verify(file: HubFile, partial: Path, key: str) -> None:
    """Delete `partial` and raise SourceError unless its bytes are those that the hub lists."""
    # A git blob's id is the SHA-1 of a header and the bytes.
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with partial.open("rb+") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
        os.fsync(handle.fileno())  # or a power cut could leave a finished name with unwritten bytes
    if digest.hexdigest() != (file.sha256 or file.oid):
        partial.unlink()
        raise SourceError(
            f"{key}: {file.address}: the bytes that arrived are not those that the hub lists "
            f"({'SHA-256' if file.sha256 else 'git blob'} {digest.hexdigest()[:16]}..., "
            f"not {(file.sha256 or file.oid)[:16]}...); they are deleted, run again to fetch them anew"
        )


def _size(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def _patiently(call: Callable[[], T], statuses: tuple[int, ...], arrived: Callable[[], int] = lambda: 0) -> T:
    """What `call` returns, tried again on broken connections and `statuses` while it gets on, or a few times if it does not.

    The hub's library itself waits out a 429 of a file's content and lists trees patiently, but gives up at the first 5xx of a
    content, at the first reset of its connection, and at the first failure of any other look-up.
    """
    failures, before = 0, arrived()
    while True:
        try:
            return call()
        except HTTPError as error:
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in statuses:
                raise
            failures, before = (failures if arrived() <= before else 0), arrived()
            asked = _asked_wait(error)
            if failures >= len(_WAITS) or asked > _LONGEST_WAIT:
                raise
            wait = max(_WAITS[failures], asked)
            failures += 1
            _log.warning("The hub does not deliver (%s); trying again in %g s", _brief(error), wait)
            time.sleep(wait)


def _asked_wait(error: Exception) -> int:
    """Seconds that the hub asks to wait, 0 where it asks for nothing."""
    if not isinstance(error, errors.HfHubHTTPError):
        return 0
    limit = parse_ratelimit_headers(error.response.headers)
    after = error.response.headers.get("Retry-After", "")
    return limit.reset_in_seconds if limit and limit.remaining == 0 else int(after) if after.isdigit() else 0


@contextmanager
def _explained(url: str, key: str) -> Generator[None]:
    """Turn what the hub's library or the disk raises into one SourceError."""
    try:
        yield
    except SourceError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        silent = isinstance(error, (HTTPError, ConnectionError, TimeoutError)) and not isinstance(error, errors.HfHubHTTPError)
        raise (HubUnreachableError if silent else SourceError)(f"{key}: {url} {_what_to_do(error)}") from None


def _what_to_do(error: Exception) -> str:
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError):
        return "is gated; accept its terms on huggingface.co and run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "names a revision that the repository does not have; give one of its branches, tags or commits"
    if status == 401 and "Invalid credentials" in str(error):
        return "is refused: the hub does not know the token; run `hf auth login`, or correct or unset HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return "does not exist or is private; check the name, or run `hf auth login` if the repository is private"
    if isinstance(error, errors.EntryNotFoundError):
        return "does not exist; check the path inside the repository"
    if status == 403:
        return f"is refused ({_brief(error)}); run `hf auth login` with a token that may read it"
    if status == 429:
        return f"is rate limited ({_brief(error)}); wait, or run `hf auth login` for higher limits; what arrived is kept"
    if status >= 500:
        return f"is not delivered: the hub is in trouble ({_brief(error)}); try again later, what arrived is kept"
    if status:
        return f"is refused by the hub: {_brief(error)}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "is not looked up: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it, or name a local copy"
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return (
            f"cannot be had: {constants.ENDPOINT} cannot be reached ({_brief(error)}); "
            "go online, or name a local copy; what arrived is kept"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot be stored ({_brief(error)}); free disk space and run again, what arrived is kept"
    return f"cannot be read: {_brief(error)}"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

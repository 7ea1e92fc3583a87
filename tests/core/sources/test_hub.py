from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from densityrm_core.settings import PlantedSettings, SourceSettings
from densityrm_core.sources import Folders, read_source
from densityrm_core.sources import hub as hub_module
from densityrm_core.sources.hub import HubFile, download, hub_files
from densityrm_core.sources.rows import SourceError

from .hub_server import COMMIT, REPO, Fault, Hub, blob_id, running

KEY = "sources.hh_rlhf.path"
ROOT = f"hf://datasets/{REPO}"
BIG = "data/big.jsonl"
CHUNK = constants.DOWNLOAD_CHUNK_SIZE
FILES = {
    "README.md": b"# Pairs\n",
    "data/a.jsonl.gz": b"first" * 100,
    "data/deep/b.jsonl.gz": b"second" * 100,
    "data/c d#1.parquet": b"third",
    "test/a.jsonl.gz": b"fourth",
    BIG: random.Random(0).randbytes(3 * CHUNK + 17),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub(dict(FILES))) as server:
        _point_to(server.url, monkeypatch)
        yield server


def _point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub_module, "_WAITS", (0.01, 0.02))


def paths(url: str) -> list[str]:
    return [file.path for file in hub_files(url, KEY)]


def file_at(path: str) -> HubFile:
    [file] = hub_files(f"{ROOT}/{path}", KEY)
    return file


def message(url: str) -> str:
    with pytest.raises(SourceError) as error:
        hub_files(url, KEY)
    assert str(error.value).startswith(f"{KEY}: {url} ")
    return str(error.value)


def download_message(file: HubFile, folder: Path) -> str:
    with pytest.raises(SourceError) as error:
        download(file, folder, KEY)
    assert str(error.value).startswith(f"{KEY}: {ROOT}@{COMMIT}/{file.path} ") or "bytes that arrived" in str(error.value)
    return str(error.value)


def test_listed_file_carries_commit_size_and_hashes(hub: Hub) -> None:
    data = FILES["data/a.jsonl.gz"]
    sha256 = hashlib.sha256(data).hexdigest()
    assert file_at("data/a.jsonl.gz") == HubFile(REPO, COMMIT, "data/a.jsonl.gz", len(data), sha256, blob_id(data))


def test_file_outside_lfs_has_no_sha256(hub: Hub) -> None:
    assert (file_at("README.md").sha256, file_at("README.md").oid) == ("", blob_id(FILES["README.md"]))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", sorted(FILES)),
        ("@v1/test", ["test/a.jsonl.gz"]),
        ("/data/", [p for p in sorted(FILES) if p.startswith("data/")]),
        ("/data/*.gz", ["data/a.jsonl.gz"]),
        ("/**/a.jsonl.gz", ["data/a.jsonl.gz", "test/a.jsonl.gz"]),
        ("/data/d*", ["data/deep/b.jsonl.gz"]),
        ("/data/c d#1.parquet", ["data/c d#1.parquet"]),
        ("/data/[ab].jsonl.gz", ["data/a.jsonl.gz"]),
    ],
)
def test_folder_and_glob_name_their_files_in_order(hub: Hub, path: str, expected: list[str]) -> None:
    assert paths(ROOT + path) == expected


@pytest.mark.parametrize("path", ["README.md", BIG, "data/c d#1.parquet"])
def test_downloaded_file_has_the_exact_bytes(hub: Hub, tmp_path: Path, path: str) -> None:
    copy = download(file_at(path), tmp_path, KEY)
    assert (copy.name, copy.read_bytes() == FILES[path]) == (path.split("/")[-1], True)


def test_finished_file_asks_the_hub_for_nothing(hub: Hub, tmp_path: Path) -> None:
    file = file_at(BIG)
    copy = download(file, tmp_path, KEY)
    asked = len(hub.requests)
    assert download(replace(file, revision="f" * 40), tmp_path, KEY) == copy
    assert len(hub.requests) == asked


def test_empty_file_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.files["empty.jsonl"] = b""
    assert download(file_at("empty.jsonl"), tmp_path, KEY).read_bytes() == b""


def test_progress_ends_at_the_size(hub: Hub, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    download(file_at(BIG), tmp_path, KEY, lambda here, size: reports.append((here, size)))
    size = len(FILES[BIG])
    assert reports == [(CHUNK, size), (2 * CHUNK, size), (3 * CHUNK, size), (size, size)]


@pytest.mark.parametrize("end", ["cut", "reset"])
def test_broken_connection_is_continued_where_it_broke(hub: Hub, tmp_path: Path, end: str) -> None:
    hub.faults["resolve"] = Fault(bytes_sent=2 * CHUNK + 5, end=end, times=1)
    assert download(file_at(BIG), tmp_path, KEY).read_bytes() == FILES[BIG]
    assert hub.ranges() == [None, f"bytes={2 * CHUNK}-"]


def test_connection_may_break_for_ever_while_bytes_arrive(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_WAITS", (0.01,))
    hub.faults["resolve"] = Fault(bytes_sent=CHUNK + 5, end="reset", times=3)
    assert download(file_at(BIG), tmp_path, KEY).read_bytes() == FILES[BIG]
    assert hub.ranges() == [None, *(f"bytes={n * CHUNK}-" for n in (1, 2, 3))]


def test_killed_download_is_continued_by_the_next_process(hub: Hub, tmp_path: Path) -> None:
    hub.faults["resolve"] = Fault(bytes_sent=2 * CHUNK + 5, end="stall", times=1)
    code = (
        "import sys; from pathlib import Path; from densityrm_core.sources.hub import download, hub_files\n"
        f"print(download(hub_files({ROOT + '/' + BIG!r}, 'path')[0], Path(sys.argv[1]), 'path'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    first = subprocess.Popen(command, env=environment)  # noqa: S603
    deadline = time.monotonic() + 20
    while not any(p.stat().st_size >= 2 * CHUNK for p in tmp_path.rglob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    assert Path(second.stdout.strip()).read_bytes() == FILES[BIG]
    assert hub.ranges() == [None, f"bytes={2 * CHUNK}-"]
    assert not list(tmp_path.rglob("*.partial"))


def test_token_stays_with_the_hub_when_the_content_lies_elsewhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    file = file_at(BIG)
    elsewhere = hub.url.replace("127.0.0.1", "localhost") + f"/datasets/{REPO}/resolve/{COMMIT}/{BIG}"
    hub.faults["resolve"] = Fault(302, {"Location": elsewhere}, times=1)
    assert download(file, tmp_path, KEY).read_bytes() == FILES[BIG]
    assert hub.tokens[-2:] == ["Bearer hf_secret", None]


def test_file_wanted_by_several_at_once_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    file = file_at(BIG)
    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(lambda _: download(file, tmp_path, KEY), range(4)))
    assert (len(copies), hub.ranges()) == (1, [None])


def test_rate_limit_is_waited_out(hub: Hub, tmp_path: Path) -> None:
    for kind in ("info", "resolve"):
        hub.faults[kind] = Fault(429, {"Retry-After": "1"}, times=1)
    begin = time.monotonic()
    assert download(file_at("README.md"), tmp_path, KEY).read_bytes() == FILES["README.md"]
    assert time.monotonic() - begin >= 2


def test_lasting_rate_limit_of_the_content_says_to_wait(hub: Hub, tmp_path: Path) -> None:
    file = file_at("README.md")
    hub.faults["resolve"] = Fault(429, {"Retry-After": "0"})
    assert "rate limited (429 Too Many Requests" in download_message(file, tmp_path)


def test_longer_wait_than_the_hubs_window_is_not_waited(hub: Hub) -> None:
    hub.faults["info"] = Fault(429, {"RateLimit": '"api";r=0;t=3000'})
    assert "Retry after 3000 seconds" in message(ROOT)
    assert len(hub.requests) == 1


def test_server_error_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    for kind in ("info", "paths-info", "resolve"):
        hub.faults[kind] = Fault(503, times=2)
    assert download(file_at("README.md"), tmp_path, KEY).read_bytes() == FILES["README.md"]


def test_lasting_server_error_keeps_what_arrived(hub: Hub, tmp_path: Path) -> None:
    file = file_at(BIG)
    folder = tmp_path / "lab--pairs" / file.sha256
    folder.mkdir(parents=True)
    (folder / "big.jsonl.partial").write_bytes(FILES[BIG][:1000])
    hub.faults["resolve"] = Fault(500)
    assert "the hub is in trouble" in download_message(file, tmp_path)
    del hub.faults["resolve"]
    assert download(file, tmp_path, KEY).read_bytes() == FILES[BIG]
    assert hub.ranges() == ["bytes=1000-"] * 4


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "is gated; accept its terms on huggingface.co and run `hf auth login`"),
        (401, {"X-Error-Code": "GatedRepo"}, "is gated; accept its terms on huggingface.co and run `hf auth login`"),
        (401, {}, "does not exist or is private; check the name, or run `hf auth login`"),
        (404, {"X-Error-Code": "RepoNotFound"}, "does not exist or is private"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "the hub does not know the token"),
        (403, {"X-Error-Message": "no permission"}, "no permission"),
        (429, {"Retry-After": "0"}, "is rate limited (429 Too Many Requests"),
        (500, {}, "the hub is in trouble (Server error '500"),
        (418, {}, "is refused by the hub: Client error '418"),
    ],
)
def test_refusal_says_what_to_do(hub: Hub, tmp_path: Path, status: int, headers: dict[str, str], expected: str) -> None:
    file = file_at("README.md")
    hub.faults["info"] = Fault(status, headers)
    assert expected in message(f"{ROOT}/README.md")
    if status != 429:
        hub.faults["resolve"] = Fault(status, headers)
        assert expected in download_message(file, tmp_path)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://datasets/lab/absent/x", "does not exist or is private"),
        (f"{ROOT}@v9/data", "names a revision that the repository does not have"),
        (f"{ROOT}/absent.jsonl", "matches no file; give a file, a folder or a glob that commit 01234567 has"),
        (f"{ROOT}/data/*.zip", "matches no file"),
        (f"{ROOT}/absent/*.zip", "does not exist; check the path inside the repository"),
        ("hf://lab/model/x", "names a model; give hf://datasets/<owner>/<repo>/<path>"),
        ("hf://datasets/lab", "cannot be read: Invalid HF URI"),
        (f"{ROOT}/a**b", "cannot be read: Invalid pattern"),
    ],
)
def test_what_is_not_there_is_named(hub: Hub, url: str, expected: str) -> None:
    assert expected in message(url)


def test_file_that_left_the_hub_is_named(hub: Hub, tmp_path: Path) -> None:
    assert "does not exist; check the path" in download_message(replace(file_at(BIG), path="gone"), tmp_path)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    _point_to("http://127.0.0.1:9", monkeypatch)
    assert "http://127.0.0.1:9 cannot be reached" in message(ROOT)
    assert "go online, or name a local copy" in message(ROOT)


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it, or name a local copy" in message(ROOT)


@pytest.mark.parametrize("path", ["README.md", "data/a.jsonl.gz"])
@pytest.mark.parametrize("wrong", [bytes.swapcase, lambda data: data[:-1], lambda data: data + b"x"])
def test_wrong_bytes_are_deleted(hub: Hub, tmp_path: Path, path: str, wrong: Callable[[bytes], bytes]) -> None:
    hub.served[path] = wrong(FILES[path])
    file = file_at(path)
    assert "not those that the hub lists" in download_message(file, tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".lock"}
    hub.served.clear()
    assert download(file, tmp_path, KEY).read_bytes() == FILES[path]


def test_file_larger_than_the_disk_is_not_begun(hub: Hub, tmp_path: Path) -> None:
    assert "free disk space and run again" in download_message(replace(file_at(BIG), size=10**18), tmp_path)
    assert hub.ranges() == []


def test_full_disk_keeps_what_arrived(hub: Hub, tmp_path: Path) -> None:
    def full(here: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SourceError, match="free disk space and run again, what arrived is kept"):
        download(file_at(BIG), tmp_path, KEY, full)
    assert download(file_at(BIG), tmp_path, KEY).read_bytes() == FILES[BIG]
    assert hub.ranges() == [None, f"bytes={CHUNK}-"]


def test_a_source_on_the_hub_is_read_once_and_its_revision_recorded(hub: Hub, tmp_path: Path) -> None:
    turn = "\n\nHuman: Hi\n\nAssistant:"
    rows = [{"chosen": f"{turn} Hello {i}", "rejected": f"{turn} What?"} for i in range(100)]
    hub.files["train/rows.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    settings = SourceSettings(path=f"hf://datasets/{REPO}/train/*.jsonl")
    folders = Folders(tmp_path / "out", tmp_path / "raw", tmp_path / "shards")
    first, second = (read_source("hh_rlhf", settings, PlantedSettings(), folders) for _ in range(2))
    assert first.pairs.rows == 100
    assert [(file.name, file.revision, file.reused) for file in first.files] == [("rows.jsonl", COMMIT, False)]
    assert first.files[0].identity == hashlib.sha256(hub.files["train/rows.jsonl"]).hexdigest()
    assert second.files[0].reused
    assert len(hub.ranges()) == 1

"""Raw files -> one table of pairs and one of rejects. What was read of a file is kept, so that only new files are read again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from densityrm_core.files import replacing
from densityrm_core.processes import ordered_map
from densityrm_core.settings import PLANTED, PlantedSettings, SourceSettings
from densityrm_core.sources.files import RawFile, RawRow, raw_files
from densityrm_core.sources.nanochat_pairs import pairs_file
from densityrm_core.sources.parsing import Parsed, SourceName, parse_rows
from densityrm_core.sources.planted import planted_file
from densityrm_core.sources.rows import SourceError
from densityrm_core.storage import Stored, batches, table_writer
from densityrm_core.tables import REJECTS, SOURCE_PAIRS

_PARSER = 1  # raise when the same raw rows shall give other pairs or rejects
_CHUNK_ROWS, _CHUNK_BYTES = 512, 1 << 20  # what is parsed at a time
_SPREAD_FROM = 2 << 20  # bytes of a file from which on several processes pay

Say = Callable[[str], None]


@dataclass(frozen=True)
class Folders:
    """`out` receives pairs.parquet and rejects.parquet; `raw` holds planted rows and downloads; `shards` what was read before."""

    out: Path
    raw: Path
    shards: Path


@dataclass(frozen=True)
class FileRead:
    """One raw file and what it gave."""

    name: str
    size: int
    identity: str
    revision: str
    rows: int
    candidates: int
    malformed: int
    first_malformed: str
    objects: int
    reused: bool = False


@dataclass(frozen=True)
class SourceRead:
    """What one source gave. `candidates == pairs.rows + sum(reasons.values())`."""

    pairs: Stored
    rejects: Stored
    files: tuple[FileRead, ...]
    reasons: dict[str, int]  # candidate pairs behind each reject reason

    @property
    def rows_read(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def candidates(self) -> int:
        return sum(file.candidates for file in self.files)


def files_of(name: SourceName, settings: SourceSettings, planted: PlantedSettings, raw: Path) -> list[RawFile]:
    """The raw files of a source, without reading them; planted rows are written under `raw` first, unless they are there.

    Raises:
        SourceError: the path names nothing readable.
    """
    if not settings.enabled:
        return []
    path = str(planted_file(name, planted, raw)) if settings.path == PLANTED else settings.path
    return raw_files(pairs_file(path) if name == "nanochat" and path else path, f"sources.{name}.path")


def read_source(
    name: SourceName,
    settings: SourceSettings,
    planted: PlantedSettings,
    folders: Folders,
    processes: int = 1,
    say: Say = lambda text: None,
) -> SourceRead:
    """Every row of a source as canonical pairs and rejects, file by file; memory does not grow with the rows.

    A file whose content was read before, with the same settings, is taken from `folders.shards`: a source that grew costs its
    new files, and a killed read goes on after the last file it had finished.

    Args:
        processes: how many parse rows of a large file.
        say: hears of progress, a line at a time.

    Raises:
        SourceError: the path names nothing readable, there are no rows, a file is not what its suffix says, or more rows are
            malformed than `settings.max_malformed`.
    """
    shards = _Shards(name, settings, folders, processes, say)
    read: list[FileRead] = []
    files = files_of(name, settings, planted, folders.raw)
    for number, file in enumerate(files, start=1):
        left = None if settings.max_rows is None else settings.max_rows - sum(f.rows for f in read)
        if left == 0:
            break
        read.append(shards.read(file, left))
        _require_wellformed(name, settings, read)
        done = "kept from an earlier read" if read[-1].reused else "read"
        say(f"file {number}/{len(files)} {file.name}: {read[-1].rows:,} rows {done}")
    if read and not any(file.rows for file in read):
        raise SourceError(
            f"sources.{name}.path: {settings.path} holds no rows; name other files, or set sources.{name}.enabled: false"
        )
    result = shards.gather(read)
    shards.forget_others()
    return result


class _Shards:
    """The pairs and rejects of single files, under a name that follows from the file's content and the settings."""

    def __init__(self, name: SourceName, settings: SourceSettings, folders: Folders, processes: int, say: Say) -> None:
        self._name: SourceName = name
        self._settings, self._processes, self._say = settings, processes, say
        self._folders, self._folder = folders, folders.shards / name
        self._used: list[str] = []

    def read(self, file: RawFile, limit: int | None) -> FileRead:
        """The shard of `file`, of its first `limit` rows; parsed unless it is there."""
        reading = {k: v for k, v in self._settings.reading().items() if k not in ("path", "enabled", "max_malformed", "max_rows")}
        identity = file.identity()
        content = json.dumps([_PARSER, self._name, reading, file.name, identity, limit], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:24]
        self._used.append(key)
        mark = self._folder / f"{key}.json"
        if mark.exists() and all(self._path(key, part).exists() for part in ("pairs", "rejects")):
            return FileRead(**json.loads(mark.read_text(encoding="utf-8")), reused=True)
        found = self._parse(file, key, identity, limit)
        with replacing(mark) as record:  # last: from here on the shard counts
            record.write(json.dumps({k: v for k, v in asdict(found).items() if k != "reused"}).encode())
        return found

    def gather(self, read: list[FileRead]) -> SourceRead:
        """All shards in the order of their files, as the source's two tables."""
        out = self._folders.out
        reasons: Counter[str] = Counter()
        with (
            table_writer(out / "pairs.parquet", SOURCE_PAIRS) as pairs,
            table_writer(out / "rejects.parquet", REJECTS) as rejects,
        ):
            for key in self._used:
                for frame in batches(self._path(key, "pairs")):
                    pairs.write(frame)
                for frame in batches(self._path(key, "rejects")):
                    rejects.write(frame)
                    for reason, count in frame.select("reason", "pairs").iter_rows():
                        reasons[reason] += count
        return SourceRead(pairs.stored, rejects.stored, tuple(read), dict(sorted(reasons.items())))

    def forget_others(self) -> None:
        """Remove the shards of files that are gone or changed."""
        if self._folder.exists():
            for path in self._folder.iterdir():
                if not path.name.startswith(".") and path.name.split(".")[0] not in self._used:
                    path.unlink(missing_ok=True)

    def _path(self, key: str, part: str) -> Path:
        return self._folder / f"{key}.{part}.parquet"

    def _parse(self, file: RawFile, key: str, identity: str, limit: int | None) -> FileRead:
        rows = islice(file.rows(self._folders.raw / "hub", self._downloaded), limit)
        parse = partial(parse_rows, self._name, self._settings)
        processes = self._processes if file.size >= _SPREAD_FROM else 1
        total = FileRead(file.name, file.size, identity, file.revision, 0, 0, 0, "", 0)
        with (
            table_writer(self._path(key, "pairs"), SOURCE_PAIRS) as pairs,
            table_writer(self._path(key, "rejects"), REJECTS) as rejects,
        ):
            for parsed in ordered_map(parse, _chunks(rows), processes):
                pairs.write(parsed.pairs)
                rejects.write(parsed.rejects)
                total = _plus(total, parsed, file)
                self._say(f"{file.name}: {total.rows:,} rows read, {total.candidates:,} candidate pairs")
        return total

    def _downloaded(self, name: str, here: int, size: int) -> None:
        self._say(f"{name}: {here / 2**20:,.0f} of {size / 2**20:,.0f} MiB downloaded")


def _chunks(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    chunk: list[RawRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.size
        if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _plus(total: FileRead, parsed: Parsed, file: RawFile) -> FileRead:
    first = total.first_malformed or (f"{file.address}:{parsed.first_malformed}" if parsed.malformed else "")
    return FileRead(
        **{k: v for k, v in asdict(total).items() if k in ("name", "size", "identity", "revision")},
        rows=total.rows + parsed.rows,
        candidates=total.candidates + parsed.candidates,
        malformed=total.malformed + parsed.malformed,
        first_malformed=first,
        objects=total.objects + parsed.objects,
    )


def _require_wellformed(name: SourceName, settings: SourceSettings, read: list[FileRead]) -> None:
    for file in read:
        if file.rows and not file.objects:
            raise SourceError(
                f"{file.first_malformed} (and no other of the {file.rows} rows is a JSON object): "
                f"{file.name} is not what its suffix says; download it again or leave it out of sources.{name}.path"
            )
    malformed = [file for file in read if file.malformed]
    count = sum(file.malformed for file in malformed)
    if count > settings.max_malformed:
        raise SourceError(
            f"{malformed[0].first_malformed} (the first of {count} malformed rows, {settings.max_malformed} allowed). "
            f"Repair the file, or raise sources.{name}.max_malformed to keep such rows as rejects."
        )

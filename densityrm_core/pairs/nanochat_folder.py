"""The file layout of nanochat's reward-model scripts: tables written to it, and a folder of it checked before it is a source.

pairs_all.jsonl       one pair a line: id, prompt, chosen, rejected, src; ours add prompt_id, split, context and scores
prompts_all.jsonl     one prompt a line: id, prompt; ours add split and pairs
stats.txt             total_pairs, unique_prompts, src_<source>; ours add split_<split> and prompts_with_weight
embeddings_offline/   density_weights.npy, prompts_list.json: entry i belongs to line i of prompts_all.jsonl;
                      embeddings_metadata.json: how the weights were made
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from densityrm_core.experiment import Experiment
from densityrm_core.files import temporary_folder, temporary_name
from densityrm_core.settings import SourceSettings
from densityrm_core.sources.files import raw_files
from densityrm_core.sources.nanochat_pairs import PAIRS_FILE, pairs_file
from densityrm_core.sources.parsing import parse_rows
from densityrm_core.storage import batches, read_frame

PROMPTS_FILE, STATS_FILE = "prompts_all.jsonl", "stats.txt"
WEIGHTS_FILE = "embeddings_offline/density_weights.npy"
LIST_FILE = "embeddings_offline/prompts_list.json"
METADATA_FILE = "embeddings_offline/embeddings_metadata.json"

_FILES = {PAIRS_FILE, PROMPTS_FILE, STATS_FILE, WEIGHTS_FILE, LIST_FILE, METADATA_FILE}
_MARK = "written_by"  # a line of stats.txt that only an export has
_PAIR = ("pair_id", "prompt", "chosen", "rejected", "src", "prompt_id", "split", "context", "score_chosen", "score_rejected")
_LINE_ENDS = {c.encode(): json.dumps(c)[1:-1].encode() for c in "\u2028\u2029\x85"}  # to str.splitlines, not to JSON
_CHUNK = 512  # rows parsed at a time

Report = Callable[[str, int], None]  # (file, rows so far)


class NanochatError(ValueError):
    """Tables cannot be exported, or the place for them is taken; the message says what to do."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote. `weighed` counts the prompts with a positive weight; None where there are no weights yet."""

    folder: Path
    pairs: int
    prompts: int
    sources: dict[str, int]
    splits: dict[str, int]
    weighed: int | None


@dataclass(frozen=True)
class ImportSummary:
    """What a nanochat folder would give as a source. `rejects` counts candidate pairs by reason."""

    file: Path
    rows: int
    pairs: int
    rejects: dict[str, int]
    sources: dict[str, int]
    malformed: int
    first_malformed: str  # line and reason


def export_nanochat(tables: Path, out: Path, report: Report | None = None, experiment: Experiment | None = None) -> ExportSummary:
    """Write the tables in nanochat's layout, whole or not at all; a former export at `out` is replaced.

    Pairs and prompts stream through; of the prompts only ids and weights are held in memory.

    Args:
        tables: the folder with preference_pairs.parquet and prompts.parquet, and density_weights.parquet if it is made.
        experiment: whose embedding model and density settings the metadata beside the weights name.

    Raises:
        NanochatError: a table is missing or the tables do not belong together, or `out` holds something else.
    """
    out = out.resolve()
    former = _former_export(out)
    with temporary_folder(out) as temporary:
        summary = _write(tables, out, temporary, report or (lambda _file, _rows: None), experiment)
        _take_the_place(temporary, out, former)
        return summary


def check_nanochat(folder: Path, report: Report | None = None) -> ImportSummary:
    """Parse every line of a nanochat folder, or of its pairs_all.jsonl, as the source `nanochat` will.

    Raises:
        SourceError: there is no such file, or it cannot be read.
    """
    file = Path(pairs_file(str(folder.absolute())))
    settings = SourceSettings(path=str(file))
    rows = pairs = malformed = 0
    first, rejects, sources = "", Counter[str](), Counter[str]()
    for raw in raw_files(str(file), "folder"):
        lines = raw.rows(file.parent)
        while chunk := list(islice(lines, _CHUNK)):
            parsed = parse_rows("nanochat", settings, chunk)
            rows, pairs, malformed = rows + parsed.rows, pairs + parsed.pairs.height, malformed + parsed.malformed
            first = first or parsed.first_malformed
            _count(sources, parsed.pairs["src"])
            for reason, candidates in parsed.rejects.select("reason", "pairs").iter_rows():
                rejects[reason] += candidates
            if report:
                report(raw.name, rows)
    return ImportSummary(file, rows, pairs, dict(rejects.most_common()), dict(sources.most_common()), malformed, first)


def _write(tables: Path, out: Path, folder: Path, report: Report, experiment: Experiment | None) -> ExportSummary:
    pairs_table = _readable(tables / "preference_pairs.parquet", _PAIR)
    prompts_table = _readable(tables / "prompts.parquet", ("prompt_id", "prompt", "split", "pairs"))
    weights_table = tables / "density_weights.parquet"
    sources, splits = Counter[str](), Counter[str]()
    with _new(folder / PAIRS_FILE) as file:
        for frame in batches(pairs_table, _PAIR):
            _write_lines(frame.select(pl.col("pair_id").alias("id"), *_PAIR[1:]), file)
            _count(sources, frame["src"])
            _count(splits, frame["split"])
            report(PAIRS_FILE, splits.total())
    prompts = promised = 0
    with _new(folder / PROMPTS_FILE) as file:
        for frame in batches(prompts_table, ("prompt_id", "prompt", "split", "pairs")):
            _write_lines(frame.select(pl.col("prompt_id").alias("id"), "prompt", "split", "pairs"), file)
            prompts, promised = prompts + frame.height, promised + int(frame["pairs"].sum())
            report(PROMPTS_FILE, prompts)
    if promised != splits.total():
        raise NanochatError(
            f"{tables}: prompts.parquet counts {promised:,} pairs, preference_pairs.parquet has {splits.total():,}; "
            "they are of different runs: materialize prompts again"
        )
    weights = _export_weights(tables, folder, report, experiment) if weights_table.exists() else None
    weighed = None if weights is None else int(np.count_nonzero(weights))
    summary = ExportSummary(out, splits.total(), prompts, dict(sorted(sources.items())), dict(sorted(splits.items())), weighed)
    with _new(folder / STATS_FILE) as file:
        file.write(_stats(summary).encode())
    return summary


def _export_weights(tables: Path, folder: Path, report: Report, experiment: Experiment | None) -> npt.NDArray[np.float32]:
    weights_table = _readable(tables / "density_weights.parquet", ("prompt_id", "weight"))
    (folder / WEIGHTS_FILE).parent.mkdir()
    weights = _aligned(weights_table, tables / "prompts.parquet")
    with _new(folder / WEIGHTS_FILE) as file:
        np.save(file, weights)
    rows = 0
    with _new(folder / LIST_FILE) as file:
        for frame in batches(tables / "prompts.parquet", ("prompt",)):
            for prompt in frame["prompt"]:
                file.write(b",\n" if rows else b"[\n")
                file.write(_one_line(json.dumps(prompt, ensure_ascii=False).encode()))
                rows += 1
            report(LIST_FILE, rows)
        file.write(b"\n]\n" if rows else b"[]\n")
    with _new(folder / METADATA_FILE) as file:
        file.write(json.dumps(_metadata(weights, tables, experiment), indent=2).encode() + b"\n")
    return weights


def _aligned(weights_table: Path, prompts_table: Path) -> npt.NDArray[np.float32]:
    """One weight a row of the prompts, in their order; 0 where a prompt is never drawn."""
    weights = read_frame(weights_table, ("prompt_id", "weight"))
    prompts = read_frame(prompts_table, ("prompt_id",))
    repeated = weights.height - weights["prompt_id"].n_unique()
    missing = prompts.join(weights, on="prompt_id", how="anti")
    unknown = weights.join(prompts, on="prompt_id", how="anti")
    faults = [
        f"{number:,} {what} (the first: {first})"
        for number, what, first in (
            (missing.height, f"of {prompts.height:,} prompts have no row in it", _first(missing)),
            (unknown.height, "of its rows have no prompt in prompts.parquet", _first(unknown)),
            (repeated, "of its rows repeat a prompt", _first(weights.filter(pl.col("prompt_id").is_duplicated()))),
        )
        if number
    ]
    if faults:
        raise NanochatError(f"{weights_table}: {'; '.join(faults)}; materialize density_weights again")
    joined = prompts.join(weights, on="prompt_id", how="left", maintain_order="left")
    return joined["weight"].fill_null(0.0).cast(pl.Float32).to_numpy()


def _metadata(weights: npt.NDArray[np.float32], tables: Path, experiment: Experiment | None) -> dict[str, Any]:
    drawn = weights[weights > 0].astype(np.float64)
    numbers: dict[str, float] = {"prompts_with_weight": len(drawn)}
    if len(drawn):
        moments = {"min": drawn.min(), "max": drawn.max(), "mean": drawn.mean(), "std": drawn.std()}
        numbers |= {f"weights_{name}": float(value) for name, value in moments.items()}
    return {
        "n_prompts": len(weights),
        "embedding_dim": _embedding_width(tables / "prompt_embeddings.parquet"),
        "embedding_dtype": "float32",
        "weights_dtype": "float32",
        "normalization": "L2 unit vectors",
        **numbers,
        "model": experiment.embedding.model if experiment else None,
        "density": experiment.density.model_dump(mode="json") if experiment else None,
    }


def _embedding_width(path: Path) -> int | None:
    if not path.exists():
        return None
    kind = _schema(path).get("embedding")
    return kind.shape[0] if isinstance(kind, pl.Array) else None


def _stats(summary: ExportSummary) -> str:
    rows: list[tuple[str, object]] = [("total_pairs", summary.pairs), ("unique_prompts", summary.prompts)]
    rows += [(f"src_{name}", count) for name, count in summary.sources.items()]
    rows += [(f"split_{name}", count) for name, count in summary.splits.items()]
    rows += [("prompts_with_weight", "-" if summary.weighed is None else summary.weighed), (_MARK, "densityrm")]
    width = max(len(key) for key, _ in rows) + 2
    return "".join(f"{key:<{width}}{value}\n" for key, value in rows)


def _former_export(out: Path) -> bool:
    """Whether `out` is there to be replaced. Raises NanochatError where that would lose anything but a former export."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise NanochatError(f"{out}: is a file; name a folder for the export")
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir())
    if found and not _is_marked(out / STATS_FILE):
        raise NanochatError(f"{out}: holds {found[0]} and is no former export; name an empty or a new folder")
    foreign = [name for name in found if name not in _FILES]
    if foreign:
        raise NanochatError(
            f"{out}: holds {foreign[0]}, which no export writes and replacing it would delete; move it, or name another folder"
        )
    return True


def _is_marked(stats: Path) -> bool:
    return stats.is_file() and any(
        line.split() == [_MARK, "densityrm"] for line in stats.read_text(encoding="utf-8", errors="replace").splitlines()
    )


def _take_the_place(new: Path, out: Path, former: bool) -> None:
    if not former:
        new.rename(out)
        return
    aside = temporary_name(out)
    out.rename(aside)
    try:
        new.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _readable(path: Path, columns: tuple[str, ...]) -> Path:
    """`path`, once it is known to hold `columns`."""
    lacking = [name for name in columns if name not in _schema(path)]
    if lacking:
        raise NanochatError(f"{path}: has no column {lacking[0]!r}; it is of an older version: materialize it again")
    return path


def _schema(path: Path) -> dict[str, pl.DataType]:
    try:
        return pl.read_parquet_schema(path)
    except FileNotFoundError:
        raise NanochatError(f"{path}: does not exist; materialize {path.stem}, or run `densityrm demo`, first") from None
    except pl.exceptions.PolarsError as error:
        raise NanochatError(f"{path}: is no readable Parquet file ({error}); materialize it again") from None


def _write_lines(frame: pl.DataFrame, file: IO[bytes]) -> None:
    lines = BytesIO()
    frame.write_ndjson(lines)
    file.write(_one_line(lines.getvalue()))


def _one_line(text: bytes) -> bytes:
    for character, escape in _LINE_ENDS.items():
        text = text.replace(character, escape)
    return text


def _count(counter: Counter[str], names: pl.Series) -> None:
    for name, count in cast(Iterator[tuple[str, int]], names.value_counts().iter_rows()):
        counter[name] += count


def _first(rows: pl.DataFrame) -> str:
    return cast(str, rows["prompt_id"][0]) if rows.height else ""


@contextmanager
def _new(path: Path) -> Generator[IO[bytes]]:
    """A file to write that is on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())

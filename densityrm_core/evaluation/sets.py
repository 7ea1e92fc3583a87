"""Further preference pairs by path, in the formats of RewardBench 1 and 2: what reward models rank beside the test split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import polars as pl

from densityrm_core.sources.files import raw_files
from densityrm_core.sources.rows import (
    MalformedError,
    Pair,
    Reject,
    SourceError,
    Turn,
    context_fault,
    objects_field,
    pair_id,
    prompt_id,
    reply_fault,
    text_field,
)
from densityrm_core.tables import TURN

_SCHEMA = {
    **dict.fromkeys(("set", "pair_id", "prompt_id", "src"), pl.String()),
    **dict.fromkeys(("decile", "quartile"), pl.Int64()),
    "context": pl.List(TURN),
    **dict.fromkeys(("chosen", "rejected"), pl.String()),
}


@dataclass(frozen=True)
class EvaluationSet:
    """The pairs of a set, and what of it could not become one."""

    name: str
    pairs: (
        pl.DataFrame
    )  # columns set, pair_id, prompt_id, src (the subset), decile and quartile (null), context, chosen, rejected
    rows: int
    left_out: dict[str, int] = field(default_factory=dict)  # pairs by reason
    first: str = ""  # where and what the first of them was
    files: tuple[str, ...] = ()  # name and SHA-256 of each file, or what its file system says of its version

    def __str__(self) -> str:
        """One line for the log."""
        pairs = f"{self.name}: {self.pairs.height:,} pairs of {self.rows:,} rows"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.left_out.items())
        return f"{pairs}; {sum(self.left_out.values()):,} left out ({reasons}; first: {self.first})" if reasons else pairs


def read_set(name: str, path: str, downloads: Path) -> EvaluationSet:
    """Every pair of a set. Broken rows are counted, and so is a pair that its subset has already had.

    A row has `prompt` (a text, or the turns up to the user's last), `chosen`, `rejected` and, if it likes, `subset` (else the
    set's name is the subset). A reply is a text, a list of turns that ends with it (the whole conversation, or the assistant's
    turn alone), or a list of texts: each of `chosen` is then paired with each of `rejected`.

    Args:
        name: as in evaluation.sets.
        path: a file, folder or glob of .jsonl, .jsonl.gz, .jsonl.zst or .parquet: local, hf://, or wherever fsspec reaches.
        downloads: where files of the hub are kept.

    Raises:
        SourceError: the path names nothing readable, or no row gives a pair.
    """
    pairs: dict[tuple[str, str], dict[str, object]] = {}
    left_out: Counter[str] = Counter()
    first, rows = "", 0
    files = raw_files(path, f"evaluation.sets.{name}")
    for raw in (row for file in files for row in file.rows(downloads)):
        rows += 1
        try:
            fields = raw.fields()
            subset = text_field(fields, "subset") if fields.get("subset") is not None else name
            items = list(_items(fields))
        except MalformedError as error:
            subset, items = "", [Reject(error.reason, error.detail)]
        for item in items:
            key = (subset, pair_id(item)) if isinstance(item, Pair) else None
            if isinstance(item, Pair) and key and key not in pairs:
                pairs[key] = _row(name, subset, item)
                continue
            fault = item if isinstance(item, Reject) else Reject("duplicate", "the subset has had this pair already")
            left_out[fault.reason] += 1
            first = first or f"{raw.origin} {fault.detail}"
    if not pairs:
        raise SourceError(
            f"evaluation.sets.{name}: none of the {rows:,} rows of {path} gives a pair (first: {first or 'there are no rows'}); "
            "name a file with the columns prompt, chosen and rejected"
        )
    identities = tuple(f"{file.name} {file.identity()}" for file in files)
    frame = pl.DataFrame(list(pairs.values()), schema=_SCHEMA)
    return EvaluationSet(name, frame, rows, dict(sorted(left_out.items())), first, identities)


def _items(row: dict[str, Any]) -> Iterator[Pair | Reject]:
    """The pairs of a row, or why there are none. Raises MalformedError."""
    for chosen in _conversations(row, "chosen"):
        for rejected in _conversations(row, "rejected"):
            fault = context_fault(chosen, rejected) or reply_fault(chosen[-1].content, rejected[-1].content)
            yield fault or Pair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _conversations(row: dict[str, Any], side: str) -> list[tuple[Turn, ...]]:
    """What `side` holds, each as a whole conversation that ends with the reply."""
    value = row.get(side)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in cast(list[Any], value)):
        texts = [text.strip() for text in cast(list[str], value)]
    elif isinstance(value, list):
        turns = _turns(row, side)
        if len(turns) > 1 or not turns:
            return [turns]
        texts = [turns[0].content]
    else:
        texts = [text_field(row, side)]
    context = _turns(row, "prompt") if isinstance(row.get("prompt"), list) else (Turn("user", text_field(row, "prompt")),)
    return [(*context, Turn("assistant", text)) for text in texts]


def _turns(row: dict[str, Any], name: str) -> tuple[Turn, ...]:
    return tuple(
        Turn(text_field(turn, "role", f"{name}[{i}]."), text_field(turn, "content", f"{name}[{i}]."))
        for i, turn in enumerate(objects_field(row, name))
    )


def _row(name: str, subset: str, pair: Pair) -> dict[str, object]:
    return {
        "set": name,
        "pair_id": pair_id(pair),
        "prompt_id": prompt_id(pair.prompt),
        "src": subset,
        "decile": None,
        "quartile": None,
        "context": [turn._asdict() for turn in pair.context],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
    }

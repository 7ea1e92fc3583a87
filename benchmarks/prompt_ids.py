"""The prompt stage (ids, unique prompts, counts) beside the line-by-line Python that the original scripts use for it.

One million pairs over 310,000 prompts; prompts and replies have about 430 characters. The peer reads `pairs_all.jsonl`, as the
original does, ours the table of pairs, of which it needs one column; both end with ids, prompts and counts in memory. Both are
also timed on texts that are in memory already. Polars uses two threads, Python can use but one; interleaved, medians. Keys:
`ratio` (from the files), `equal` (row for row), `ratio_in_memory`, `seconds`, `peer_seconds`.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ.setdefault("POLARS_MAX_THREADS", "2")

import polars as pl  # the number of its threads is read at import

from benchmarks.measure import interleaved
from densityrm_core.pairs.prompts import index_prompts
from densityrm_core.storage import GROUP_ROWS
from densityrm_core.streams import stream

_UNIQUE, _WORDS, _ROUNDS = 0.31, 70, 5


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--prompts", type=int, default=1_000_000)
    arguments.add_argument("--rounds", type=int, default=_ROUNDS)
    options = arguments.parse_args()
    texts = _texts(options.prompts)
    series = pl.Series("prompt", texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(texts, folder)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: index_prompts([pl.read_parquet(folder / "pairs.parquet", columns=["prompt"])["prompt"]]),
            "peer": lambda: _peer(_lines(folder / "pairs_all.jsonl")),
            "ours_in_memory": lambda: index_prompts([series]),
            "peer_in_memory": lambda: _peer(texts),
        }
        equal = index_prompts([series])[0].rows() == _peer(_lines(folder / "pairs_all.jsonl"))
        median = interleaved(ways, options.rounds)
    result = {
        "ratio": round(median["peer"] / median["ours"], 2),
        "equal": equal,
        "ratio_in_memory": round(median["peer_in_memory"] / median["ours_in_memory"], 2),
        "prompts": options.prompts,
        "threads": pl.thread_pool_size(),
        "seconds": round(median["ours"], 2),
        "peer_seconds": round(median["peer"], 2),
    }
    print(json.dumps(result))


def _lines(pairs: Path) -> Iterator[str]:
    with pairs.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["prompt"]


def _peer(prompts: Iterable[str]) -> list[tuple[str, str, int]]:
    """What the original does: a prompt at a time, a dict of what was seen."""
    counts: dict[str, int] = {}
    texts: dict[str, str] = {}
    for prompt in prompts:
        prompt_id = hashlib.md5(prompt.encode("utf-8")).hexdigest()[:16]  # noqa: S324  the id's definition
        if prompt_id not in texts:
            texts[prompt_id] = prompt
        counts[prompt_id] = counts.get(prompt_id, 0) + 1
    return [(prompt_id, prompt, counts[prompt_id]) for prompt_id, prompt in texts.items()]


def _texts(count: int) -> list[str]:
    rng = stream(0, "prompt_ids")
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiouy" for c in ("ck", "nd", "rms", "stle", "lt", "nning", "")]
    unique = [" ".join(words[i] for i in rng.integers(0, len(words), _WORDS)) for _ in range(max(1, int(count * _UNIQUE)))]
    return [unique[i] for i in rng.integers(0, len(unique), count).tolist()]


def _write(texts: list[str], folder: Path) -> None:
    """The same pairs for both; another prompt's text stands for a reply, which is of that length too."""
    frame = pl.DataFrame({"src": "hh", "prompt": texts, "chosen": texts[1:] + texts[:1], "rejected": texts[2:] + texts[:2]})
    frame.write_ndjson(folder / "pairs_all.jsonl")
    frame.write_parquet(folder / "pairs.parquet", row_group_size=GROUP_ROWS)


if __name__ == "__main__":
    main()

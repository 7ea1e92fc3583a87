"""Commands that are repeated or run beside others: nothing is lost, nothing is made twice."""

import gzip
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from .commands import check_one_clear_message, demo, good_row, only_hh, write_rows


@dataclass(frozen=True)
class Shared:
    """A folder with rows and the state of the experiments `one`, read by two commands at once, and `two`, each read once more.

    Args:
        at_once: results of the two commands.
        again: results of the repeated commands.
        pairs: the table of pairs of both experiments.
    """

    folder: Path
    at_once: "list[subprocess.CompletedProcess[str]]"
    again: "list[subprocess.CompletedProcess[str]]"
    pairs: list[bytes]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    write_rows(folder / "hh", *(good_row(i) for i in range(60)))
    with ThreadPoolExecutor() as pool:
        at_once = list(pool.map(lambda _: read(folder, "one"), range(2)))
    assert read(folder, "two").returncode == 0
    again = [read(folder, name) for name in ("one", "two")]
    return Shared(folder, at_once, again, [table(folder, name, "preference_pairs").read_bytes() for name in ("one", "two")])


def read(folder: Path, name: str) -> "subprocess.CompletedProcess[str]":
    return demo(folder, {**only_hh(folder / "hh"), "name": name}, command="read")


def table(folder: Path, experiment: str, name: str) -> Path:
    return folder / "home" / experiment / "tables" / f"{name}.parquet"


def test_two_commands_at_once_on_one_experiment_are_one_too_many(shared: Shared):
    assert sorted(result.returncode for result in shared.at_once) == [0, 1]
    refused = next(result for result in shared.at_once if result.returncode)
    check_one_clear_message(refused, "another command is at work", "DENSITYRM_HOME")


def test_two_experiments_share_a_home_and_do_not_disturb_each_other(shared: Shared):
    assert all("everything is up to date" in result.stderr for result in shared.again)
    assert shared.pairs[0] == shared.pairs[1]


def test_changed_raw_rows_change_the_tables_of_the_next_run(shared: Shared):
    with gzip.open(shared.folder / "hh" / "more.jsonl.gz", "wt") as file:
        file.write("\n".join(good_row(i) for i in range(60, 90)) + "\n")
    grown = read(shared.folder, "one")
    assert "HH-RLHF        90 rows read = 90 pairs + 0 rejects" in grown.stdout
    assert len(pl.read_parquet(table(shared.folder, "one", "prompts"))) == 90

"""Steps are forks of a server that has loaded what they need."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest

from densityrm_dagster.commands.run import renew_fork_server


@pytest.fixture
def no_server_is_left() -> Iterator[None]:
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()
    forkserver.set_forkserver_preload(["__main__"])


def server_and_its_modules(preload: list[str]) -> tuple[int | None, bool, bool]:
    """The server's process, and whether a process forked for a run with `preload` has two modules of the standard library."""
    renew_fork_server(preload)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    with context.Pool(1) as pool:
        wave, colorsys = pool.apply(eval, ("[name in __import__('sys').modules for name in ('wave', 'colorsys')]",))
    return forkserver._forkserver._forkserver_pid, wave, colorsys


@pytest.mark.usefixtures("no_server_is_left")
def test_a_fork_server_is_kept_until_a_run_needs_more_modules():
    first, *modules = server_and_its_modules(["wave"])
    assert modules == [True, False]
    assert server_and_its_modules(["wave"]) == (first, True, False)
    second, *modules = server_and_its_modules(["wave", "colorsys"])
    assert second != first
    assert modules == [True, True]
    assert server_and_its_modules(["wave"])[0] == second

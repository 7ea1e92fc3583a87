from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from densityrm_core.choices import Taken, noted

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

GRAPH = "tests/dagster"  # its tests share one run of the graph


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """With `--dist loadfile` a core takes a file at a time; the graph's tests count as one file, so that it is run once."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "loadfile":
        return None

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return GRAPH if nodeid.startswith(f"{GRAPH}/") else super()._split_scope(nodeid)

    return Scheduling(config, log)


def not_taken(claims: Iterable[str], taken: Taken) -> list[str]:
    """The claims `choice=branch` that did not come true."""
    heard = {f"{choice}={branch}" for choice, branches in taken.items() for branch in branches}
    return [claim for claim in claims if claim not in heard]


@pytest.fixture(autouse=True)
def branches_are_taken(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked `takes("choice=branch")` fails unless that branch of `densityrm_core.choices` is taken in it."""
    claims = [claim for mark in request.node.iter_markers("takes") for claim in mark.args]
    with noted() as taken:
        yield
    if claims and (missing := not_taken(claims, taken)):
        pytest.fail(f"claims to take {', '.join(missing)}, but takes {taken}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real rows of the three sources; the folder `DENSITYRM_TEST_DATA`, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("DENSITYRM_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real rows: {folder} is absent; set DENSITYRM_TEST_DATA")
    return folder

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real rows of the three sources; the folder `DENSITYRM_TEST_DATA`, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("DENSITYRM_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real rows: {folder} is absent; set DENSITYRM_TEST_DATA")
    return folder

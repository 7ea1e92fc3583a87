"""What the README shows as Python runs as it stands there."""

import re
from pathlib import Path

import pytest

from .conftest import Run

README = Path(__file__).parents[2] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_is_something_to_run():
    assert SNIPPETS


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_on_a_finished_experiment(run: Run, snippet: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    state = tmp_path / ".densityrm" / "planted"
    state.parent.mkdir()
    state.symlink_to(run.root / "tiny")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})  # noqa: S102  our own README

"""Whatever depends on the machine is a named choice, can be forced, and has a test for each of its branches on every machine."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from densityrm_core.choices import CHOICES, noted, take
from densityrm_core.hardware import processor_features

from .conftest import not_taken

REPOSITORY = Path(__file__).parents[1]
# What asks the machine, in code: each belongs into hardware.py or terminal.py, and what follows from the answer into CHOICES
ASKS = re.compile(
    r"\btorch\.(cuda|cpu|backends|xpu|mps)\.|\.is_cuda\b|get_capabilities|cpu_count|sched_getaffinity|find_spec|isatty"
    r"|disk_usage|/proc/(cpuinfo|meminfo)|virtual_memory|get_device_properties|mkldnn|platform\.(machine|processor)"
)
MAY_ASK = {"densityrm_core/hardware.py", "densityrm_dagster/terminal.py"}
MAY_DO = {  # not questions
    "densityrm_core/training/ranks.py": {"torch.cuda."},  # set_device: a rank computes on the GPU of its number
}


def claims() -> dict[str, list[str]]:
    """The tests that say, by `pytest.mark.takes`, which branches they take: by claim."""
    found: dict[str, list[str]] = {}
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                for claim in _claimed(function):
                    found.setdefault(claim, []).append(f"{path.relative_to(REPOSITORY)}::{function.name}")
    return found


def _claimed(function: ast.FunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        for call in ast.walk(decorator):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.takes":
                yield from (str(argument.value) for argument in call.args if isinstance(argument, ast.Constant))


BRANCHES = [f"{name}={branch}" for name, choice in CHOICES.items() for branch in choice.branches if branch not in choice.on_gpu]
ON_GPU = [f"{name}={branch}" for name, choice in CHOICES.items() for branch in choice.on_gpu]


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_branch_has_a_test_that_takes_it(branch: str):
    assert claims().get(branch), f'no test takes {branch}: mark one with pytest.mark.takes("{branch}")'


def table() -> str:
    """The choices as CONTRIBUTING shows them: how to force each, what decides otherwise, and a test for each branch."""
    taken_by = claims()
    lines = ["| choice | forced by | otherwise | branch: a test that takes it |", "| --- | --- | --- | --- |"]
    for name, choice in CHOICES.items():
        tests = {branch: taken_by.get(f"{name}={branch}") for branch in choice.branches}
        shown = [
            f"`{branch}`: " + (f"`{found[0].removeprefix('tests/')}`" if found else "`benchmarks.gpu_check`, on a GPU")
            for branch, found in tests.items()
        ]
        lines.append(f"| {name} | `{choice.setting}` | {choice.rule} | {'<br>'.join(shown)} |")
    return "\n".join(lines)


def test_the_table_in_contributing_is_the_list():
    assert table() in (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"), f"put into CONTRIBUTING.md:\n{table()}"


@pytest.mark.parametrize("branch", ON_GPU)
def test_the_check_of_a_gpu_claims_every_branch_that_only_a_gpu_takes(branch: str):
    parts = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "benchmarks").glob("gpu_*.py")]
    assert any(f'"{branch}"' in part for part in parts), f"no part of benchmarks.gpu_check claims {branch}"


def test_every_claim_is_a_branch():
    assert set(claims()) <= {*BRANCHES, *ON_GPU}


def test_a_claim_that_does_not_come_true_fails_its_test():
    with noted() as taken:
        take("precision", "fp32")
    assert not_taken(["precision=fp32"], taken) == []
    assert not_taken(["precision=fp32", "precision=bf16"], taken) == ["precision=bf16"]


def test_a_branch_without_a_line_in_the_list_cannot_be_taken():
    with pytest.raises(KeyError, match="'precision' has no branch 'fp8'"):
        take("precision", "fp8")
    with pytest.raises(KeyError, match="colour"):
        take("colour", "red")


@pytest.mark.parametrize("package", ["densityrm_core", "densityrm_dagster"])
def test_only_two_modules_ask_the_machine_what_it_is(package: str):
    asked = {
        f"{name}: {found}"
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if (name := str(path.relative_to(REPOSITORY))) not in MAY_ASK
        for found in {match.group() for match in ASKS.finditer(path.read_text(encoding="utf-8"))} - MAY_DO.get(name, set())
    }
    assert asked == set()


def test_an_older_pytorch_is_not_asked_for_the_processors_features(monkeypatch: pytest.MonkeyPatch):
    known = {"avx2", "avx512_bf16", "avx512_vnni", "amx_bf16"}
    by_pytorch = processor_features() & known
    monkeypatch.delattr("torch.cpu.get_capabilities")
    processor_features.cache_clear()
    assert processor_features() & known == by_pytorch
    processor_features.cache_clear()

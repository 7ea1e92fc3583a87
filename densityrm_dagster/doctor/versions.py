"""Installed versions against those that the tests were run with."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from densityrm_dagster.doctor.lines import Line, green, red, yellow

_MATTER = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "polars", "pyarrow", "faiss-cpu", "dagster", "mlflow")
_MATTER = (*_MATTER, "sentence-transformers", "pydantic")


def versions(pinned: Path) -> list[Line]:
    """One line for all that are as they should be, and one for each that is not.

    Args:
        pinned: the checkout's constraints.txt, which an installed package lacks.
    """
    wanted = _constraints(pinned) if pinned.is_file() else {}
    there = {name: _installed(name) for name in _MATTER}
    missing = [red(name, "is not installed", f"pip install {_named(name, wanted)}") for name, found in there.items() if not found]
    others = [
        yellow(name, f"{found} is installed, constraints.txt has {wanted[name]}", f"pip install {_named(name, wanted)}")
        for name, found in there.items()
        if found and _public(found) != wanted.get(name, _public(found))
    ]
    faulty = {line.subject for line in (*missing, *others)}
    good = ", ".join(f"{name} {found}" for name, found in there.items() if name not in faulty)
    compared = "as in constraints.txt" if wanted else "not compared, there is no constraints.txt beside this package"
    return [*([green("versions", f"{good}: {compared}")] if good else []), *missing, *others]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _named(name: str, wanted: dict[str, str]) -> str:
    return f"{name}=={wanted[name]}" if name in wanted else name


def _public(found: str) -> str:
    """A version without what a builder added, as in 2.13.0+cu126."""
    return found.partition("+")[0]


def _constraints(pinned: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip().partition("==") for line in pinned.read_text(encoding="utf-8").splitlines())
    return {name.strip().lower(): _public(number.strip()) for name, equals, number in lines if equals}

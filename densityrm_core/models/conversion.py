"""Base models from anywhere: what an experiment names becomes a Hugging Face folder or hub id, which `models` loads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from densityrm_core.files import file_hash, sweep, temporary_folder
from densityrm_core.hardware import BASE_MODELS, located
from densityrm_core.models.folders import ModelError
from densityrm_core.models.gguf import convert_gguf
from densityrm_core.models.nanochat_checkpoint import convert_checkpoint, last_checkpoint

_RECIPE = b"1"  # changes when a conversion of the same content would come out otherwise


def as_hugging_face(source: str, cache: Path) -> str:
    """A folder or hub id that `load_causal_lm` and `load_tokenizer` take.

    Args:
        source: a Hugging Face folder, a GGUF file (`*.gguf`), a nanochat checkpoint folder (`model_<step>.pt`,
            `meta_<step>.json` and a `tokenizer.json`), or a hub id; a hub id that an installed package carries is that package's.
        cache: where a GGUF file or a nanochat checkpoint is converted to, once for the same content: a folder that is whole or
            not there, whoever else converts it at the same time or was killed while doing so.

    Raises:
        ModelError: there is no such file or folder, or it cannot be converted.
    """
    place = located(source, BASE_MODELS)
    path = Path(place)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: there is no such file; download the GGUF file and name it by its path")
        return str(_converted(path.stem, [path], lambda folder: convert_gguf(path, folder), cache))
    if not path.is_dir():
        if place.startswith(("/", ".", "~")) or place.count("/") > 1:
            raise ModelError(f"{place}: there is no such folder; give a model's folder, a GGUF file, or a hub id <owner>/<name>")
        return place
    if (path / "config.json").is_file():
        return place
    checkpoint = last_checkpoint(path)
    if checkpoint is None:
        raise ModelError(_not_a_model(path))
    name = path.resolve().name
    return str(_converted(name, checkpoint.files, lambda folder: convert_checkpoint(checkpoint, folder), cache))


def _converted(name: str, files: Sequence[Path], convert: Callable[[Path], None], cache: Path) -> Path:
    digest = hashlib.sha256(_RECIPE)
    for file in files:
        with file.open("rb") as content:
            digest.update(file_hash(content).encode())
    target = cache / f"{name}-{digest.hexdigest()[:32]}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            sweep(cache)
            if not target.exists():
                with temporary_folder(target) as staged:
                    convert(staged)
                    staged.rename(target)
    return target


def _not_a_model(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files:
        return f"{folder}: holds GGUF files; name the one to use, as {folder / files[0]}"
    return f"{folder}: holds neither a Hugging Face model (config.json) nor a nanochat checkpoint (model_<step>.pt)"

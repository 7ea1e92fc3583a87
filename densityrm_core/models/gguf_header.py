"""The numbers at the head of a GGUF file, in milliseconds: gguf's own reader takes seconds for a large vocabulary.

The format is that of github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts, then key, type and value.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

Value = int | float | bool | str
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_header(file: Path) -> dict[str, Value]:
    """Scalars and texts by key; of an array how many items it has.

    Raises:
        ValueError: this is no GGUF file of version 2 or 3, or it breaks off.
    """
    with file.open("rb") as opened:
        try:
            magic, version, _tensors, count = struct.unpack("<4sIQQ", opened.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"{file} is no GGUF file of version 2 or 3")
            return {_text(opened): _value(opened, _number(opened, "I")) for _ in range(count)}
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: its header breaks off or is damaged ({error})") from None


def _value(opened: BinaryIO, kind: int) -> Value:
    if kind == _STRING:
        return _text(opened)
    if kind != _ARRAY:
        return _number(opened, _SCALARS[kind])
    item, count = _number(opened, "I"), _number(opened, "Q")
    if item == _STRING:
        for _ in range(count):
            opened.seek(_number(opened, "Q"), 1)
    elif item == _ARRAY:
        for _ in range(count):
            _value(opened, _ARRAY)
    else:
        opened.seek(count * struct.calcsize(_SCALARS[item]), 1)
    return count


def _number(opened: BinaryIO, code: str) -> int:
    size = struct.calcsize(code)
    return struct.unpack(f"<{code}", opened.read(size))[0]


def _text(opened: BinaryIO) -> str:
    return opened.read(_number(opened, "Q")).decode()

"""JSON files of a checkpoint, read and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import reason

#: The largest JSON file that is read, in bytes; indexes of the largest models have a few million.
MAX_JSON_BYTES = 2**26

#: The first bytes of a Git LFS pointer.
LFS_POINTER = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Raise ValueError if a file is a Git LFS pointer to a large file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's file.

    Raises:
        ValueError: the file is a Git LFS pointer, too large, or not a JSON object.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes; a checkpoint's JSON file has at most {MAX_JSON_BYTES}.")
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of too many digits are plain ValueErrors
        raise ValueError(f"{path}: not a JSON file: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, not a {type(content).__name__}.")
    return content

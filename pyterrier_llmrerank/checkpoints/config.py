"""Read and check the JSON files of a checkpoint, and the model settings in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import reason, short

#: The largest JSON file that is read, in bytes; indexes of the largest models have a few million.
MAX_JSON_BYTES = 2**26

#: The largest value of each size in a configuration: ten times that of any known model, yet small enough to build
#: without weights in little memory. The tensors must agree with it in any case.
MAX_SIZES = {
    "num_hidden_layers": 10_000,
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
        2**24,
    ),
    "sliding_window": 2**31,
}

#: The first bytes of a Git LFS pointer.
LFS_POINTER = b"version https://git-lfs"

#: Settings to ignore: they have no effect on a headless decoder in our own dtype, or could make transformers fetch
#: code.
IGNORED_SETTINGS = {
    "model_type", "auto_map", "architectures", "transformers_version", "dtype", "torch_dtype", "num_labels", "id2label",
    "label2id", "problem_type", "attn_implementation", "experts_implementation",
}  # fmt: skip


def refuse_pointer(path: Path) -> None:
    """Raise ValueError if a file is a Git LFS pointer to a large file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's file.

    Raises:
        ValueError: the file holds anything else.
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


def model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove the :data:`IGNORED_SETTINGS` settings and those private to transformers, at any depth."""
    return {
        key: model_settings(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in IGNORED_SETTINGS and not key.startswith("_")
    }


def check_sizes(settings: Mapping[str, Any], names: Mapping[str, str], argument: str) -> None:
    """Raise ValueError on sizes that no model has, before anything of that size is built.

    Args:
        settings: a checkpoint's configuration.
        names: the family's own names for some of :data:`MAX_SIZES`.
        argument: the caller's argument and its value, for messages.
    """
    for usual, largest in MAX_SIZES.items():
        for name in {usual, names.get(usual, usual)}:
            value = settings.get(name)
            if value is None or (name == "sliding_window" and value == 0):  # both mean no sliding window
                continue
            sizes = value if isinstance(value, list) else [value]  # some families have one for each layer
            if not all(type(size) is int and 1 <= size <= largest for size in sizes):
                raise ValueError(f"{argument}: {name} is {short(value)}; allowed: integers from 1 to {largest}.")

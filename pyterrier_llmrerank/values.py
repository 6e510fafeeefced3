"""Values that come from outside: what an argument or a cell may be, and what is said of others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd


def problem_of(text: object) -> str | None:
    """What is wrong with a query or passage, or None."""
    if not isinstance(text, str):
        return f"{text!r}, not a string (an empty one is scored)"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"not valid Unicode (a lone surrogate at character {error.start})"
    return None


def problem_of_id(value: object) -> str | None:
    """What is wrong with a qid or docno that is there, or None."""
    if isinstance(value, str):
        return problem_of(value)
    return None if pd.api.types.is_hashable(value) else f"{value!r}, neither a string nor a number"


def as_list(value: object) -> Any:
    """An array as a list, rows of it as lists too; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def integer(name: str, value: object, allowed: str) -> int:
    """The value as an int, or ValueError with the argument's name; a bool is no integer."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}={value!r}; allowed: {allowed}.")
    return int(value)


def positive(name: str, value: object) -> int:
    """The value as an int of at least 1, or ValueError with the argument's name."""
    allowed = "an integer of at least 1"
    if (number := integer(name, value, allowed)) < 1:
        raise ValueError(f"{name}={value!r}; allowed: {allowed}.")
    return number


def one_of(name: str, value: object, allowed: Sequence[str]) -> str | None:
    """The value where it is allowed or None, or ValueError with the argument's name."""
    if value is not None and value not in allowed:
        raise ValueError(f"{name}={value!r}; allowed: {', '.join(allowed)}, or None.")
    return cast(str | None, value)


def column(name: str, value: object) -> str:
    """The value as a column name, or ValueError with the argument's name."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={value!r}; allowed: the name of a column.")
    return value


#: What torch calls devices that a model may be on.
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")


def devices(value: object) -> str | tuple[str, ...] | None:
    """A device's name, or those of several, or ValueError; a list of one is that one."""
    if value is None:
        return None
    names = tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
    if others := [name for name in names if not DEVICE.fullmatch(name)]:
        raise ValueError(
            f"device={value!r}: {others[0]!r} is none; allowed: 'cpu', 'cuda', 'cuda:1', 'mps', 'xpu', a list of "
            "these, or None for what is here."
        )
    if len(set(names)) < max(1, len(names)):
        raise ValueError(f"device={value!r}; allowed: a device, or a list of at least one, each once.")
    return names if len(names) > 1 else names[0]


def path_like(name: str, value: object) -> str:
    """A folder, file or hub id as a string, or ValueError with the argument's name."""
    if not value or not (isinstance(value, str) or hasattr(value, "__fspath__")):
        raise ValueError(f"{name}={value!r}; allowed: a folder, a .gguf file or a hub id.")
    return str(value)

"""Check values from outside: constructor arguments, and the cells of a frame.

A check of an argument takes the argument's name and value. It returns the value to keep, or raises a ValueError that
names the argument, the value and the allowed values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, ItemsView, Iterable, Mapping, Sequence, Set
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import pandas as pd

from .errors import short

Kept = TypeVar("Kept")

#: The ratios in which hidden states may be pooled.
RATIOS = (1, 2, 4, 8, 16, 32, 64)

#: Torch's names of devices that can hold a model.
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")


# -- arguments


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Raise the ValueError for a value that is not allowed."""
    raise ValueError(f"{name}={value!r}; allowed: {allowed}.")


def optional(check: Callable[[str, Any], Kept]) -> Callable[[str, Any], Kept | None]:
    """Return a check that also allows None."""
    return lambda name, value: None if value is None else check(name, value)


def check_integer(name: str, value: object, allowed: str) -> int:
    """Check an integer, and return it as an int; a bool is not allowed."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        refuse(name, value, allowed)
    return int(value)


def at_least(least: int) -> Callable[[str, object], int]:
    """Return a check for integers of at least ``least``."""
    allowed = f"an integer of at least {least}"

    def check(name: str, value: object) -> int:
        if (number := check_integer(name, value, allowed)) < least:
            refuse(name, value, allowed)
        return number

    return check


#: Checks for an integer of at least 1, and of at least 0.
check_positive = at_least(1)
check_natural = at_least(0)


def as_bool(name: str, value: object) -> bool:
    """Return any value as a bool."""
    return bool(value)


def check_string(name: str, value: object) -> str:
    """Check a string."""
    if not isinstance(value, str):
        refuse(name, value, "a string")
    return value


def one_of(*allowed: str) -> Callable[[str, object], str | None]:
    """Return a check for one of some names, or None."""

    def check(name: str, value: object) -> str | None:
        if value is None or (isinstance(value, str) and value in allowed):
            return value
        refuse(name, value, f"{', '.join(allowed)}, or None")

    return check


def check_column(name: str, value: object) -> str:
    """Check the name of a column."""
    if not isinstance(value, str) or not value:
        refuse(name, value, "the name of a column")
    return value


def check_devices(name: str, value: object) -> str | tuple[str, ...] | None:
    """Check names of devices. Return one as a string, several as a tuple; a list of one device is that device."""
    if value is None:
        return None
    names = tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
    if unknown := [device for device in names if not DEVICE.fullmatch(device)]:
        raise ValueError(
            f"{name}={value!r}: {unknown[0]!r} is not a device; allowed: 'cpu', 'cuda', 'cuda:1', 'mps', 'xpu', a "
            "list of these, or None for the best one available."
        )
    if len(set(names)) < max(1, len(names)):
        refuse(name, value, "a device, or a list of one or more different devices")
    return names if len(names) > 1 else names[0]


def check_path(name: str, value: object) -> str:
    """Check a folder, file or hub id, and return it as a string."""
    if not value or not (isinstance(value, str) or hasattr(value, "__fspath__")):
        refuse(name, value, "a folder, a .gguf file or a hub id")
    return str(value)


def check_folders(name: str, value: object) -> tuple[str, ...]:
    """Check one folder or several, and return them as a tuple of strings."""
    return tuple(check_path(name, folder) for folder in (value if isinstance(value, list | tuple) else [value]))


def check_folders_by_ratio(name: str, value: object) -> tuple[tuple[int, str], ...]:
    """Check folders of adapters by ratio, and return them as pairs of ratio and folder, ascending."""
    allowed = "a folder for each ratio, {2: folder, 4: folder}, powers of two from 2 to 64"
    given = check_items(name, value, allowed)
    by_ratio = {check_integer(name, ratio, allowed): check_path(name, folder) for ratio, folder in given}
    if any(ratio == 1 or ratio not in RATIOS for ratio in by_ratio):
        refuse(name, value, allowed)
    return tuple(sorted(by_ratio.items()))


def check_layers(name: str, value: object, least: int) -> tuple[int, ...]:
    """Check layers of at least ``least``; return them ascending and without duplicates."""
    allowed = f"a layer from {least} on, or a list of them"
    value = as_list(value)
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    numbers = [check_integer(name, layer, allowed) for layer in (cast(Iterable[object], value) if several else [value])]
    if any(number < least for number in numbers):
        refuse(name, value, allowed)
    return tuple(sorted(set(numbers)))


def check_items(name: str, value: object, allowed: str) -> list[tuple[Any, Any]]:
    """Check a mapping, which may be given as a list of pairs, and return its items."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        refuse(name, value, allowed)
    return [(key, kept) for key, kept in pairs]


# -- cells and texts


def problem_of(text: object) -> str | None:
    """Say why a value cannot be a query or passage; None if it can."""
    if not isinstance(text, str):
        return f"{text!r}, not a string (an empty one is scored)"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"not valid Unicode (a lone surrogate at character {error.start})"
    return None


def problem_of_id(value: object) -> str | None:
    """Say why a value cannot be a qid or docno; None if it can. Missing values are not checked."""
    if isinstance(value, str):
        return problem_of(value)
    return None if pd.api.types.is_hashable(value) else f"{value!r}, neither a string nor a number"


def is_finite(value: object) -> bool:
    """Tell whether a value is a number that a float can hold; a bool does not count."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def as_list(value: object) -> Any:
    """Turn an array into a list, or a list of lists; return any other value unchanged."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def as_pairs(pairs: Any) -> tuple[list[tuple[str, str]], bool]:
    """Check pairs of query and passage.

    Args:
        pairs: one pair or an iterable of pairs: tuples, lists, or the rows of an array.

    Returns:
        The pairs, and whether a single pair was given.

    Raises:
        ValueError: a value is not a pair of strings.
    """
    pairs = as_list(pairs)
    is_unordered = isinstance(pairs, Set) and not isinstance(pairs, ItemsView)
    if is_unordered or isinstance(pairs, Mapping | pd.DataFrame) or not isinstance(pairs, Iterable):
        raise ValueError(
            f"pairs={short(pairs)} ({type(pairs).__name__}); allowed: a pair of strings, (query, passage), a list "
            "of pairs, or an array with a row for each."
        )
    given = [pairs] if isinstance(pairs, str) else list(pairs)  # a string would be split into characters
    is_single = len(given) == 2 and all(isinstance(text, str) for text in given)
    checked = []
    for number, pair in enumerate([given] if is_single else map(as_list, given)):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"pairs[{number}] is {short(pair)}; expected two strings, (query, passage).")
        for name, text in zip(("query", "passage"), pair, strict=True):
            if problem := problem_of(text):
                raise ValueError(f"the {name} of pairs[{number}] is {problem}.")
        checked.append((pair[0], pair[1]))
    return checked, is_single

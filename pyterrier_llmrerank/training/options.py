"""Options of the recipes: each is a field with its default, its help text and the values allowed, written once."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar

Recipe = TypeVar("Recipe")


def option(default: Any, help: str, *aliases: str, least: float | None = None, shell: bool = True) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: its default; a dict is copied for each recipe.
        help: its meaning, for ``--help`` and the docstring; a phrase without a full stop.
        aliases: its other names on the command line.
        least: the smallest number allowed; an int allows integers alone. None for an option that is checked elsewhere.
        shell: whether the command line has the option.
    """
    metadata = {"help": help, "aliases": aliases, "least": least, "shell": shell}
    if isinstance(default, dict):
        return field(default_factory=default.copy, hash=False, metadata=metadata)
    return field(default=default, hash=None if shell else False, metadata=metadata)


class Declared:
    """Lets a subclass of a dataclass with options change an option's default.

    The option keeps its help text, aliases and limits.
    """

    def __init_subclass__(cls) -> None:
        inherited: dict[str, Field[Any]] = getattr(cls, "__dataclass_fields__", {})
        for name in inspect.get_annotations(cls):
            value = cls.__dict__.get(name)
            if name in inherited and not isinstance(value, Field):
                setattr(cls, name, field(default=value, metadata=inherited[name].metadata))


def default_of(declared: Field[Any]) -> Any:
    """Return the default of a field."""
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


def document_options(recipe: type[Recipe]) -> type[Recipe]:
    """Add the options of a dataclass to its docstring, as the section ``Args``."""
    if recipe.__doc__ is None:  # python -OO
        return recipe
    lines = ["Args:"]
    for declared in fields(recipe):  # type: ignore[arg-type]
        text = f"{declared.name}: {declared.metadata['help']}. Default: ``{default_of(declared)!r}``."
        lines += textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="        ", break_long_words=False)
    section = textwrap.indent("\n".join(lines), "    ")
    summary, *rest = re.split(r"\n(?=    Raises:)", recipe.__doc__, maxsplit=1)
    recipe.__doc__ = "\n".join([f"{summary.rstrip()}\n\n{section}\n", *rest])
    return recipe


def check_numbers(recipe: Any) -> None:
    """Check every option that has a smallest value.

    Raises:
        ValueError: a value is not a number, not an integer, or too small; names the option and the allowed values.
    """
    for declared in fields(recipe):
        least, value = declared.metadata["least"], getattr(recipe, declared.name)
        if least is None or (value is None and declared.default is None):
            continue
        whole = isinstance(least, int)
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
            kind = "an integer" if whole else "a number"
            raise ValueError(f"{declared.name}={value!r}; allowed: {kind} of at least {least:g}.")


def make_tuple(recipe: Any, name: str, kind: type) -> None:
    """Replace the list in an option by a tuple, which can be hashed.

    Raises:
        ValueError: the value is not a list of this kind.
    """
    value = getattr(recipe, name)
    if not isinstance(value, list | tuple) or not all_are(value, kind):
        raise ValueError(f"{name}={value!r}; allowed: a list of {kind.__name__}.")
    object.__setattr__(recipe, name, tuple(value))


def all_are(values: Sequence[Any], kind: type) -> bool:
    """Tell whether all values are of this kind; a bool does not count as an integer."""
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)

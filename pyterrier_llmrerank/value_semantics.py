"""Value semantics: objects that are compared, hashed, printed and changed by their constructor arguments."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any, cast


class ValueSemantics:
    """Makes objects equal if their constructor arguments are; each argument is an attribute of the same name.

    An object that is changed later equals only itself from then on, and keeps its hash. Private attributes, with an
    underscore in front, are neither compared nor pickled.
    """

    # The values that equality compares, as they were before the first change; None for an unchanged object.
    _first_values = cast("dict[str, Any] | None", None)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments, with the values in use."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self).__init__).parameters)[1:]}

    def equality_key(self) -> dict[str, Any]:
        """Return the values that equality compares: the arguments and, in subclasses, others that affect scores."""
        return self.arguments()

    def set_parameter(self, name: str, value: Any) -> None:
        """Change a constructor argument, as ``pt.GridScan`` does. The value is checked as in the constructor.

        Args:
            name: the name of the argument.
            value: the new value.

        Raises:
            ValueError: there is no such argument, or the value is not allowed.
        """
        arguments = self.arguments()
        if name not in arguments:
            raise ValueError(f"no argument {name!r}; allowed: {', '.join(arguments)}.")
        changed = type(self)(**{**arguments, name: value})
        for argument, before in arguments.items():
            if (after := getattr(changed, argument)) != before:
                setattr(self, argument, after)

    def __setattr__(self, name: str, value: Any) -> None:
        before = None
        if self._first_values is None and name in self.__dict__ and not name.startswith("_"):
            with suppress(AttributeError):  # a subclass's constructor that is still setting its arguments
                before = self.equality_key()
        super().__setattr__(name, value)
        if before is not None and self.equality_key() != before:
            self._first_values = before

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, ValueSemantics) or type(self) is not type(other):
            return False
        return self._first_values is other._first_values is None and self.equality_key() == other.equality_key()

    def __hash__(self) -> int:
        return hash((type(self), *(self._first_values or self.equality_key()).values()))

    def __repr__(self) -> str:
        first, *_ = self.arguments()
        return f"{type(self).__name__}({', '.join([repr(self._repr_value(first)), *self._options_shown()])})"

    def _options_shown(self) -> list[str]:
        """Return the options that differ from their defaults, as ``repr`` prints them."""
        _, _, *options = inspect.signature(
            type(self).__init__
        ).parameters.values()  # self and the first, which is always shown
        return [f"{p.name}={value!r}" for p in options if (value := self._repr_value(p.name)) != p.default]

    def _repr_value(self, name: str) -> Any:
        """Return an argument's value as ``repr`` prints it."""
        return getattr(self, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

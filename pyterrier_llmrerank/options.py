"""Constructor options of rerankers, each written once: name, type, default, check and help.

A reranker declares its options as class attributes::

    @with_options
    class MyReranker(LLMReranker):
        model: Option[str] = Option(default="owner/name", check=check_path, help="a folder or hub id.")
        _: KW_ONLY
        cutoff: Converted[int | Sequence[int], tuple[int, ...]] = Converted(default=(), check=check_layers, help="...")

The constructor, its signature and the docstring's ``Args`` follow from them, and :func:`options_of` lists them for a
command line. Values are checked whenever they are set.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast, dataclass_transform, overload

Given = TypeVar("Given")
Kept = TypeVar("Kept")
Value = TypeVar("Value")
Class = TypeVar("Class", bound=type)


class Converted(Generic[Given, Kept]):
    """Declares a constructor option that accepts values of one type and keeps them as another.

    Args:
        default: the value if none is given; an option without a default is required.
        check: takes the option's name and a value, and returns the value to keep or raises ValueError.
        help: the effect of the option, in reStructuredText. Its first sentence has to make sense alone.
        shell: the help of the command-line option, if the first sentence of ``help`` is about Python alone.
    """

    #: The name of the option, and the type of the values it accepts, as the source writes it.
    name: str
    accepts: str

    def __init__(
        self,
        *,
        default: Given = ...,  # type: ignore[assignment]
        check: Callable[[str, Any], Kept],
        help: str,
        shell: str | None = None,
    ) -> None:
        self.default = default
        self.check = check
        self.help = help
        self.shell = shell

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, reranker: None, owner: type) -> Given: ...
    @overload
    def __get__(self, reranker: object, owner: type) -> Kept: ...
    def __get__(self, reranker: object | None, owner: type) -> Given | Kept:
        if reranker is None:  # dataclasses ask for the default
            if self.default is ...:
                raise AttributeError(self.name)
            return self.default
        try:
            return cast(Kept, vars(reranker)[self.name])
        except KeyError:
            raise AttributeError(f"{type(reranker).__name__!r} object has no attribute {self.name!r}") from None

    def __set__(self, reranker: object, value: Given) -> None:
        vars(reranker)[self.name] = self.check(self.name, value)


class Option(Converted[Value, Value], Generic[Value]):
    """Declares a constructor option that keeps values as the type it accepts."""


@dataclass_transform(eq_default=False, field_specifiers=(Converted, Option))
def with_options(cls: Class) -> Class:
    """Give a reranker class the constructor, signature and ``Args`` docs that its options describe.

    The signature lists the positional options, then the class's own, then inherited ones. After the constructor has
    set all options, it calls ``__post_init__``.
    """
    made = cast(Any, dataclasses.dataclass(eq=False, repr=False)(cls))
    for name, annotation in made.__annotations__.items():
        if isinstance(option := vars(made).get(name), Converted):
            option.accepts = made.__annotations__[name] = _accepted_type(annotation)  # Sphinx reads annotations
    own, constructor = vars(made), made.__init__
    first, *others = inspect.signature(constructor).parameters.values()
    others = [parameter.replace(annotation=_option(made, parameter.name).accepts) for parameter in others]
    others.sort(key=lambda parameter: (parameter.kind, parameter.name not in own))
    constructor.__signature__ = inspect.Signature([first, *others])
    constructor.__annotations__ = {parameter.name: parameter.annotation for parameter in others} | {"return": "None"}
    made.__signature__ = constructor_signature(made)
    made.__doc__ = _with_args_section(made.__doc__, options_of(made))
    return cast(Class, made)


def options_of(reranker: type) -> list[Converted[Any, Any]]:
    """Return the options of a reranker class in the order of its signature.

    >>> from pyterrier_llmrerank import RankLLaMAReranker
    >>> option = options_of(RankLLaMAReranker)[8]
    >>> option.name, option.accepts, option.default
    ('title_field', 'str | None', 'title')
    """
    return [_option(reranker, name) for name in constructor_signature(reranker).parameters]


def constructor_signature(cls: type) -> inspect.Signature:
    """Return the signature of a class, which is its constructor's without ``self``."""
    _, *parameters = inspect.signature(cast(Any, cls).__init__).parameters.values()
    return inspect.Signature(parameters)


def _option(reranker: type, name: str) -> Converted[Any, Any]:
    return cast(Converted[Any, Any], inspect.getattr_static(reranker, name))


def _accepted_type(annotation: str) -> str:
    """Return ``A`` of an annotation ``Option[A]`` or ``Converted[A, B]``."""
    parameters = cast(ast.Subscript, ast.parse(annotation, mode="eval").body).slice
    return ast.unparse(parameters.elts[0] if isinstance(parameters, ast.Tuple) else parameters)


def _with_args_section(doc: str | None, options: list[Converted[Any, Any]]) -> str | None:
    """Insert the options as ``Args`` before the section ``Raises`` of a docstring, or at its end."""
    if doc is None:  # Python runs with -OO
        return None
    wrap = textwrap.TextWrapper(116, initial_indent="    ", subsequent_indent=" " * 8, break_on_hyphens=False).fill
    arguments = "\n".join(["Args:", *(wrap(f"{option.name}: {option.help}") for option in options)])
    before, raises, after = inspect.cleandoc(doc).partition("\nRaises:\n")
    return f"{before.rstrip()}\n\n{arguments}\n{raises}{after}"

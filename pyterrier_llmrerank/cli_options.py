"""Options of commands, made from the constructor options of rerankers, and errors that name them."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from .options import options_of
from .reranker import LLMReranker

#: Arguments without an option: a rerank file has one text, and training is another command.
WITHOUT_OPTION = ("self", "text_field", "training", "verbose")


def command_options(**kinds: type[LLMReranker]) -> list[inspect.Parameter]:
    """Return the options of a command: the options of a reranker, or of several, then without defaults."""
    found: dict[str, dict[str, Any]] = {}
    for kind, reranker in kinds.items():
        for option in options_of(reranker):
            if option.name not in WITHOUT_OPTION:
                found.setdefault(option.name, {})[kind] = option
    parameters = []
    for name, by_kind in found.items():
        kind, option = next(iter(by_kind.items()))
        hint = eval(option.accepts, vars(sys.modules[kinds[kind].__module__]) | globals())
        helps = {kind: option.summary for kind, option in by_kind.items()}
        if len(helps) == len(kinds) and len(set(helps.values())) == 1:
            help = option.summary
        else:
            help = " ".join(f"{kind}: {summary}" for kind, summary in helps.items())
        parameters.append(_option(name, hint, option.default if len(kinds) == 1 else None, help))
    return parameters


def _option(name: str, hint: Any, default: Any, help: str) -> inspect.Parameter:
    """Turn an argument into an option. Options with several values are repeated; ``{8: 50}`` is written ``8:50``."""
    kinds = typing.get_args(hint) or (hint,)
    origins = {typing.get_origin(kind): typing.get_args(kind) for kind in kinds}
    annotation: Any
    # A name keeps typer from adding --no-<name> to a bool.
    flag = f"--{name.replace('_', '-')}"
    if mapping := origins.get(Mapping):
        metavar = ":".join(kind.__name__ for kind in mapping).upper()
        info = typer.Option(flag, help=f"{help} May be repeated.", metavar=metavar, parser=_pair(*mapping))
        annotation, default = Annotated[list[Any] | None, info], None
    elif element := origins.get(Sequence):
        info = typer.Option(flag, help=f"{help} May be repeated.")
        annotation, default = Annotated[list[element[0]] | None, info], None  # type: ignore[valid-type]
    else:
        annotation = Annotated[hint, typer.Option(flag, help=help)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _pair(key: Callable[[str], Any], value: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    """Return a parser for ``8:50``."""

    def parse(word: str) -> tuple[Any, Any]:
        first, colon, second = word.partition(":")
        if not colon:
            raise typer.BadParameter(f"{word!r} has no colon")
        return key(first), value(second)

    return parse


def set_options(command: Callable[..., None], options: list[inspect.Parameter]) -> None:
    """Give a command options in place of its ``**arguments``."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own] + options
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


# -- errors


class OptionError(Exception):
    """An error whose message names options in place of arguments."""


def with_option_names(message: str, arguments: Iterable[str]) -> str:
    """Name options in place of arguments: ``--base-model=`` for ``base_model=``, ``--resume`` for ``resume=True``."""
    options = {name: f"--{name.replace('_', '-')}=" for name in arguments} | {"target": "--output="}
    flags = {"resume=True": "--resume", "overwrite=True": "--overwrite"}
    names = "|".join([*flags, *(f"{name}=" for name in options)])
    written = flags | {f"{name}=": option for name, option in options.items()}
    return re.sub(rf"(?<![\w/'\"-])({names})", lambda match: written[match[1]], message)


def one_line(error: BaseException) -> str:
    """Return the message of an error and its notes, in one line."""
    parts = (str(error) or type(error).__name__, *getattr(error, "__notes__", ()))
    return " ".join(" ".join(parts).split())

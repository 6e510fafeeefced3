"""Options of commands, made from the constructor options of rerankers, and errors that name them."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from .errors import ScoringError
from .options import Converted, options_of
from .reranker import LLMReranker

#: Errors that a command reports in one line, without a traceback.
ERRORS = (ValueError, OSError, ImportError, ScoringError, FloatingPointError)

#: Arguments without an option: a rerank file has one text, and training is another command.
WITHOUT_OPTION = ("self", "text_field", "training", "verbose")


def command_options(**kinds: type[LLMReranker]) -> list[inspect.Parameter]:
    """Return the options of a command for one kind of reranker, or for several kinds and then without defaults."""
    found: dict[str, dict[str, Any]] = {}
    for kind, reranker in kinds.items():
        for option in options_of(reranker):
            if option.name not in WITHOUT_OPTION:
                found.setdefault(option.name, {})[kind] = option
    parameters = []
    for name, by_kind in found.items():
        kind, option = next(iter(by_kind.items()))
        hint = eval(option.accepts, vars(sys.modules[kinds[kind].__module__]) | globals())
        helps = {kind: help_of(option, found) for kind, option in by_kind.items()}
        if len(helps) == len(kinds) and len(set(helps.values())) == 1:
            help = helps[kind]
        else:
            help = " ".join(f"{kind}: {text}" for kind, text in helps.items())
        parameters.append(_option(name, hint, option.default if len(kinds) == 1 else None, help))
    return parameters


def help_of(option: Converted[Any, Any], names: Container[str]) -> str:
    """Return the help of an option as plain text, in the words of a shell.

    Args:
        option: the option.
        names: the names of all options of the command, which the help mentions by their flags.
    """
    text = option.shell or option.help.partition(". ")[0].rstrip(".") + "."
    text = re.sub(r"``(\w+)``", lambda name: flag(name[1]) if name[1] in names else name[1], text)
    text = re.sub(r'``"(\S*)"``', r"\1", text)
    text = re.sub(r"(:\w+:)?`+", "", text).replace("None for", "by default,")
    return text[0].upper() + text[1:]


def flag(name: str) -> str:
    """Return the option for an argument: ``--base-model`` for ``base_model``."""
    return f"--{name.replace('_', '-')}"


def flags(*names: str) -> dict[str, str]:
    """Return the options for several arguments, by their names."""
    return {name: flag(name) for name in names}


def _option(name: str, hint: Any, default: Any, help: str) -> inspect.Parameter:
    """Turn an argument into an option. Options with several values are repeated; ``{8: 50}`` is written ``8:50``."""
    kinds = typing.get_args(hint) or (hint,)
    origins = {typing.get_origin(kind): typing.get_args(kind) for kind in kinds}
    annotation: Any
    # A name keeps typer from adding --no-<name> to a bool.
    if mapping := origins.get(Mapping):
        metavar = f"<{':'.join(kind.__name__ for kind in mapping)}>"
        info = typer.Option(flag(name), help=f"{help} May be repeated.", metavar=metavar, parser=_pair(*mapping))
        annotation, default = Annotated[list[Any] | None, info], None
    elif element := origins.get(Sequence):
        info = typer.Option(flag(name), help=f"{help} May be repeated.", metavar=f"<{element[0].__name__}>")
        annotation, default = Annotated[list[element[0]] | None, info], None  # type: ignore[valid-type]
    else:
        annotation = Annotated[hint, typer.Option(flag(name), help=help)]
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
    """Replaces an error that names arguments by one that names options.

    Args:
        message: a message that names arguments.
        names, repeat: as for :func:`in_shell`.
    """

    def __init__(self, message: str, names: Mapping[str, str], repeat: bool) -> None:
        super().__init__(message)
        self.names, self.repeat = names, repeat

    def in_shell(self, words: Sequence[str]) -> str:
        """Return the message as :func:`in_shell` spells it."""
        return in_shell(str(self), self.names, words, repeat=self.repeat)


@contextmanager
def naming(names: Mapping[str, str], *, repeat: bool = True) -> Iterator[None]:
    """Turn errors that name arguments into errors that name options.

    Args:
        names: as for :func:`in_shell`.
        repeat: as for :func:`in_shell`.

    Raises:
        OptionError: in place of an error of :data:`ERRORS`.
    """
    try:
        yield
    except ERRORS as error:
        raise OptionError(one_line(error), names, repeat) from error


#: A quoted text; its closing quote is missing if it was shortened.
QUOTED = r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'(?!\w)|"(?:[^"\\]|\\.)*"(?!\w)|'[^']*?\.\.\.|"[^"]*?\.\.\.)"""

#: A value in brackets, or True.
VALUE = r"True\b|" + "|".join(rf"\{a}(?:{QUOTED}|[^\{a}\{z}'\"])*\{z}" for a, z in ("{}", "[]", "()"))


def in_shell(message: str, names: Mapping[str, str], words: Sequence[str] = (), *, repeat: bool = True) -> str:
    """Spell the arguments in a message, and their values, as a shell does. Quoted texts stay as they are.

    Args:
        message: the message.
        names: the name of each argument in the shell.
        words: the words of the command line, which stay as they are, too.
        repeat: name an option before each of several values, rather than once before all.

    >>> in_shell("prune={8: 50}: no layer 8; set resume=True", {"prune": "--prune", "resume": "--resume"})
    '--prune 8:50: no layer 8; set --resume'
    """

    def spelled(found: re.Match[str]) -> str:
        if found["kept"]:
            return found["kept"]
        if found["pairs"]:
            return found["pairs"][1:-1].replace(": ", ":").replace(",", "")
        if found["name"]:
            return _spelled(names[found["name"]], found["value"], repeat)
        return "without it" if found["false"] else ""  # an option is omitted instead of False or None

    own = [word.partition("=")[2] if word.startswith("--") else word for word in words]
    own = [word for word in own if re.search("[={ ]", word)]  # "model" as a value says nothing about model='x'
    kept = "|".join([QUOTED, *(rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(own, key=len, reverse=True))])
    parts = (
        rf"(?P<kept>{kept})",
        rf"(?<![^\s(])(?P<name>{'|'.join(names)})=(?P<value>{VALUE})?",
        r"(?P<pairs>\{\d+: \w+(?:, \d+: \w+)*\})",
        r"(?<=allowed: )(?P<false>False)",
        r",? or None(?: for [^.;]*)?(?=[.;](?!\w))",
    )
    return re.sub("|".join(parts), spelled, message)


def _spelled(option: str, value: str | None, repeat: bool) -> str:
    """Spell an option with a value as Python writes it."""
    if value is None:
        return f"{option}="
    if value == "True":
        return option
    try:
        several = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a remark, not a literal
        return f"{option}={value}"
    if not isinstance(several, dict | list | tuple):
        return f"{option}={value}"
    each = several.items() if isinstance(several, dict) else several
    words = [shlex.quote(":".join(map(str, one)) if isinstance(one, tuple) else str(one)) for one in each]
    if not words:
        return f"{option}={value}"
    return f"{option} " + (f" {option} " if repeat else " ").join(words)


def one_line(error: BaseException) -> str:
    """Return the message of an error and its notes, in one line."""
    parts = (str(error) or type(error).__name__, *getattr(error, "__notes__", ()))
    return " ".join(" ".join(parts).split())

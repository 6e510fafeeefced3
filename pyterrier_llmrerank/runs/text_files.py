"""Lines of text files: read and checked one by one, or written so that a file appears only once it is complete.

Files are UTF-8, and compressed if their name ends in ``.gz``. Readers skip empty lines, and accept a byte order mark
and CRLF. An error names the file, the line, the value and the expected value.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, TextIO, cast

from ..values import problem_of

#: The longest line to read, in bytes, so that a hostile file cannot fill the memory.
MAX_LINE = 16 * 2**20

#: The most bytes of an output to a pipe that are held in memory; a larger output is held in a temporary file.
HELD_IN_MEMORY = 16 * 2**20

_BOM = b"\xef\xbb\xbf"
_WORD = re.compile(r"\S+", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


# -- reading


def malformed(path: Path, line: int, problem: str) -> ValueError:
    """Return the error for a line of a file."""
    return ValueError(f"{path}, line {line}: {problem}.")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read the lines that are not empty, without line ends, with their numbers from 1."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while True:
            number += 1
            try:
                raw = file.readline(MAX_LINE + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise malformed(path, number, f"the compressed file is truncated or damaged here ({error})") from error
            if not raw:
                return
            if len(raw) > MAX_LINE:
                raise malformed(path, number, f"longer than {MAX_LINE} bytes, the limit")
            if number == 1:
                raw = raw.removeprefix(_BOM)
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if b"\0" in raw:
                raise malformed(path, number, f"byte {raw.index(0) + 1} is NUL; expected text")
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                problem = f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not valid UTF-8"
                raise malformed(path, number, problem) from error
            if text.strip(" "):
                yield number, text


def _split(
    path: Path, lines: Iterable[tuple[int, list[str]]], allowed: dict[int, str], separator: str
) -> Iterator[tuple[int, list[str]]]:
    """Pass on the columns of each line; ValueError if their number changes or is not allowed."""
    count: int | None = None
    for line, parts in lines:
        if len(parts) != (count or len(parts)):
            raise malformed(path, line, f"{len(parts)} columns, but {count} in the lines before")
        count = len(parts)
        if count not in allowed:
            expected = " or ".join(f"{columns} ({names})" for columns, names in allowed.items())
            raise malformed(path, line, f"{count} {separator}-separated columns; expected {expected}")
        yield line, parts


def whitespace_columns(path: Path, allowed: dict[int, str]) -> Iterator[tuple[int, list[str]]]:
    """Read the columns of a file, separated by whitespace, with their line numbers.

    Args:
        path: the file.
        allowed: the names of the columns by their number, for the error message.

    Raises:
        ValueError: the number of columns in a line is not allowed, or differs from the first line's.
        OSError: the file cannot be read.
    """
    words = ((line, _WORD.findall(text)) for line, text in numbered_lines(path))
    return _split(path, words, allowed, "whitespace")


def tab_columns(
    path: Path, lines: Iterable[tuple[int, str]], allowed: dict[int, str]
) -> Iterator[tuple[int, list[str]]]:
    """Split lines at tabs; arguments and errors as for :func:`whitespace_columns`."""
    return _split(path, ((line, text.split("\t")) for line, text in lines), allowed, "tab")


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSON lines file, with their line numbers.

    Raises:
        ValueError: a line is not a JSON object.
        OSError: the file cannot be read.
    """
    for line, text in numbered_lines(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise malformed(path, line, f"not JSON ({error})") from error
        if not isinstance(record, dict):
            raise malformed(path, line, f"{reprlib.repr(record)}; expected a JSON object")
        yield line, record


def is_json_lines(path: Path) -> bool:
    """Tell from its name whether a file has JSON lines."""
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


# -- values


def parse_integer(path: Path, line: int, name: str, word: str) -> int:
    """Parse an integer, or raise the error for its line."""
    if not _INTEGER.fullmatch(word):
        raise malformed(path, line, f"{name} is {reprlib.repr(word)}; expected an integer")
    return int(word)


def parse_score(path: Path, line: int, word: str) -> float:
    """Parse a finite score, or raise the error for its line."""
    score = float(word) if _NUMBER.fullmatch(word) else math.nan
    if not math.isfinite(score):
        raise malformed(path, line, f"score is {reprlib.repr(word)}; expected a finite number")
    return score


def id_problem(value: object) -> str | None:
    """Return the problem with a qid, docno or tag, or None."""
    if not isinstance(value, str) or not value:
        return f"{reprlib.repr(value)}; expected a non-empty string"
    if not _WORD.fullmatch(value) or "\0" in value:
        return f"{reprlib.repr(value)}; expected no whitespace, which separates the columns of a run, and no NUL"
    return problem_of(value)


def text_problem(value: object) -> str | None:
    """Return the problem with a query, text, title or url, or None."""
    return problem_of(value) if isinstance(value, str) else f"{reprlib.repr(value)}; expected a string"


def check_id(path: Path, line: int, name: str, value: object) -> str:
    """Return an id, or raise the error for its line."""
    if problem := id_problem(value):
        raise malformed(path, line, f"{name} is {problem}")
    return cast(str, value)


def _key(path: Path, line: int, record: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of the names that the record has."""
    for name in names:
        if name in record:
            return name
    raise malformed(path, line, f"no key {' or '.join(map(repr, names))}; expected one, with a string")


def id_in(path: Path, line: int, record: dict[str, Any], *names: str) -> str:
    """Return the id under the first of the names that the record has. Integers become strings."""
    name = _key(path, line, record, names)
    value = record[name]
    return check_id(path, line, name, str(value) if type(value) is int else value)


def text_in(path: Path, line: int, record: dict[str, Any], *names: str) -> str:
    """Return the text under the first of the names that the record has, or raise the error for its line."""
    name = _key(path, line, record, names)
    value = record[name]
    if problem := text_problem(value):
        raise malformed(path, line, f"{name} is {problem}")
    return cast(str, value)


def optional_text_in(path: Path, line: int, record: dict[str, Any], name: str) -> str | None:
    """Return the text under a name; None if it is missing or null."""
    return None if record.get(name) is None else text_in(path, line, record, name)


# -- writing


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing, and create or replace it only once all of it is written.

    Args:
        path: the file, compressed if its name ends in ``.gz`` (without a timestamp, so equal texts give equal files).
            A path that is not a regular file, such as ``/dev/stdout``, gets the whole text at the end.

    Raises:
        OSError: the file cannot be written.
    """
    regular = path.is_file() or not path.exists()
    if regular:
        path = path.resolve()  # keeps a symbolic link
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist.")
    part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}") if regular else path
    try:
        with part.open("xb") if regular else SpooledTemporaryFile(HELD_IN_MEMORY) as raw:
            with _gzip(cast(BinaryIO, raw)) if path.suffix == ".gz" else nullcontext(raw) as lines:
                text = TextIOWrapper(cast(BinaryIO, lines), encoding="utf-8", newline="\n")
                yield text
                text.flush()
            raw.flush()
            if regular:
                os.fsync(raw.fileno())
            else:
                raw.seek(0)
                with path.open("wb") as target:
                    shutil.copyfileobj(raw, target)
        if regular:
            part.replace(path)
    except BaseException:
        if regular:
            part.unlink(missing_ok=True)
        raise


def _gzip(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))

"""Read and write runs, rerank files, topics, texts and qrels, line by line, in the forms of TREC, BEIR and Tevatron.

Readers check each line. A malformed one raises a ValueError with the file, the line, the value and the expected value.
Files are UTF-8, and compressed if their name ends in ``.gz``. Readers skip empty lines, and accept a byte order mark
and CRLF. Memory use grows at most with the number of queries, not with the number of lines.
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
from html import unescape
from io import TextIOWrapper
from itertools import chain, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO, TypeVar, cast

from ..values import problem_of

#: The longest line to read, in bytes, so that a hostile file cannot fill the memory.
MAX_LINE = 16 * 2**20

#: Bytes of an output to a pipe that are held in memory; more are held in a temporary file.
HELD_IN_MEMORY = 16 * 2**20

#: The forms of a run to write: ``qid docno score``, and TREC's ``qid Q0 docno rank score tag``.
FORMS = ("three", "trec")

#: The columns of a run by their number; ``_`` is a column to ignore.
COLUMNS = {
    3: ("qid", "docno", "score"),
    4: ("qid", "docno", "rank", "score"),
    6: ("qid", "_", "docno", "rank", "score", "_"),
}

_NAME_COLUMNS = "name the columns with --columns (for a baseline, --baseline-columns)"

_BOM = b"\xef\xbb\xbf"
_WORD = re.compile(r"\S+", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class RunRow(NamedTuple):
    """A line of a run. ``rank`` is None if the run has no ranks."""

    qid: str
    docno: str
    rank: int | None
    score: float
    line: int


class RerankRow(NamedTuple):
    """A line of a rerank file: a query and a candidate. Missing fields are None."""

    qid: str
    query: str
    docno: str
    title: str | None
    url: str | None
    text: str
    score: float | None
    line: int


class Text(NamedTuple):
    """A document. Missing fields are None."""

    docno: str
    title: str | None
    url: str | None
    text: str
    line: int


class Topic(NamedTuple):
    """A query with its id."""

    qid: str
    query: str
    line: int


class Judgement(NamedTuple):
    """A line of qrels: the relevance of a document to a query."""

    qid: str
    docno: str
    label: int


class _Ranked(Protocol):
    @property
    def qid(self) -> str: ...
    @property
    def docno(self) -> str: ...
    @property
    def line(self) -> int: ...


Ranked = TypeVar("Ranked", bound=_Ranked)


# -- runs and rerank files


def read_run(path: Path, columns: str | None = None) -> Iterator[RunRow]:
    """Read a run of 3 columns (qid docno score), 4 (qid docno rank score) or 6 (TREC), or with the given columns.

    Args:
        path: the run.
        columns: names of the columns, such as ``"qid,docno,rank"``: qid, docno, and rank, score or both, with ``_`` for
            each column to ignore. Without a score column, scores are negated ranks. None infers the columns from
            their number.

    Raises:
        ValueError: a line is malformed, has more or fewer columns than the first, repeats a document of its query, or
            belongs to an earlier query; ranks and scores contradict each other; without ``columns``, scores look like
            ranks in most queries, or are 1, 2, 3 and so on in one; or ``columns`` is invalid.
        OSError: the file cannot be read.
    """
    names = None if columns is None else _names(columns)
    hint = " (sort -s -k1,1 groups them)"
    like_ranks = unlike_ranks = line = 0  # queries; integers of single documents may be either
    for _, rows in by_query(_check_unique(path, _run_rows(path, names), hint)):
        _check_agreement(path, rows)
        scores = [row.score for row in rows]
        if names is None and len(scores) > 2 and scores == list(range(1, len(scores) + 1)):
            raise _like_ranks(path, rows[0].line, "")
        if len(scores) > 1 and _look_like_ranks(scores):
            line, like_ranks = line or rows[0].line, like_ranks + 1
        elif len(scores) > 1 or not scores[0].is_integer():
            unlike_ranks += 1
        yield from rows
    if names is None and like_ranks > unlike_ranks:
        raise _like_ranks(path, line, " and most others")


def _like_ranks(path: Path, line: int, others: str) -> ValueError:
    """Return the error for scores that look like ranks."""
    problem = f"the scores count up like ranks, in this query{others}"
    return malformed(path, line, f"{problem}; {_NAME_COLUMNS} as qid,docno,rank or qid,docno,score")


def _names(columns: str) -> tuple[str, ...]:
    names = tuple(columns.replace(",", " ").split())
    read = [name for name in names if name != "_"]
    if sorted(read) not in (["docno", "qid", "rank"], ["docno", "qid", "score"], ["docno", "qid", "rank", "score"]):
        raise ValueError(
            f"columns={columns!r}; allowed: qid, docno, and rank, score or both, with _ for each column to ignore, "
            "such as qid,docno,rank or qid,_,docno,_,score,_."
        )
    return names


def _run_rows(path: Path, names: tuple[str, ...] | None) -> Iterator[RunRow]:
    allowed = {3: "qid docno score", 4: "qid docno rank score", 6: "TREC"}
    if names is not None:
        allowed = {len(names): " ".join(names)}
    for line, words in _columns(path, allowed):
        row = dict(zip(names or COLUMNS[len(words)], words, strict=True))
        rank = _integer(path, line, "rank", row["rank"]) if "rank" in row else None
        score = float(-(rank or 0)) if "score" not in row else _score(path, line, row["score"])
        yield RunRow(row["qid"], row["docno"], rank, score, line)


def _check_agreement(path: Path, rows: list[RunRow]) -> None:
    """Raise ValueError if a document of a query has a better rank and a lower score than another."""
    ranked = sorted((row for row in rows if row.rank is not None), key=lambda row: (row.rank or 0, -row.score))
    for above, below in pairwise(ranked):
        if below.score > above.score:
            raise malformed(
                path,
                below.line,
                f"docno {below.docno!r} has rank {below.rank} and score {below.score:g}, but docno {above.docno!r} has "
                f"rank {above.rank} and score {above.score:g} (query {above.qid!r}), which contradict each other; "
                f"{_NAME_COLUMNS}, with _ for the column to ignore, such as qid,_,docno,_,score,_",
            )


def _look_like_ranks(scores: list[float]) -> bool:
    """Return whether the scores of a query, in the order of the file, may be ranks and are not sorted by score."""
    if not all(score.is_integer() and score >= 0 for score in scores):
        return False
    if all(above < below for above, below in pairwise(scores)):
        return True
    first, whole = min(scores), sorted(scores)
    counts = first <= 1 and whole == [first + place for place in range(len(scores))]
    return counts and scores != whole[::-1]


def run_line(qid: str, docno: str, rank: int, score: float, form: str, tag: str) -> str:
    r"""Format a line of a run, including the line end.

    Args:
        qid: the query's id.
        docno: the document's id.
        rank: the rank, from 1; omitted from the three-column form.
        score: a finite score, written so that it reads back as the same float.
        form: ``"three"`` (Tevatron's three tab-separated columns) or ``"trec"``.
        tag: the run's name; omitted from the three-column form.

    Raises:
        ValueError: a value cannot be represented, or ``form`` is unknown.

    >>> run_line("q1", "d7", 1, 0.5, "trec", "rankllama")
    'q1 Q0 d7 1 0.5 rankllama\n'
    """
    for name, value in (("qid", qid), ("docno", docno), ("tag", tag)):
        if problem := _problem_of_id(value):
            raise ValueError(f"{name} is {problem}.")
    if not math.isfinite(score):
        raise ValueError(f"the score of query {qid!r}, docno {docno!r} is {score!r}; expected a finite number.")
    if form == "three":
        return f"{qid}\t{docno}\t{float(score)!r}\n"
    if form == "trec":
        return f"{qid} Q0 {docno} {rank} {float(score)!r} {tag}\n"
    raise ValueError(f"form={form!r}; allowed: {', '.join(FORMS)}.")


def read_rerank(path: Path) -> Iterator[RerankRow]:
    """Read a rerank file: JSON objects with the strings ``query_id``, ``query``, ``docid`` and ``text``.

    ``title`` and ``url`` (strings) and ``score`` (a finite number) are optional; other keys are ignored. Ids may be
    integers, too.

    Raises:
        ValueError, OSError: as :func:`read_run`.
    """
    return _check_unique(path, _rerank_rows(path))


def _rerank_rows(path: Path) -> Iterator[RerankRow]:
    for line, record in objects(path):
        score = record.get("score")
        if score is not None and not _is_finite(score):
            raise malformed(path, line, f"score is {reprlib.repr(score)}; expected a finite number")
        yield RerankRow(
            _id(path, line, record, "query_id"),
            _text(path, line, record, "query"),
            _id(path, line, record, "docid"),
            _optional(path, line, record, "title"),
            _optional(path, line, record, "url"),
            _text(path, line, record, "text"),
            None if score is None else float(score),
            line,
        )


def rerank_line(row: RerankRow) -> str:
    """Format a line of a rerank file, including the line end. Fields that are None are omitted.

    Raises:
        ValueError: :func:`read_rerank` would reject the line.
    """
    texts = {"query": row.query, "text": row.text}
    texts |= {name: value for name, value in (("title", row.title), ("url", row.url)) if value is not None}
    problems = {"query_id": _problem_of_id(row.qid), "docid": _problem_of_id(row.docno)}
    problems |= {name: _problem_of_text(value) for name, value in texts.items()}
    if row.score is not None and not _is_finite(row.score):
        problems["score"] = f"{reprlib.repr(row.score)}; expected a finite number"
    label = f"docno {reprlib.repr(row.docno)} (query {reprlib.repr(row.qid)})"
    for name, problem in problems.items():
        if problem:
            raise ValueError(f"{label}: {name} is {problem}.")
    record = {
        "query_id": row.qid,
        "query": row.query,
        "docid": row.docno,
        "title": row.title,
        "url": row.url,
        "text": row.text,
        "score": row.score,
    }
    line = json.dumps({key: value for key, value in record.items() if value is not None}, ensure_ascii=False) + "\n"
    if (length := len(line.encode())) > MAX_LINE:
        raise ValueError(f"{label}: the line has {length} bytes; allowed: up to {MAX_LINE}. Truncate its text.")
    return line


def by_query(rows: Iterable[Ranked]) -> Iterator[tuple[str, list[Ranked]]]:
    """Group consecutive rows by query."""
    for qid, group in groupby(rows, attrgetter("qid")):
        yield qid, list(group)


def best_first(rows: Iterable[RunRow]) -> list[RunRow]:
    """Sort the rows of a query by score; ties by rank if there are ranks, then by position."""
    return sorted(rows, key=lambda row: (-row.score, row.rank or 0))


def _check_unique(path: Path, rows: Iterable[Ranked], hint: str = "") -> Iterator[Ranked]:
    """Pass on rows; raise ValueError if a document repeats within a query, or a query after another one.

    Args:
        path: the file, for the message.
        rows: its rows.
        hint: how to group rows by query, for the message.
    """
    done: set[str] = set()
    qid: str | None = None
    lines: dict[str, int] = {}
    for row in rows:
        if row.qid != qid:
            if row.qid in done:
                problem = f"query {row.qid!r} again, after others; expected consecutive lines for each query{hint}"
                raise malformed(path, row.line, problem)
            qid, lines = row.qid, {}
            done.add(qid)
        first = lines.setdefault(row.docno, row.line)
        if first != row.line:
            raise malformed(
                path, row.line, f"docno {row.docno!r} again for query {qid!r}, as in line {first}; expected it once"
            )
        yield row


# -- topics, texts and qrels


def read_topics(path: Path) -> Iterator[Topic]:
    """Read queries from tab-separated columns (qid, query), TREC ``<top>`` elements or JSON lines.

    JSON lines (``.jsonl``, ``.json``) have ``qid``, ``query_id``, ``_id`` or ``id``, and ``query`` or ``text``. In
    ``<top>`` elements, ``<num>`` is the qid and ``<title>`` the query.

    Raises:
        ValueError, OSError: as :func:`read_run`; or a qid repeats.
    """
    lines: dict[str, int] = {}
    for topic in _topics(path):
        first = lines.setdefault(topic.qid, topic.line)
        if first != topic.line:
            raise malformed(path, topic.line, f"qid {topic.qid!r} again, as in line {first}; expected it once")
        yield topic


def _topics(path: Path) -> Iterator[Topic]:
    if _is_json(path):
        for line, record in objects(path):
            qid = _id(path, line, record, "qid", "query_id", "_id", "id")
            yield Topic(qid, _text(path, line, record, "query", "text"), line)
        return
    lines = _lines(path)
    if (first := next(lines, None)) is None:
        return
    line, text = first
    lines = chain([first], lines)
    if _TOP.match(text):
        yield from _trec_topics(path, lines)
    elif text.startswith(("<?xml", "<!DOCTYPE", "<topic")):
        raise malformed(
            path, line, "XML; expected lines of qid, tab, query; TREC <top> elements; or JSON lines (.jsonl)"
        )
    else:
        for line, (qid, query) in _fields(path, lines, {2: "qid, query"}):
            yield Topic(_checked_id(path, line, "qid", qid), query, line)


def _trec_topics(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Topic]:
    begun: int | None = None
    element = ""
    for line, text in lines:
        if (_TOP.match(text) is not None) != (begun is None):
            raise malformed(path, line, f"{reprlib.repr(text)}; expected a sequence of <top> ... </top> elements")
        begun = begun or line
        element += text + "\n"
        if "</top>" in text.lower():
            yield _trec_topic(path, begun, element)
            begun, element = None, ""
    if begun is not None:
        raise malformed(path, begun, "<top> without </top>")


#: A field of a TREC topic: up to its end tag, or to the next line that begins with a tag.
_FIELD = re.compile(
    r"(?:^|>)\s*<(num|title)>\s*(?:number:|topic:|title:)?(.*?)(?=</\1>|</top>|^\s*</?(?:num|title|desc|narr|dom|smry|con|fac|def)\b)",
    re.I | re.M | re.S,
)
_TOP = re.compile(r"\s*<top[\s>]", re.I)


def _trec_topic(path: Path, line: int, element: str) -> Topic:
    fields = [(name.lower(), " ".join(unescape(value).split())) for name, value in _FIELD.findall(element)]
    for name in ("num", "title"):
        if sum(one == name for one, _ in fields) != 1 or not dict(fields)[name]:
            raise malformed(path, line, f"a <top> element with no <{name}>, an empty one or several; expected one")
    return Topic(_checked_id(path, line, "num", dict(fields)["num"]), dict(fields)["title"], line)


def read_texts(path: Path) -> Iterator[Text]:
    """Read documents from 2 to 4 tab-separated columns or JSON lines.

    The columns are docno, text; docno, title, text; or docno, url, title, text, as in ``msmarco-docs.tsv``. JSON lines
    (``.jsonl``, ``.json``) have ``docno``, ``docid``, ``_id`` or ``id``, and ``text`` or ``contents``; ``title`` and
    ``url`` are optional. Repeated docnos are not detected, since there may be more documents than fit in memory.

    Raises:
        ValueError, OSError: as :func:`read_run`.
    """
    if _is_json(path):
        for line, record in objects(path):
            yield Text(
                _id(path, line, record, "docno", "docid", "_id", "id"),
                _optional(path, line, record, "title"),
                _optional(path, line, record, "url"),
                _text(path, line, record, "text", "contents"),
                line,
            )
    else:
        allowed = {2: "docno, text", 3: "docno, title, text", 4: "docno, url, title, text"}
        for line, (docno, *more, text) in _fields(path, _lines(path), allowed):
            url, title = [None, None, *more][-2:]
            yield Text(_checked_id(path, line, "docno", docno), title, url, text, line)


#: The header of BEIR qrels.
_BEIR = ["query-id", "corpus-id", "score"]


def read_qrels(path: Path) -> Iterator[Judgement]:
    """Read qrels of TREC's 4 columns (qid iteration docno label) or BEIR's 3 (qid docno label, with or without header).

    Repeated lines count once, and lines may have any order.

    Raises:
        ValueError: a line is malformed, or a document has two labels for a query.
        OSError: the file cannot be read.
    """
    seen: dict[tuple[str, str], tuple[int, int]] = {}
    for line, words in _columns(path, {3: "qid docno label", 4: "TREC"}):
        if line == 1 and words == _BEIR:
            continue
        qid, docno, label = words[0], words[-2], _integer(path, line, "label", words[-1])
        first, before = seen.setdefault((qid, docno), (line, label))
        if label != before:
            problem = f"docno {docno!r} again for query {qid!r}, with label {label}, but {before} in line {first}"
            raise malformed(path, line, f"{problem}; expected one label")
        if first == line:
            yield Judgement(qid, docno, label)


# -- lines


def malformed(path: Path, line: int, problem: str) -> ValueError:
    """Return the error for a line of a file."""
    return ValueError(f"{path}, line {line}: {problem}.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
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
    """Pass on the columns of each line; raise ValueError if their number changes or is not allowed."""
    count: int | None = None
    for line, parts in lines:
        if len(parts) != (count or len(parts)):
            raise malformed(path, line, f"{len(parts)} columns, but {count} in the lines before")
        count = len(parts)
        if count not in allowed:
            expected = " or ".join(f"{columns} ({names})" for columns, names in allowed.items())
            raise malformed(path, line, f"{count} {separator}-separated columns; expected {expected}")
        yield line, parts


def _columns(path: Path, allowed: dict[int, str]) -> Iterator[tuple[int, list[str]]]:
    words = ((line, _WORD.findall(text)) for line, text in _lines(path))
    return _split(path, words, allowed, "whitespace")


def _fields(path: Path, lines: Iterable[tuple[int, str]], allowed: dict[int, str]) -> Iterator[tuple[int, list[str]]]:
    return _split(path, ((line, text.split("\t")) for line, text in lines), allowed, "tab")


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSON lines file, with their line numbers.

    Raises:
        ValueError, OSError: as :func:`read_run`.
    """
    for line, text in _lines(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise malformed(path, line, f"not JSON ({error})") from error
        if not isinstance(record, dict):
            raise malformed(path, line, f"{reprlib.repr(record)}; expected a JSON object")
        yield line, record


def _is_json(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


# -- values


def _integer(path: Path, line: int, name: str, word: str) -> int:
    if not _INTEGER.fullmatch(word):
        raise malformed(path, line, f"{name} is {reprlib.repr(word)}; expected an integer")
    return int(word)


def _score(path: Path, line: int, word: str) -> float:
    score = float(word) if _NUMBER.fullmatch(word) else math.nan
    if not math.isfinite(score):
        raise malformed(path, line, f"score is {reprlib.repr(word)}; expected a finite number")
    return score


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def _problem_of_id(value: object) -> str | None:
    """Return the problem with a qid, docno or tag, or None."""
    if not isinstance(value, str) or not value:
        return f"{reprlib.repr(value)}; expected a non-empty string"
    if not _WORD.fullmatch(value) or "\0" in value:
        return f"{reprlib.repr(value)}; expected no whitespace, which separates the columns of a run, and no NUL"
    return problem_of(value)


def _problem_of_text(value: object) -> str | None:
    """Return the problem with a query, text, title or url, or None."""
    return problem_of(value) if isinstance(value, str) else f"{reprlib.repr(value)}; expected a string"


def _checked_id(path: Path, line: int, name: str, value: object) -> str:
    if problem := _problem_of_id(value):
        raise malformed(path, line, f"{name} is {problem}")
    return cast(str, value)


def _key(path: Path, line: int, record: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of the names that the record has."""
    for name in names:
        if name in record:
            return name
    raise malformed(path, line, f"no key {' or '.join(map(repr, names))}; expected one, with a string")


def _id(path: Path, line: int, record: dict[str, Any], *names: str) -> str:
    """Return the id under the first of the names that the record has. Integers become strings."""
    name = _key(path, line, record, names)
    value = record[name]
    return _checked_id(path, line, name, str(value) if type(value) is int else value)


def _text(path: Path, line: int, record: dict[str, Any], *names: str) -> str:
    name = _key(path, line, record, names)
    value = record[name]
    if problem := _problem_of_text(value):
        raise malformed(path, line, f"{name} is {problem}")
    return cast(str, value)


def _optional(path: Path, line: int, record: dict[str, Any], name: str) -> str | None:
    return None if record.get(name) is None else _text(path, line, record, name)


# -- writing


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing, and create or replace it only once all of it is written.

    Args:
        path: the file, compressed if its name ends in ``.gz`` (without a timestamp, so equal texts give equal files).
            A path that is not a regular file, such as ``/dev/stdout``, gets all of the text at the end.

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
            with _compressed(cast(BinaryIO, raw)) if path.suffix == ".gz" else nullcontext(raw) as lines:
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


def _compressed(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))

"""Files of rankings and of what they rank, in TREC's and Tevatron's forms, read and written a line at a time.

Every reader checks as it goes. What is malformed is a ValueError that names the file, the line, the value and
what is wanted. Lines are UTF-8; a byte order mark, CRLF and empty lines are tolerated; a file whose name ends in
``.gz`` is compressed. Memory grows with the number of queries at most, not with the lines.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import reprlib
import secrets
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from itertools import chain, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO, TypeVar, cast

from ..values import problem_of

#: The longest line that is read, in bytes: a hostile file cannot fill the memory.
MAX_LINE = 16 * 2**20

#: The forms of a run that are written: ``qid docno score``, and TREC's ``qid Q0 docno rank score tag``.
FORMS = ("three", "trec")

#: The columns of a run by how many there are; ``_`` is one that is not read.
COLUMNS = {
    3: ("qid", "docno", "score"),
    4: ("qid", "docno", "rank", "score"),
    6: ("qid", "_", "docno", "rank", "score", "_"),
}

#: How a user says which columns a run has.
_SAY = "name the columns by --columns (a baseline's by --baseline-columns)"

_BOM = b"\xef\xbb\xbf"
_WORD = re.compile(r"\S+", re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class RunRow(NamedTuple):
    """A line of a run; ``rank`` is None where the form has no ranks."""

    qid: str
    docno: str
    rank: int | None
    score: float
    line: int


class RerankRow(NamedTuple):
    """A line of a rerank file: a query and a document, to be scored; None for what it does not say."""

    qid: str
    query: str
    docno: str
    title: str | None
    url: str | None
    text: str
    score: float | None
    line: int


class Text(NamedTuple):
    """A document; None for what its file does not say."""

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
    """How relevant a document is to a query."""

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


# -- rankings


def read_run(path: Path, columns: str | None = None) -> Iterator[RunRow]:
    """Read a run of 3 columns (qid docno score), 4 (qid docno rank score) or 6 (TREC's), or of those that are named.

    Args:
        path: the run.
        columns: its columns, ``"qid,docno,rank"``: qid, docno, and rank or score or both, with ``_`` for each
            column that is not read. Without a score, the score is minus the rank. None goes by their number.

    Raises:
        ValueError: a line is malformed, has another number of columns than the first, names a document a second
            time for its query, or returns to a query after lines of another; ranks and scores contradict each
            other; without ``columns``, scores look like ranks in every query; or ``columns`` is not what is allowed.
        OSError: the file cannot be read.
    """
    names = None if columns is None else _names(columns)
    hint = ", as sort -s -k1,1 puts them"
    like_ranks: bool | None = None
    line = 0
    for _, rows in by_query(_each_once(path, _run_rows(path, names), hint)):
        _check_agreement(path, rows)
        scores = [row.score for row in rows]
        if len(rows) == 1:
            like_ranks = like_ranks if scores[0].is_integer() else False
        elif like_ranks is not False:
            line, like_ranks = line or rows[0].line, _like_ranks(scores)
        yield from rows
    if like_ranks and names is None:
        raise malformed(
            path,
            line,
            f"scores that count up, as ranks do, here and in every other query; wanted to know which they are: {_SAY}, "
            "like qid,docno,rank or qid,docno,score",
        )


def _names(columns: str) -> tuple[str, ...]:
    names = tuple(columns.replace(",", " ").split())
    read = [name for name in names if name != "_"]
    if sorted(read) not in (["docno", "qid", "rank"], ["docno", "qid", "score"], ["docno", "qid", "rank", "score"]):
        raise ValueError(
            f"columns={columns!r}; allowed: qid, docno, and rank or score or both, with _ for each column that is not "
            "read, like qid,docno,rank or qid,_,docno,_,score,_."
        )
    return names


def _run_rows(path: Path, names: tuple[str, ...] | None) -> Iterator[RunRow]:
    allowed = {3: "qid docno score", 4: "qid docno rank score", 6: "TREC's"}
    if names is not None:
        allowed = {len(names): " ".join(names)}
    for line, words in _columns(path, allowed):
        row = dict(zip(names or COLUMNS[len(words)], words, strict=True))
        rank = _whole(path, line, "rank", row["rank"]) if "rank" in row else None
        score = float(-(rank or 0)) if "score" not in row else _score(path, line, row["score"])
        yield RunRow(row["qid"], row["docno"], rank, score, line)


def _check_agreement(path: Path, rows: list[RunRow]) -> None:
    """Raise ValueError where a document of a query has the better rank and the lower score."""
    ranked = sorted((row for row in rows if row.rank is not None), key=lambda row: (row.rank or 0, -row.score))
    for above, below in pairwise(ranked):
        if below.score > above.score:
            raise malformed(
                path,
                below.line,
                f"docno {below.docno!r} has rank {below.rank} and score {below.score:g}, but docno {above.docno!r} has "
                f"rank {above.rank} and score {above.score:g} (query {above.qid!r}); wanted to know which counts: "
                f"{_SAY}, with _ for the one that does not, like qid,_,docno,_,score,_",
            )


def _like_ranks(scores: list[float]) -> bool:
    """Whether the scores of a query, as they stand in a file, may be ranks, and do not begin with the best."""
    if not all(score.is_integer() and score >= 0 for score in scores):
        return False
    if all(above < below for above, below in pairwise(scores)):
        return True
    first, whole = min(scores), sorted(scores)
    counts = first <= 1 and whole == [first + place for place in range(len(scores))]
    return counts and scores != whole[::-1]


def run_line(qid: str, docno: str, rank: int, score: float, form: str, tag: str) -> str:
    r"""A line of a run, with its line end.

    Args:
        qid: of the query.
        docno: of the document.
        rank: from 1; the three-column form leaves it out.
        score: finite; written so that reading it gives the same float.
        form: ``"three"`` (Tevatron's, parted by tabs) or ``"trec"``.
        tag: the run's name; the three-column form leaves it out.

    Raises:
        ValueError: one of them cannot be written in this form.

    >>> run_line("q1", "d7", 1, 0.5, "trec", "rankllama")
    'q1 Q0 d7 1 0.5 rankllama\n'
    """
    for name, value in (("qid", qid), ("docno", docno), ("tag", tag)):
        if problem := _problem_of_id(value):
            raise ValueError(f"{name} is {problem}.")
    if not math.isfinite(score):
        raise ValueError(f"the score of query {qid!r}, docno {docno!r} is {score!r}; wanted a finite number.")
    if form == "three":
        return f"{qid}\t{docno}\t{float(score)!r}\n"
    if form == "trec":
        return f"{qid} Q0 {docno} {rank} {float(score)!r} {tag}\n"
    raise ValueError(f"form={form!r}; allowed: {', '.join(FORMS)}.")


def read_rerank(path: Path) -> Iterator[RerankRow]:
    """The lines of a rerank file: JSON objects with ``query_id``, ``query``, ``docid`` and ``text``, all strings.

    ``title`` and ``url`` (strings) and ``score`` (a finite number) may be there; other keys are passed over.

    Raises:
        ValueError, OSError: as :func:`read_run`.
    """
    return _each_once(path, _rerank_rows(path))


def _rerank_rows(path: Path) -> Iterator[RerankRow]:
    for line, record in objects(path):
        score = record.get("score")
        if score is not None and not _is_finite(score):
            raise malformed(path, line, f"score is {reprlib.repr(score)}; wanted a finite number")
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
    """Write a line of a rerank file, with its line end; what is None is left out.

    Raises:
        ValueError: :func:`read_rerank` would not read it.
    """
    texts = {"query": row.query, "text": row.text}
    texts |= {name: value for name, value in (("title", row.title), ("url", row.url)) if value is not None}
    problems = {"query_id": _problem_of_id(row.qid), "docid": _problem_of_id(row.docno)}
    problems |= {name: _problem_of_text(value) for name, value in texts.items()}
    if row.score is not None and not _is_finite(row.score):
        problems["score"] = f"{reprlib.repr(row.score)}; wanted a finite number"
    of = f"docno {reprlib.repr(row.docno)} (query {reprlib.repr(row.qid)})"
    for name, problem in problems.items():
        if problem:
            raise ValueError(f"{of}: {name} is {problem}.")
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
        raise ValueError(f"{of}: a line of {length} bytes; allowed: up to {MAX_LINE}. Cut its text.")
    return line


def by_query(rows: Iterable[Ranked]) -> Iterator[tuple[str, list[Ranked]]]:
    """The rows of one query after the other."""
    for qid, group in groupby(rows, attrgetter("qid")):
        yield qid, list(group)


def best_first(rows: Iterable[RunRow]) -> list[RunRow]:
    """By score; equal ones by rank where there are ranks, then as they stand."""
    return sorted(rows, key=lambda row: (-row.score, row.rank or 0))


def _each_once(path: Path, rows: Iterable[Ranked], hint: str = "") -> Iterator[Ranked]:
    """The rows, checked to name each document once, and to keep those of a query together; the hint says how to."""
    done: set[str] = set()
    qid: str | None = None
    lines: dict[str, int] = {}
    for row in rows:
        if row.qid != qid:
            if row.qid in done:
                problem = f"query {row.qid!r} again, after others; wanted the lines of a query together{hint}"
                raise malformed(path, row.line, problem)
            qid, lines = row.qid, {}
            done.add(qid)
        first = lines.setdefault(row.docno, row.line)
        if first != row.line:
            raise malformed(
                path, row.line, f"docno {row.docno!r} again for query {qid!r}, as in line {first}; wanted it once"
            )
        yield row


# -- what they rank


def read_topics(path: Path) -> Iterator[Topic]:
    """Read queries: two columns parted by a tab (qid, query); TREC's ``<top>`` elements; or, if named so, JSON lines.

    The JSON objects (``.jsonl``, ``.json``) have a ``qid``, ``query_id``, ``_id`` or ``id`` and a ``query`` or
    ``text``. Of TREC's elements ``<num>`` is the qid and ``<title>`` the query.

    Raises:
        ValueError, OSError: as :func:`read_run`; or a qid comes twice.
    """
    lines: dict[str, int] = {}
    for topic in _topics(path):
        first = lines.setdefault(topic.qid, topic.line)
        if first != topic.line:
            raise malformed(path, topic.line, f"qid {topic.qid!r} again, as in line {first}; wanted it once")
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
    if text.lstrip()[:5].lower() == "<top>":
        yield from _trec_topics(path, lines)
    elif text.startswith(("<?xml", "<!DOCTYPE", "<topic")):
        raise malformed(
            path, line, "XML; wanted lines of qid, tab, query; TREC's <top> elements; or JSON lines (.jsonl)"
        )
    else:
        for line, (qid, query) in _fields(path, lines, {2: "qid, query"}):
            yield Topic(_checked_id(path, line, "qid", qid), query, line)


def _trec_topics(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Topic]:
    begun: int | None = None
    element = ""
    for line, text in lines:
        if (text.lstrip()[:5].lower() == "<top>") != (begun is None):
            raise malformed(path, line, f"{reprlib.repr(text)}; wanted <top> ... </top>, one after the other")
        begun = begun or line
        element += text + "\n"
        if "</top>" in text.lower():
            yield _trec_topic(path, begun, element)
            begun, element = None, ""
    if begun is not None:
        raise malformed(path, begun, "<top> without </top>; wanted both")


#: A field of TREC's topics: up to its end tag, or to the next line that begins with a tag.
_FIELD = re.compile(r"(?:^|>)\s*<(num|title)>\s*(?:number:|topic:)?(.*?)(?=</\1>|</top>|^\s*<)", re.I | re.M | re.S)


def _trec_topic(path: Path, line: int, element: str) -> Topic:
    fields = [(name.lower(), " ".join(value.split())) for name, value in _FIELD.findall(element)]
    for name in ("num", "title"):
        if sum(one == name for one, _ in fields) != 1 or not dict(fields)[name]:
            raise malformed(path, line, f"a <top> without a <{name}>, with an empty one or with several; wanted one")
    return Topic(_checked_id(path, line, "num", dict(fields)["num"]), dict(fields)["title"], line)


def read_texts(path: Path) -> Iterator[Text]:
    """Read documents: 2 to 4 columns parted by tabs, or, if named so, JSON lines.

    The columns are docno, text; docno, title, text; or docno, url, title, text, as in ``msmarco-docs.tsv``. The JSON
    objects (``.jsonl``, ``.json``) have a ``docno``, ``docid``, ``_id`` or ``id``, a ``text`` or ``contents``, and
    perhaps ``title`` and ``url``. That a docno comes once is not checked: there may be more of them than memory holds.

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


#: The first line of BEIR's judgements.
_BEIR = ["query-id", "corpus-id", "score"]


def read_qrels(path: Path) -> Iterator[Judgement]:
    """Read judgements: TREC's 4 columns (qid, iteration, docno, label), or 3 (qid docno label), BEIR's header or none.

    A judgement that is repeated counts once.

    Raises:
        ValueError, OSError: as :func:`read_run`, but that lines may come in any order; or a document has two labels.
    """
    seen: dict[tuple[str, str], tuple[int, int]] = {}
    for line, words in _columns(path, {3: "qid docno label", 4: "TREC's"}):
        if line == 1 and words == _BEIR:
            continue
        qid, docno, label = words[0], words[-2], _whole(path, line, "label", words[-1])
        first, before = seen.setdefault((qid, docno), (line, label))
        if label != before:
            problem = f"docno {docno!r} again for query {qid!r}, with label {label}, but {before} in line {first}"
            raise malformed(path, line, f"{problem}; wanted one label")
        if first == line:
            yield Judgement(qid, docno, label)


# -- lines


def malformed(path: Path, line: int, problem: str) -> ValueError:
    """The error that says what is wrong in which line of a file."""
    return ValueError(f"{path}, line {line}: {problem}.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold something, without their ends, numbered from 1."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while True:
            number += 1
            try:
                raw = file.readline(MAX_LINE + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise malformed(path, number, f"the compressed file is cut off or damaged here ({error})") from error
            if not raw:
                return
            if len(raw) > MAX_LINE:
                raise malformed(path, number, f"longer than {MAX_LINE} bytes; wanted lines up to that")
            if number == 1:
                raw = raw.removeprefix(_BOM)
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if b"\0" in raw:
                raise malformed(path, number, f"a NUL byte at byte {raw.index(0) + 1}; wanted text")
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                problem = f"byte {error.start + 1} is 0x{raw[error.start]:02x}, which is not UTF-8 there"
                raise malformed(path, number, problem) from error
            if text.strip(" "):
                yield number, text


def _split(
    path: Path, lines: Iterable[tuple[int, list[str]]], allowed: dict[int, str], how: str
) -> Iterator[tuple[int, list[str]]]:
    """The parts of each line, checked to be as many in each as in the first and as is allowed."""
    count: int | None = None
    for line, parts in lines:
        if len(parts) != (count or len(parts)):
            raise malformed(path, line, f"{len(parts)} columns, but {count} in the lines before; wanted as many")
        count = len(parts)
        if count not in allowed:
            wanted = " or ".join(f"{columns} ({names})" for columns, names in allowed.items())
            raise malformed(path, line, f"{count} columns {how}; wanted {wanted}")
        yield line, parts


def _columns(path: Path, allowed: dict[int, str]) -> Iterator[tuple[int, list[str]]]:
    words = ((line, _WORD.findall(text)) for line, text in _lines(path))
    return _split(path, words, allowed, "parted by white space")


def _fields(path: Path, lines: Iterable[tuple[int, str]], allowed: dict[int, str]) -> Iterator[tuple[int, list[str]]]:
    return _split(path, ((line, text.split("\t")) for line, text in lines), allowed, "parted by tabs")


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its line.

    Raises:
        ValueError, OSError: as :func:`read_run`.
    """
    for line, text in _lines(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise malformed(path, line, f"not JSON ({error})") from error
        if not isinstance(record, dict):
            raise malformed(path, line, f"{reprlib.repr(record)}; wanted a JSON object")
        yield line, record


def _is_json(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


# -- values


def _whole(path: Path, line: int, name: str, word: str) -> int:
    if not _INTEGER.fullmatch(word):
        raise malformed(path, line, f"{name} is {reprlib.repr(word)}; wanted a whole number")
    return int(word)


def _score(path: Path, line: int, word: str) -> float:
    score = float(word) if _NUMBER.fullmatch(word) else math.nan
    if not math.isfinite(score):
        raise malformed(path, line, f"score is {reprlib.repr(word)}; wanted a finite number")
    return score


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def _problem_of_id(value: object) -> str | None:
    """What is wrong with a qid, docno or tag, or None."""
    if not isinstance(value, str) or not value:
        return f"{reprlib.repr(value)}; wanted a string that is not empty"
    if not _WORD.fullmatch(value) or "\0" in value:
        return f"{reprlib.repr(value)}; wanted no white space in it, which parts a run's columns, and no NUL"
    return problem_of(value)


def _problem_of_text(value: object) -> str | None:
    """What is wrong with a query, text, title or url, or None."""
    return problem_of(value) if isinstance(value, str) else f"{reprlib.repr(value)}; wanted a string"


def _checked_id(path: Path, line: int, name: str, value: object) -> str:
    if problem := _problem_of_id(value):
        raise malformed(path, line, f"{name} is {problem}")
    return cast(str, value)


def _found(path: Path, line: int, record: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of the names that the record has."""
    for name in names:
        if name in record:
            return name
    raise malformed(path, line, f"no key {' or '.join(map(repr, names))}; wanted one, with a string")


def _id(path: Path, line: int, record: dict[str, Any], *names: str) -> str:
    """The first of the names that the record has; a whole number is the string of its digits."""
    name = _found(path, line, record, names)
    value = record[name]
    return _checked_id(path, line, name, str(value) if type(value) is int else value)


def _text(path: Path, line: int, record: dict[str, Any], *names: str) -> str:
    name = _found(path, line, record, names)
    value = record[name]
    if problem := _problem_of_text(value):
        raise malformed(path, line, f"{name} is {problem}")
    return cast(str, value)


def _optional(path: Path, line: int, record: dict[str, Any], name: str) -> str | None:
    return None if record.get(name) is None else _text(path, line, record, name)


# -- writing


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name when all of it is written, and not at all where that fails.

    Args:
        path: compressed where it ends in ``.gz``, without a time in it, so that equal texts give equal files. What
            is no regular file (``/dev/stdout``) is written as it is.

    Raises:
        OSError: it cannot be written.
    """
    regular = path.is_file() or not path.exists()
    if regular:
        path = path.resolve()  # a link stays one
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}.")
    part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}") if regular else path
    try:
        with part.open("xb" if regular else "wb") as raw:
            with _packed(raw) if path.suffix == ".gz" else nullcontext(raw) as lines:
                text = TextIOWrapper(lines, encoding="utf-8", newline="\n")
                yield text
                text.flush()
            raw.flush()
            if regular:
                os.fsync(raw.fileno())
        if regular:
            part.replace(path)
    except BaseException:
        if regular:
            part.unlink(missing_ok=True)
        raise


def _packed(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))

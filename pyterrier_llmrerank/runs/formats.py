"""Read and write runs and rerank files, line by line, in the forms of TREC and Tevatron.

Readers check each line; a malformed one raises a ValueError. Memory use grows at most with the number of queries, not
with the number of lines.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from ..values import is_finite
from .text_files import (
    MAX_LINE,
    id_in,
    id_problem,
    malformed,
    objects,
    optional_text_in,
    parse_integer,
    parse_score,
    text_in,
    text_problem,
    whitespace_columns,
)

#: The forms of a run to write: ``qid docno score``, and TREC's ``qid Q0 docno rank score tag``.
FORMS = ("three", "trec")

#: The columns of a run by their number; ``_`` is a column to ignore.
COLUMNS = {
    3: ("qid", "docno", "score"),
    4: ("qid", "docno", "rank", "score"),
    6: ("qid", "_", "docno", "rank", "score", "_"),
}

_NAME_COLUMNS = "name the columns with --columns (for a baseline, --baseline-columns)"


class RunRow(NamedTuple):
    """Holds a line of a run. ``rank`` is None if the run has no ranks."""

    qid: str
    docno: str
    rank: int | None
    score: float
    line: int


class RerankRow(NamedTuple):
    """Holds a line of a rerank file: a query and a candidate. Missing fields are None."""

    qid: str
    query: str
    docno: str
    title: str | None
    url: str | None
    text: str
    score: float | None
    line: int


class _Ranked(Protocol):
    @property
    def qid(self) -> str: ...
    @property
    def docno(self) -> str: ...
    @property
    def line(self) -> int: ...


Ranked = TypeVar("Ranked", bound=_Ranked)


# -- runs


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
    like_ranks = unlike_ranks = line = 0  # counts of queries; one document with an integer score counts for neither
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
    for line, words in whitespace_columns(path, allowed):
        row = dict(zip(names or COLUMNS[len(words)], words, strict=True))
        rank = parse_integer(path, line, "rank", row["rank"]) if "rank" in row else None
        score = float(-(rank or 0)) if "score" not in row else parse_score(path, line, row["score"])
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
    """Return whether the scores of a query, in the order of the file, look like ranks.

    They are whole numbers that ascend, or the numbers from 0 or 1 on in any order but the descending one.
    """
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
        if problem := id_problem(value):
            raise ValueError(f"{name} is {problem}.")
    if not math.isfinite(score):
        raise ValueError(f"the score of query {qid!r}, docno {docno!r} is {score!r}; expected a finite number.")
    if form == "three":
        return f"{qid}\t{docno}\t{float(score)!r}\n"
    if form == "trec":
        return f"{qid} Q0 {docno} {rank} {float(score)!r} {tag}\n"
    raise ValueError(f"form={form!r}; allowed: {', '.join(FORMS)}.")


# -- rerank files


def read_rerank(path: Path) -> Iterator[RerankRow]:
    """Read a rerank file: JSON objects with the strings ``query_id``, ``query``, ``docid`` and ``text``.

    ``title`` and ``url`` (strings) and ``score`` (a finite number) are optional; other keys are ignored. Ids may be
    integers, too.

    Raises:
        ValueError: a line is malformed, repeats a document of its query, or belongs to an earlier query.
        OSError: the file cannot be read.
    """
    return _check_unique(path, _rerank_rows(path))


def _rerank_rows(path: Path) -> Iterator[RerankRow]:
    for line, record in objects(path):
        score = record.get("score")
        if score is not None and not is_finite(score):
            raise malformed(path, line, f"score is {reprlib.repr(score)}; expected a finite number")
        yield RerankRow(
            id_in(path, line, record, "query_id"),
            text_in(path, line, record, "query"),
            id_in(path, line, record, "docid"),
            optional_text_in(path, line, record, "title"),
            optional_text_in(path, line, record, "url"),
            text_in(path, line, record, "text"),
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
    problems = {"query_id": id_problem(row.qid), "docid": id_problem(row.docno)}
    problems |= {name: text_problem(value) for name, value in texts.items()}
    if row.score is not None and not is_finite(row.score):
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


# -- rows of runs and of rerank files


def by_query(rows: Iterable[Ranked]) -> Iterator[tuple[str, list[Ranked]]]:
    """Group consecutive rows by query."""
    for qid, group in groupby(rows, attrgetter("qid")):
        yield qid, list(group)


def best_first(rows: Iterable[RunRow]) -> list[RunRow]:
    """Sort the rows of a query by score; ties by rank if there are ranks, then by position."""
    return sorted(rows, key=lambda row: (-row.score, row.rank or 0))


def _check_unique(path: Path, rows: Iterable[Ranked], hint: str = "") -> Iterator[Ranked]:
    """Pass on rows; raise ValueError if a document repeats within a query, or a query resumes after another.

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

"""Read the topics, texts and qrels of a test collection, line by line, in the forms of TREC, BEIR and JSON lines.

Readers check each line; a malformed one raises a ValueError. Qrels and the ids of topics are held in memory, texts are
not.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from html import unescape
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from .text_files import (
    check_id,
    id_in,
    is_json_lines,
    malformed,
    numbered_lines,
    objects,
    optional_text_in,
    parse_integer,
    tab_columns,
    text_in,
    whitespace_columns,
)


class Text(NamedTuple):
    """Holds a document. Missing fields are None."""

    docno: str
    title: str | None
    url: str | None
    text: str
    line: int


class Topic(NamedTuple):
    """Holds a query with its id."""

    qid: str
    query: str
    line: int


class Judgement(NamedTuple):
    """Holds a line of qrels: the relevance of a document to a query."""

    qid: str
    docno: str
    label: int


def read_topics(path: Path) -> Iterator[Topic]:
    """Read queries from tab-separated columns (qid, query), TREC ``<top>`` elements or JSON lines.

    JSON lines (``.jsonl``, ``.json``) have ``qid``, ``query_id``, ``_id`` or ``id``, and ``query`` or ``text``. In
    ``<top>`` elements, ``<num>`` is the qid and ``<title>`` the query.

    Raises:
        ValueError: a line is malformed, or a qid repeats.
        OSError: the file cannot be read.
    """
    lines: dict[str, int] = {}
    for topic in _topics(path):
        first = lines.setdefault(topic.qid, topic.line)
        if first != topic.line:
            raise malformed(path, topic.line, f"qid {topic.qid!r} again, as in line {first}; expected it once")
        yield topic


def _topics(path: Path) -> Iterator[Topic]:
    if is_json_lines(path):
        for line, record in objects(path):
            qid = id_in(path, line, record, "qid", "query_id", "_id", "id")
            yield Topic(qid, text_in(path, line, record, "query", "text"), line)
        return
    lines = numbered_lines(path)
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
        for line, (qid, query) in tab_columns(path, lines, {2: "qid, query"}):
            yield Topic(check_id(path, line, "qid", qid), query, line)


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
    return Topic(check_id(path, line, "num", dict(fields)["num"]), dict(fields)["title"], line)


def read_texts(path: Path) -> Iterator[Text]:
    """Read documents from 2 to 4 tab-separated columns or JSON lines.

    The columns are docno, text; docno, title, text; or docno, url, title, text, as in ``msmarco-docs.tsv``. JSON lines
    (``.jsonl``, ``.json``) have ``docno``, ``docid``, ``_id`` or ``id``, and ``text`` or ``contents``; ``title`` and
    ``url`` are optional. Repeated docnos are not detected, since there may be more documents than fit in memory.

    Raises:
        ValueError: a line is malformed.
        OSError: the file cannot be read.
    """
    if is_json_lines(path):
        for line, record in objects(path):
            yield Text(
                id_in(path, line, record, "docno", "docid", "_id", "id"),
                optional_text_in(path, line, record, "title"),
                optional_text_in(path, line, record, "url"),
                text_in(path, line, record, "text", "contents"),
                line,
            )
    else:
        allowed = {2: "docno, text", 3: "docno, title, text", 4: "docno, url, title, text"}
        for line, (docno, *more, text) in tab_columns(path, numbered_lines(path), allowed):
            url, title = [None, None, *more][-2:]
            yield Text(check_id(path, line, "docno", docno), title, url, text, line)


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
    for line, words in whitespace_columns(path, {3: "qid docno label", 4: "TREC"}):
        if line == 1 and words == _BEIR:
            continue
        qid, docno, label = words[0], words[-2], parse_integer(path, line, "label", words[-1])
        first, before = seen.setdefault((qid, docno), (line, label))
        if label != before:
            problem = f"docno {docno!r} again for query {qid!r}, with label {label}, but {before} in line {first}"
            raise malformed(path, line, f"{problem}; expected one label")
        if first == line:
            yield Judgement(qid, docno, label)

"""Topics, texts and judgements by name: a file, an ir_datasets id or a PyTerrier dataset."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import ir_datasets
import pyterrier as pt

from .formats import (
    Judgement,
    RerankRow,
    RunRow,
    Text,
    best_first,
    by_query,
    malformed,
    read_qrels,
    read_run,
    read_texts,
    read_topics,
)  # fmt: skip


def rerank_rows(run: Path, topics: str, texts: str, depth: int) -> Iterator[RerankRow]:
    """What a run ranks, with what is needed to rank it again: queries as they stand in it, each from its best.

    All is found before the first row is given.

    Args:
        run: as :func:`~pyterrier_llmrerank.formats.read_run` reads it.
        topics: names the queries.
        texts: names the documents.
        depth: documents of each query.

    Raises:
        ValueError: a file is malformed, the run is empty, a query or text is missing, or a name means nothing.
        OSError: a file cannot be read, or a dataset not be fetched.
    """
    kept: list[RunRow] = []
    for _, rows in by_query(read_run(run)):
        kept += islice(best_first(rows), depth)
    if not kept:
        raise ValueError(f"{run}: no line in it; wanted a run.")
    query_of, text_of = queries(topics), documents(texts, {row.docno for row in kept})
    for row in kept:
        if row.qid not in query_of:
            raise malformed(run, row.line, f"query {row.qid!r} is not among the topics of {topics}")
        if row.docno not in text_of:
            raise malformed(run, row.line, f"docno {row.docno!r} (query {row.qid!r}) is not among the texts of {texts}")
    for row in kept:
        _, title, url, text, _ = text_of[row.docno]
        yield RerankRow(row.qid, query_of[row.qid], row.docno, title, url, text, row.score, row.line)


def queries(name: str) -> dict[str, str]:
    """All queries by qid.

    Args:
        name: a file as :func:`~pyterrier_llmrerank.formats.read_topics` reads it, or a dataset with topics.

    Raises:
        ValueError: the file is malformed, the dataset has no topics, or there is nothing of this name.
        OSError: it cannot be read or fetched.
    """
    if (path := _file(name)) is not None:
        return {topic.qid: topic.query for topic in read_topics(path)}
    dataset = _dataset("topics", name)
    if isinstance(dataset, pt.datasets.Dataset):
        frame = _part(name, "topics", dataset.get_topics)
        return dict(zip(frame["qid"].astype(str), frame["query"], strict=True))
    if not dataset.has_queries():
        raise ValueError(f"topics={name!r}: the dataset has none.")
    with _fetching("topics", name):
        return {query.query_id: query.default_text() for query in dataset.queries_iter()}


def documents(name: str, docnos: Collection[str]) -> dict[str, Text]:
    """The documents with these docnos, as far as they are there.

    Args:
        name: a file as :func:`~pyterrier_llmrerank.formats.read_texts` reads it, or a dataset with documents.
        docnos: whose texts are wanted; no others are kept in memory.

    Raises:
        ValueError, OSError: as :func:`queries`; or a file has one of them twice.
    """
    if (path := _file(name)) is not None:
        found: dict[str, Text] = {}
        for text in read_texts(path):
            if text.docno in docnos and found.setdefault(text.docno, text) is not text:
                first = found[text.docno].line
                raise malformed(path, text.line, f"docno {text.docno!r} again, as in line {first}; wanted it once")
        return found
    dataset = _dataset("texts", name)
    if isinstance(dataset, pt.datasets.Dataset):
        corpus = _part(name, "corpus", lambda: dataset.get_corpus_iter(verbose=False))
        wanted = (document for document in corpus if document["docno"] in docnos)
        return {d["docno"]: Text(d["docno"], d.get("title"), d.get("url"), d["text"], 0) for d in wanted}
    if not dataset.has_docs():
        raise ValueError(f"texts={name!r}: the dataset has none.")
    with _fetching("texts", name):
        return {docno: _text(document) for docno, document in dataset.docs_store().get_many(docnos).items()}


def _text(document: Any) -> Text:
    """A document of ir_datasets: by the fields that most have, else by what it calls its text, without a title."""
    for field in ("text", "body"):  # msmarco-document has a body
        if hasattr(document, field):
            title, url = getattr(document, "title", None), getattr(document, "url", None)
            return Text(document.doc_id, title, url, getattr(document, field), 0)
    return Text(document.doc_id, None, None, document.default_text(), 0)


def judgements(name: str) -> list[Judgement]:
    """All judgements.

    Args:
        name: a file as :func:`~pyterrier_llmrerank.formats.read_qrels` reads it, or a dataset with judgements.

    Raises:
        ValueError, OSError: as :func:`queries`; or there is none in it.
    """
    found = _judgements(name)
    if not found:
        raise ValueError(f"qrels={name!r}: no judgement in it.")
    return found


def _judgements(name: str) -> list[Judgement]:
    if (path := _file(name)) is not None:
        return list(read_qrels(path))
    dataset = _dataset("qrels", name)
    if isinstance(dataset, pt.datasets.Dataset):
        frame = _part(name, "qrels", dataset.get_qrels).astype({"qid": str, "docno": str, "label": int})
        return list(map(Judgement, frame["qid"], frame["docno"], frame["label"]))
    if not dataset.has_qrels():
        raise ValueError(f"qrels={name!r}: the dataset has none.")
    with _fetching("qrels", name):
        return [Judgement(one.query_id, one.doc_id, one.relevance) for one in dataset.qrels_iter()]


def _file(name: str) -> Path | None:
    """The file of this name, or None."""
    path = Path(name).expanduser()
    return path if path.exists() and not path.is_dir() else None


def _dataset(argument: str, name: str) -> Any:
    """What ir_datasets has of this name, or else PyTerrier."""
    try:
        return ir_datasets.load(name.removeprefix("irds:"))
    except KeyError:
        pass  # not there; PyTerrier knows more
    try:
        return pt.get_dataset(name)
    except KeyError:
        raise ValueError(
            f"{argument}={name!r}: no such file, nor a dataset of this name; allowed: a file, an ir_datasets id "
            "(https://ir-datasets.com) or a PyTerrier dataset."
        ) from None


def _part(name: str, part: str, read: Callable[[], Any]) -> Any:
    """A part of a PyTerrier dataset; they have no common way of saying which ones there are."""
    try:
        return read()
    except NotImplementedError as error:
        raise ValueError(f"{name!r}: the dataset has no {part}.") from error


@contextmanager
def _fetching(argument: str, name: str) -> Iterator[None]:
    """What ir_datasets says where it has tried all of a file's addresses, as the error that it is."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"{argument}={name!r} could not be fetched: {str(error)[:300]}") from error

"""Topics, texts and judgements by name: a file, an ir_datasets id or a PyTerrier dataset."""

from __future__ import annotations

import reprlib
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

#: The fields that make the text of the documents for which ir_datasets has no ``default_text()``.
TEXTS = {
    "ArgsMeProcessedDoc": ("premises_texts", "conclusion"),
    "ClinicalTrialsDoc": ("title", "condition", "summary", "detailed_description", "eligibility"),
    "CodeSearchNetDoc": ("code",),
}


def rerank_rows(run: Path, topics: str, texts: str, depth: int, columns: str | None = None) -> Iterator[RerankRow]:
    """What a run ranks, with what is needed to rank it again: queries as they stand in it, each from its best.

    All is found before the first row is given.

    Args:
        run: as :func:`~pyterrier_llmrerank.runs.formats.read_run` reads it.
        topics: names the queries.
        texts: names the documents.
        depth: documents of each query.
        columns: of the run, as :func:`~pyterrier_llmrerank.runs.formats.read_run` takes them.

    Raises:
        ValueError: a file is malformed, the run is empty, a query or text is missing, or a name means nothing.
        OSError: a file cannot be read, or a dataset not be fetched.
    """
    kept: list[RunRow] = []
    for _, rows in by_query(read_run(run, columns)):
        kept += islice(best_first(rows), depth)
    if not kept:
        raise ValueError(f"{run}: no line in it; wanted a run.")
    query_of = queries(topics, {row.qid for row in kept})
    text_of = documents(texts, {row.docno for row in kept})
    for row in kept:
        if row.qid not in query_of:
            raise malformed(run, row.line, f"query {row.qid!r} is not among the topics of {topics}")
        if row.docno not in text_of:
            raise malformed(run, row.line, f"docno {row.docno!r} (query {row.qid!r}) is not among the texts of {texts}")
    for row in kept:
        _, title, url, text, _ = text_of[row.docno]
        yield RerankRow(row.qid, query_of[row.qid], row.docno, title, url, text, row.score, row.line)


def queries(name: str, qids: Collection[str] | None = None) -> dict[str, str]:
    """Queries by qid, as far as they are there.

    Args:
        name: a file as :func:`~pyterrier_llmrerank.runs.formats.read_topics` reads it, or a dataset with topics.
        qids: of those that are wanted; None for all.

    Raises:
        ValueError: the file is malformed, the dataset has no topics or a query no text, or there is nothing of this
            name.
        OSError: it cannot be read or fetched.
    """
    if (path := _file(name)) is not None:
        return {topic.qid: topic.query for topic in read_topics(path) if qids is None or topic.qid in qids}
    dataset = _dataset("topics", name)
    if isinstance(dataset, pt.datasets.Dataset):
        frame = _part(name, "topics", dataset.get_topics)
        if "query" not in frame:
            raise ValueError(f"topics={name!r}: the topics have no 'query', but {', '.join(map(repr, frame))}.")
        found = dict(zip(frame["qid"].astype(str), frame["query"], strict=True))
        return {qid: query for qid, query in found.items() if qids is None or qid in qids}
    if not dataset.has_queries():
        raise ValueError(f"topics={name!r}: the dataset has none.")
    with _fetching("topics", name):
        wanted = [query for query in dataset.queries_iter() if qids is None or query.query_id in qids]
    return {query.query_id: _default_text(f"topics={name!r}", query) for query in wanted}


def documents(name: str, docnos: Collection[str]) -> dict[str, Text]:
    """The documents with these docnos, as far as they are there.

    Args:
        name: a file as :func:`~pyterrier_llmrerank.runs.formats.read_texts` reads it, or a dataset with documents.
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
        wanted = {document["docno"]: document for document in corpus if document["docno"] in docnos}
        for docno, document in wanted.items():
            if "text" not in document:
                has = ", ".join(map(repr, document))
                raise ValueError(f"texts={name!r}: docno {docno!r} has no 'text', but {has}.")
        return {docno: Text(docno, d.get("title"), d.get("url"), d["text"], 0) for docno, d in wanted.items()}
    if not dataset.has_docs():
        raise ValueError(f"texts={name!r}: the dataset has none.")
    with _fetching("texts", name):
        found = dataset.docs_store().get_many(docnos)
    return {docno: _text(f"texts={name!r}", document) for docno, document in found.items()}


def _text(source: str, document: Any) -> Text:
    """A document of ir_datasets: its default text, of which the title, where it begins with that, stands apart."""
    text = _default_text(source, document)
    title, url = (getattr(document, name, None) for name in ("title", "url"))
    for field, value in (("title", title), ("url", url)):
        if not isinstance(value, str | None):
            raise ValueError(
                f"{source}: doc_id {document.doc_id!r}: {field} is {reprlib.repr(value)}; wanted a string."
            )
    if text == title:
        title = None
    elif hasattr(document, "title") and text.startswith(title or "") and text[len(title or "") :][:1].isspace():
        text = text[len(title or "") + 1 :]
    return Text(document.doc_id, title, url, text, 0)


def _default_text(source: str, record: Any) -> str:
    """The text that ir_datasets gives a document or query by default, or else its ``text``; of :data:`TEXTS`, theirs.

    Raises:
        ValueError: there is none, or it cannot be had; the message names the source, the record and its fields.
    """
    kind, fields = type(record).__name__, getattr(record, "_fields", ())
    missing = [name for name in fields if getattr(record, name) is None]
    if missing:  # it would be read as the word None
        record = record._replace(**dict.fromkeys(missing, ""))
    try:
        if hasattr(record, "default_text"):
            text = record.default_text()
        else:
            text = " ".join(getattr(record, name) for name in TEXTS.get(kind, ("text",)))
        if not isinstance(text, str):
            raise ValueError(f"its default text is {reprlib.repr(text)}, not a string")
        if missing and not text.strip():
            raise ValueError(f"nothing in {', '.join(missing)}")
    except Exception as error:
        which = f"{fields[0]} {record[0]!r}" if fields else reprlib.repr(record)
        raise ValueError(
            f"{source}: no text of {which}, a {kind} ({error}); its fields: {', '.join(fields)}. Give a file instead."
        ) from error
    return text


def judgements(name: str) -> list[Judgement]:
    """All judgements, each once.

    Args:
        name: a file as :func:`~pyterrier_llmrerank.runs.formats.read_qrels` reads it, or a dataset with judgements.

    Raises:
        ValueError, OSError: as :func:`queries`; or there is none in it, or several labels for one document.
    """
    labels: dict[tuple[str, str], int] = {}
    for qid, docno, label in _judgements(name):
        if (before := labels.setdefault((qid, docno), label)) != label:
            raise ValueError(
                f"qrels={name!r}: docno {docno!r} is judged {before} and {label} for query {qid!r}; wanted one label, "
                "not one for each subtopic or passage."
            )
    if not labels:
        raise ValueError(f"qrels={name!r}: no judgement in it.")
    return [Judgement(*pair, label) for pair, label in labels.items()]


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
        return [Judgement(one.query_id, one.doc_id, int(one.relevance)) for one in dataset.qrels_iter()]


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

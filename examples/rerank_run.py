"""Rerank the runs of another system in many shapes, and test the differences for significance.

    python examples/rerank_run.py FOLDER [FOLDER ...] --run bm25 --depths 10 15 20 30 --ratios 1 2 4

FOLDER holds topics.tsv (qid, query), qrels.txt (TREC), docs.jsonl.gz (docno, title, text) and
runs/NAME.res.gz (TREC). All depths of a ratio come from one forward pass. --compensation both compares the small
models of this package with and without their compensation adapters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyterrier as pt
from pyterrier.measures import RR, nDCG

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker

STRINGS = {"qid": str, "query": str, "docno": str, "title": str, "text": str}
DISTILLED = ["distilled", "distilled-2"]


def load(folder: Path, run: str, candidates: int, queries: int | None) -> tuple[pd.DataFrame, ...]:
    """Return topics, qrels and the run's best candidates with their texts."""
    topics = pd.read_csv(folder / "topics.tsv", sep="\t", names=["qid", "query"], dtype=STRINGS, quoting=3)
    documents = pd.read_json(folder / "docs.jsonl.gz", lines=True, dtype=STRINGS)
    qrels = pt.io.read_qrels(str(folder / "qrels.txt"))
    topics = topics[topics["qid"].isin(qrels["qid"])].head(queries)
    results = pt.io.read_results(str(folder / "runs" / f"{run}.res.gz"))
    results["score"] = -results["rank"]  # scores in files are rounded, and docnos would break the ties
    return topics, qrels, results[results["rank"] < candidates].merge(topics, on="qid").merge(documents, on="docno")


def with_title(results: pd.DataFrame) -> pd.DataFrame:
    """Put titles before their texts, because Matroyshka reads one column."""
    return results.assign(text=(results["title"] + " " + results["text"]).str.strip())


def rerankers(arguments: argparse.Namespace) -> Iterator[tuple[str, LLMReranker]]:
    """Yield the rerankers to compare, with a name: one for each ratio, which scores at all depths."""
    shared = {"dtype": arguments.dtype, "verbose": True, "batch_size": arguments.batch_size}
    if arguments.rankllama:
        yield "RankLLaMA", RankLLaMAReranker(arguments.rankllama, **shared)
    if not arguments.model:
        return
    for ratio in arguments.ratios:
        where = arguments.compress_layers if ratio > 1 else ()
        shape = {"cutoff": arguments.depths, "compress_layers": where, "compress_ratio": ratio}
        width = "" if ratio == 1 else f" ratio {ratio}"
        if arguments.model != "smollm2-135m":
            lowest = arguments.start_layer or min(arguments.depths)
            yield (
                width,
                MatroyshkaReranker(arguments.model, adapters=arguments.adapters, start_layer=lowest, **shape, **shared),
            )
            continue
        if arguments.compensation in ("with", "both"):
            yield width, MatroyshkaReranker(arguments.model, **shape, **shared)
        if arguments.compensation in ("without", "both"):
            yield (
                f"{width} uncompensated",
                MatroyshkaReranker(arguments.model, adapters=DISTILLED, **shape, **shared),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--run", default="bm25", help="name of the run in runs/*.res.gz")
    parser.add_argument("--candidates", type=int, default=20, help="passages to rerank for each query")
    parser.add_argument("--queries", type=int, help="number of topics, from the first; default all")
    parser.add_argument(
        "--model", default="smollm2-135m", help="Matroyshka model: folder, .gguf file, hub id; '' for none"
    )
    parser.add_argument("--adapters", nargs="*", default=(), help="LoRA folders for another model")
    parser.add_argument("--start_layer", type=int, help="shallowest layer with a head, for another model")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 20, 30], help="decoder layers")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1], help="passage states pooled into one state")
    parser.add_argument(
        "--compress_layers", type=int, nargs="+", default=[8], help="layers before which they are pooled"
    )
    parser.add_argument("--compensation", choices=["with", "without", "both"], default="with")
    parser.add_argument("--rankllama", help="a RankLLaMA to compare with, for example smollm2-135m")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--csv", type=Path, help="file for the table")
    arguments = parser.parse_args()

    tables = []
    for folder in arguments.folders:
        topics, qrels, candidates = load(folder, arguments.run, arguments.candidates, arguments.queries)
        systems = {arguments.run: candidates}
        for name, reranker in rerankers(arguments):
            if isinstance(reranker, RankLLaMAReranker):
                systems[name] = reranker(candidates)
                continue
            reranked = reranker(with_title(candidates))
            for depth in arguments.depths:
                score = reranked[f"score_{depth}"] if len(arguments.depths) > 1 else reranked["score"]
                systems[f"{depth} layers{name}"] = pt.model.add_ranks(reranked.assign(score=score))
        table = pt.Experiment(
            list(systems.values()),
            topics,
            qrels,
            [nDCG @ 10, RR(rel=2) @ 10] if qrels["label"].max() > 1 else [nDCG @ 10, RR @ 10],
            names=list(systems),
            baseline=0,
            round=4,
        )
        table.insert(0, "collection", f"{folder.name} ({len(topics)})")
        print(f"\n{folder.name}, {len(topics)} queries, {arguments.candidates} candidates each\n")
        print(table.drop(columns="collection").to_string(index=False), flush=True)
        tables.append(table)
    if arguments.csv:
        pd.concat(tables).to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()

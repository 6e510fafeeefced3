"""Rerank the runs of another system in many shapes, and test the differences for significance.

    python examples/rerank_run.py FOLDER [FOLDER ...] --run bm25 --depths 10 20 30 --ratios 1 2

FOLDER holds topics.tsv (qid, query), qrels.txt (TREC), docs.jsonl.gz (docno, title, text) and
runs/NAME.res.gz (TREC). All depths of a ratio come from one forward pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pyterrier as pt
from pyterrier.measures import RR, nDCG

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker

STRINGS = {"qid": str, "query": str, "docno": str, "title": str, "text": str}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--run", default="bm25", help="name of the run in runs/*.res.gz")
    parser.add_argument("--candidates", type=int, default=20, help="passages to rerank for each query")
    parser.add_argument("--queries", type=int, help="number of topics, from the first; default all")
    parser.add_argument("--model", default="smollm2-135m", help="Matroyshka model: folder, .gguf file or hub id")
    parser.add_argument("--start_layer", type=int, help="shallowest layer with a head, for a plain language model")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 20, 30], help="decoder layers")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1], help="passage states pooled into one state")
    parser.add_argument("--compress_layer", type=int, default=8, help="layer after which they are pooled")
    parser.add_argument("--rankllama", help="a RankLLaMA to compare with, for example smollm2-135m")
    arguments = parser.parse_args()

    deep = MatroyshkaReranker(arguments.model, start_layer=arguments.start_layer, cutoff=arguments.depths, verbose=True)
    rankllama = RankLLaMAReranker(arguments.rankllama, verbose=True) if arguments.rankllama else None
    for folder in arguments.folders:
        topics, qrels, candidates = load(folder, arguments.run, arguments.candidates, arguments.queries)
        systems = {arguments.run: candidates}
        if rankllama:
            systems["RankLLaMA"] = rankllama(candidates)
        for ratio in arguments.ratios:
            narrow = {"compress_layers": arguments.compress_layer, "compress_ratio": ratio} if ratio > 1 else {}
            reranked = deep.at(**narrow)(with_title(candidates))
            for depth in arguments.depths:
                score = reranked[f"score_{depth}" if len(arguments.depths) > 1 else "score"]
                name = f"{depth} layers" + (f" ratio {ratio}" if narrow else "")
                systems[name] = pt.model.add_ranks(reranked.assign(score=score))
        measures = [nDCG @ 10, RR(rel=2) @ 10] if qrels["label"].max() > 1 else [nDCG @ 10, RR @ 10]
        shown = {"names": list(systems), "baseline": 0, "round": 4}
        table = pt.Experiment(list(systems.values()), topics, qrels, measures, **shown)
        print(f"\n{folder.name}, {len(topics)} queries, {arguments.candidates} candidates each\n")
        print(table.to_string(index=False), flush=True)


if __name__ == "__main__":
    main()

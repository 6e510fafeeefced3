"""Rerank a run that some other system made, and compare the two with a significance test.

    python examples/rerank_run.py FOLDER --run bm25 --depths 10 20 30

FOLDER holds topics.tsv (qid, query), qrels.txt (TREC), docs.jsonl.gz (docno, title, text) and
runs/NAME.res.gz (TREC). All depths come out of one pass over the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pyterrier as pt
from pyterrier.measures import RR, nDCG

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.files import smollm2

STRINGS = {"qid": str, "query": str, "docno": str, "title": str, "text": str}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", default="bm25", help="which of runs/*.res.gz")
    parser.add_argument("--candidates", type=int, default=20, help="how many of its results are reranked")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 20, 30], help="decoder layers")
    parser.add_argument("--model", default=smollm2(), help="folder, .gguf file or hub id of a causal language model")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    arguments = parser.parse_args()

    folder = arguments.folder
    topics = pd.read_csv(folder / "topics.tsv", sep="\t", names=["qid", "query"], dtype=STRINGS, quoting=3)
    documents = pd.read_json(folder / "docs.jsonl.gz", lines=True, dtype=STRINGS)
    qrels = pt.io.read_qrels(str(folder / "qrels.txt"))
    run = pt.io.read_results(str(folder / "runs" / f"{arguments.run}.res.gz"))
    run["score"] = -run["rank"]  # files round scores until they tie, and ties would be broken by docno
    candidates = run[run["rank"] < arguments.candidates].merge(topics, on="qid").merge(documents, on="docno")

    reranker = MatroyshkaReranker(
        arguments.model,
        cutoff=arguments.depths,
        start_layer=min(arguments.depths),
        dtype=arguments.dtype,
        verbose=True,
    )
    reranked = reranker(candidates)
    by_depth = {
        f"{arguments.run} >> {depth} layers": pt.model.add_ranks(reranked.assign(score=reranked[f"score_{depth}"]))
        for depth in arguments.depths
    }
    systems = {arguments.run: candidates} | by_depth
    table = pt.Experiment(
        list(systems.values()),
        topics[topics["qid"].isin(qrels["qid"])],
        qrels,
        [nDCG @ 10, RR(rel=2) @ 10] if qrels["label"].max() > 1 else [nDCG @ 10, RR @ 10],
        names=list(systems),
        baseline=0,
        round=4,
    )
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()

"""Rerank BM25 on several collections of ir_datasets, as BEIR does, with one table at the end.

    python examples/beir.py vaswani cranfield beir/nfcorpus/test --cutoffs 10 20 30

Every judged query counts. All cutoffs of a collection come from one forward pass.
"""

import argparse

import pandas as pd
import pyterrier as pt
from first_stages import bm25_of, irds_collection
from pyterrier.measures import nDCG

from pyterrier_llmrerank import MatroyshkaReranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collections", nargs="+", help="ids of ir_datasets, such as beir/nfcorpus/test")
    parser.add_argument("--model", default="smollm2-135m", help="Matroyshka model: folder, .gguf file or hub id")
    parser.add_argument("--cutoffs", type=int, nargs="+", default=[10, 30], help="decoder layers")
    parser.add_argument("--candidates", type=int, default=100, help="passages to rerank for each query")
    parser.add_argument("--queries", type=int, help="number of judged queries, from the first; default all")
    arguments = parser.parse_args()
    depths = MatroyshkaReranker(arguments.model, cutoff=arguments.cutoffs, verbose=True).depths()
    table = pd.DataFrame()
    for name in arguments.collections:
        corpus, with_text, topics, qrels = irds_collection(f"irds:{name}")
        topics = topics[topics["qid"].isin(qrels["qid"])].head(arguments.queries)
        with bm25_of(corpus, arguments.candidates) as bm25:
            systems = {"BM25": bm25, **{f"{cutoff} layers": bm25 >> with_text >> depths[cutoff] for cutoff in depths}}
            found = pt.Experiment(systems, topics, qrels, [nDCG @ 10], plan="tree", verbose=False)
        table[f"{name} ({len(topics)})"] = found.set_index("name")["nDCG@10"]
    table["mean"] = table.mean(axis=1)
    print("\nnDCG@10", table.T.round(4).to_string(), sep="\n\n")


if __name__ == "__main__":
    main()

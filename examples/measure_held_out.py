"""Measure rerankers on training data that was held out: cross-entropy and RR@10 of the positive in its group.

    python examples/measure_held_out.py mixture.held_out.jsonl --rankllama FOLDER
    python examples/measure_held_out.py mixture.held_out.jsonl --matroyshka FOLDER --layers 10 20 30

Each line's first positive competes with all its negatives, as in training. The file is one that training_mixture.py
writes. Printed are means with the standard error, ready for the log beside a model card, and the p-value of a paired
t-test against the first model at the same depth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rerank_run import with_title
from scipy.stats import ttest_rel

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker


def groups_of(path: Path) -> pd.DataFrame:
    """Rows of ``qid``, ``query``, ``docno``, ``title`` and ``text``: a query's positive first."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        passages = [record["positive_passages"][0], *record["negative_passages"]]
        rows += [(record["query_id"], record["query"], p["docid"], p["title"], p["text"]) for p in passages]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "title", "text"])


def with_error(values: np.ndarray) -> str:
    """A mean and its standard error."""
    return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rankllama", nargs="*", default=[], help="adapters: folders, hub ids, smollm2-135m")
    parser.add_argument("--matroyshka", nargs="*", default=[], help="likewise")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 30], help="Matroyshka's cutoff layers")
    parser.add_argument("--ratio", type=int, default=1, help="passage states pooled into one after layer 8")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows = groups_of(arguments.data)
    shape = {"compress_layers": [8], "compress_ratio": arguments.ratio} if arguments.ratio > 1 else {}
    shared = {"dtype": arguments.dtype, "verbose": True}
    scored = [(name, RankLLaMAReranker(name, **shared)(rows), ["score"]) for name in arguments.rankllama]
    for name in arguments.matroyshka:
        reranker = MatroyshkaReranker(name, cutoff=arguments.layers, **shape, **shared)
        columns = [f"score_{layer}" for layer in arguments.layers] if len(arguments.layers) > 1 else ["score"]
        scored.append((name, reranker(with_title(rows)), columns))

    print(f"| {rows['qid'].nunique()} held-out queries | cross-entropy | p | RR@10 | p |\n|---|---|---|---|---|")
    first: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, frame, columns in scored:
        for column in columns:
            groups = [torch.tensor(scores.to_numpy()) for _, scores in frame.groupby("qid", sort=False)[column]]
            losses = np.array([-group.log_softmax(0)[0].item() for group in groups])
            ranks = np.array([1 + int((group[1:] >= group[0]).sum()) for group in groups])
            measured = losses, np.where(ranks <= 10, 1 / ranks, 0.0)
            cells = []
            for values, others in zip(measured, first.setdefault(column, measured), strict=True):
                cells += [with_error(values), "" if values is others else f"{ttest_rel(values, others).pvalue:.3f}"]
            print(f"| {name} {column} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

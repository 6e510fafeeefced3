"""Measure the cost and the effectiveness of every shape of a Matroyshka, and draw the Pareto front.

    python examples/pareto.py FOLDER [FOLDER ...] --run bm25 --candidates 100 --queries 50 --output pareto.png

FOLDER is as for rerank_run.py. One forward pass for each ratio gives every depth and every cascade. Shapes on the
front are timed. The best of many shapes looks better than it is, so the last line measures each query with the shape
that is best on the other folds.
"""

import argparse
from pathlib import Path

import pandas as pd
from matplotlib import pyplot
from rerank_run import load, with_title

from pyterrier_llmrerank import MatroyshkaReranker, Tuning, tune


def best_of(found: Tuning, name: str, shapes: pd.DataFrame) -> str:
    """Describe the best of some shapes, and its share of the full depth's measure and operations."""
    if shapes.empty:
        return f"{name}: none"
    best = shapes.loc[shapes.sort_values("operations")[found.measure].idxmax()]
    full = found.shapes.loc[(found.shapes["share"] == 1) & (found.shapes["prune"].str.len() == 0), found.measure]
    kept = f", {best[found.measure] / full.iloc[0]:.1%} of the full depth's" if len(full) else ""
    value = f"{found.measure} {best[found.measure]:.4f}{kept}, {best['share']:.1%} of its operations"
    return f"{name}: {value}\n    {found.reranker(best)!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--run", default="bm25", help="name of the run in runs/*.res.gz")
    parser.add_argument("--candidates", type=int, default=100, help="passages to rerank for each query")
    parser.add_argument("--queries", type=int, help="number of topics, from the first; default all")
    parser.add_argument("--measure", default="nDCG@10", help="of ir_measures")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the full depth's operations")
    parser.add_argument("--model", default="smollm2-135m", help="folder, .gguf file or hub id")
    parser.add_argument("--start_layer", type=int, help="shallowest layer with a head, for a plain language model")
    parser.add_argument("--depths", type=int, nargs="+", help="decoder layers; default eight, evenly spaced")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 2, 4], help="passage states pooled into one state")
    parser.add_argument("--keep", type=int, nargs="+", default=[10, 20, 50], help="candidates after a cascade's stage")
    parser.add_argument("--timed", type=int, default=4, help="number of queries to time the front on")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--csv", type=Path, help="file for all shapes")
    parser.add_argument("--output", type=Path, default=Path("pareto.png"), help="file for the plot")
    arguments = parser.parse_args()

    deep = MatroyshkaReranker(arguments.model, start_layer=arguments.start_layer, dtype=arguments.dtype, verbose=True)
    size = (6 * len(arguments.folders), 4.5)
    figure, panels = pyplot.subplots(1, len(arguments.folders), figsize=size, squeeze=False)
    measured = []
    for folder, panel in zip(arguments.folders, panels[0], strict=True):
        topics, qrels, candidates = load(folder, arguments.run, arguments.candidates, arguments.queries)
        found = tune(
            deep, with_title(candidates), qrels, arguments.measure, budget=arguments.budget, cutoffs=arguments.depths,
            compress_ratios=arguments.ratios, keep=arguments.keep, timed=arguments.timed,
        )  # fmt: skip
        found.plot(panel).set_title(f"{folder.name}, {len(topics)} queries, {arguments.candidates} candidates each")
        print(f"\n{panel.get_title()}: {len(found.shapes)} shapes, {len(found.front)} on the front")
        print(f"{arguments.run}: {found.measure} {found.first_stage:.4f}\n")
        rounding = {found.measure: 4, "low": 4, "high": 4, "share": 3, "GFLOP": 1, "milliseconds": 0}
        front = found.front.assign(GFLOP=found.front["operations"] / 1e9).round(rounding)
        print(front[["cutoff", "compress_layers", "compress_ratio", "prune", *rounding]].to_string(index=False))
        affordable = found.shapes[found.shapes["share"] <= arguments.budget]
        is_cascade = affordable["prune"].str.len() > 0
        print(f"\nwithin {arguments.budget:.0%} of the operations of the full depth:")
        print(best_of(found, "best cascade", affordable[is_cascade]))
        print(best_of(found, "best without", affordable[~is_cascade]))
        mean, low, high, _ = found.held_out(min(5, len(found.values)))
        print(f"chosen on other queries: {found.measure} {mean:.4f} ({low:.4f} to {high:.4f})", flush=True)
        measured.append(found.shapes.assign(collection=folder.name))
    figure.savefig(arguments.output, bbox_inches="tight", dpi=150)
    if arguments.csv:
        pd.concat(measured).to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()

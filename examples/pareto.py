"""Measure the cost and the effectiveness of every shape of a Matroyshka, and draw the Pareto front.

    python examples/pareto.py FOLDER [FOLDER ...] --run bm25 --candidates 100 --queries 50 --output pareto.png

FOLDER is as for rerank_run.py. One forward pass for each ratio gives every depth and every cascade. Shapes on the
front are timed. The best of many shapes looks better than it is, so the last line measures each query with the shape
that is best on the other folds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pandas as pd
from rerank_run import load, with_title

from pyterrier_llmrerank import MatroyshkaReranker, Tuning, tune


def table(shapes: pd.DataFrame, measure: str) -> str:
    """Format shapes as lines of a table."""
    shown = shapes.assign(GFLOP=shapes["operations"] / 1e9)
    shape = ["cutoff", "compress_layers", "compress_ratio", "prune"]
    rounding = {measure: 4, "low": 4, "high": 4, "share": 3, "GFLOP": 1, "milliseconds": 0}
    return shown[[*shape, *rounding]].round(rounding).to_string(index=False)


def within(found: Tuning, share: float) -> str:
    """Describe the best cascade and the best other shape within a share of the full depth's operations."""
    shapes, measure = found.shapes.sort_values("operations"), found.measure
    alone = shapes["prune"].str.len() == 0
    full = shapes[alone & (shapes["share"] == 1)]
    lines = [f"within {share:.0%} of the operations of the full depth:"]
    for name, chosen in (("best cascade", shapes[~alone]), ("best without", shapes[alone])):
        affordable = chosen[chosen["share"] <= share]
        if affordable.empty:
            lines.append(f"{name}: none")
            continue
        best = affordable.iloc[int(affordable[measure].argmax())]
        kept = f", {best[measure] / full[measure].iloc[0]:.1%} of the full depth's" if len(full) else ""
        lines.append(f"{name}: {measure} {best[measure]:.4f}{kept}, {best['share']:.1%} of its operations")
        lines.append(f"    {found.reranker(best)!r}")
    held = found.held_out(min(5, len(found.values)))
    lines.append(f"chosen on other queries: {measure} {held.mean:.4f} ({held.low:.4f} to {held.high:.4f})")
    return "\n".join(lines)


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
    parser.add_argument(
        "--keep", type=int, nargs="+", default=[10, 20, 50], help="candidates kept by a stage of a cascade"
    )
    parser.add_argument("--timed", type=int, default=4, help="number of queries to time the front on")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--csv", type=Path, help="file for all shapes")
    parser.add_argument("--output", type=Path, default=Path("pareto.png"), help="file for the plot")
    arguments = parser.parse_args()

    matplotlib.use("Agg")
    from matplotlib import pyplot

    reranker = MatroyshkaReranker(
        arguments.model, start_layer=arguments.start_layer, dtype=arguments.dtype, verbose=True
    )
    count = len(arguments.folders)
    figure, panels = pyplot.subplots(1, count, figsize=(6 * count, 4.5), squeeze=False)
    measured = []
    for folder, panel in zip(arguments.folders, panels[0], strict=True):
        topics, qrels, candidates = load(folder, arguments.run, arguments.candidates, arguments.queries)
        found = tune(
            reranker, with_title(candidates), qrels, arguments.measure,
            budget=arguments.budget, cutoffs=arguments.depths, compress_ratios=arguments.ratios,
            keep=arguments.keep, timed=arguments.timed,
        )  # fmt: skip
        found.plot(panel)
        panel.set_title(f"{folder.name}, {len(topics)} queries, {arguments.candidates} candidates each")
        print(f"\n{panel.get_title()}: {len(found.shapes)} shapes, {len(found.front)} on the front")
        print(f"{arguments.run}: {found.measure} {found.first_stage:.4f}\n")
        print(table(found.front, found.measure), within(found, arguments.budget), sep="\n\n", flush=True)
        measured.append(found.shapes.assign(collection=folder.name))
    figure.savefig(arguments.output, bbox_inches="tight", dpi=150)
    if arguments.csv:
        pd.concat(measured).to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()

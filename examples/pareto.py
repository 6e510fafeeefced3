"""What each shape of a Matroyshka costs and how well it ranks, and which of them are worth it.

    python examples/pareto.py FOLDER [FOLDER ...] --run bm25 --candidates 100 --queries 50 --output pareto.png

FOLDER is as for rerank_run.py. One pass a ratio gives every depth and every cascade; what is on the front is timed.
The best of many shapes looks a little better than it is: choose on some queries, and report on others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pandas as pd
from rerank_run import load, with_title

from pyterrier_llmrerank import MatroyshkaReranker, Tuning, tune


def table(shapes: pd.DataFrame, measure: str) -> str:
    """Shapes as lines to read."""
    shown = shapes.assign(
        width=[f"1/{ratio} from {layers}" if ratio > 1 else "" for layers, ratio in widths(shapes)],
        cascade=[", ".join(f"{keep} after {layer}" for layer, keep in stages) for stages in shapes["prune"]],
        GFLOP=shapes["operations"] / 1e9,
    )
    columns = ["cutoff", "width", "cascade", measure, "low", "high", "share", "GFLOP", "milliseconds"]
    rounding = {measure: 4, "low": 4, "high": 4, "share": 3, "GFLOP": 1, "milliseconds": 0}
    return shown[columns].round(rounding).to_string(index=False)


def widths(shapes: pd.DataFrame) -> list[tuple[str, int]]:
    """Where each shape pools, and how much."""
    layers = shapes["compress_layers"].map(lambda at: " ".join(map(str, at)))
    return list(zip(layers, shapes["compress_ratio"], strict=True))


def within(found: Tuning, share: float) -> str:
    """The best cascade and the best shape without one in a share of the operations, beside the full depth."""
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
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--run", default="bm25", help="which of runs/*.res.gz")
    parser.add_argument("--candidates", type=int, default=100, help="how many of its results are reranked")
    parser.add_argument("--queries", type=int, help="so many of the topics, from the first; default all")
    parser.add_argument("--measure", default="nDCG@10", help="of ir_measures")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the full depth's operations")
    parser.add_argument("--model", default="smollm2-135m", help="folder, .gguf file or hub id")
    parser.add_argument("--start_layer", type=int, help="the shallowest layer with a head of a plain language model")
    parser.add_argument("--depths", type=int, nargs="+", help="decoder layers; default eight, evenly spaced")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 2, 4], help="passage states pooled into one")
    parser.add_argument("--keep", type=int, nargs="+", default=[10, 20, 50], help="candidates that go on after a stage")
    parser.add_argument("--timed", type=int, default=4, help="queries on which the front is timed")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--csv", type=Path, help="where to write all shapes too")
    parser.add_argument("--output", type=Path, default=Path("pareto.png"), help="where to draw them")
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

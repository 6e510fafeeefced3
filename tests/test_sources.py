"""Topics, texts and judgements come out of files, ir_datasets and PyTerrier alike; what is missing is named."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ir_datasets
import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_llmrerank.formats import Judgement, RerankRow, Text
from pyterrier_llmrerank.sources import documents, judgements, queries, rerank_rows

FILES = {
    "run.txt": "q2 d1 1\nq2 d2 3\nq2 d3 2\nq1 d3 1\n",
    "topics.tsv": "q1\tpanda\nq2\tcoffee\nq3\ttide\n",
    "texts.tsv": "d1\ta panda\nd2\tsome coffee\nd3\tboth\nd4\tneither\n",
    "qrels.txt": "q1 0 d1 2\nq2 0 d3 0\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, lines in FILES.items():
        (tmp_path / name).write_text(lines)
    return tmp_path


class Tiny(pt.datasets.Dataset):
    """A dataset of PyTerrier's own kind."""

    def get_topics(self, variant: str | None = None) -> pd.DataFrame:
        return pd.DataFrame({"qid": [1, 2], "query": ["panda", "coffee"]})

    def get_qrels(self, variant: str | None = None) -> pd.DataFrame:
        return pd.DataFrame({"qid": [1], "docno": ["d1"], "label": [2], "iteration": [0]})

    def get_corpus_iter(self, *, verbose: bool = True) -> Iterator[dict[str, Any]]:
        yield {"docno": "d1", "text": "a panda", "title": "T"}
        yield {"docno": "d2", "text": "some coffee"}


@pytest.fixture
def named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as ir_datasets' ``tiny-irds``, and ``tiny-pt`` and ``empty-pt``."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(folder / "irds"))
    parts = {"docs_tsv": "texts.tsv", "queries_tsv": "topics.tsv", "qrels_trec": "qrels.txt"}
    paths = {part: str(folder / name) for part, name in parts.items()}
    registered = ir_datasets.registry._registered
    monkeypatch.setitem(registered, "tiny-irds", ir_datasets.create_dataset(**paths))
    monkeypatch.setitem(registered, "docs-irds", ir_datasets.create_dataset(docs_tsv=paths["docs_tsv"]))
    monkeypatch.setitem(registered, "qrels-irds", ir_datasets.create_dataset(qrels_trec=paths["qrels_trec"]))
    monkeypatch.setitem(pt.datasets.DATASET_MAP, "tiny-pt", Tiny())
    monkeypatch.setitem(pt.datasets.DATASET_MAP, "empty-pt", pt.datasets.Dataset())


def test_a_run_with_what_it_ranks(folder: Path) -> None:
    rows = rerank_rows(folder / "run.txt", str(folder / "topics.tsv"), str(folder / "texts.tsv"), 2)
    assert list(rows) == [
        RerankRow("q2", "coffee", "d2", None, None, "some coffee", 3.0, 2),
        RerankRow("q2", "coffee", "d3", None, None, "both", 2.0, 3),
        RerankRow("q1", "panda", "d3", None, None, "both", 1.0, 4),
    ]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"topics.tsv": "q1\tpanda\n"}, "run.txt, line 2: query 'q2' is not among the topics of .*topics.tsv"),
        ({"texts.tsv": "d2\tx\n"}, r"run.txt, line 3: docno 'd3' \(query 'q2'\) is not among the texts of .*texts.tsv"),
        ({"texts.tsv": "d2\tx\nd2\tx\n"}, "texts.tsv, line 2: docno 'd2' again, as in line 1"),
        ({"run.txt": "\n"}, "run.txt: no line in it"),
    ],
)
def test_what_is_missing_or_double_is_named(folder: Path, changed: dict[str, str], problem: str) -> None:
    for name, lines in changed.items():
        (folder / name).write_text(lines)
    with pytest.raises(ValueError, match=problem):
        next(rerank_rows(folder / "run.txt", str(folder / "topics.tsv"), str(folder / "texts.tsv"), 2))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("name", ["tiny-irds", "irds:tiny-irds"])
def test_ir_datasets(name: str) -> None:
    assert queries(name) == {"q1": "panda", "q2": "coffee", "q3": "tide"}
    assert documents(name, {"d1", "d9"}) == {"d1": Text("d1", None, None, "a panda", 0)}
    assert judgements(name) == [Judgement("q1", "d1", 2), Judgement("q2", "d3", 0)]


@pytest.mark.usefixtures("named")
def test_pyterriers_datasets() -> None:
    assert queries("tiny-pt") == {"1": "panda", "2": "coffee"}
    assert documents("tiny-pt", {"d1", "d9"}) == {"d1": Text("d1", "T", None, "a panda", 0)}
    assert judgements("tiny-pt") == [Judgement("1", "d1", 2)]


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("read", "name", "problem"),
    [
        (queries, "docs-irds", "topics='docs-irds': the dataset has none"),
        (judgements, "docs-irds", "qrels='docs-irds': the dataset has none"),
        (lambda name: documents(name, {"d1"}), "qrels-irds", "texts='qrels-irds': the dataset has none"),
        (queries, "empty-pt", "'empty-pt': the dataset has no topics"),
        (judgements, "empty-pt", "'empty-pt': the dataset has no qrels"),
        (lambda name: documents(name, {"d1"}), "empty-pt", "'empty-pt': the dataset has no corpus"),
        (queries, "irds:none", "topics='irds:none': no such file, nor a dataset"),
        (judgements, "./none.txt", "qrels='./none.txt': no such file"),
        (judgements, "/dev/null", "qrels='/dev/null': no judgement in it"),
    ],
)
def test_names_that_do_not_serve(read: Callable[[str], object], name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read(name)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("read", "part"), [(queries, "topics"), (judgements, "qrels"), (lambda name: documents(name, {"d1"}), "texts")]
)
def test_a_dataset_that_cannot_be_fetched(
    read: Callable[[str], object], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: object) -> None:
        raise RuntimeError("All download sources failed", [])

    for method in ("queries_iter", "qrels_iter", "docs_store"):
        monkeypatch.setattr(ir_datasets.registry._registered["tiny-irds"], method, failed, raising=False)
    with pytest.raises(ConnectionError, match=f"{part}='tiny-irds' could not be fetched: .*All download sources"):
        read("tiny-irds")


def test_documents_without_a_text_are_read_by_what_ir_datasets_calls_it() -> None:
    from ir_datasets.formats import TrecDoc

    from pyterrier_llmrerank.sources import _text

    class Page:
        doc_id, url, title, body = "d1", "u", "T", "b"

    class Paper:
        doc_id, abstract = "d2", "a"

        def default_text(self) -> str:
            return self.abstract

    assert _text(Page()) == Text("d1", "T", "u", "b", 0)
    assert _text(Paper()) == Text("d2", None, None, "a", 0)
    assert _text(TrecDoc("d3", "t", "<TEXT>")).text == "t"

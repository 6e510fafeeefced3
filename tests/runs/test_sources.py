"""Topics, texts and qrels from files, ir_datasets and PyTerrier, and errors for missing ones."""

import datetime
import enum
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ir_datasets
import pandas as pd
import pyterrier as pt
import pytest
from ir_datasets.formats import GenericDoc, GenericQuery

from pyterrier_llmrerank.runs.collection import Judgement, Text
from pyterrier_llmrerank.runs.formats import RerankRow, read_rerank, rerank_line
from pyterrier_llmrerank.runs.sources import documents, judgements, queries, rerank_rows

FILES = {
    "run.txt": "q2 d1 1\nq2 d2 3\nq2 d3 2.5\nq1 d3 1\n",
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
    """A PyTerrier dataset."""

    def get_topics(self, variant: str | None = None) -> pd.DataFrame:
        return pd.DataFrame({"qid": [1, 2], "query": ["panda", "coffee"]})

    def get_qrels(self, variant: str | None = None) -> pd.DataFrame:
        return pd.DataFrame({"qid": [1], "docno": ["d1"], "label": [2], "iteration": [0]})

    def get_corpus_iter(self, *, verbose: bool = True) -> Iterator[dict[str, Any]]:
        yield {"docno": "d1", "text": "a panda", "title": "T"}
        yield {"docno": "d2", "text": "some coffee"}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a dict to which tests add datasets that ir_datasets then loads by name."""
    added: dict[str, Any] = {}
    real = ir_datasets.load
    monkeypatch.setattr(ir_datasets, "load", lambda name: added[name] if name in added else real(name))
    return added


@pytest.fixture
def named(folder: Path, registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the files as ``tiny-irds`` with ir_datasets, and ``tiny-pt`` and ``empty-pt`` with PyTerrier."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(folder / "irds"))
    parts = {"docs_tsv": "texts.tsv", "queries_tsv": "topics.tsv", "qrels_trec": "qrels.txt"}
    paths = {part: str(folder / name) for part, name in parts.items()}
    registered["tiny-irds"] = ir_datasets.create_dataset(**paths)
    registered["docs-irds"] = ir_datasets.create_dataset(docs_tsv=paths["docs_tsv"])
    registered["qrels-irds"] = ir_datasets.create_dataset(qrels_trec=paths["qrels_trec"])
    monkeypatch.setitem(pt.datasets.DATASET_MAP, "tiny-pt", Tiny())
    monkeypatch.setitem(pt.datasets.DATASET_MAP, "empty-pt", pt.datasets.Dataset())


def test_a_run_is_joined_with_its_texts(folder: Path) -> None:
    rows = rerank_rows(folder / "run.txt", str(folder / "topics.tsv"), str(folder / "texts.tsv"), 2)
    assert list(rows) == [
        RerankRow("q2", "coffee", "d2", None, None, "some coffee", 3.0, 2),
        RerankRow("q2", "coffee", "d3", None, None, "both", 2.5, 3),
        RerankRow("q1", "panda", "d3", None, None, "both", 1.0, 4),
    ]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"topics.tsv": "q1\tpanda\n"}, "run.txt, line 2: query 'q2' is not among the topics of .*topics.tsv"),
        ({"texts.tsv": "d2\tx\n"}, r"run.txt, line 3: docno 'd3' \(query 'q2'\) is not among the texts of .*texts.tsv"),
        ({"texts.tsv": "d2\tx\nd2\tx\n"}, "texts.tsv, line 2: docno 'd2' again, as in line 1"),
        ({"run.txt": "\n"}, "run.txt is empty"),
    ],
)
def test_missing_and_repeated_entries_are_named(folder: Path, changed: dict[str, str], problem: str) -> None:
    for name, lines in changed.items():
        (folder / name).write_text(lines)
    with pytest.raises(ValueError, match=problem):
        next(rerank_rows(folder / "run.txt", str(folder / "topics.tsv"), str(folder / "texts.tsv"), 2))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("name", ["tiny-irds", "irds:tiny-irds"])
def test_a_dataset_of_ir_datasets_is_read_by_name(name: str) -> None:
    assert queries(name) == {"q1": "panda", "q2": "coffee", "q3": "tide"}
    assert documents(name, {"d1", "d9"}) == {"d1": Text("d1", None, None, "a panda", 0)}
    assert judgements(name) == [Judgement("q1", "d1", 2), Judgement("q2", "d3", 0)]


@pytest.mark.usefixtures("named")
def test_a_dataset_of_pyterrier_is_read_by_name() -> None:
    assert queries("tiny-pt") == {"1": "panda", "2": "coffee"}
    assert documents("tiny-pt", {"d1", "d9"}) == {"d1": Text("d1", "T", None, "a panda", 0)}
    assert judgements("tiny-pt") == [Judgement("1", "d1", 2)]


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("read", "name", "problem"),
    [
        (queries, "docs-irds", "topics='docs-irds': the dataset has no topics"),
        (judgements, "docs-irds", "qrels='docs-irds': the dataset has no qrels"),
        (lambda name: documents(name, {"d1"}), "qrels-irds", "texts='qrels-irds': the dataset has no documents"),
        (queries, "empty-pt", "topics='empty-pt': the dataset has no topics"),
        (judgements, "empty-pt", "qrels='empty-pt': the dataset has no qrels"),
        (lambda name: documents(name, {"d1"}), "empty-pt", "texts='empty-pt': the dataset has no corpus"),
        (queries, "irds:none", "topics='irds:none': no such file or dataset"),
        (judgements, "./none.txt", "qrels='./none.txt': no such file"),
        (judgements, "/dev/null", "qrels='/dev/null' is empty"),
    ],
)
def test_invalid_names_are_errors(read: Callable[[str], object], name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read(name)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("read", "part"), [(queries, "topics"), (judgements, "qrels"), (lambda name: documents(name, {"d1"}), "texts")]
)
def test_a_failed_download_is_named(
    read: Callable[[str], object], part: str, registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: object) -> None:
        raise RuntimeError("All download sources failed", [])

    for method in ("queries_iter", "qrels_iter", "docs_store"):
        monkeypatch.setattr(registered["tiny-irds"], method, failed, raising=False)
    with pytest.raises(ConnectionError, match=f"{part}='tiny-irds' could not be downloaded: .*All download sources"):
        read("tiny-irds")


# -- every kind of document, query and judgement of ir_datasets


def classes(part: str) -> dict[str, type[Any]]:
    """Return the record classes of all datasets of ir_datasets."""
    found: dict[str, type[Any]] = {}
    for dataset in map(ir_datasets.load, ir_datasets.registry):
        if getattr(dataset, f"has_{part}")():
            kind = getattr(dataset, f"{part}_cls")()
            found[f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"] = kind
    return found


DOCS, QUERIES, QRELS = (classes(part) for part in ("docs", "queries", "qrels"))
PAGE = b"<html><head><title>a page</title></head><body>\nits \xe2\x82\xac body</body></html>"


def made_up(hint: Any, name: str) -> Any:
    """Make a value of a type."""
    arguments = [argument for argument in typing.get_args(hint) if argument not in (type(None), ...)]
    origin = typing.get_origin(hint)
    if origin is typing.Union:
        return made_up(arguments[0], name)
    if origin in (list, tuple):
        return origin(made_up(argument, name) for argument in arguments)
    if origin is dict:
        return {"key": made_up(arguments[1], name)}
    if issubclass(hint, enum.Enum):
        return next(iter(hint))
    if issubclass(hint, tuple):
        return made(hint)
    plain = {
        str: f"some {name}", bytes: PAGE, int: 7, float: 0.5, bool: True,
        datetime.datetime: datetime.datetime(2020, 1, 1),
    }  # fmt: skip
    return plain[hint]


def made(kind: Any, **given: Any) -> Any:
    """Make an instance of a record class."""
    hints = typing.get_type_hints(kind)
    usual = {"doc_id": "d1", "query_id": "q1", "http_headers": None}
    if "http_headers" in hints:
        said = "Content-Type: text/html; charset=utf-8\r\n"
        usual["http_headers"] = said.encode() if hints["http_headers"] is bytes else said
    values = {name: usual.get(name) or made_up(hint, name) for name, hint in hints.items()}
    return kind(**{**values, **given})


def fields(kind: Any) -> list[str]:
    """Return the fields of a record class after the first, which is its id."""
    return list(typing.get_type_hints(kind))[1:]


@pytest.fixture
def prepared(tmp_path: Path, registered: dict[str, Any]) -> Callable[[Any, Any], RerankRow]:
    """Return a function that prepares a query and a document of ir_datasets, and reads the rerank file back."""
    (tmp_path / "run.txt").write_text("q1 d1 0.5\n")

    def prepare(document: Any, query: Any) -> RerankRow:
        dataset = types.SimpleNamespace(
            has_docs=lambda: True, docs_store=lambda: types.SimpleNamespace(get_many=lambda docnos: {"d1": document}),
            has_queries=lambda: True, queries_iter=lambda: iter([query]),
        )  # fmt: skip
        registered["made-up"] = dataset
        lines = [rerank_line(row) for row in rerank_rows(tmp_path / "run.txt", "made-up", "made-up", 1)]
        (tmp_path / "rerank.jsonl").write_text("".join(lines))
        (row,) = read_rerank(tmp_path / "rerank.jsonl")
        return row

    return prepare


QUERY, DOCUMENT = GenericQuery("q1", "panda"), GenericDoc("d1", "a panda")


@pytest.mark.parametrize("kind", DOCS.values(), ids=DOCS)
def test_every_kind_of_document_has_a_text_or_is_named(kind: Any, prepared: Callable[[Any, Any], RerankRow]) -> None:
    document = made(kind)
    if kind.__name__ == "ToucheImageDoc":
        with pytest.raises(
            ValueError, match="^texts='made-up': cannot get a text for doc_id 'd1', a ToucheImageDoc .*doc_id, png"
        ):
            prepared(document, QUERY)
        return
    row = prepared(document, QUERY)
    whole = f"{row.title} {row.text}" if row.title is not None else row.text
    if hasattr(document, "default_text"):
        assert whole.split() == document.default_text().split()
    assert row.text
    assert row.url == getattr(document, "url", None)
    for name in fields(kind):
        try:
            row = prepared(made(kind, **{name: None}), QUERY)
        except ValueError as error:
            assert f"cannot get a text for doc_id 'd1', a {kind.__name__}" in str(error)  # noqa: PT017
        else:
            assert "None" not in f"{row.title or ''} {row.text}"


@pytest.mark.parametrize("kind", QUERIES.values(), ids=QUERIES)
def test_every_kind_of_query_has_a_text_or_is_named(kind: Any, prepared: Callable[[Any, Any], RerankRow]) -> None:
    query = made(kind)
    if kind.__name__ == "TrecBackgroundLinkingQuery":
        with pytest.raises(ValueError, match="^topics='made-up': cannot get a text for query_id 'q1', a TrecBack"):
            prepared(DOCUMENT, query)
        return
    assert prepared(DOCUMENT, query).query == (query.default_text() if hasattr(query, "default_text") else "some text")
    for name in fields(kind):
        try:
            row = prepared(DOCUMENT, made(kind, **{name: None}))
        except ValueError as error:
            assert f"cannot get a text for query_id 'q1', a {kind.__name__}" in str(error)  # noqa: PT017
        else:
            assert "None" not in row.query


@pytest.mark.parametrize(
    ("kind", "title", "text"),
    [
        ("msmarco_document.MsMarcoDocument", "some title", "some body"),
        ("msmarco_document_v2.MsMarcoV2Document", "some title", "some headings some body"),
        ("cord19.Cord19FullTextDoc", "some title", "some abstract some title some text"),
        (
            "clinicaltrials.ClinicalTrialsDoc",
            "some title",
            "some condition some summary some detailed_description some eligibility",
        ),
        ("codesearchnet.CodeSearchNetDoc", None, "some code"),
        ("gov2.Gov2Doc", None, "a page\nits € body"),
        ("nyt.NytDoc", None, "some headline some body"),
        ("tripclick.TripClickPartialDoc", None, "some title"),
        ("csl.CslDoc", "some title", "some abstract"),
    ],
)
def test_titles_are_separated_from_texts(
    kind: str, title: str | None, text: str, prepared: Callable[[Any, Any], RerankRow]
) -> None:
    row = prepared(made(DOCS[kind]), QUERY)
    assert (row.title, " ".join(row.text.split())) == (title, " ".join(text.split()))


class Page(typing.NamedTuple):
    """A document that ir_datasets cannot decode."""

    doc_id: str
    body: bytes

    def default_text(self) -> str:
        return self.body.decode()


def test_a_page_that_cannot_be_decoded_is_named(prepared: Callable[[Any, Any], RerankRow]) -> None:
    with pytest.raises(ValueError, match="^texts='made-up': cannot get a text for doc_id 'd1', a Page .*body .*decode"):
        prepared(Page("d1", b"\xff"), QUERY)


def test_queries_without_text_are_an_error_only_if_the_run_has_them(prepared: Callable[[Any, Any], RerankRow]) -> None:
    kind = QUERIES["trec.TrecQuery"]
    with pytest.raises(ValueError, match=r"cannot get a text for query_id 'q1', a TrecQuery .*\(no value for title\)"):
        prepared(DOCUMENT, made(kind, title=None))
    with pytest.raises(ValueError, match="query 'q1' is not among the topics"):
        prepared(DOCUMENT, made(kind, query_id="q2", title=None))


@pytest.mark.parametrize("kind", QRELS.values(), ids=QRELS)
def test_every_kind_of_judgement_has_one_label(kind: Any, registered: dict[str, Any]) -> None:
    one = made(kind, relevance="2" if kind.__name__ == "CodeSearchNetChallengeQrel" else 2)
    given = [one, one]
    registered["made-up"] = types.SimpleNamespace(has_qrels=lambda: True, qrels_iter=lambda: iter(given))
    assert judgements("made-up") == [Judgement("q1", "d1", 2)] or one.doc_id != "d1"
    given = [one, made(kind, relevance=0)]
    with pytest.raises(
        ValueError, match="qrels='made-up': docno .* is judged 2 and 0 for query 'q1'; expected one label"
    ):
        judgements("made-up")

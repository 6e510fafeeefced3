"""What is written is read again; what is malformed is named by file and line, whatever it is."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank import formats
from pyterrier_llmrerank.formats import (
    FORMS,
    MAX_LINE,
    Judgement,
    RerankRow,
    RunRow,
    Text,
    Topic,
    best_first,
    by_query,
    read_qrels,
    read_rerank,
    read_run,
    read_texts,
    read_topics,
    rerank_line,
    run_line,
    writing,
)  # fmt: skip

READERS: dict[str, tuple[str, Callable[[Path], Iterator[Any]]]] = {
    "run": ("run.txt", read_run),
    "rerank": ("rerank.jsonl", read_rerank),
    "topics": ("topics.tsv", read_topics),
    "topics in JSON lines": ("topics.jsonl", read_topics),
    "texts": ("texts.tsv", read_texts),
    "texts in JSON lines": ("texts.json", read_texts),
    "qrels": ("qrels.txt", read_qrels),
}

#: Hypothesis and tmp_path: each example writes the same file anew.
ANEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

IDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6).filter(
    lambda text: not any(character in " \t\n\r\v\f\0" for character in text)
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCORES = st.floats(allow_nan=False, allow_infinity=False)


def written(path: Path, *lines: str) -> Path:
    with writing(path) as file:
        file.writelines(lines)
    return path


def rerank(**changed: Any) -> str:
    record = {"query_id": "q1", "query": "panda", "docid": "d1", "title": "", "text": "a panda", "score": 1.5}
    return json.dumps({key: value for key, value in {**record, **changed}.items() if value is not ...}) + "\n"


# -- round trips


@ANEW
@given(st.lists(st.tuples(IDS, IDS, SCORES), max_size=6, unique_by=lambda row: row[:2]), st.sampled_from(FORMS))
@pytest.mark.parametrize("name", ["run.txt", "run.gz"])
def test_a_run_is_read_as_it_was_written(
    tmp_path: Path, name: str, rows: list[tuple[str, str, float]], form: str
) -> None:
    rows.sort(key=lambda row: row[0])
    lines = [run_line(*row[:2], rank, row[2], form, "mine") for rank, row in enumerate(rows, 1)]
    path = written(tmp_path / name, *lines)
    ranks = [None if form == "three" else rank for rank in range(1, len(rows) + 1)]
    want = [RunRow(*row[:2], rank, row[2], n) for n, (row, rank) in enumerate(zip(rows, ranks, strict=True), 1)]
    assert list(read_run(path)) == want


@ANEW
@given(
    st.builds(
        RerankRow, qid=IDS, query=TEXTS, docno=IDS, title=st.none() | TEXTS, url=st.none() | TEXTS, text=TEXTS,
        score=st.none() | SCORES, line=st.just(1),
    )
)  # fmt: skip
def test_a_rerank_file_is_read_as_it_was_written(tmp_path: Path, row: RerankRow) -> None:
    assert list(read_rerank(written(tmp_path / "rerank.jsonl", rerank_line(row)))) == [row]


def test_the_seeds_line_is_ours(tmp_path: Path) -> None:
    assert list(read_rerank(written(tmp_path / "x", rerank(more=[1])))) == [
        RerankRow("q1", "panda", "d1", "", None, "a panda", 1.5, 1)
    ]


@pytest.mark.parametrize(
    ("lines", "rank"),
    [
        ("q1\td1\t2.5\nq1\td2\t-1e-3\n", None),
        ("q1 d1 7 2.5\nq1 d2 8 -.001\n", 7),
        ("q1 Q0 d1 7 2.5 t\nq1 0 d2 8 -1e-3 t", 7),
    ],
)
def test_runs_have_three_four_or_six_columns(tmp_path: Path, lines: str, rank: int | None) -> None:
    first, second = read_run(written(tmp_path / "run", lines))
    assert first == RunRow("q1", "d1", rank, 2.5, 1)
    assert second == RunRow("q1", "d2", rank and rank + 1, -0.001, 2)


def test_what_is_ranked(tmp_path: Path) -> None:
    topics = [Topic("1", "what is\xa0a panda", 1), Topic("q2", "", 2)]
    assert list(read_topics(written(tmp_path / "a.tsv", "1\twhat is\xa0a panda\nq2\t\n"))) == topics
    lines = ['{"_id": "1", "text": "what is\\u00a0a panda"}\n', '{"query_id": "q2", "query": ""}\n']
    assert list(read_topics(written(tmp_path / "a.jsonl.gz", *lines))) == topics
    assert list(read_texts(written(tmp_path / "b.tsv", "d1\ta  text \n"))) == [Text("d1", None, None, "a  text ", 1)]
    assert list(read_texts(written(tmp_path / "c.tsv", "d1\tT\ta\n"))) == [Text("d1", "T", None, "a", 1)]
    line = '{"docid": "d1", "title": "T", "text": "a", "url": "u", "other": 1}\n'
    assert list(read_texts(written(tmp_path / "d.jsonl", line))) == [Text("d1", "T", "u", "a", 1)]


def test_judgements(tmp_path: Path) -> None:
    want = [Judgement("q1", "d1", 2), Judgement("q2", "d1", -1), Judgement("q1", "d2", 0)]
    for lines in (
        "q1 0 d1 2\nq2 0 d1 -1\nq1 0 d2 0\n",
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td1\t-1\nq1\td2\t0\n",
    ):
        assert list(read_qrels(written(tmp_path / "qrels", lines))) == want


def test_bom_crlf_and_empty_lines_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "topics.tsv"
    path.write_bytes(b"\xef\xbb\xbfq1\tpanda\r\n\r\n  \nq2\tcoffee")
    assert list(read_topics(path)) == [Topic("q1", "panda", 1), Topic("q2", "coffee", 4)]
    path = tmp_path / "rerank.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + rerank().encode().replace(b"\n", b"\r\n"))
    assert [row.line for row in read_rerank(path)] == [1]


def test_best_first() -> None:
    ranked = [("a", 3, 0.5), ("b", 1, 0.5), ("c", 9, 2), ("d", 1, 0.5)]
    rows = [RunRow("q", name, rank, score, 1) for name, rank, score in ranked]
    assert [row.docno for row in best_first(rows)] == ["c", "b", "d", "a"]
    rows = [RunRow("q", name, None, 0.5, 1) for name in "ba"]
    assert [row.docno for row in best_first(rows)] == ["b", "a"]


def test_lines_are_given_as_they_are_read(tmp_path: Path) -> None:
    rows = read_rerank(written(tmp_path / "rerank.jsonl", rerank(), rerank(docid="d2"), "{"))
    assert next(rows).docno == "d1"
    assert next(rows).docno == "d2"
    with pytest.raises(ValueError, match="line 3"):
        next(rows)


def test_rows_of_a_query_come_together(tmp_path: Path) -> None:
    path = written(tmp_path / "run", "q1 d1 2\nq1 d2 1\nq0 d1 1\n")
    assert [(qid, [row.docno for row in rows]) for qid, rows in by_query(read_run(path))] == [
        ("q1", ["d1", "d2"]), ("q0", ["d1"]),
    ]  # fmt: skip


# -- malformed lines


@pytest.mark.parametrize(
    ("kind", "lines", "problem"),
    [
        ("run", "q1 d1 1\nq1 d2\n", "line 2: 2 columns, but 3 in the lines before"),
        ("run", "q1 d1 1\nq1 Q0 d2 1 2 t\n", "line 2: 6 columns, but 3"),
        ("run", "q1 Q0 d1 1 2\n", "line 1: 5 columns parted by white space; wanted 3 .* or 4 .* or 6"),
        ("run", "q1 d1 1\nq1 d2 nan\n", "line 2: score is 'nan'; wanted a finite number"),
        ("run", "q1 d1 1e999\n", "line 1: score is '1e999'"),
        ("run", "q1 d1 1_000\n", "line 1: score is '1_000'"),
        ("run", "q1 d1 \u0661\n", "line 1: score is '\u0661'"),
        ("run", "q1 d1 1.5 2\n", "line 1: rank is '1.5'; wanted a whole number"),
        ("run", "q1 d1 1\n\nq1 d1 2\n", "line 3: docno 'd1' again for query 'q1', as in line 1"),
        ("run", "q1 d1 1\nq2 d1 2\nq1 d2 2\n", "line 3: query 'q1' again, after others; .* together"),
        ("rerank", rerank(score="1"), "line 1: score is '1'; wanted a finite number"),
        ("rerank", rerank(score=True), "line 1: score is True"),
        ("rerank", rerank(score=float("nan")), "line 1: score is nan"),
        ("rerank", rerank(score=10**400), "line 1: score is 1000"),
        ("rerank", rerank(query_id=7), "line 1: query_id is 7; wanted a string that is not empty"),
        ("rerank", rerank(docid=""), "line 1: docid is ''; wanted a string that is not empty"),
        ("rerank", rerank(docid="a b"), "line 1: docid is 'a b'; wanted no white space"),
        ("rerank", rerank(docid="a\0"), "line 1: docid is .*no NUL"),
        ("rerank", rerank(docid="\ud800"), "line 1: docid is not valid Unicode"),
        ("rerank", rerank(text="\ud800"), "line 1: text is not valid Unicode"),
        ("rerank", rerank(text=None), "line 1: text is None; wanted a string"),
        ("rerank", rerank(text=...), "line 1: no key 'text'; wanted one, with a string"),
        ("rerank", rerank(title=["x"] * 1000), r"line 1: title is \['x', .*\.\.\.\]; wanted a string"),
        ("rerank", rerank() + rerank(query="koala"), "line 2: docno 'd1' again for query 'q1', as in line 1"),
        ("rerank", '["q1"]', r"line 1: \['q1'\]; wanted a JSON object"),
        ("rerank", rerank()[:-9], "line 1: not JSON"),
        ("rerank", "[" * 100_000, "line 1: not JSON"),
        ("rerank", '{"score": ' + "1" * 5000 + "}", "line 1: not JSON"),
        ("topics", "q1\tpanda\nq2\n", "line 2: 1 columns, but 2"),
        ("topics", "q1\ta\tb\n", "line 1: 3 columns parted by tabs; wanted 2"),
        ("topics", "q 1\ta\n", "line 1: qid is 'q 1'; wanted no white space"),
        ("topics", "q1\ta\nq1\tb\n", "line 2: qid 'q1' again, as in line 1"),
        ("topics in JSON lines", '{"query": "x"}', "line 1: no key 'qid' or 'query_id' or '_id'"),
        ("texts", "d1\ta\nd2\tt\ta\n", "line 2: 3 columns, but 2"),
        ("texts in JSON lines", '{"docno": "d1", "text": 1}', "line 1: text is 1; wanted a string"),
        ("qrels", "q1 0 d1 1.0\n", "line 1: label is '1.0'; wanted a whole number"),
        ("qrels", "q1 d1 1\nquery-id corpus-id score\n", "line 2: label is 'score'"),
        ("qrels", "q1 0 d1 1\nq2 0 d1 1\nq1 0 d1 0\n", "line 3: docno 'd1' again for query 'q1', as in line 1"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, kind: str, lines: str, problem: str) -> None:
    name, reader = READERS[kind]
    path = tmp_path / name
    path.write_bytes(lines.encode())
    with pytest.raises(ValueError, match=f"^{path}, {problem}") as raised:
        list(reader(path))
    assert len(str(raised.value)) < 500 + len(str(path))


EACH = pytest.mark.parametrize(("name", "reader"), READERS.values(), ids=READERS)


@EACH
def test_bytes_that_are_no_text_are_named(tmp_path: Path, name: str, reader: Callable[[Path], Iterator[Any]]) -> None:
    path = tmp_path / name
    for raw, problem in ((b"q\xff", "byte 2 is 0xff, which is not UTF-8"), (b"ab\0", "a NUL byte at byte 3")):
        path.write_bytes(b"\n" + raw)
        with pytest.raises(ValueError, match=f"line 2: {problem}"):
            list(reader(path))


@EACH
@ANEW
@given(lines=st.lists(st.binary(max_size=30) | st.text('q1d \t\n{}[]":,.-e0\\u', max_size=30).map(str.encode)))
def test_whatever_is_in_a_file_it_is_read_or_named(
    tmp_path: Path, name: str, reader: Callable[[Path], Iterator[Any]], lines: list[bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines))
    try:
        list(reader(path))
    except ValueError as error:
        assert str(error).startswith(f"{path}, line ")  # noqa: PT017


@ANEW
@given(cut=st.integers(0, 200), flip=st.integers(0, 200))
def test_a_damaged_gz_is_named(tmp_path: Path, cut: int, flip: int) -> None:
    whole = gzip.compress("".join(f"q{q} d{d} {q * d}\n" for q in range(30) for d in range(10)).encode(), mtime=0)
    path = tmp_path / "run.gz"
    damaged = bytearray(whole[: len(whole) - 1 - cut])
    damaged[min(flip, len(damaged) - 1)] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"^{path}, line [0-9]+: "):
        list(read_run(path))


def test_long_lines_are_read_and_longer_ones_named(tmp_path: Path) -> None:
    text = "panda " * (10 * 2**20 // 6)
    (row,) = read_rerank(written(tmp_path / "rerank.jsonl", rerank(text=text)))
    assert row.text == text
    path = tmp_path / "texts.tsv.gz"
    path.write_bytes(gzip.compress(b"d1\t" + b"x" * 6 * MAX_LINE, 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"line 1: longer than {MAX_LINE} bytes"):
        list(read_texts(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_LINE


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.gz"):
        list(read_run(tmp_path / "none.gz"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"qid": "a b"}, "qid is 'a b'; wanted no white space"),
        ({"docno": ""}, "docno is ''; wanted a string that is not empty"),
        ({"tag": "my run"}, "tag is 'my run'"),
        ({"score": float("inf")}, "the score of query 'q', docno 'd' is inf"),
        ({"form": "four"}, "form='four'; allowed: three, trec"),
    ],
)
def test_what_no_run_can_hold_is_not_written(change: dict[str, Any], problem: str) -> None:
    values = {"qid": "q", "docno": "d", "rank": 1, "score": 1.0, "form": "trec", "tag": "t", **change}
    with pytest.raises(ValueError, match=problem):
        run_line(**values)


# -- writing


def test_a_file_appears_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text("before")
    with pytest.raises(KeyError), writing(path) as file:  # noqa: PT012
        file.write("x" * 100_000)
        raise KeyError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["run.txt"]
    assert written(path, "after").read_text() == "after"
    assert os.listdir(tmp_path) == ["run.txt"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "run.gz", "before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        written(path, "after")
    assert gzip.decompress(path.read_bytes()) == b"before"
    assert os.listdir(tmp_path) == ["run.gz"]


def test_equal_texts_give_equal_gz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = written(tmp_path / "one.gz", "q1 d1 1\n").read_bytes()
    monkeypatch.setattr("time.time", lambda: 10.0**9)
    two = written(tmp_path / "two.gz", "q1 d1 1\n").read_bytes()
    assert one == two
    assert gzip.decompress(one) == b"q1 d1 1\n"


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    written(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "x"
    assert written(Path(os.devnull), "x").is_char_device()
    reading, end = os.pipe()
    written(Path(f"/dev/fd/{end}"), "through a pipe")
    assert os.read(reading, 100) == b"through a pipe"
    os.close(reading)
    os.close(end)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        written(tmp_path / "none" / "run.txt", "x")

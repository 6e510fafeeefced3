"""Round trips of all file formats, and errors that name the file and line."""

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank.runs.collection import Topic, read_qrels, read_texts, read_topics
from pyterrier_llmrerank.runs.formats import (
    FORMS,
    RerankRow,
    RunRow,
    best_first,
    by_query,
    read_rerank,
    read_run,
    rerank_line,
    run_line,
)
from pyterrier_llmrerank.runs.text_files import MAX_LINE

READERS: dict[str, tuple[str, Callable[[Path], Iterator[Any]]]] = {
    "run": ("run.txt", read_run),
    "rerank": ("rerank.jsonl", read_rerank),
    "topics": ("topics.tsv", read_topics),
    "topics in JSON lines": ("topics.jsonl", read_topics),
    "texts": ("texts.tsv", read_texts),
    "texts in JSON lines": ("texts.json", read_texts),
    "qrels": ("qrels.txt", read_qrels),
}

#: All examples of a test share its tmp_path.
ANEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

IDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6).filter(
    lambda text: not any(character in " \t\n\r\v\f\0" for character in text)
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ROW = RerankRow("q1", "panda", "d1", "T", "u", "a panda", 1.5, 1)
SCORES = st.floats(allow_nan=False, allow_infinity=False)


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
    rows.sort(key=lambda row: (row[0], -row[2]))  # runs are sorted by score
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


def test_ids_of_a_rerank_line_may_be_integers(tmp_path: Path) -> None:
    (row,) = read_rerank(written(tmp_path / "rerank.jsonl", rerank(query_id=0, docid=8841823)))
    assert (row.qid, row.docno) == ("0", "8841823")


def test_a_rerank_line_may_have_other_keys(tmp_path: Path) -> None:
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


#: The last of three columns, by query. Numbers that count up, or count in any order but descending, may be ranks.
LIKE_RANKS = [
    [[1, 2, 3]], [[1, 2, 3], [1, 2]], [[1], [1, 2, 3], [1]], [[0, 1, 2]], [[1, 4, 9]], [[2, 1, 3]], [[3, 5]],
    [[1, 2, 3], [2, 1]], [[1, 2, 3], [9, 5], [5, 5]], [[0, 1], [2, 1], [0, 1]],
]  # fmt: skip
LIKE_SCORES = [
    [[3, 2, 1]], [[1, 2], [2, 1]], [[1, 2], [0.5]], [[1], [1]], [[1, 2, 2.5]], [[-3, -2, -1]], [[9, 1, 4]],
    [[1, 1, 2]], [[1, 2], [5, 5]],
]  # fmt: skip


def of_scores(queries: list[list[float]]) -> str:
    return "".join(f"q{q} d{d} {score}\n" for q, scores in enumerate(queries) for d, score in enumerate(scores))


@pytest.mark.parametrize("queries", LIKE_RANKS)
def test_ranks_are_not_taken_for_scores(tmp_path: Path, queries: list[list[float]]) -> None:
    path = written(tmp_path / "run.txt", of_scores(queries))
    first = 1 if len(queries[0]) > 1 else 2
    with pytest.raises(ValueError, match=f"^{path}, line {first}: the scores count up like ranks, .* --columns .*qid"):
        list(read_run(path))
    values = [value for scores in queries for value in scores]
    assert [row.score for row in read_run(path, "qid,docno,score")] == values
    assert [(row.rank, row.score) for row in read_run(path, "qid,docno,rank")] == [(value, -value) for value in values]
    ranked = [best_first(rows)[0].rank for _, rows in by_query(read_run(path, "qid,docno,rank"))]
    assert ranked == [min(scores) for scores in queries]


@pytest.mark.parametrize("queries", LIKE_SCORES)
def test_scores_are_not_taken_for_ranks(tmp_path: Path, queries: list[list[float]]) -> None:
    rows = read_run(written(tmp_path / "run.txt", of_scores(queries)))
    assert [row.score for row in rows] == [score for scores in queries for score in scores]


@pytest.mark.parametrize(
    ("lines", "columns", "problem"),
    [
        (
            "q d1 1 0.25\nq d2 9 0.5\nq d3 2 0.5\n",
            "qid,docno,_,score",
            "line 3: docno 'd3' has rank 2 and score 0.5, but",
        ),
        ("q 0 d1 2 8.5 t\nq 0 d2 1 7 t\n", "qid,_,docno,_,score,_", "line 1: docno 'd1' has rank 2 and score 8.5, but"),
        ("q d1 20 1\nq d2 10 2\n", "qid,docno,score,rank", "line 1: the scores count up like ranks"),  # swapped
    ],
)
def test_ranks_and_scores_that_contradict_each_other_are_named(
    tmp_path: Path, lines: str, columns: str, problem: str
) -> None:
    path = written(tmp_path / "run.txt", lines)
    with pytest.raises(ValueError, match=f"^{path}, {problem}.*--columns"):
        list(read_run(path))
    at = columns.split(",").index("score")
    assert [row.score for row in read_run(path, columns)] == [float(line.split()[at]) for line in lines.splitlines()]


def test_equal_ranks_or_scores_contradict_nothing(tmp_path: Path) -> None:
    for lines in (
        "q d1 0 1\nq d2 0 3\nq d3 0 2.5\n",
        "q d1 2 .5\nq d2 1 .5\nq d3 3 .5\n",
        "q a 1 2\nq b 1 9\nq c 2 2\n",
    ):
        assert len(list(read_run(written(tmp_path / "run", lines)))) == 3


@pytest.mark.parametrize("columns", ["", "qid,docno", "qid,score", "qid,docno,scores", "qid,docno,score,qid", "docno"])
def test_invalid_columns_are_errors(tmp_path: Path, columns: str) -> None:
    path = written(tmp_path / "run", "q d 1\n")
    with pytest.raises(ValueError, match=f"^columns='{columns}'; allowed: qid, docno, and rank, score"):
        list(read_run(path, columns))
    with pytest.raises(ValueError, match="line 1: 3 whitespace-separated columns; expected 2 \\(docno qid rank\\)|4"):
        list(read_run(path, "docno,qid,_,rank"))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"qid": "a b"}, r"docno 'd1' \(query 'a b'\): query_id is 'a b'; expected no whitespace"),
        ({"docno": ""}, r"docno '' \(query 'q1'\): docid is ''"),
        ({"text": b"<html>"}, r"docno 'd1' \(query 'q1'\): text is b'<html>'; expected a string"),
        ({"text": ["a", "b"]}, r"text is \['a', 'b'\]; expected a string"),
        ({"query": None}, "query is None; expected a string"),
        ({"title": 3}, "title is 3; expected a string"),
        ({"url": "\ud800"}, "url is not valid Unicode"),
        ({"score": float("nan")}, "score is nan; expected a finite number"),
        ({"text": "ä" * (MAX_LINE // 2)}, f"the line has 1[0-9]* bytes; allowed: up to {MAX_LINE}"),
    ],
)
def test_invalid_rerank_lines_are_not_written(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        rerank_line(ROW._replace(**changed))


def test_bom_crlf_and_empty_lines_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "topics.tsv"
    path.write_bytes(b"\xef\xbb\xbfq1\tpanda\r\n\r\n  \nq2\tcoffee")
    assert list(read_topics(path)) == [Topic("q1", "panda", 1), Topic("q2", "coffee", 4)]
    path = tmp_path / "rerank.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + rerank().encode().replace(b"\n", b"\r\n"))
    assert [row.line for row in read_rerank(path)] == [1]


def test_rows_are_sorted_by_score_then_rank_then_position() -> None:
    ranked = [("a", 3, 0.5), ("b", 1, 0.5), ("c", 9, 2), ("d", 1, 0.5)]
    rows = [RunRow("q", name, rank, score, 1) for name, rank, score in ranked]
    assert [row.docno for row in best_first(rows)] == ["c", "b", "d", "a"]
    rows = [RunRow("q", name, None, 0.5, 1) for name in "ba"]
    assert [row.docno for row in best_first(rows)] == ["b", "a"]


def test_rows_are_yielded_as_they_are_read(tmp_path: Path) -> None:
    rows = read_rerank(written(tmp_path / "rerank.jsonl", rerank(), rerank(docid="d2"), "{"))
    assert next(rows).docno == "d1"
    assert next(rows).docno == "d2"
    with pytest.raises(ValueError, match="line 3"):
        next(rows)


def test_rows_are_grouped_by_query(tmp_path: Path) -> None:
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
        ("run", "q1 Q0 d1 1 2\n", "line 1: 5 whitespace-separated columns; expected 3 .* or 4 .* or 6"),
        ("run", "q1 d1 1\nq1 d2 nan\n", "line 2: score is 'nan'; expected a finite number"),
        ("run", "q1 d1 1e999\n", "line 1: score is '1e999'"),
        ("run", "q1 d1 1_000\n", "line 1: score is '1_000'"),
        ("run", "q1 d1 \u0661\n", "line 1: score is '\u0661'"),
        ("run", "q1 d1 1.5 2\n", "line 1: rank is '1.5'; expected an integer"),
        ("run", "q1 d1 1\n\nq1 d1 2\n", "line 3: docno 'd1' again for query 'q1', as in line 1"),
        (
            "run",
            "q1 d1 1\nq2 d1 2\nq1 d2 2\n",
            r"line 3: query 'q1' again, .* consecutive .* \(sort -s -k1,1 groups them",
        ),
        ("rerank", rerank(score="1"), "line 1: score is '1'; expected a finite number"),
        ("rerank", rerank(score=True), "line 1: score is True"),
        ("rerank", rerank(score=float("nan")), "line 1: score is nan"),
        ("rerank", rerank(score=10**400), "line 1: score is 1000"),
        ("rerank", rerank(query_id=7.0), "line 1: query_id is 7.0; expected a non-empty string"),
        ("rerank", rerank(docid=True), "line 1: docid is True; expected a non-empty string"),
        ("rerank", rerank(docid=""), "line 1: docid is ''; expected a non-empty string"),
        ("rerank", rerank(docid="a b"), "line 1: docid is 'a b'; expected no whitespace"),
        ("rerank", rerank(docid="a\0"), "line 1: docid is .*no NUL"),
        ("rerank", rerank(docid="\ud800"), "line 1: docid is not valid Unicode"),
        ("rerank", rerank(text="\ud800"), "line 1: text is not valid Unicode"),
        ("rerank", rerank(text=None), "line 1: text is None; expected a string"),
        ("rerank", rerank(text=...), "line 1: no key 'text'; expected one, with a string"),
        ("rerank", rerank(title=["x"] * 1000), r"line 1: title is \['x', .*\.\.\.\]; expected a string"),
        ("rerank", rerank() + rerank(query="koala"), "line 2: docno 'd1' again for query 'q1', as in line 1"),
        ("rerank", '["q1"]', r"line 1: \['q1'\]; expected a JSON object"),
        ("rerank", rerank()[:-9], "line 1: not JSON"),
        ("rerank", "[" * 100_000, "line 1: not JSON"),
        ("rerank", '{"score": ' + "1" * 5000 + "}", "line 1: not JSON"),
        ("topics", "q1\tpanda\nq2\n", "line 2: 1 columns, but 2"),
        ("topics", "q1\ta\tb\n", "line 1: 3 tab-separated columns; expected 2"),
        ("topics", "q 1\ta\n", "line 1: qid is 'q 1'; expected no whitespace"),
        ("topics", "q1\ta\nq1\tb\n", "line 2: qid 'q1' again, as in line 1"),
        ("topics in JSON lines", '{"query": "x"}', "line 1: no key 'qid' or 'query_id' or '_id'"),
        ("texts", "d1\ta\nd2\tt\ta\n", "line 2: 3 columns, but 2"),
        ("texts in JSON lines", '{"docno": "d1", "text": 1}', "line 1: text is 1; expected a string"),
        ("qrels", "q1 0 d1 1.0\n", "line 1: label is '1.0'; expected an integer"),
        ("qrels", "q1 d1 1\nquery-id corpus-id score\n", "line 2: label is 'score'"),
        (
            "qrels",
            "q1 0 d1 1\nq2 0 d1 1\nq1 0 d1 0\n",
            "line 3: docno 'd1' again for query 'q1', with label 0, but 1 in line 1; expected one label",
        ),
        ("topics", "<?xml version='1.0'?>\n<topics>\n", "line 1: XML; expected lines of qid, tab, query"),
        ("topics", "\n<top>\n<num> 1\n<title> a\n", "line 2: <top> without </top>"),
        ("topics", "<top>\n<num> 1\n<top>\n", "line 3: '<top>'; expected a sequence of <top> ... </top>"),
        (
            "topics",
            "<top><num>1</num><title>a</title></top>\n<num> 2\n",
            "line 2: '<num> 2'; expected a sequence of <top> ... </top>",
        ),
        ("topics", "<top>\n<num> 1\n<desc> a\n</top>\n", "line 1: a <top> element with no <title>, an empty one"),
        ("topics", "<top>\n<num> 1\n<title>\n<desc> a\n</top>\n", "line 1: a <top> element with no <title>"),
        ("topics", "<top>\n<num> 1\n<num> 2\n<title> a\n</top>\n", "line 1: a <top> element with no <num>, .* several"),
        ("topics", "<top>\n<num> 1 2\n<title> a\n</top>\n", "line 1: num is '1 2'; expected no whitespace"),
        ("topics", "<top>\n<num>1\n<title>a\n</top>\n" * 2, "line 5: qid '1' again, as in line 1"),
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
def test_invalid_bytes_are_named(tmp_path: Path, name: str, reader: Callable[[Path], Iterator[Any]]) -> None:
    path = tmp_path / name
    for raw, problem in ((b"q\xff", r"byte 2 \(0xff\) is not valid UTF-8"), (b"ab\0", "byte 3 is NUL")):
        path.write_bytes(b"\n" + raw)
        with pytest.raises(ValueError, match=f"line 2: {problem}"):
            list(reader(path))


@EACH
@ANEW
@given(lines=st.lists(st.binary(max_size=30) | st.text('q1d \t\n{}[]":,.-e0\\u', max_size=30).map(str.encode)))
def test_any_bytes_are_read_or_named(
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


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.gz"):
        list(read_run(tmp_path / "none.gz"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"qid": "a b"}, "qid is 'a b'; expected no whitespace"),
        ({"docno": ""}, "docno is ''; expected a non-empty string"),
        ({"tag": "my run"}, "tag is 'my run'"),
        ({"score": float("inf")}, "the score of query 'q', docno 'd' is inf"),
        ({"form": "four"}, "form='four'; allowed: three, trec"),
    ],
)
def test_invalid_run_lines_are_not_written(change: dict[str, Any], problem: str) -> None:
    values = {"qid": "q", "docno": "d", "rank": 1, "score": 1.0, "form": "trec", "tag": "t", **change}
    with pytest.raises(ValueError, match=problem):
        run_line(**values)


# -- writing

"""Topics, texts and qrels of other projects are read as they are."""

from pathlib import Path

import pytest
from conftest import written

from pyterrier_llmrerank.runs.collection import Judgement, Text, Topic, read_qrels, read_texts, read_topics


def test_topics_and_texts_are_read_from_columns_and_json_lines(tmp_path: Path) -> None:
    topics = [Topic("1", "what is\xa0a panda", 1), Topic("q2", "", 2)]
    assert list(read_topics(written(tmp_path / "a.tsv", "1\twhat is\xa0a panda\nq2\t\n"))) == topics
    lines = ['{"_id": "1", "text": "what is\\u00a0a panda"}\n', '{"query_id": "q2", "query": ""}\n']
    assert list(read_topics(written(tmp_path / "a.jsonl.gz", *lines))) == topics
    assert list(read_texts(written(tmp_path / "b.tsv", "d1\ta  text \n"))) == [Text("d1", None, None, "a  text ", 1)]
    assert list(read_texts(written(tmp_path / "c.tsv", "d1\tT\ta\n"))) == [Text("d1", "T", None, "a", 1)]
    line = '{"docid": "d1", "title": "T", "text": "a", "url": "u", "other": 1}\n'
    assert list(read_texts(written(tmp_path / "d.jsonl", line))) == [Text("d1", "T", "u", "a", 1)]


def test_files_of_other_projects_are_read_as_they_are(tmp_path: Path) -> None:
    docs = written(tmp_path / "msmarco-docs.tsv", "D1\thttp://x\tT\ta body\n")
    assert list(read_texts(docs)) == [Text("D1", "T", "http://x", "a body", 1)]
    pyserini = written(tmp_path / "pyserini.jsonl", '{"id": 7, "contents": "a"}\n{"id": "d-2", "contents": ""}\n')
    assert list(read_texts(pyserini)) == [Text("7", None, None, "a", 1), Text("d-2", None, None, "", 2)]
    assert list(read_topics(written(tmp_path / "q.jsonl", '{"id": -1, "query": "a"}'))) == [Topic("-1", "a", 1)]


@pytest.mark.parametrize(
    "element",
    [
        "<top>\n\n<num> Number: 51 \n<title> Topic: Airbus\n  Subsidies\n\n<desc> Its <title>.\n</top>\n",
        "<top>\n<num> 51\n<dom> Domain: Law\n<title>\nAirbus Subsidies\n\n<narr> Narrative:\nx\n\n</top>\n",
        "<TOP><NUM>51</NUM><TITLE>Airbus  Subsidies</TITLE><DESC>x</DESC></TOP>\n",
        '<top lang="en">\n<num> 51\n<title> TITLE: Airbus\n<i>Subsidies</i>\n<desc> x\n</top>\n',
        "  <top>\n  <num>Number: 51</num>\n  <title>Airbus Subsidies</title>\n  </top>",
    ],
)
def test_topics_of_trec_have_number_and_title(tmp_path: Path, element: str) -> None:
    second = "<top>\n<num> Number: 052\n<title> AT&T < 5 &amp; 6\n</top>\n"
    first, other = read_topics(written(tmp_path / "topics.txt", f"{element}\n{second}"))
    title = "Airbus <i>Subsidies</i>" if "<i>" in element else "Airbus Subsidies"
    assert first == Topic("51", title, 1)
    assert other[:2] == ("052", "AT&T < 5 & 6")


def test_a_judgement_that_is_repeated_counts_once(tmp_path: Path) -> None:
    path = written(tmp_path / "qrels", "q1 0 d1 2\nq2 0 d1 0\nq1 0 d1 2\n")
    assert list(read_qrels(path)) == [Judgement("q1", "d1", 2), Judgement("q2", "d1", 0)]


def test_judgements_are_read_in_the_forms_of_trec_and_beir(tmp_path: Path) -> None:
    want = [Judgement("q1", "d1", 2), Judgement("q2", "d1", -1), Judgement("q1", "d2", 0)]
    for lines in (
        "q1 0 d1 2\nq2 0 d1 -1\nq1 0 d2 0\n",
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td1\t-1\nq1\td2\t0\n",
    ):
        assert list(read_qrels(written(tmp_path / "qrels", lines))) == want

"""Results and judgements become groups: positives by label, everything else retrieved as negatives."""

import logging

import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_llmrerank.training.frames import check_qrels, records_of, validation_of


def bodies(frame: pd.DataFrame) -> list[str]:
    return [f"<{text}>" for text in frame["text"]]


def results() -> pd.DataFrame:
    rows = [
        ("1", "d1"), ("1", "d2"), ("1", "d3"),  # d2 is relevant
        ("2", "d4"), ("2", "d5"),  # d1, of query 1's results, is relevant
        ("3", "d6"), ("3", "d7"),  # d9, retrieved nowhere, is relevant
        ("4", "d8"),  # nothing is relevant
        ("5", "d2"),  # all that was retrieved is relevant
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["qid", "docno"])
    return frame.assign(query="query " + frame["qid"], text="text of " + frame["docno"])


QRELS = pd.DataFrame(
    [("1", "d2", 1), ("1", "d3", 0), ("2", "d1", 2), ("3", "d9", 1), ("5", "d2", 1)], columns=["qid", "docno", "label"]
)


def test_queries_without_a_positive_or_a_negative_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pyterrier_llmrerank"):
        records = records_of(results(), QRELS, bodies, 1, None, "text")
    assert records == [
        {"query_id": "1", "query": "query 1", "pos": ["<text of d2>"], "neg": ["<text of d1>", "<text of d3>"]},
        {"query_id": "2", "query": "query 2", "pos": ["<text of d1>"], "neg": ["<text of d4>", "<text of d5>"]},
    ]
    (line,) = caplog.messages
    assert line == "Training leaves out 3 of 5 queries: 2 have no positive, 1 no negative."


def test_text_loads_positives_that_were_not_retrieved() -> None:
    text = pt.apply.generic(lambda frame: frame.assign(text="fetched " + frame["docno"]))
    records = records_of(results(), QRELS, bodies, 1, text, "text")
    assert [(r["query_id"], r["pos"]) for r in records][2] == ("3", ["<fetched d9>"])


def test_texts_may_stand_in_another_column() -> None:
    body = results().rename(columns={"text": "body"})
    loader = pt.apply.generic(lambda frame: frame.assign(body="fetched " + frame["docno"]))
    records = records_of(body, QRELS, lambda frame: list(frame["body"]), 1, loader, "body")
    assert records[2]["pos"] == ["fetched d9"]
    other = pt.apply.generic(lambda frame: frame.assign(text="fetched " + frame["docno"]))
    with pytest.raises(ValueError, match=r"text returns columns .*'text'.*; missing: body"):
        records_of(body, QRELS, lambda frame: list(frame["body"]), 1, other, "body")


@pytest.mark.parametrize("text", [None, float("nan"), 3])
def test_a_query_whose_loaded_text_is_no_string_is_left_out(text: object) -> None:
    loader = pt.apply.generic(lambda frame: frame.assign(text=pd.Series([text] * len(frame), dtype=object)))
    assert len(records_of(results(), QRELS, bodies, 1, loader, "text")) == 2


def test_a_query_whose_text_cannot_be_loaded_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def missing(frame: pd.DataFrame) -> pd.DataFrame:
        raise KeyError("d9")

    assert len(records_of(results(), QRELS, bodies, 1, pt.apply.generic(missing), "text")) == 2
    assert "text failed to load 1 passages: KeyError('d9')" in caplog.messages[0]


def test_min_label() -> None:
    records = records_of(results(), QRELS, bodies, 2, None, "text")
    assert [r["query_id"] for r in records] == ["2"]
    with pytest.raises(ValueError, match=r"nothing to train on: 5 queries have no positive \(label of at least 3\)"):
        records_of(results(), QRELS, bodies, 3, None, "text")


def test_results_and_judgements_without_a_common_qid_are_shown() -> None:
    named = QRELS.assign(qid="q" + QRELS["qid"])
    with pytest.raises(ValueError, match=r"nothing to train on: .*; no qid is in both: .* have '1', .* 'q1'\.$"):
        records_of(results(), named, bodies, 1, None, "text")
    with pytest.raises(ValueError, match=r"judgements; no qid is in both: .* have '1', .* 'q1'\.$"):
        validation_of(results(), named, bodies)


def test_a_teachers_scores_go_with_their_passages() -> None:
    scored = results().assign(teacher=range(9))
    (record,) = records_of(scored, QRELS, bodies, 1, None, "text")  # query 2's positive would come without a score
    assert (record["query_id"], record["pos_scores"], record["neg_scores"]) == ("1", [1], [0, 2])
    with pytest.raises(ValueError, match="training results: 'teacher' is nan for qid '2', docno 'd4'; expected a"):
        records_of(scored.assign(teacher=[0.0, 1, 2, float("nan"), 4, 5, 6, 7, 8]), QRELS, bodies, 1, None, "text")


def test_ids_may_be_numbers() -> None:
    numbers = results().astype({"qid": int})
    assert len(records_of(numbers, check_qrels(QRELS.astype({"qid": int}), "qrels_tr"), bodies, 1, None, "text")) == 2


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (QRELS.rename(columns={"label": "grade"}), "qrels_tr has columns .*'grade'.*; expected qid, docno and label"),
        (QRELS[:0], "qrels_tr is empty"),
    ],
)
def test_judgements_are_checked(qrels: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_qrels(qrels, "qrels_tr")


def test_relevant_passages_that_were_not_retrieved_lower_ndcg() -> None:
    measure = validation_of(results(), QRELS, bodies)
    perfect = measure(lambda pairs: [float(body == "<text of d2>") for _, body, _ in pairs])
    # Queries 1 and 5 are perfect, 2 and 3 retrieved nothing relevant; 4 is not judged.
    assert perfect == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ["x", 0, 2, 1, 1]}, "qrels_tr: 'label' is 'x' for qid '1', docno 'd2'; expected a finite number"),
        ({"label": [1, 0, None, 1, 1]}, "qrels_tr: 'label' is .* for qid '2', docno 'd1'; expected a finite number"),
        ({"label": [1, 0, float("inf"), 1, 1]}, "'label' is inf for qid '2'"),
        ({"label": [1, 0, 10**400, 1, 1]}, r"'label' is 10+\.\.\. for qid '2'"),
        ({"label": [1, 0, [2], 1, 1]}, r"'label' is \[2\] for qid '2'"),
        ({"qid": ["1", None, "2", "3", "5"]}, "qrels_tr: qid is missing in row 1"),
        ({"docno": ["d2", "d3", "d1", "d9", None]}, "qrels_tr: docno is missing in row 4"),
        ({"docno": ["d2"] * 5, "qid": ["1"] * 5}, "qrels_tr: qid '1', docno 'd2' has two different labels"),
    ],
)
def test_an_invalid_judgement_is_named(change: dict[str, list[object]], message: str) -> None:
    columns = {name: pd.Series(values, dtype=object) for name, values in change.items()}
    with pytest.raises(ValueError, match=message):
        check_qrels(QRELS.assign(**columns), "qrels_tr")


def test_judgements_have_three_columns_and_each_pair_once() -> None:
    with pytest.raises(ValueError, match="expected qid, docno and label, once each"):
        check_qrels(pd.concat([QRELS, QRELS[["label"]]], axis=1), "qrels_tr")
    twice = check_qrels(pd.concat([QRELS, QRELS]).set_index("qid", drop=False), "qrels_tr")
    pd.testing.assert_frame_equal(twice, QRELS, check_dtype=False)


def test_an_index_may_be_named_as_a_column() -> None:
    named = results().set_index("qid", drop=False)
    assert records_of(named, QRELS, bodies, 1, None, "text") == records_of(results(), QRELS, bodies, 1, None, "text")


@pytest.mark.parametrize("value", [None, "x", float("inf"), 10**400])
def test_an_invalid_teacher_score_is_named(value: object) -> None:
    scored = results().assign(teacher=pd.Series([0, 1, 2, value, 4, 5, 6, 7, 8], dtype=object))
    with pytest.raises(ValueError, match=r"'teacher' is .* for qid '2', docno 'd4'; expected a finite number"):
        records_of(scored, QRELS, bodies, 1, None, "text")

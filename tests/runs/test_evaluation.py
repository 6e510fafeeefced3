"""Evaluation of runs, against ir_measures and scipy."""

import numpy as np
import pytest
from scipy import stats

from pyterrier_llmrerank.runs.collection import Judgement
from pyterrier_llmrerank.runs.evaluation import compare, parse_measure
from pyterrier_llmrerank.runs.formats import RunRow

QRELS = [Judgement(f"q{q}", f"d{q}", 2) for q in range(4)]


def run(*places: int | None) -> list[RunRow]:
    """Make a run with the relevant document of each query at the given place; None omits the query."""
    rows = []
    for q, place in enumerate(places):
        if place is not None:
            docnos = [f"x{n}" for n in range(4)]
            docnos.insert(place, f"d{q}")
            rows += [RunRow(f"q{q}", docno, None, -float(at), 1) for at, docno in enumerate(docnos)]
    return rows


def test_every_judged_query_counts() -> None:
    queries, total = compare([parse_measure("RR@10"), parse_measure("P@1")], QRELS, [*run(0, 1, 1, None), *run(0)[:0]])
    assert list(total.itertuples(index=False, name=None)) == [("RR@10", 0.5), ("P@1", 0.25)]
    assert queries.columns.tolist() == ["qid", "measure", "value"]
    assert queries["measure"].tolist() == ["RR@10"] * 4 + ["P@1"] * 4
    assert list(zip(queries["qid"], queries["value"], strict=True))[:4] == [
        ("q0", 1),
        ("q1", 0.5),
        ("q2", 0.5),
        ("q3", 0),
    ]


def test_a_run_and_its_baseline() -> None:
    mine, other = (0, 1, 1, 3), (1, None, 2, 1)
    queries, total = compare([parse_measure("RR")], QRELS, run(*mine), run(*other))
    values, others = np.array([1, 1 / 2, 1 / 2, 1 / 4]), np.array([1 / 2, 0, 1 / 3, 1 / 2])
    np.testing.assert_allclose(queries.sort_values("qid")["difference"], values - others)
    np.testing.assert_allclose(
        total[["value", "baseline", "difference", "p"]].iloc[0].astype(float),
        [values.mean(), others.mean(), (values - others).mean(), stats.ttest_rel(values, others).pvalue],
    )


def test_missing_queries_give_a_warning_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    compare([parse_measure("RR")], QRELS, run(0, 1, 1, 2), run(None, 1, None, 2))
    assert caplog.messages == [
        "The baseline lacks 2 of the 4 queries with judgements; they count as queries without results."
    ]
    others = [row._replace(qid=f"other-{row.qid}") for row in run(0)]
    with pytest.raises(
        ValueError,
        match="the baseline has none of the queries .*: it has 'other-.*, and the qrels have 'q0'",
    ):
        compare([parse_measure("RR")], QRELS, run(0), others)
    with pytest.raises(ValueError, match="the run is empty"):
        compare([parse_measure("RR")], QRELS, [])


def test_a_measure_may_be_undefined_for_some_queries() -> None:
    judged = [*QRELS[:2], Judgement("q0", "x0", 0)]  # Accuracy needs a document that is not relevant
    queries, total = compare([parse_measure("Accuracy")], judged, run(0, None))
    assert queries["qid"].tolist() == ["q0"]
    assert total["measure"].tolist() == ["Accuracy"]


def test_a_measure_that_needs_numeric_qids() -> None:
    with pytest.raises(ValueError, match=r"measure=RR, ERR@10: .* need numeric qids"):
        compare([parse_measure("RR"), parse_measure("ERR@10")], QRELS, run(0, 1, 1, 2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("places", [(0, 1, 1, 3), (1,)])
def test_equal_runs_have_no_p_value(places: tuple[int, ...]) -> None:
    _, same = compare([parse_measure("RR")], QRELS[: len(places)], run(*places), run(*places))
    assert same["difference"].tolist() == [0]
    assert np.isnan(same["p"].iloc[0])


def test_ties_keep_their_rank_or_order() -> None:
    rows = [RunRow("q0", name, None, 0.5, 1) for name in ("d0", "z", "a")]
    for order, value in ((rows, 1.0), (rows[::-1], 1 / 3)):
        _, total = compare([parse_measure("RR")], QRELS[:1], order)
        assert total["value"].tolist() == [value]
    ranked = [row._replace(rank=rank) for row, rank in zip(rows, (1, 0, 2), strict=True)]
    _, total = compare([parse_measure("RR")], QRELS[:1], ranked)
    assert total["value"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("name", "same"), [("ndcg_cut_10", "nDCG@10"), ("map", "AP"), ("recip_rank", "RR"), ("P_5", "P@5"), ("AP", "AP")]
)
def test_measures_by_their_names_in_trec_eval(name: str, same: str) -> None:
    assert parse_measure(name) == parse_measure(same)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("foo", "measure='foo'; allowed: AP, .*nDCG"),
        ("nDCG@x", "measure='nDCG@x'; allowed"),
        ("", "measure=''; allowed"),
        ("nDCG@0", "measure='nDCG@0'; parameters allowed for nDCG: cutoff"),
        ("P", "measure='P'; parameters allowed for P: cutoff"),
        ("RR(foo=2)", r"measure='RR\(foo=2\)'; parameters allowed for RR: cutoff .*rel"),
        ("alpha_nDCG@10", "no installed package computes it"),
    ],
)
def test_invalid_measures_are_errors(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_measure(name)

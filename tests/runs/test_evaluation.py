"""Evaluation of runs, against ir_measures and scipy."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pyterrier_llmrerank.runs.collection import Judgement
from pyterrier_llmrerank.runs.evaluation import Evaluation, compare, parse_measure
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
    queries, total = compare(
        [parse_measure("RR@10"), parse_measure("P@1")], QRELS, {"mine": [*run(0, 1, 1, None), *run(0)[:0]]}
    )
    assert list(total.itertuples(index=False, name=None)) == [("RR@10", 0.5), ("P@1", 0.25)]
    assert queries.columns.tolist() == ["qid", "measure", "value"]
    assert queries["measure"].tolist() == ["RR@10"] * 4 + ["P@1"] * 4
    assert list(zip(queries["qid"], queries["value"], strict=True))[:4] == [
        ("q0", 1),
        ("q1", 0.5),
        ("q2", 0.5),
        ("q3", 0),
    ]


def test_a_run_is_compared_with_its_baseline_query_by_query() -> None:
    mine, other = (0, 1, 1, 3), (1, None, 2, 1)
    queries, total = compare([parse_measure("RR")], QRELS, {"mine": run(*mine)}, run(*other))
    values, others = np.array([1, 1 / 2, 1 / 2, 1 / 4]), np.array([1 / 2, 0, 1 / 3, 1 / 2])
    np.testing.assert_allclose(queries.sort_values("qid")["difference"], values - others)
    np.testing.assert_allclose(
        total[["value", "baseline", "difference", "p"]].iloc[0].astype(float),
        [values.mean(), others.mean(), (values - others).mean(), stats.ttest_rel(values, others).pvalue],
    )


@pytest.mark.parametrize("correction", ["holm", "bonferroni"])
def test_p_values_are_corrected_for_several_runs(correction: str) -> None:
    """Corrected by hand, measure by measure. A run that equals the baseline counts, and has no p."""
    generator = np.random.default_rng(0)
    qrels = [Judgement(f"q{q}", f"d{q}", 2) for q in range(12)]
    places = {
        "a": [0] * 11 + [4],
        "b": generator.integers(0, 4, 12),
        "same": [3, 2, 1] * 4,
        "c": generator.integers(0, 5, 12),
    }
    base = [3, 2, 1] * 4
    measures = [parse_measure("RR"), parse_measure("P@1")]
    runs = {name: run(*map(int, own)) for name, own in places.items()}
    queries, total = compare(measures, qrels, runs, run(*base), correction)
    corrected = f"p_{correction}"
    assert total.columns.tolist() == ["run", "measure", "value", "baseline", "difference", "p", corrected]
    assert list(zip(total["measure"], total["run"], strict=True)) == [(m, r) for m in ("RR", "P@1") for r in runs]
    assert len(queries) == 2 * 4 * 12
    per_query = queries.set_index(["measure", "run", "qid"])["value"].sort_index()
    for name, value in (("RR", lambda at: 1 / (1 + np.asarray(at))), ("P@1", lambda at: np.asarray(at) == 0)):
        rows = total[total["measure"] == name].set_index("run")
        ps = {run_: stats.ttest_rel(value(at) * 1.0, value(base) * 1.0).pvalue for run_, at in places.items()}
        assert np.isnan(ps.pop("same"))
        assert np.isnan(rows.loc["same", ["p", corrected]].astype(float)).all()
        largest = 0.0
        for place, (run_, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
            largest = max(largest, min(1, p * (4 - place if correction == "holm" else 4)))
            wanted = largest if correction == "holm" else min(1, 4 * p)
            np.testing.assert_allclose(rows.loc[run_, ["p", corrected]].astype(float), [p, wanted])
            np.testing.assert_allclose(per_query[name, run_].loc[[f"q{q}" for q in range(12)]], value(places[run_]))
        for run_ in places:  # each as if it were the only one
            _, alone = compare([parse_measure(name)], qrels, {run_: runs[run_]}, run(*base))
            pd.testing.assert_frame_equal(alone, rows.loc[[run_], alone.columns].reset_index(drop=True))


def test_several_runs_are_evaluated_without_a_baseline() -> None:
    _, total = compare([parse_measure("RR")], QRELS, {"a": run(0, 1, 1, 0), "b": run(1, 1, 1, 1)})
    assert list(total.itertuples(index=False, name=None)) == [("a", "RR", 0.75), ("b", "RR", 0.5)]
    with pytest.raises(ValueError, match="correction='holm' needs a baseline"):
        compare([parse_measure("RR")], QRELS, {"a": run(0, 1, 1, 0)}, correction="holm")
    with pytest.raises(ValueError, match="the run b is empty"):
        compare([parse_measure("RR")], QRELS, {"a": run(0), "b": []})


@pytest.mark.parametrize("names", [["Accuracy"], ["Accuracy", "RR"]])
def test_a_measure_that_some_queries_lack_is_compared_on_its_values(names: list[str]) -> None:
    """Alone, a query without results has no Accuracy; beside another measure, ir_measures counts it as 0."""
    judged = [*QRELS[:3], *(Judgement(f"q{q}", "x0", 0) for q in range(2))]
    measures = list(map(parse_measure, names))
    queries, total = compare(measures, judged, {"mine": run(0, 1, None)}, run(1, 1, None))
    values, others = (queries[queries["measure"] == "Accuracy"][name] for name in ("value", "baseline"))
    assert len(values) == 1 + len(names)
    assert total["p"][0] == pytest.approx(stats.ttest_rel(values, others).pvalue)


def test_missing_queries_give_a_warning_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    compare([parse_measure("RR")], QRELS, {"mine": run(0, 1, 1, 2)}, run(None, 1, None, 2))
    assert caplog.messages == [
        "The baseline lacks 2 of the 4 queries with judgements; they count as queries without results."
    ]
    others = [RunRow(f"other-{qid}", *rest) for qid, *rest in run(0)]
    with pytest.raises(
        ValueError,
        match="the baseline has none of the queries .*: it has 'other-.*, and the qrels have 'q0'",
    ):
        compare([parse_measure("RR")], QRELS, {"mine": run(0)}, others)
    with pytest.raises(ValueError, match="the run is empty"):
        compare([parse_measure("RR")], QRELS, {"mine": []})


def test_a_measure_may_be_undefined_for_some_queries() -> None:
    judged = [*QRELS[:2], Judgement("q0", "x0", 0)]  # Accuracy needs a document that is not relevant
    queries, total = compare([parse_measure("Accuracy")], judged, {"mine": run(0, None)})
    assert queries["qid"].tolist() == ["q0"]
    assert total["measure"].tolist() == ["Accuracy"]


def test_a_measure_that_a_query_does_not_define_is_an_error() -> None:
    relevant = [RunRow("q0", "d0", None, 1.0, 1)]  # no other document
    with pytest.raises(ValueError, match="measure=Accuracy: not defined for a query of the run"):
        compare([parse_measure("Accuracy")], QRELS, {"mine": relevant})


def test_a_measure_not_defined_for_the_candidates_is_an_error() -> None:
    """Found before any ranking is computed."""
    rows = pd.DataFrame({"qid": ["q0", "q1", "q1"], "docno": ["a", "a", "b"]})
    relevant = pd.DataFrame({"qid": ["q0", "q1"], "docno": ["a", "b"], "label": 1})
    for own, measure, problem in (
        (relevant, "Accuracy", "measure=Accuracy: not defined for 1 of 2 queries, such as 'q0'"),
        (relevant.assign(label=[0, 1]), "Accuracy", "such as 'q0'"),
        (relevant, "ERR@10", "measure=ERR@10: .* need numeric qids"),
    ):
        with pytest.raises(ValueError, match=problem):
            Evaluation(measure, rows, own)
    evaluation = Evaluation("Accuracy@2", rows[1:], relevant)
    assert evaluation(np.array([1.0, 2.0])).tolist() == [1]
    assert evaluation(np.array([2.0, 1.0])).tolist() == [0]


def test_a_measure_is_named_once() -> None:
    names = ["RR", "nDCG@10", "ndcg_cut_10"]
    with pytest.raises(ValueError, match="measure=nDCG@10 is named twice"):
        compare(list(map(parse_measure, names)), QRELS, {"mine": run(0, 1, 1, 0)}, run(1, 1, 1, 1))


def test_a_measure_that_needs_numeric_qids_is_named() -> None:
    with pytest.raises(ValueError, match=r"measure=RR, ERR@10: .* need numeric qids"):
        compare([parse_measure("RR"), parse_measure("ERR@10")], QRELS, {"mine": run(0, 1, 1, 2)})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("places", [(0, 1, 1, 3), (1,)])
def test_equal_runs_have_no_p_value(places: tuple[int, ...]) -> None:
    _, same = compare([parse_measure("RR")], QRELS[: len(places)], {"mine": run(*places)}, run(*places))
    assert same["difference"].tolist() == [0]
    assert np.isnan(same["p"].iloc[0])


def test_ties_keep_their_rank_or_order() -> None:
    rows = [RunRow("q0", name, None, 0.5, 1) for name in ("d0", "z", "a")]
    for order, value in ((rows, 1.0), (rows[::-1], 1 / 3)):
        _, total = compare([parse_measure("RR")], QRELS[:1], {"mine": order})
        assert total["value"].tolist() == [value]
    ranked = [RunRow("q0", name, rank, 0.5, 1) for name, rank in (("d0", 1), ("z", 0), ("a", 2))]
    _, total = compare([parse_measure("RR")], QRELS[:1], {"mine": ranked})
    assert total["value"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("name", "same"), [("ndcg_cut_10", "nDCG@10"), ("map", "AP"), ("recip_rank", "RR"), ("P_5", "P@5"), ("AP", "AP")]
)
def test_measures_may_have_their_names_in_trec_eval(name: str, same: str) -> None:
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

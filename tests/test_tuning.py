"""Tuning: reported measures and costs are true for every shape, and each width takes one pass."""

import builtins
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import MODELS, frame
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from pyterrier_llmrerank import MatroyshkaReranker, Tuning, sweep, tune
from pyterrier_llmrerank.engine import device_scorer
from pyterrier_llmrerank.engine.flops import Operations
from pyterrier_llmrerank.sweep import cascades, interval, pareto

FULL = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32")
RES = frame(5, 9)
QRELS = pd.DataFrame(
    [(f"q{q}", f"d{(3 * q + k) % 9}", k % 3) for q in range(4) for k in range(5)], columns=["qid", "docno", "label"]
)
GRID: dict[str, Any] = {"cutoffs": [2, 4, 6, 8], "keep": [2, 4, 6], "compress_layers": [3], "timed": 0}


@pytest.fixture(scope="module")
def found() -> Tuning:
    return tune(FULL, RES, QRELS, **GRID)


def test_measures_equal_an_experiments(found: Tuning) -> None:
    judged = RES[RES["qid"] != "q4"]
    assert found.shapes["prune"].map(len).value_counts().tolist() == [54, 36, 10]
    topics, candidates = judged[["qid", "query"]].drop_duplicates(), pt.Transformer.from_df(judged)
    some = found.shapes.index[::12]
    systems = [candidates >> found.reranker(index) for index in some]
    wanted = pt.Experiment(systems, topics, QRELS, ["ndcg_cut_10"], plan="tree")
    np.testing.assert_allclose(found.shapes.loc[some, "nDCG@10"], wanted["ndcg_cut_10"], atol=1e-9)
    evaluated = pt.Evaluate(found.reranker(9)(judged), QRELS, ["ndcg_cut_10"])["ndcg_cut_10"]
    assert found.shapes.loc[9, "nDCG@10"] == pytest.approx(evaluated)


def test_rows_with_equal_texts_are_dropped_one_by_one(found: Tuning) -> None:
    """With the same passage under several docnos, and the same query under several qids."""
    rows = RES.assign(text=RES["text"].where(RES["docno"] != "d1", RES["text"].shift(-1)))
    rows["query"] = rows["query"].where(rows["qid"] != "q2", rows["query"].iloc[0])
    again = tune(FULL.at(normalize=True), rows, QRELS, **GRID)
    for index in again.shapes[again.shapes["prune"].map(len) > 0].sample(5, random_state=1).index:
        reranked = again.reranker(index)(rows[rows["qid"] != "q4"])
        assert reranked["score"].between(0, 1).all()
        wanted = pt.Evaluate(reranked, QRELS, ["ndcg_cut_10"])["ndcg_cut_10"]
        assert again.shapes.loc[index, "nDCG@10"] == pytest.approx(wanted)


def test_each_width_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, real = [], device_scorer.embedded
    monkeypatch.setattr(device_scorer, "embedded", lambda *args: embedded.append(len(args[1])) or real(*args))
    shapes = tune(FULL, RES, QRELS, **GRID).shapes
    assert sum(embedded) == 3 * (4 + 1) * 9  # ratios, judged queries and one to warm up, candidates
    counts = shapes.groupby("compress_ratio").size()
    per_cutoff = [1, 1 + 3, 1 + 2 * 3 + 3, 1 + 3 * 3 + 3 * 3]  # alone, one stage, two stages
    assert counts.tolist() == [
        sum(per_cutoff),
        sum(per_cutoff[1:]),
        sum(per_cutoff[1:]),
    ]  # cutoff 2 ends before the pooling


def test_a_grid_has_each_cutoff_with_each_cascade_before_it() -> None:
    assert list(cascades([2, 4, 6], [5, 3], 2)) == [
        (2, ()),
        (4, ()), (4, ((2, 5),)), (4, ((2, 3),)),
        (6, ()), (6, ((2, 5),)), (6, ((2, 3),)), (6, ((4, 5),)), (6, ((4, 3),)), (6, ((2, 5), (4, 3))),
    ]  # fmt: skip


def test_the_default_grid_has_up_to_eight_cutoffs() -> None:
    shapes = tune(FULL, RES, QRELS, timed=0).shapes
    assert sorted(set(shapes["cutoff"])) == [2, 3, 4, 5, 6, 7, 8]
    assert set(shapes["compress_layers"]) == {(), (2,)}
    assert set(shapes["prune"]) == {()}  # no query has more than ten candidates
    few = tune(FULL.at(cutoff=5, compress_layers=[3], compress_ratio=2, prune={3: 2}), RES, QRELS, timed=0).shapes
    assert sorted(set(few["cutoff"])) == [2, 3, 4, 5]
    assert set(few["compress_layers"]) == {(), (3,)}
    assert sweep.evenly_spaced(range(4, 31), 30) == [7, 10, 14, 17, 20, 24, 27, 30]


def test_a_pooling_without_effect_is_no_shape() -> None:
    shapes = tune(FULL, RES, QRELS, **{**GRID, "keep": 2, "compress_layers": 0}).shapes
    assert set(shapes["compress_ratio"]) == {1}


def test_models_run_by_their_own_forward_have_depths_only(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=700, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODELS / "mistral_base").save_pretrained(tmp_path)
    shapes = tune(MatroyshkaReranker(tmp_path, dtype="float32", start_layer=1), RES, QRELS, keep=2, timed=1).shapes
    assert shapes["cutoff"].tolist() == [1, 2, 3]
    assert shapes["share"].tolist() == [1, 1, 1]  # all layers are always run
    assert shapes["front"].any()


def test_shares_and_times_follow_from_operations(found: Tuning) -> None:
    shapes = found.shapes
    full = shapes[(shapes["cutoff"] == 8) & (shapes["compress_ratio"] == 1) & (shapes["prune"] == ())].iloc[0]
    assert full["share"] == 1
    assert (shapes["share"] * full["operations"] / shapes["operations"]).to_numpy() == pytest.approx(1)
    assert shapes["share"].max() == 1
    for _, width in shapes.groupby("compress_ratio"):
        assert (width["milliseconds"] / width["operations"]).nunique() < 5  # one rate, except for rounding
    assert not shapes["timed"].any()
    assert (shapes["low"] <= shapes["nDCG@10"]).all()
    assert (shapes["nDCG@10"] <= shapes["high"]).all()


def test_a_cascades_operations_follow_from_its_exit_layers(found: Tuning) -> None:
    judged = RES[RES["qid"] != "q4"]
    scorer = FULL.scorer()
    ids = scorer.ids(list(zip(judged["query"], judged["text"], strict=True)))
    operations = Operations(scorer.open(), ids, np.repeat(np.arange(4), 9), 4)
    for _, row in found.shapes[found.shapes["prune"].map(len) == 2].iloc[::3].iterrows():
        exit_layer = found.reranker(row)(judged)["exit_layer"].to_numpy()
        read = [*dict(row["prune"]), row["cutoff"]]
        counted = operations(read, row["compress_layers"], row["compress_ratio"], exit_layer)
        assert row["operations"] == pytest.approx(counted.mean())


def test_the_front_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    real = MatroyshkaReranker.transform

    def transform(self: MatroyshkaReranker, rows: pd.DataFrame) -> pd.DataFrame:
        seen.append((self, rows["qid"].nunique()))
        return real(self, rows)

    clock = itertools.count()
    monkeypatch.setattr(MatroyshkaReranker, "transform", transform)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    got = tune(FULL, RES, QRELS, **{**GRID, "timed": 2, "compress_ratios": [1]})
    front = got.shapes[got.shapes["front"]]
    assert got.shapes["timed"].equals(got.shapes["front"])
    assert [queries for _, queries in seen[:2]] == [1, 4]  # a query to warm up, and one pass
    assert seen[2:] == [(got.reranker(index), 2) for index in front.index] * 2  # turns
    # By this clock, two queries took a second; they have about half of the operations of all four.
    assert front["milliseconds"].between(400, 600).all()


def test_the_best_shape_in_a_budget(found: Tuning) -> None:
    shapes = found.shapes
    for share in (0.3, 0.6, 1.0):
        best = Tuning(FULL, shapes, found.measure, share, None).best
        within = shapes[shapes["share"] <= share]
        wanted = within.sort_values(["nDCG@10", "operations"], ascending=[False, True]).index[0]
        assert best == found.reranker(wanted)
    assert found.best == found.reranker(found.front.iloc[-1])
    cheapest = found.front.iloc[0]
    limit = f"{cheapest['milliseconds'] * 1.0001:.9f}ms"
    assert Tuning(FULL, shapes.iloc[[cheapest.name]], found.measure, limit, None).best == found.reranker(cheapest)
    with pytest.raises(ValueError, match=r"budget=0.001: no shape is within it; the cheapest takes 0\.\d+ of the full"):
        _ = Tuning(FULL, shapes, found.measure, 0.001, None).best
    with pytest.raises(ValueError, match=r"budget='0.0ms': .* milliseconds a query"):
        _ = Tuning(FULL, shapes, found.measure, "0.0ms", None).best


def without_signal(seed: int) -> Tuning:
    """300 shapes that are equally good but for chance, on 60 queries; 150 are within the budget."""
    values, ops = pd.DataFrame(np.random.default_rng(seed).random((60, 300)).round(2)), np.arange(1.0, 301.0)
    shapes = pd.DataFrame({"cutoff": range(300), "compress_layers": [()] * 300, "compress_ratio": 1})
    shapes = shapes.assign(prune=[()] * 300, operations=ops, share=ops / 300, RR=values.mean())
    return Tuning(FULL, shapes.assign(front=pareto(ops, values.mean().to_numpy())), "RR", 0.5, None, values)


def test_each_fold_is_measured_with_the_choice_of_the_others() -> None:
    found = without_signal(0)
    got, values = found.held_out(4), found.values
    fold_of = np.random.default_rng(0).permutation(np.arange(60) % 4)
    for fold, (index, row) in enumerate(got.folds.iterrows()):
        within = values.loc[fold_of != fold, :149].mean()
        assert index == row["cutoff"] == within.idxmax()
        assert row["chosen"] == pytest.approx(within.max())
        assert row["held_out"] == pytest.approx(values.loc[fold_of == fold, index].mean())
    assert got.folds["queries"].tolist() == [15] * 4
    assert got.mean == pytest.approx(got.folds["held_out"].mean())
    assert got.low < got.mean < got.high


def test_the_best_by_chance_is_no_better_on_other_queries() -> None:
    tunings = [without_signal(seed) for seed in range(20)]
    assert np.mean([found.shapes["RR"][:150].max() for found in tunings]) > 0.58
    assert np.mean([found.held_out().mean for found in tunings]) == pytest.approx(0.5, abs=0.02)


def test_held_out_queries_are_measured_as_in_an_experiment(found: Tuning) -> None:
    within = Tuning(FULL, found.shapes, found.measure, 0.6, None, found.values)
    got = within.held_out(2)
    assert (got.folds["share"] <= 0.6).all()
    assert got.folds["queries"].tolist() == [2, 2]
    pd.testing.assert_series_equal(found.values.mean(), found.shapes["nDCG@10"], check_names=False)
    index, row = next(got.folds.iterrows())
    judged = RES[RES["qid"] != "q4"]
    measured = pt.Evaluate(within.reranker(row)(judged), QRELS, ["ndcg_cut_10"], perquery=True)
    assert within.reranker(row) == found.reranker(index)
    for qid, each in measured.items():
        assert found.values.loc[qid, index] == pytest.approx(each["ndcg_cut_10"])
    for folds in (0, 1, 5, 2.5):
        with pytest.raises(ValueError, match=f"folds={folds}; allowed: (from 2 to 4|an integer of at least 1)"):
            found.held_out(folds)
    with pytest.raises(ValueError, match=r"budget=0.001: no shape is within it"):
        Tuning(FULL, found.shapes, found.measure, 0.001, None, found.values).held_out(2)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_the_front_has_exactly_the_points_that_are_not_dominated(points: list[tuple[int, int]]) -> None:
    cost, value = (np.array(numbers, dtype=float) for numbers in zip(*points, strict=True))
    for own, on_front in zip(points, pareto(cost, value), strict=True):
        dominated = any(c <= own[0] and v >= own[1] and (c, v) != own for c, v in points)
        assert on_front != dominated


def test_intervals_cover_the_mean_and_share_their_samples() -> None:
    values = np.column_stack([np.full(40, 0.25), np.arange(40) % 2, np.arange(40) % 2])
    low, high = interval(values)
    assert low[0] == high[0] == 0.25
    assert low[1] == pytest.approx(0.5 - 1.96 * 0.5 / np.sqrt(40), abs=0.03)
    assert (low[1], high[1]) == (low[2], high[2])


@pytest.mark.parametrize("measure", ["RR@3", RR @ 3])
def test_the_first_stage_is_measured_too(measure: object) -> None:
    few = {**GRID, "cutoffs": [4, 8], "compress_ratios": [1], "stages": 0}
    got = tune(FULL, RES, QRELS, measure, **few)
    assert got.measure == "RR@3"
    assert got.first_stage == pytest.approx(pt.Evaluate(RES[RES["qid"] != "q4"], QRELS, [RR @ 3])["RR@3"])
    assert tune(FULL, RES.drop(columns="score"), QRELS, measure, **few).first_stage == got.first_stage
    assert tune(FULL, RES.drop(columns=["score", "rank"]), QRELS, measure, **few).first_stage is None
    irrelevant = QRELS.assign(label=QRELS["label"].where(QRELS["qid"] != "q1", 0))
    reranked = FULL(RES[RES["qid"].isin(["q0", "q2", "q3"])])
    wanted = pt.Evaluate(reranked, QRELS[QRELS["qid"] != "q1"], [RR @ 3])["RR@3"]
    counted = tune(FULL, RES, irrelevant, measure, **few).shapes.set_index("cutoff")["RR@3"]
    assert counted[8] == pytest.approx(wanted * 3 / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reranker": MatroyshkaReranker(MODELS / "costwise_full", released=True)}, "reranker=.*without released"),
        ({"reranker": pt.Transformer.identity()}, "reranker=.*; allowed: a MatroyshkaReranker"),
        ({"res": RES.drop(columns="text")}, r"res has columns .*; missing: text"),
        ({"qrels": QRELS.drop(columns="label")}, r"qrels has columns .*; missing: label"),
        ({"qrels": QRELS.assign(qid="other")}, "res and qrels have no query in common"),
        ({"res": RES.assign(text=None)}, "'text' is"),
        ({"measure": "nonsense"}, "measure='nonsense'; allowed: a measure of ir_measures"),
        ({"measure": "nDCG@0"}, "measure='nDCG@0'; allowed: a measure of ir_measures"),
        ({"measure": "nDCG("}, "measure='nDCG.'; allowed"),
        ({"measure": 3}, "measure=3; allowed"),
        ({"measure": "Accuracy", "qrels": RES.assign(label=1)}, "measure=Accuracy: not defined for .*'q0'"),
        ({"budget": 0}, "budget=0; allowed: a share .* '150ms'; None"),
        ({"budget": 1.5}, "budget=1.5; allowed"),
        ({"budget": True}, "budget=True; allowed"),
        ({"budget": "150"}, "budget='150'; allowed"),
        ({"keep": [0]}, "keep=0; allowed: an integer of at least 1"),
        ({"stages": -1}, "stages=-1; allowed: an integer of at least 0"),
        ({"timed": 1.5}, "timed=1.5; allowed"),
        ({"cutoffs": [1, 8]}, r"cutoff=1: .* has heads at layers 2 to 8"),
        ({"cutoffs": []}, r"cutoff=\[\]; allowed"),
        ({"compress_ratios": [3]}, "compress_ratio=3; allowed"),
        ({"compress_ratios": []}, r"compress_ratios=\[\].*: no shape is left"),
        ({"keep": 2.5}, "keep=2.5; allowed"),
        ({"compress_layers": [8]}, r"compress_layers=\[8\]: .* has 8 layers, so none runs after layer 8"),
        ({"compress_ratios": [2], "compress_layers": [0]}, "no shape is left"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(MatroyshkaReranker, "transform", None)
    with pytest.raises(ValueError, match=message):
        tune(**{"reranker": FULL, "res": RES, "qrels": QRELS, **changes})


def test_a_plot_shows_the_measurements(found: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ax = found.plot()
    assert ax.get_xlabel() == "share of the full shape's operations"
    assert ax.get_ylabel() == "nDCG@10"
    assert sum(len(points.get_offsets()) for points in ax.collections[:4:2]) == len(found.shapes)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["without a cascade", "cascade", "first stage", "front, 95 % intervals"]
    other = pyplot.subplots()[1]
    again = Tuning(FULL, found.shapes, found.measure, "150ms", None)
    assert again.plot(other, "milliseconds") is other
    assert "budget" in [text.get_text() for text in other.get_legend().get_texts()]
    pyplot.close("all")
    with pytest.raises(ValueError, match="cost='seconds'; allowed: share, milliseconds"):
        found.plot(cost="seconds")

    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'pyterrier-llmrerank\[plot\]'"):
        found.plot()


def test_repr_and_unknown_rows(found: Tuning) -> None:
    assert repr(found).endswith(f"{len(found.shapes)} shapes, {len(found.front)} on the front by nDCG@10")
    with pytest.raises(KeyError):
        found.reranker(len(found.shapes))

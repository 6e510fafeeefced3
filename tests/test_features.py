"""A union of depths is one pass with the same features, and only of depths."""

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import frame
from pyterrier.measures import nDCG
from test_matroyshka import FULL, full

from pyterrier_llmrerank import MatroyshkaReranker, scoring
from pyterrier_llmrerank.features import AtDepth, MatroyshkaFeatures


def test_a_union_of_depths_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = frame(2, 5)
    union = full().at(cutoff=4) ** full() ** full().at(cutoff=2) ** full().at(cutoff=4)
    wanted = union.transform(rows)
    compiled = union.compile()
    assert isinstance(compiled, MatroyshkaFeatures)
    passes = []
    real = scoring.walk
    monkeypatch.setattr(scoring, "walk", lambda *args, **options: passes.append(1) or real(*args, **options))
    got = compiled.transform(rows)
    assert len(passes) == 1
    np.testing.assert_allclose(np.stack(got["features"]), np.stack(wanted["features"]), atol=1e-4)
    assert got.drop(columns="features").equals(wanted[got.columns].drop(columns="features"))
    unranked = rows.drop(columns=["score", "rank"])
    assert compiled.transform(unranked)["rank"].tolist() == union.transform(unranked)["rank"].tolist()
    assert list(compiled.transform(rows.head(0)).columns) == list(got.columns)


class LeastSquares:
    """A learner as scikit-learn's are called."""

    def fit(self, features: np.ndarray, labels: np.ndarray) -> None:
        self.weights = np.linalg.lstsq(features, labels, rcond=None)[0]

    def predict(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weights


def test_a_fused_union_is_learnt_from() -> None:
    """By pt.ltr, and what it learnt ranks as it does over the union that is not fused."""
    rows, first = frame(4, 5), pt.Transformer.from_df(frame(4, 5))
    topics = rows[["qid", "query"]].drop_duplicates()
    qrels = rows[["qid", "docno"]].assign(label=[0, 1, 0, 2, 0] * 4)
    union = full().at(cutoff=4) ** full().at(cutoff=2) ** full()
    assert isinstance(union.compile(), MatroyshkaFeatures)
    ranked = []
    for features in (union, union.compile()):
        pipeline = first >> features >> pt.ltr.apply_learned_model(LeastSquares())
        pipeline.fit(topics, qrels)
        ranked.append(pipeline(topics).sort_values(["qid", "docno"]))
    np.testing.assert_allclose(ranked[0]["score"], ranked[1]["score"], atol=1e-3)
    assert ranked[1]["score"].nunique() == len(rows)


def test_what_differs_in_more_than_depth_stays_apart() -> None:
    shallow, other = full().at(cutoff=4), full().at(cutoff=8, normalize=True)
    several, released = full().at(cutoff=[3, 4]), MatroyshkaReranker(FULL, released=True, cutoff=4)
    for union in (
        shallow**other,
        shallow**several,
        released ** released.at(cutoff=8),
        shallow.at(prune={3: 2}) ** full().at(prune={3: 2}),
        shallow ** pt.Transformer.identity(),
    ):
        assert not isinstance(union.compile(), MatroyshkaFeatures)
    fused = (pt.Transformer.identity() ** shallow ** full()).compile()
    assert repr(fused).count("MatroyshkaFeatures") == 1
    assert (shallow ** full()).compile() == (shallow ** full()).compile()
    assert hash((shallow ** full()).compile()) == hash((shallow ** full()).compile())
    assert (shallow ** full()).compile() != (full() ** shallow).compile()


class TestFeatures(pt.testing.transformer_test_class(lambda: MatroyshkaFeatures([MatroyshkaReranker(cutoff=8)]))):
    """PyTerrier's own tests of inspection and schematics."""


def test_an_experiment_over_depths_makes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = frame(2, 5)
    first = pt.Transformer.from_df(rows)
    topics, qrels = rows[["qid", "query"]].drop_duplicates(), rows[["qid", "docno"]].assign(label=[0, 1, 0, 1, 0] * 2)
    several = full().at(cutoff=[2, 4, 8])
    alone = [first >> full().at(cutoff=layer) for layer in (2, 4, 8)]
    wanted = pt.Experiment(alone, topics, qrels, [nDCG @ 10])
    passes, real = [], scoring.walk
    monkeypatch.setattr(scoring, "walk", lambda *args, **options: passes.append(1) or real(*args, **options))
    pipelines = [first, *(first >> depth for depth in several.depths().values())]
    got = pt.Experiment(pipelines, topics, qrels, [nDCG @ 10], plan="tree")
    assert len(passes) == 1
    assert got["nDCG@10"][1:].tolist() == wanted["nDCG@10"].tolist()
    scored = several.depths()[4].transform(rows)
    pd.testing.assert_frame_equal(scored, full().at(cutoff=4).transform(rows), check_like=True, atol=1e-4)


def test_depths_are_values_and_not_of_a_cascade() -> None:
    assert AtDepth(4) == AtDepth(4) != AtDepth(8)
    assert hash(AtDepth(4)) == hash(AtDepth(4))
    assert full().depths() == {8: full()}
    assert full().at(cutoff=4).depths() == {4: full().at(cutoff=4)}
    with pytest.raises(ValueError, match=r"prune=\{3: 2\}: not every candidate comes to every depth"):
        full().at(cutoff=[4, 8], prune={3: 2}).depths()
    with pytest.raises(pt.validate.InputValidationError, match="score_4"):
        AtDepth(4).transform(frame(1, 1))


def test_columns_and_indexes_of_any_name() -> None:
    rows = full().at(cutoff=[2, 4]).transform(frame(2, 3)).assign(score_=1)
    rows[3] = "a number for a name"
    rows = rows.set_index("qid", drop=False)
    got = AtDepth(2).transform(rows)
    assert set(got.columns) == set(rows.columns) - {"score_2", "score_4"}
    assert got["score"].tolist() == rows["score_2"].tolist()
    assert MatroyshkaFeatures([full().at(cutoff=2)]).transform(rows)["features"].str[0].tolist() == pytest.approx(
        rows["score_2"].tolist()
    )

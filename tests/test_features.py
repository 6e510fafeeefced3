"""Several depths in one pass: as features, and as systems of an experiment."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import frame
from pyterrier.measures import nDCG
from pyterrier_caching import KeyValueCache
from safetensors.torch import load_file, save_file
from scipy.special import expit
from test_matroyshka import FULL, full

from pyterrier_llmrerank import MatroyshkaReranker, tune
from pyterrier_llmrerank.engine import device_scorer
from pyterrier_llmrerank.features import AtDepth, MatroyshkaFeatures
from pyterrier_llmrerank.runs.streaming import rerank_file


def test_a_union_of_depths_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = frame(2, 5)
    union = full().at(cutoff=4) ** full() ** full().at(cutoff=2) ** full().at(cutoff=4)
    wanted = union.transform(rows)
    compiled = union.compile()
    assert isinstance(compiled, MatroyshkaFeatures)
    passes = []
    real = device_scorer.run_layers
    monkeypatch.setattr(
        device_scorer, "run_layers", lambda *args, **options: passes.append(1) or real(*args, **options)
    )
    got = compiled.transform(rows)
    assert len(passes) == 1
    np.testing.assert_allclose(np.stack(got["features"]), np.stack(wanted["features"]), atol=1e-4)
    assert got.drop(columns="features").equals(wanted[got.columns].drop(columns="features"))
    unranked = rows.drop(columns=["score", "rank"])
    assert compiled.transform(unranked)["rank"].tolist() == union.transform(unranked)["rank"].tolist()
    assert list(compiled.transform(rows.head(0)).columns) == list(got.columns)


class LeastSquares:
    """A learner with the interface of scikit-learn."""

    def fit(self, features: np.ndarray, labels: np.ndarray) -> None:
        self.weights = np.linalg.lstsq(features, labels, rcond=None)[0]

    def predict(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weights


def test_learning_to_rank_over_a_fused_union() -> None:
    """A learner over the fused union ranks as one over the union that is not fused."""
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


def test_rerankers_that_differ_in_more_than_depth_are_not_fused() -> None:
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
    passes, real = [], device_scorer.run_layers
    monkeypatch.setattr(
        device_scorer, "run_layers", lambda *args, **options: passes.append(1) or real(*args, **options)
    )
    pipelines = [first, *(first >> depth for depth in several.depths().values())]
    got = pt.Experiment(pipelines, topics, qrels, [nDCG @ 10], plan="tree")
    assert len(passes) == 1
    assert got["nDCG@10"][1:].tolist() == wanted["nDCG@10"].tolist()
    scored = several.depths()[4].transform(rows)
    pd.testing.assert_frame_equal(scored, full().at(cutoff=4).transform(rows), check_like=True, atol=1e-4)


def test_depths_are_values_and_exclude_cascades() -> None:
    assert AtDepth(4, (4, 8)) == AtDepth(4, [4, 8]) != AtDepth(8, (4, 8))
    assert AtDepth(4, (4, 8)) != AtDepth(4, (2, 4)) != AtDepth(4, (2, 4), normalize=True)
    assert hash(AtDepth(4, (4, 8))) == hash(AtDepth(4, [4, 8]))
    assert eval(repr(AtDepth(4, (4, 8), normalize=True))) == AtDepth(4, (4, 8), normalize=True)
    assert full().depths() == {8: full()}
    assert full().at(cutoff=4).depths() == {4: full().at(cutoff=4)}
    with pytest.raises(ValueError, match=r"prune=\{3: 2\}: not every candidate reaches every depth"):
        full().at(cutoff=[4, 8], prune={3: 2}).depths()
    with pytest.raises(pt.validate.InputValidationError, match="score_4"):
        AtDepth(4, (4, 8)).transform(frame(1, 1))


def test_drawing_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt.documentation, "objects_inv", None)  # PyTerrier's inventory, which it downloads
    candidates = frame(1, 1).columns.tolist()
    for pipeline in (full().at(cutoff=[4, 8]).depths()[4], full().at(cutoff=4) ** full()):
        assert "https://" in pt.schematic.draw(pipeline.compile(), input_columns=candidates)


def test_columns_and_indexes_of_any_name() -> None:
    rows = full().at(cutoff=[2, 4]).transform(frame(2, 3)).assign(score_=1)
    rows[3] = "a number for a name"
    rows = rows.set_index("qid", drop=False)
    got = AtDepth(2, (2, 4)).transform(rows)
    assert set(got.columns) == set(rows.columns) - {"score_2", "score_4"}
    assert got["score"].tolist() == rows["score_2"].tolist()
    assert MatroyshkaFeatures([full().at(cutoff=2)]).transform(rows)["features"].str[0].tolist() == pytest.approx(
        rows["score_2"].tolist()
    )


def test_depths_leave_the_users_own_columns() -> None:
    rows = frame(2, 3).assign(score_1=1.5, score_2023="a year", score_3=0)
    got = full().at(cutoff=[2, 4]).depths()[2].transform(rows)
    assert set(got.columns) == set(rows.columns)
    own = ["score_1", "score_2023", "score_3"]
    pd.testing.assert_frame_equal(got[own], rows[own])


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> MatroyshkaReranker:
    """A reranker with logits so large that many normalised scores become 1 or, in single precision, 0."""
    folder = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(FULL, folder)
    tensors = load_file(folder / "model.safetensors")
    heads = {name: 200 * tensor for name, tensor in tensors.items() if "head" in name}
    assert heads
    save_file(tensors | heads, folder / "model.safetensors", metadata={"format": "pt"})
    return MatroyshkaReranker(folder, cutoff=[2, 4, 8], dtype="float32", normalize=True)


def test_ranks_follow_the_logits_where_scores_are_normalised(loud: MatroyshkaReranker) -> None:
    rows = frame(3, 9).sort_values("docno", kind="stable").reset_index(drop=True)
    logits = loud.at(normalize=False).transform(rows)
    normalised = loud.transform(rows)
    assert normalised["score"].eq(1).sum() > 5  # ties
    assert normalised["rank"].equals(logits["rank"])
    np.testing.assert_allclose(normalised["score"], expit(logits["score"]))
    for layer, depth in loud.depths().items():
        wanted = loud.at(cutoff=layer, normalize=False).transform(rows)
        got = depth.transform(rows)
        assert got["rank"].equals(wanted["rank"])
        assert set(got.columns) == set(wanted.columns)
        np.testing.assert_allclose(got["score"], expit(wanted["score"]), atol=1e-3)
    features = MatroyshkaFeatures([loud.at(cutoff=4), loud.at(cutoff=8)]).transform(rows.drop(columns=["rank"]))
    assert features["rank"].equals(loud.at(cutoff=4, normalize=False).transform(rows)["rank"])
    np.testing.assert_allclose(features["features"].str[1], normalised["score"], atol=1e-6)
    pruned = {"cutoff": 8, "prune": {2: 4, 4: 2}}
    assert loud.at(**pruned).transform(rows)["rank"].equals(loud.at(**pruned, normalize=False).transform(rows)["rank"])


@pytest.mark.parametrize("normalize", [False, True])
def test_usage_of_depths_is_the_rerankers(normalize: bool) -> None:
    reranker, rows = MatroyshkaReranker(FULL, dtype="float32", cutoff=[2, 4], normalize=normalize), frame(2, 3)
    for depth in reranker.depths().values():
        depth.transform(rows)
    assert reranker.usage.pairs == 12


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages of warnings; another test may have asked for more."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_scores_that_evaluators_cannot_tell_apart_are_warned_of_once(
    loud: MatroyshkaReranker, caplog: pytest.LogCaptureFixture
) -> None:
    rows = frame(3, 9)
    fresh = loud.at(cutoff=8)
    fresh.transform(rows)
    fresh.transform(rows)
    scores = fresh.transform(rows)["score"].astype(np.float32).groupby(rows["qid"])
    tied = sum(len(of_query) - of_query.nunique() for _, of_query in scores)
    (said,) = warnings_of(caplog)
    assert f"normalize=True makes {tied} scores equal to another score of their query in single" in said
    caplog.clear()
    loud.depths()[4].transform(rows)
    (said,) = warnings_of(caplog)
    assert said.startswith("AtDepth(4, (2, 4, 8), normalize=True): normalize=True makes")
    caplog.clear()
    loud.at(normalize=False).transform(rows)
    MatroyshkaReranker(FULL, dtype="float32", normalize=True).transform(rows)  # logits are moderate
    loud.at().transform(rows.assign(text="the same text"))
    assert warnings_of(caplog) == []


def test_a_normalised_run_is_ordered_by_logits(loud: MatroyshkaReranker, tmp_path: Path) -> None:
    rows = frame(2, 9).rename(columns={"qid": "query_id", "docno": "docid"})
    rows[["query_id", "query", "docid", "text"]].to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    docnos = {}
    for normalize in (False, True):
        target = tmp_path / f"{normalize}.tsv"
        rerank_file(loud.at(cutoff=8, normalize=normalize), tmp_path / "in.jsonl", target)
        docnos[normalize] = [line.split("\t")[:2] for line in target.read_text().splitlines()]
    assert docnos[True] == docnos[False]


def test_tune_measures_by_logits(loud: MatroyshkaReranker) -> None:
    rows = frame(3, 9)
    qrels = rows[["qid", "docno"]].assign(label=[k % 3 for k in range(len(rows))])
    options = {"cutoffs": [4, 8], "keep": [4], "timed": 0, "compress_ratios": 1}
    normalised, logits = (tune(loud.at(normalize=on), rows, qrels, **options).shapes for on in (True, False))
    assert normalised["nDCG@10"].tolist() == logits["nDCG@10"].tolist()


def test_several_depths_are_cached_by_key_and_value(loud: MatroyshkaReranker, tmp_path: Path) -> None:
    """As in the documentation: one cached pass, and a system for each depth."""
    rows = frame(3, 9)
    several = MatroyshkaReranker(FULL, dtype="float32", cutoff=[2, 4, 8])
    values = ["score_2", "score_4", "score_8"]
    with KeyValueCache(tmp_path / "cache", several, key=["query", "docno"], value=values) as cache:
        cache.transform(rows[rows["docno"] != "d3"])
        some = several.usage.pairs
        for layer, depth in several.depths().items():
            got = (cache >> depth[1]).transform(rows)
            pd.testing.assert_frame_equal(got, full().at(cutoff=layer).transform(rows), check_like=True, atol=1e-4)
        assert several.usage.pairs == some + 3  # the missing ones, once

"""Cascades: survivors get the usual scores, dropped rows rank below them, and no layer runs for dropped rows."""

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, frame, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank import MatroyshkaReranker, ScoringError
from pyterrier_llmrerank.engine import device_scorer, scoring
from pyterrier_llmrerank.engine.cascade import Cascade

FULL = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32")


@st.composite
def cascades(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes with up to three stages."""
    cutoff = draw(st.integers(4, 8))
    layers = sorted(draw(st.sets(st.integers(2, cutoff - 1), min_size=1, max_size=3)))
    keeps = sorted(draw(st.lists(st.integers(1, 7), min_size=len(layers), max_size=len(layers))), reverse=True)
    return {
        "cutoff": cutoff,
        "prune": dict(zip(layers, keeps, strict=True)),
        "compress_ratio": draw(st.sampled_from([1, 2, 4])),
        "compress_layers": draw(
            st.sets(st.integers(0, 8), max_size=3).filter(lambda layers: max(layers, default=0) < 8)
        ),
    }


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=cascades(),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    batch_size=st.sampled_from([None, 1, 3]),
    duplicates=st.booleans(),
    normalize=st.booleans(),
)
def test_a_cascade_is_the_pipeline_of_its_stages(
    shape: dict[str, Any], sizes: list[int], batch_size: int | None, duplicates: bool, normalize: bool
) -> None:
    rows = pd.concat([frame(1, size).assign(qid=f"q{q}", query=words(q % 2, 4)) for q, size in enumerate(sizes)])
    rows = pd.concat([rows, rows.head(2).assign(docno=["x", "y"][: len(rows.head(2))])]) if duplicates else rows
    rows = rows.sample(frac=1, random_state=len(rows)).reset_index(drop=True)
    unpruned = FULL.at(**{**shape, "prune": ()})
    cascade = FULL.at(**shape, normalize=normalize)
    cascade.set_parameter("batch_size", batch_size)
    got = cascade.transform(rows)

    stages = [*shape["prune"], shape["cutoff"]]
    alive, exit_layer = rows, pd.Series(shape["cutoff"], index=rows.index)
    for layer in stages:
        scored = unpruned.at(cutoff=layer).transform(alive)
        scores = scored["score"] if not normalize else 1 / (1 + np.exp(-scored["score"]))
        column = "score" if layer == stages[-1] else f"score_{layer}"
        np.testing.assert_allclose(got.loc[alive.index, column], scores, atol=1e-4)
        if layer != stages[-1]:
            assert got.loc[rows.index.difference(alive.index), column].isna().all()
            # by the cascade's own scores, because rounding could break ties differently
            places = got.loc[alive.index].groupby("qid")[column].rank(ascending=False, method="first")
            left = alive.index[places > shape["prune"][layer]]
            exit_layer[left] = layer
            alive = alive.drop(index=left)
    assert got["exit_layer"].tolist() == exit_layer.tolist()

    for _, query in got.groupby("qid"):
        best_first = query.sort_values("rank")
        assert best_first["exit_layer"].is_monotonic_decreasing
        assert best_first["score"].is_monotonic_decreasing
        for layer, left in query.groupby("exit_layer"):
            own = left["score"] if layer == shape["cutoff"] else left[f"score_{layer}"]
            assert (own.rank() == left["score"].rank()).all()
        for shallower, deeper in pairwise(sorted(query["exit_layer"].unique())):
            by_exit = query.groupby("exit_layer")["score"]
            assert by_exit.max()[shallower] < by_exit.min()[deeper]


def test_layers_run_for_survivors_only() -> None:
    rows, cascade = frame(3, 8), FULL.at(prune={3: 4, 6: 2}, cutoff=8)
    decoder = cascade.scorer().open()
    seen = [0] * 9

    def count(depth: int, module: object, args: tuple[torch.Tensor], output: object) -> None:
        seen[depth] += args[0][..., 0].numel()

    hooks = [
        layer.post_attention_layernorm.register_forward_hook(partial(count, depth))
        for depth, layer in enumerate(decoder.layers, 1)
    ]
    got = cascade.transform(rows)
    for hook in hooks:
        hook.remove()

    def tokens(left: pd.DataFrame) -> int:
        ids = cascade.scorer().ids(list(zip(left["query"], left["text"], strict=True)))
        prefixes = {tuple(pair.prefix) for pair in ids}
        return sum(map(len, prefixes)) + sum(len(pair.body) + len(pair.suffix) for pair in ids)

    assert seen[1:4] == [tokens(rows)] * 3
    assert seen[4:7] == [tokens(got[got["exit_layer"] > 3])] * 3
    assert seen[7:] == [tokens(got[got["exit_layer"] > 6]), 3 * 2]  # the last layer runs for the last tokens only


def test_survivors_are_not_embedded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, real = [], device_scorer.embedded
    monkeypatch.setattr(device_scorer, "embedded", lambda *args: embedded.append(len(args[1])) or real(*args))
    FULL.at(prune={3: 4, 6: 2}).transform(frame(3, 8))
    assert sum(embedded) == 24


def test_queries_stay_whole_in_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cascade = frame(5, 8), FULL.at(prune={3: 4, 6: 2})
    wanted = cascade.transform(rows)
    monkeypatch.setattr(scoring, "CASCADE_CHUNK", 3)
    pd.testing.assert_frame_equal(cascade.transform(rows), wanted, atol=1e-4)


def test_when_memory_runs_out_whole_queries_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cascade = frame(3, 6), FULL.at(prune={3: 4, 6: 2})
    wanted, real, walks = cascade.transform(rows), device_scorer.run_layers, []

    def fails_in_the_second_query(*args: object, **options: object) -> object:
        walks.append(args)
        if len(walks) > 4:
            raise MemoryError
        return real(*args, **options)

    monkeypatch.setattr(scoring, "CASCADE_CHUNK", 1)
    monkeypatch.setattr(device_scorer, "run_layers", fails_in_the_second_query)
    with pytest.raises(ScoringError, match="out of memory") as info:
        cascade.transform(rows)
    pd.testing.assert_frame_equal(info.value.scores, wanted[wanted["qid"] == "q0"], atol=1e-4)
    assert info.value.scores["exit_layer"].tolist().count(8) == 2


def test_ties_go_by_the_rows_order() -> None:
    pair_of_row = np.array([0, 0, 1, 0])
    cascade = Cascade({2: 2}, ["q", "q", "q", "q"], pair_of_row, 3)
    assert cascade.survivors(2, [0, 1], np.array([1.0, 0.5])) == [0]
    assert cascade.exit_layer.tolist() == [3, 3, 2, 2]
    final = cascade.final_scores({2: np.array([1.0, 0.5])[pair_of_row], 3: np.array([-7.0, np.nan])[pair_of_row]})
    assert final.tolist() == [-7.0, -7.0, -8.5, -8.0]


def test_few_candidates_all_survive() -> None:
    rows = frame(2, 3)
    got = FULL.at(prune={3: 50, 6: 20}).transform(rows)
    assert got["exit_layer"].tolist() == [8] * 6
    np.testing.assert_allclose(got["score"], FULL.transform(rows)["score"], atol=1e-4)
    assert FULL.at(prune={3: 1}).transform(frame(1, 1))["exit_layer"].tolist() == [8]


def test_pairs_without_a_frame_compete_by_query() -> None:
    pairs = [(query, words(i, 9 + i)) for i in range(4) for query in ("tide", "train")]
    cascade, by_layer = FULL.at(prune={4: 2}), FULL.at(cutoff=[4, 8]).compute_score(pairs)
    got = cascade.compute_score(pairs)
    for query in ("tide", "train"):
        own = [i for i, pair in enumerate(pairs) if pair[0] == query]
        stay = sorted(own, key=lambda i: -by_layer[0][i])[:2]
        np.testing.assert_allclose(got[stay], by_layer[1][stay], atol=1e-4)
        assert max(got[i] for i in own if i not in stay) < min(got[stay])
    both = FULL.at(cutoff=[2, 8], prune={4: 2})
    assert both.compute_score(pairs).shape == (2, 8)
    got_frame = both.transform(frame(1, 4))
    assert [name for name in got_frame.columns if name.startswith("score")] == [
        "score",
        "score_2",
        "score_4",
        "score_8",
    ]
    assert np.isnan(got_frame["score_8"]).sum() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {8: 50}, "cutoff": 8}, r"prune=\{8: 50\}: layer 8 is not shallower than the cutoff, 8"),
        ({"prune": {8: 50}}, r"prune=.*: layer 8 is not shallower than the cutoff, 8"),
        ({"prune": {3: 20, 6: 50}}, "50 cannot survive layer 6: only 20 are left there"),
        ({"prune": {0: 20}}, r"prune=\{0: 20\}; allowed: layers and the number of .* integers of at least 1"),
        ({"prune": {3: 0}}, r"prune=\{3: 0\}; allowed"),
        ({"prune": {3: 2.5}}, r"prune=2.5; allowed"),
        ({"prune": 3}, "prune=3; allowed"),
        ({"prune": [(3, 2), (3, 1)]}, "has a layer twice"),
        ({"prune": {1: 20}}, r"prune=\{1: 20\}: model='.*' has heads at layers 2 to 8"),
    ],
)
def test_invalid_cascades_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FULL.at(**changes)


def test_the_released_code_has_no_cascade() -> None:
    with pytest.raises(ValueError, match=r"prune=\{3: 2\}: released=True"):
        MatroyshkaReranker(MODELS / "costwise_full", released=True, prune={3: 2})


def test_a_cascade_is_kept_as_a_value() -> None:
    cascade = FULL.at(prune={6: 2, 3: 4})
    assert cascade == FULL.at(prune=[(3, 4), (6, 2)]) != FULL
    assert hash(cascade) == hash(FULL.at(prune=cascade.prune))
    assert "prune={3: 4, 6: 2}" in repr(cascade)
    assert cascade.at(prune=()) == FULL


def test_bf16_survivors_do_not_depend_on_dropped_rows() -> None:
    rows, narrow = frame(2, 8), MatroyshkaReranker(MODELS / "costwise_full", dtype="bfloat16", device="cpu")
    got, wanted = narrow.at(prune={3: 3}).transform(rows), narrow.transform(rows)
    stay = got["exit_layer"] == 8
    assert torch.allclose(
        torch.tensor(got["score"][stay].to_numpy()), torch.tensor(wanted["score"][stay].to_numpy()), atol=2e-2
    )

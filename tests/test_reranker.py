"""The PyTerrier contract: frames in and out, composition, inspection, caching, copies and parallel work."""

import contextlib
import copy
import inspect
import json
import logging
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import MODELS, frame, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyterrier.measures import nDCG
from safetensors.torch import load_file, save_file

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.engine import device_scorer, pending, scoring
from pyterrier_llmrerank.engine.packing import Row
from pyterrier_llmrerank.engine.usage import Usage
from pyterrier_llmrerank.options import options_of

FULL = str(MODELS / "costwise_full")
RERANKERS = {
    "rankllama": RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32"),
    "matroyshka": MatroyshkaReranker(FULL, dtype="float32"),
    "several cutoffs": MatroyshkaReranker(FULL, dtype="float32", cutoff=[4, 8]),
    "cascade": MatroyshkaReranker(FULL, dtype="float32", prune={3: 4, 5: 2}),
}
#: Columns that a reranker adds to a frame besides score and rank.
ADDED = {"several cutoffs": {"score_4", "score_8"}, "cascade": {"score_3", "score_5", "exit_layer"}}
EITHER = pytest.mark.parametrize("reranker", RERANKERS.values(), ids=RERANKERS)
MATROYSHKA = RERANKERS["matroyshka"]


# -- frames


@EITHER
def test_scores_and_ranks_are_added_and_nothing_else_is_touched(reranker: LLMReranker) -> None:
    rows = frame().assign(extra=range(6))
    rows.index = [7, 3, 3, 100, -1, 0]  # caches pass on frames with any index
    before = rows.copy()
    got = reranker.transform(rows)
    pd.testing.assert_frame_equal(rows, before)
    kept = [name for name in before.columns if name not in ("score", "rank")]
    pd.testing.assert_frame_equal(got[kept], before[kept])
    assert got["score"].dtype == np.float64
    for _, query in got.groupby("qid"):
        assert sorted(query["rank"]) == [0, 1, 2]
        assert query.sort_values("rank")["score"].is_monotonic_decreasing


def test_the_index_may_have_the_name_of_a_column() -> None:
    rows = frame().set_index("qid", drop=False)
    got = MATROYSHKA.transform(rows)
    assert got.index.equals(rows.index)
    assert got.index.name == "qid"
    assert got["rank"].tolist() == MATROYSHKA.transform(frame())["rank"].tolist()


ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.text(max_size=20), st.integers(0, 30)), min_size=1, max_size=8
)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_any_frame_of_texts_is_ranked(drawn: list[tuple[int, int, str, int]]) -> None:
    """With any characters, in any order, with repeated qids and docnos."""
    rows = pd.DataFrame(
        [{"qid": f"q{q}", "docno": f"d{d}", "query": text, "text": words(n, n)} for q, d, text, n in drawn]
    )
    got = MATROYSHKA.transform(rows)
    assert np.isfinite(got["score"]).all()
    assert len(got) == len(rows)
    for _, query in got.groupby("qid"):
        assert sorted(query["rank"]) == list(range(len(query)))


@pytest.mark.parametrize("name", RERANKERS)
def test_an_empty_frame_costs_nothing(name: str) -> None:
    reranker = RERANKERS[name]
    fresh = type(reranker)(**{**reranker.arguments(), "model": "someone/not-downloaded"})
    for columns in (["qid", "query", "docno", "text"], ["qid", "docno", "text", "query", "score", "rank", "extra"]):
        got = fresh.transform(pd.DataFrame(columns=columns))
        assert len(got) == 0
        assert set(got.columns) == {*columns, "score", "rank", *ADDED.get(name, ())}
        assert got["score"].dtype == np.float64


def test_duplicate_rows_are_each_scored_and_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pd.concat([frame(1, 2)] * 3)
    seen = []
    real = device_scorer.run_layers

    def counting(model: object, row: Row, *args: object, **options: object) -> object:
        seen.append(len(row.packing))
        return real(model, row, *args, **options)

    monkeypatch.setattr(device_scorer, "run_layers", counting)
    got = MATROYSHKA.transform(rows)
    assert sum(seen) == 2
    assert got["score"].nunique() == 2
    assert sorted(got["rank"]) == list(range(6))


def test_usage_is_written_out_only_for_a_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    written = []
    monkeypatch.setattr(Usage, "__str__", lambda usage: written.append(usage) or "")
    for level, count in ((logging.WARNING, 0), (logging.INFO, 1)):
        with caplog.at_level(level, "pyterrier_llmrerank"):
            MATROYSHKA.compute_score(("a", "b"))
        assert len(written) == count


def test_a_frame_that_was_tokenised_before_has_the_same_scores() -> None:
    """Token ids are used once, and only with the arguments that they were made with."""
    rows, reranker = frame(), MatroyshkaReranker(FULL, dtype="float32")
    reranker.transform(rows)
    reranker.take_usage()
    reranker.tokenise(rows)
    assert reranker.take_usage().tokenising_seconds > 0
    pd.testing.assert_frame_equal(reranker.transform(rows), MATROYSHKA.transform(rows))
    reranker.tokenise(rows)
    reranker.max_length = 3
    pd.testing.assert_frame_equal(
        reranker.transform(rows), MatroyshkaReranker(FULL, dtype="float32", max_length=3).transform(rows)
    )
    reranker.tokenise(rows.drop(columns="text"))  # transform names the column


def test_integer_qids_stay_integers() -> None:
    got = MATROYSHKA.transform(frame().assign(qid=[1, 1, 1, 2, 2, 2]))
    assert got["qid"].dtype.kind == "i"
    assert sorted(got["rank"]) == [0, 0, 1, 1, 2, 2]


def test_empty_texts_are_scored() -> None:
    assert np.isfinite(MATROYSHKA.transform(frame().assign(text="", query=""))["score"]).all()


def test_another_text_field_is_read() -> None:
    reranker = MatroyshkaReranker(FULL, dtype="float32", text_field="body")
    rows = frame()
    got = reranker.transform(rows.rename(columns={"text": "body"}))
    np.testing.assert_allclose(got["score"], MATROYSHKA.transform(rows)["score"], atol=1e-5)


# -- bad input


@EITHER
@pytest.mark.parametrize("missing", ["qid", "query", "docno", "text"])
def test_a_missing_column_is_named(reranker: LLMReranker, missing: str) -> None:
    with pytest.raises(pt.validate.InputValidationError, match=missing):
        reranker.transform(frame().drop(columns=missing))


@pytest.mark.parametrize("value", [None, float("nan"), pd.NA, 3, b"bytes"])
@pytest.mark.parametrize("column", ["query", "text"])
def test_an_invalid_text_is_named_by_qid_and_docno(column: str, value: object) -> None:
    rows = frame().astype(object)
    rows.loc[4, column] = value
    with pytest.raises(ValueError, match=rf"'{column}' is .*, not a string .* for qid 'q1', docno 'd1'"):
        MATROYSHKA.transform(rows)


def test_missing_texts_are_counted_and_shown_as_none() -> None:
    for dtype in (object, "str"):
        rows = frame().assign(text=pd.Series(["a", None, "c", "d", None, None], dtype=dtype))
        with pytest.raises(ValueError, match=r"'text' is None, .* for qid 'q0', docno 'd1' and 2 more rows\.$"):
            MATROYSHKA.transform(rows)


def test_invalid_unicode_is_named() -> None:
    rows = frame().assign(text=pd.Series(["a", "b", "c", "bad \ud83d", "e", "f"], dtype=object))
    with pytest.raises(
        ValueError, match=r"'text' is not valid Unicode \(a lone surrogate at character 4\) for qid 'q1'"
    ):
        MATROYSHKA.transform(rows)


@pytest.mark.parametrize("column", ["qid", "text", "extra"])
def test_a_repeated_column_is_named(column: str) -> None:
    rows = frame().assign(extra=1)
    with pytest.raises(ValueError, match=f"several columns '{column}'"):
        MATROYSHKA.transform(pd.concat([rows, rows[[column]]], axis=1))
    with pytest.raises(ValueError, match=f"several columns '{column}'"):
        MATROYSHKA.transform(pd.concat([rows, rows[[column]]], axis=1).head(0))


@pytest.mark.parametrize("column", ["qid", "docno"])
def test_a_row_without_qid_or_docno_is_named(column: str) -> None:
    rows = frame().astype(object)
    rows.loc[2, column] = None
    with pytest.raises(ValueError, match=f"{column} is missing in row 2"):
        MATROYSHKA.transform(rows)


@pytest.mark.parametrize("column", ["qid", "docno"])
@pytest.mark.parametrize(
    ("value", "problem"), [(["a"], r"\['a'\], neither a string nor a number"), ("\ud83d", "not valid Unicode")]
)
def test_an_invalid_qid_or_docno_is_named(column: str, value: object, problem: str) -> None:
    rows = frame().astype(object)
    rows.at[2, column] = value
    with pytest.raises(ValueError, match=rf"{column} is {problem}.* in row 2 of the frame"):
        MATROYSHKA.transform(rows)


def test_scores_from_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = MatroyshkaReranker(FULL, dtype="float32", batch_size=1)
    rows = frame()
    real = device_scorer.run_layers
    calls = []

    def fails_at_the_third(*args: object, **options: object) -> object:
        calls.append(1)
        states, row = real(*args, **options)
        return states * (np.inf if len(calls) == 3 else 1), row

    monkeypatch.setattr(device_scorer, "run_layers", fails_at_the_third)
    with pytest.raises(ScoringError, match=r"score of qid 'q\d', docno 'd\d' is not finite") as info:
        reranker.transform(rows)
    kept = info.value.scores
    assert len(kept) == len(calls) - 1
    wanted = MATROYSHKA.transform(rows).loc[kept.index]
    np.testing.assert_allclose(kept["score"], wanted["score"], atol=1e-4)
    for _, rows_of_query in kept.groupby("qid"):
        assert sorted(rows_of_query["rank"]) == list(range(len(rows_of_query)))
    again = pickle.loads(pickle.dumps(info.value))  # as on the way out of a worker process
    assert str(again) == str(info.value)
    pd.testing.assert_frame_equal(again.scores, kept)


@EITHER
def test_ctrl_c_leaves_the_ranked_rows_on_the_exception(monkeypatch: pytest.MonkeyPatch, reranker: LLMReranker) -> None:
    """A cascade keeps only queries of which every row has a score."""
    is_cascade = reranker == RERANKERS["cascade"]
    reranker = type(reranker)(**{**reranker.arguments(), "batch_size": 1})
    monkeypatch.setattr(scoring, "CHUNK", 3)
    monkeypatch.setattr(scoring, "CASCADE_CHUNK", 3)
    rows, calls, real = frame(2, 3).assign(extra=range(6)), [], pending.to_host

    def interrupted_in_the_second_query(computed: torch.Tensor) -> object:
        calls.append(1)
        if len(calls) == (13 if is_cascade else 5):
            signal.default_int_handler(signal.SIGINT, None)
        return real(computed)

    monkeypatch.setattr(pending, "to_host", interrupted_in_the_second_query)
    with pytest.raises(KeyboardInterrupt) as info:
        reranker.transform(rows)
    monkeypatch.undo()
    kept, whole = info.value.scores, reranker.transform(rows)
    assert len(kept) == (3 if is_cascade else 4)
    assert list(kept.columns) == list(whole.columns)
    pd.testing.assert_frame_equal(kept.drop(columns="rank"), whole.loc[kept.index].drop(columns="rank"), atol=1e-4)
    for _, of_query in kept.groupby("qid"):
        assert of_query.sort_values("rank")["score"].is_monotonic_decreasing
        assert sorted(of_query["rank"]) == list(range(len(of_query)))


def test_ctrl_c_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MatroyshkaReranker, "scorer", interrupted)
    with pytest.raises(KeyboardInterrupt) as info:
        MATROYSHKA.transform(frame())
    assert info.value.scores.empty
    assert list(info.value.scores.columns) == [*frame().columns]
    with pytest.raises(KeyboardInterrupt) as info:
        RERANKERS["several cutoffs"].compute_score([("a", "b")] * 3)
    assert np.isnan(info.value.scores).all()
    assert info.value.scores.shape == (2, 3)


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "/no/where.gguf"])
def test_a_path_that_does_not_exist_fails_at_once(model: str) -> None:
    for cls in (RankLLaMAReranker, MatroyshkaReranker):
        with pytest.raises(FileNotFoundError, match=f"model={model!r}: no such model folder"):
            cls(model)
    with pytest.raises(FileNotFoundError, match=f"base_model={model!r}"):
        RankLLaMAReranker("castorini/some-adapter", base_model=model)
    with pytest.raises(FileNotFoundError, match=f"adapters={model!r}"):
        MatroyshkaReranker(FULL, adapters=[model])


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(Path(FULL, "config.json").read_bytes())
    for file in Path(FULL).glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no weights in .*expected model\.safetensors"):
        MatroyshkaReranker(tmp_path).compute_score(("a", "b"))


def test_a_hub_out_of_reach_shows_on_use_only() -> None:
    reranker = RankLLaMAReranker()
    with pytest.raises(ConnectionError, match="castorini/rankllama-v1-7b-lora-passage.*Offline"):
        reranker.transform(frame())
    local_adapter = RankLLaMAReranker(MODELS / "rankllama_adapter")  # its base is on the hub
    with pytest.raises(ConnectionError, match="rankllama_base"):
        local_adapter.transform(frame())
    hub_adapter = MatroyshkaReranker(MODELS / "mistral_base", adapters="someone/adapter", cutoff=99)
    with pytest.raises(ConnectionError, match="adapters='someone/adapter'"):
        hub_adapter.transform(frame())


# -- value semantics


@EITHER
def test_repr_is_the_call_and_equal_arguments_make_equal_rerankers(reranker: LLMReranker) -> None:
    again = eval(repr(reranker), {type(reranker).__name__: type(reranker)})
    assert again == reranker
    assert hash(again) == hash(reranker)
    assert again is not reranker
    other = type(reranker)(**{**reranker.arguments(), "text_field": "body"})
    assert other != reranker
    assert reranker != "something else"


@EITHER
def test_copies_and_pickles_hold_no_weights(reranker: LLMReranker) -> None:
    wanted = reranker.transform(frame())
    pickled = pickle.dumps(reranker)
    assert len(pickled) < 2000
    for other in (pickle.loads(pickled), copy.deepcopy(reranker)):
        assert other == reranker
        pd.testing.assert_frame_equal(other.transform(frame()), wanted)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models and adapters in the current folder; the returned folder is empty."""
    for name in ("rankllama_adapter", "rankllama_base", "mistral_base", "adapter_sd", "adapter_comp_token2"):
        shutil.copytree(MODELS / name, tmp_path / "here" / name)
    shutil.copytree(MODELS / "adapter_comp_layer", tmp_path / "here" / "mistral_base" / "layer")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "elsewhere"


RELATIVE = {
    "rankllama": (RankLLaMAReranker, "rankllama_adapter", {"base_model": "./rankllama_base"}),
    "rankllama that names its base": (RankLLaMAReranker, "rankllama_adapter", {}),  # "rankllama_base"
    "matroyshka": (
        MatroyshkaReranker,
        "../here/mistral_base/",
        {
            "adapters": ["adapter_sd", "layer"], "token_adapters": {2: "adapter_comp_token2"}, "start_layer": 2,
            "compress_layers": [4], "compress_ratio": 2,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIVE)
def test_relative_paths_are_resolved_when_the_reranker_is_made(
    name: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, model, options = RELATIVE[name]
    wanted = kind(model, dtype="float32", **options).compute_score(("a", "b"))
    fresh = [kind(model, dtype="float32", max_length=99, **options)] if kind is MatroyshkaReranker else []
    reranker, changed = kind(model, dtype="float32", **options), kind(model, dtype="float32", **options)
    pickled, said = pickle.dumps(reranker), repr(reranker)
    monkeypatch.chdir(elsewhere)
    changed.set_parameter("batch_size", 3)
    for other in (reranker, changed, pickle.loads(pickled), copy.deepcopy(reranker), *fresh):
        assert other.compute_score(("a", "b")) == pytest.approx(wanted, abs=1e-5)
    assert said != repr(reranker)  # paths are relative to the current folder
    again = eval(repr(reranker).partition(" over ")[0], {kind.__name__: kind})
    assert (again == reranker) is (name != "rankllama that names its base")  # "rankllama_base" is a hub id here


def test_relative_and_absolute_paths_share_weights(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path.cwd()
    relative = MatroyshkaReranker("mistral_base", start_layer=2, dtype="float32", device="cpu")
    weights = relative.scorer().weights
    monkeypatch.chdir(elsewhere)
    absolute = MatroyshkaReranker(here / "mistral_base", start_layer=2, dtype="float32", device="cpu")
    assert absolute == relative
    assert absolute.scorer().weights == relative.scorer().weights == weights
    assert absolute.compute_score(("a", "b")) == relative.compute_score(("a", "b"))


def test_an_adapter_below_the_model_that_is_rewritten_is_read_again(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODELS / "mistral_base", model)
    shutil.copytree(MODELS / "adapter_sd", model / "trained" / "here")
    options: dict[str, Any] = {"adapters": "trained/here", "start_layer": 2, "dtype": "float32"}
    pair = ("panda", words(1, 9))
    before = MatroyshkaReranker(model, **options)
    score = before.compute_score(pair)
    file = model / "trained" / "here" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    again = MatroyshkaReranker(model, **options)
    elsewhere = MatroyshkaReranker(model, **options | {"adapters": shutil.copytree(file.parent, tmp_path / "copy")})
    assert again.compute_score(pair) == elsewhere.compute_score(pair) != score
    assert again.scorer().weights == MatroyshkaReranker(model, **options).scorer().weights


@pytest.mark.usefixtures("elsewhere")
def test_repr_shortens_paths() -> None:
    rankllama = RankLLaMAReranker(Path.cwd() / "rankllama_adapter", base_model="./rankllama_base")
    assert repr(rankllama) == "RankLLaMAReranker('rankllama_adapter', base_model='rankllama_base')"
    matroyshka = MatroyshkaReranker("mistral_base", start_layer=2, adapters=["layer", Path.cwd() / "adapter_sd"])
    assert repr(matroyshka) == "MatroyshkaReranker('mistral_base', adapters=('layer', 'adapter_sd'), start_layer=2)"
    shutil.copytree("adapter_sd", "layer")  # the bare name means the folder below the model
    above = MatroyshkaReranker("mistral_base", start_layer=2, adapters=Path("layer").absolute())
    assert f"adapters=({str(Path.cwd() / 'layer')!r},)" in repr(above)
    assert eval(repr(above)) == above
    assert above != MatroyshkaReranker("mistral_base", start_layer=2, adapters="layer")


@pytest.mark.parametrize("change", [LLMReranker.set_parameter, setattr])
def test_a_new_adapter_brings_its_own_base(elsewhere: Path, change: Callable[[Any, str, str], None]) -> None:
    shutil.copytree("rankllama_adapter", "other")
    config = json.loads(Path("other/adapter_config.json").read_text())
    Path("other/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/other"}))
    reranker = RankLLaMAReranker("rankllama_adapter")
    change(reranker, "model", "other")
    with pytest.raises(ConnectionError, match="someone/other"):
        reranker.compute_score(("a", "b"))
    change(reranker, "model", "rankllama_adapter")
    assert reranker.scorer().checkpoint.folder == Path("rankllama_base").absolute()


def test_an_adapter_that_is_set_again_keeps_its_base(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker, base = RankLLaMAReranker("rankllama_adapter"), Path("rankllama_base").absolute()
    monkeypatch.chdir(elsewhere)
    reranker.model = reranker.model
    assert reranker.scorer().checkpoint.folder == base


def test_rerankers_over_different_bases_differ(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter that names a relative base, opened in two folders."""
    adapter = Path("rankllama_adapter").absolute()
    shutil.copytree("rankllama_base", elsewhere / "rankllama_base")
    here, twin = RankLLaMAReranker(adapter), RankLLaMAReranker(adapter)
    given = [RankLLaMAReranker(adapter, base_model=Path("rankllama_base").absolute())]
    monkeypatch.chdir(elsewhere)
    there = RankLLaMAReranker(adapter)
    given += [RankLLaMAReranker(adapter, base_model=given[0].base_model)]
    assert here == twin
    assert hash(here) == hash(twin)
    assert here != there
    assert len({here, twin, there, pickle.loads(pickle.dumps(here)), copy.copy(there)}) == 2
    assert given[0] == given[1]  # the base that the adapter names has no effect
    before = hash(here)
    here.model = str(MODELS / "rankllama_adapter")
    assert hash(here) == before


def test_a_relative_output_dir_is_found_from_anywhere(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyterrier_llmrerank.training import RankLLaMATraining

    settings = RankLLaMATraining(group_size=2, max_steps=1, output_dir="run")
    reranker = RankLLaMAReranker.untrained("rankllama_base", training=settings, dtype="float32")
    rows = frame(1, 3)
    reranker.fit(rows, rows.assign(label=[1, 0, 0])[["qid", "docno", "label"]])
    run = Path("run").absolute()
    monkeypatch.chdir(elsewhere)
    assert reranker.model == str(run)
    again = RankLLaMAReranker(run, dtype="float32")  # the adapter names its base by its full path
    assert again.compute_score(("a", "b")) == pytest.approx(reranker.compute_score(("a", "b")), abs=1e-5)


def test_set_parameter_checks_as_the_constructor_does() -> None:
    reranker = MatroyshkaReranker(FULL)
    reranker.set_parameter("cutoff", [4, 2])
    assert reranker.cutoff == (2, 4)
    assert reranker.get_parameter("cutoff") == (2, 4)
    with pytest.raises(ValueError, match="cutoff=1"):
        reranker.set_parameter("cutoff", 1)
    with pytest.raises(FileNotFoundError):
        reranker.set_parameter("model", "./nowhere")
    assert reranker.arguments() == MatroyshkaReranker(FULL, cutoff=[2, 4]).arguments()
    with pytest.raises(ValueError, match="no argument 'depth'; allowed: model, adapters"):
        reranker.set_parameter("depth", 1)


def change(how: str, reranker: MatroyshkaReranker) -> None:
    if how == "set_parameter":
        reranker.set_parameter("cutoff", 4)
    elif how == "attribute":
        reranker.cutoff = 4
    else:
        rows = frame(1, 3)
        reranker.fit(rows, rows.assign(label=[1, 0, 0])[["qid", "docno", "label"]])


@pytest.mark.parametrize("how", ["set_parameter", "attribute", "fit"])
def test_a_changed_reranker_keeps_its_hash_and_equals_only_itself(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trains nothing.
    monkeypatch.setattr("pyterrier_llmrerank.training.fit.fit", lambda *_, **__: MODELS / "adapter_sd")
    first, second = MatroyshkaReranker(FULL, cutoff=8), MatroyshkaReranker(FULL, cutoff=8)
    other = MatroyshkaReranker(FULL, cutoff=4)
    known, before = {first: "first", other: "other"}, hash(first)
    assert known[second] == "first"
    first.set_parameter("cutoff", 8)  # no change
    first.cutoff, first.verbose = [8], first.verbose
    assert first == second
    change(how, first)
    assert hash(first) == before
    assert known == {first: "first", other: "other"}
    assert first == first
    assert first not in (second, other)  # second has the original arguments, other the new ones
    assert second not in known
    first.set_parameter("cutoff", 8)
    assert first != second  # changing it back makes no difference
    made_anew = pickle.loads(pickle.dumps(first))
    assert made_anew == type(first)(**first.arguments())
    assert hash(made_anew) == hash(type(first)(**first.arguments()))


def test_the_keys_of_a_grid_stay_distinct() -> None:
    """Two rerankers of one pipeline that at times have the same arguments."""
    rows = frame(2, 6)
    one, other = (MatroyshkaReranker(FULL, dtype="float32", cutoff=cutoff) for cutoff in (3, 5))
    pipeline = first_stage(rows) >> one % 3 >> other
    qrels = rows.assign(label=lambda r: (r["rank"] % 2).astype(int))[["qid", "docno", "label"]]
    grid = {one: {"cutoff": [2, 8]}, other: {"cutoff": [2, 8]}}
    found = pt.GridScan(pipeline, grid, TOPICS, qrels, ["ndcg_cut_10"])
    assert found[["tran_0_cutoff", "tran_1_cutoff"]].to_numpy().tolist() == [[2, 2], [2, 8], [8, 2], [8, 8]]
    for _, row in found.iterrows():
        first, second = (MatroyshkaReranker(FULL, dtype="float32", cutoff=row[f"tran_{k}_cutoff"]) for k in (0, 1))
        wanted = pt.Evaluate((first_stage(rows) >> first % 3 >> second)(TOPICS), qrels, ["ndcg_cut_10"])
        assert row["ndcg_cut_10"] == pytest.approx(wanted["ndcg_cut_10"])
    assert found["ndcg_cut_10"].nunique() == 4


def test_a_subclass_may_set_an_argument_again() -> None:
    class Small(MatroyshkaReranker):
        def __init__(self, depth: int = 4) -> None:
            super().__init__(FULL, cutoff=8)
            self.cutoff = self.depth = depth

    assert Small() == Small()
    assert hash(Small()) == hash(Small())
    assert Small() != Small(2)


def test_equal_rerankers_share_their_work_in_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rerankers in three systems run once; a changed one runs by itself."""
    rows = frame(2, 5)
    first = first_stage(rows)
    qrels = rows.assign(label=lambda r: (r["rank"] == 3).astype(int))[["qid", "docno", "label"]]
    one, two, changed = (MatroyshkaReranker(FULL, dtype="float32", cutoff=8) for _ in range(3))
    changed.set_parameter("cutoff", 4)
    passes, real = [], device_scorer.run_layers
    monkeypatch.setattr(
        device_scorer, "run_layers", lambda *args, **options: passes.append(1) or real(*args, **options)
    )
    systems = [first >> one % 2, first >> two % 4, first >> changed]
    got = pt.Experiment(systems, TOPICS, qrels, ["ndcg_cut_10"], plan="tree")["ndcg_cut_10"]
    assert len(passes) == 2
    alone = [pt.Experiment([system], TOPICS, qrels, ["ndcg_cut_10"])["ndcg_cut_10"][0] for system in systems]
    assert got.tolist() == pytest.approx(alone)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("quantization", "int4", "int8, float8, or None"),
        ("attn_implementation", "flash", "sdpa, eager, flex_attention, flash_attention_2, flash_attention_3, or None"),
    ],
)
def test_unknown_names_are_refused(name: str, value: str, allowed: str) -> None:
    for cls in (RankLLaMAReranker, MatroyshkaReranker):
        with pytest.raises(ValueError, match=f"{name}='{value}'; allowed: {allowed}."):
            cls(**{name: value})


def test_repr_shows_options_and_pipelines_compile() -> None:
    reranker = RankLLaMAReranker("a/b", quantization="int8", torch_compile=True, attn_implementation="eager")
    options = "quantization='int8', torch_compile=True, attn_implementation='eager'"
    assert repr(reranker) == f"RankLLaMAReranker('a/b', {options})"
    assert (reranker >> pt.RankCutoff(2)).compile().transform(frame().head(0)).empty


DEVICES = ("cuda:0", "cuda:1", "cuda:2")


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", RERANKERS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=12),
    st.none() | st.integers(1, 4),
)
def test_a_frame_over_several_devices_is_the_same(
    name: str, drawn: list[tuple[int, int, int]], batch_size: int | None
) -> None:
    """This holds if qids share a query text, if queries share a passage, and in cascades, too."""
    rows = pd.DataFrame(
        [
            {"qid": f"q{q}", "docno": f"d{d}", "query": words(q // 2, 3), "text": f"{words(n, 5)} {d}"}
            for q, d, n in drawn
        ]
    )
    arguments = RERANKERS[name].arguments()
    one, two, three = (
        type(RERANKERS[name])(**{**arguments, "device": DEVICES[:count], "batch_size": batch_size}).transform(rows)
        for count in (1, 2, 3)
    )
    numbers = [column for column in one if column.startswith("score")]
    for several in (two, three):
        np.testing.assert_allclose(several[numbers].astype(float), one[numbers].astype(float), atol=2e-4)
        pd.testing.assert_frame_equal(several.drop(columns=numbers), one.drop(columns=numbers))  # ranks too


def test_devices_are_a_value() -> None:
    one, several = MatroyshkaReranker(device=["cuda:0"]), MatroyshkaReranker(device=["cuda:0", torch.device("cuda:1")])
    assert one == MatroyshkaReranker(device="cuda:0")
    assert several.device == ("cuda:0", "cuda:1")
    assert several == MatroyshkaReranker(device=("cuda:0", "cuda:1")) != MatroyshkaReranker(device=["cuda:1", "cuda:0"])
    assert repr(several) == "MatroyshkaReranker('BAAI/Matroyshka-ReRanker-passage', device=('cuda:0', 'cuda:1'))"
    for other in (pickle.loads(pickle.dumps(several)), eval(repr(several)), copy.copy(several)):
        assert other == several
        assert hash(other) == hash(several)


@pytest.mark.parametrize("value", [[], (), ["cpu", "cpu"], ["cuda:0", "cuda:1", torch.device("cuda:0")]])
def test_invalid_lists_of_devices_are_refused(value: object) -> None:
    for cls in (RankLLaMAReranker, MatroyshkaReranker):
        with pytest.raises(
            ValueError, match=r"device=.*; allowed: a device, or a list of one or more different devices"
        ):
            cls(device=value)


@pytest.mark.usefixtures("devices")
def test_several_devices_have_one_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    MatroyshkaReranker(FULL, dtype="float32", verbose=True, device=DEVICES, batch_size=1).transform(frame(6, 2))
    shown = capfd.readouterr().err
    assert shown.count(" 0/12 ") == 1  # one bar began
    assert " 12/12 " in shown.splitlines()[-1]


@pytest.mark.usefixtures("devices")
def test_devices_take_turns_at_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    done = [0]

    class Bar(contextlib.nullcontext):
        def update(self, count: int) -> None:
            before = done[0]
            time.sleep(0.002)
            done[0] = before + count

    monkeypatch.setattr(pt, "tqdm", lambda **options: Bar(Bar()))
    MatroyshkaReranker(FULL, dtype="float32", device=DEVICES, batch_size=1).transform(frame(24, 2))
    assert done == [48]


# -- options


@pytest.mark.parametrize("kind", [LLMReranker, RankLLaMAReranker, MatroyshkaReranker])
def test_an_option_is_in_the_signature_the_docs_and_the_table(kind: type[LLMReranker]) -> None:
    signature = inspect.signature(kind)
    assert list(signature.parameters) == list(inspect.signature(kind.__init__).parameters)[1:]
    arguments = kind.__doc__.partition("\nArgs:\n")[2].partition("\nRaises:\n")[0]
    for option, parameter in zip(options_of(kind), signature.parameters.values(), strict=True):
        assert (option.name, option.accepts) == (parameter.name, parameter.annotation)
        assert parameter.default == (parameter.empty if option.default is ... else option.default)
        assert " ".join(f"{option.name}: {option.help}".split()) in " ".join(arguments.split())


def test_the_signature_has_own_options_first_and_one_that_is_positional() -> None:
    names = list(inspect.signature(RankLLaMAReranker).parameters)
    assert names[:3] == ["model", "base_model", "input_format"]
    assert names[-3:] == ["torch_compile", "attn_implementation", "verbose"]
    with pytest.raises(TypeError, match="positional argument"):
        RankLLaMAReranker("someone/model", "someone/base")
    with pytest.raises(TypeError, match="unexpected keyword argument 'cutoff'"):
        RankLLaMAReranker(cutoff=3)


def test_an_attribute_is_checked_and_kept_in_one_form() -> None:
    reranker = MatroyshkaReranker(FULL)
    reranker.cutoff = [4, 2]
    assert reranker.cutoff == (2, 4)
    with pytest.raises(ValueError, match="max_length=0; allowed: an integer of at least 1"):
        reranker.max_length = 0
    assert reranker.max_length is None


def test_a_subclass_has_the_signature_of_its_own_constructor() -> None:
    class Small(RankLLaMAReranker):
        def __init__(self, length: int = 9) -> None:
            super().__init__(passage_max_length=length)
            self.length = length

    assert list(inspect.signature(Small).parameters) == ["length"]
    assert Small(4) == Small(4) != Small()


# -- pipelines


def first_stage(rows: pd.DataFrame) -> pt.Transformer:
    return pt.Transformer.from_df(rows)


TOPICS = frame()[["qid", "query"]].drop_duplicates()


def test_pipelines_cut_and_unite_rerankers() -> None:
    rows = frame(2, 8)
    got = (first_stage(rows) >> MATROYSHKA % 3).transform(TOPICS)
    assert len(got) == 6
    assert set(got["rank"]) == {0, 1, 2}
    features = (first_stage(rows) >> (MATROYSHKA ** MATROYSHKA.at(cutoff=4))).transform(TOPICS)
    assert features["features"].iloc[0].shape == (2,)


def test_an_experiment_names_and_shares() -> None:
    rows = frame(2, 8)
    first = first_stage(rows)
    systems = [first, first >> MATROYSHKA, first >> MATROYSHKA.at(cutoff=4), first >> RERANKERS["rankllama"]]
    qrels = rows.assign(label=lambda r: (r["rank"] == 5).astype(int))[["qid", "docno", "label"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", pt.validate.InputValidationWarning)
        table = pt.Experiment(systems, TOPICS, qrels, [nDCG @ 10, "mrt"], plan="tree", verbose=False)
    assert len(table) == 4
    assert repr(MATROYSHKA) in table["name"][1]


def test_a_scorer_cache_wraps_it(tmp_path: Path) -> None:
    from pyterrier_caching import ScorerCache

    cache = ScorerCache(str(tmp_path / "cache"), MATROYSHKA)
    rows = frame(2, 6)
    part = cache(rows[rows["docno"] != "d3"])
    assert len(part) == 10
    whole = cache(rows)
    pd.testing.assert_series_equal(whole["score"], MATROYSHKA.transform(rows)["score"], atol=1e-4, check_exact=False)
    cache.close()


def test_sliding_windows_and_their_maximum() -> None:
    long = pd.DataFrame([{"qid": "q", "query": "panda", "docno": f"d{i}", "text": words(i, 40 + i)} for i in range(3)])
    pipeline = (
        pt.text.sliding(text_attr="text", length=15, stride=8, prepend_attr=None) >> MATROYSHKA >> pt.text.max_passage()
    )
    got = pipeline.transform(long)
    assert sorted(got["docno"]) == ["d0", "d1", "d2"]
    windows = pt.text.sliding(text_attr="text", length=15, stride=8, prepend_attr=None).transform(long)
    best = (
        MATROYSHKA.transform(windows)
        .assign(parent=lambda r: r["docno"].str.split("%").str[0])
        .groupby("parent")["score"]
        .max()
    )
    np.testing.assert_allclose(got.set_index("docno")["score"].sort_index(), best.sort_index(), atol=1e-4)


@pytest.mark.parametrize("backend", ["joblib", "ray"])
def test_parallel_workers_give_the_same(backend: str) -> None:
    rows = frame(4, 3)
    wanted = MATROYSHKA.transform(rows)
    if backend == "ray":
        ray = pytest.importorskip("ray")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        got = MATROYSHKA.parallel(2, backend).transform(rows)
    finally:
        if backend == "ray":
            ray.shutdown()
    np.testing.assert_allclose(got.sort_index()["score"], wanted["score"], atol=1e-4)
    assert got.sort_index()["rank"].tolist() == wanted["rank"].tolist()


def test_progress_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    MATROYSHKA.transform(frame())
    assert capfd.readouterr().err == ""
    MatroyshkaReranker(FULL, dtype="float32", verbose=True).transform(frame())
    assert "MatroyshkaReranker: 100%" in capfd.readouterr().err
    MatroyshkaReranker(FULL, dtype="float32", verbose=True, cutoff=4, prune={2: 2}).transform(frame())
    assert "MatroyshkaReranker(cutoff=4, prune={2: 2}): 100%" in capfd.readouterr().err


# -- inspection


class TestMatroyshka(pt.testing.transformer_test_class(lambda: MatroyshkaReranker(cutoff=[8, 16]))):
    """PyTerrier's own tests of inspection and schematics."""


class TestRankLLaMA(pt.testing.transformer_test_class(RankLLaMAReranker)):
    """PyTerrier's own tests of inspection and schematics."""


@pytest.mark.parametrize("name", RERANKERS)
def test_inspection_shows_columns_and_arguments(name: str) -> None:
    reranker = RERANKERS[name]
    assert pt.inspect.transformer_inputs(reranker) == [["qid", "docno", "query", "text"]]
    outputs = pt.inspect.transformer_outputs(reranker, ["qid", "query", "docno", "text", "more"])
    assert set(outputs) == {"qid", "query", "docno", "text", "more", "score", "rank", *ADDED.get(name, ())}
    attributes = {attribute.name: attribute.value for attribute in pt.inspect.transformer_attributes(reranker)}
    assert attributes == reranker.arguments()
    changed = pt.inspect.transformer_apply_attributes(reranker, batch_size=3)
    assert changed.batch_size == 3
    assert pt.schematic.transformer_schematic(reranker)["help_url"].startswith("https://")


def test_importing_waits_for_torch() -> None:
    """Torch and transformers take seconds; a pipeline that is only built or drawn needs neither."""
    code = (
        "import sys, pandas as pd; from pyterrier_llmrerank import MatroyshkaReranker;"
        "MatroyshkaReranker().transform(pd.DataFrame(columns=['qid', 'query', 'docno', 'text']));"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Matroyshka rerankers give the original scores at every depth and width, from every checkpoint layout."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import MODELS, agree, frame, golden, words
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.engine.inputs import PROMPT, MatroyshkaInputs
from pyterrier_llmrerank.frames import sigmoid

GOLDEN = golden("matroyshka_inference.json")
FULL = str(MODELS / "costwise_full")
PAIRS = [(pair["query"], pair["passage"]) for pair in GOLDEN["pairs"]]


def opened(run: dict[str, Any], **changes: Any) -> MatroyshkaReranker:
    """The reranker of a golden run, except for its instructions."""
    layout, config = GOLDEN["layouts"][run["layout"]], run["config"]
    adapters = [MODELS / path.removeprefix("models/") for path in layout["peft_path"] or []]
    arguments = {
        "adapters": adapters,
        "start_layer": layout["start_layer"] if layout["from_raw"] else None,
        "cutoff": config["cutoff_layers"],
        "compress_layers": config["compress_layers"],
        "compress_ratio": config["compress_ratio"],
        "prompt": config["prompt"] or PROMPT,
        "query_max_length": config["query_max_length"],
        "max_length": config["max_length"],
        "normalize": config["normalize"],
        "dtype": "float32",
    }
    return MatroyshkaReranker(MODELS / layout["model"].removeprefix("models/"), **arguments | changes)


def scores_of(run: dict[str, Any], **changes: Any) -> np.ndarray:
    """The scores of a golden run's pairs, ``[cutoffs, pairs]``."""
    reranker, config = opened(run, **changes), run["config"]
    if config["query_instruction_for_rerank"] == "A: ":
        return np.atleast_2d(reranker.compute_score(PAIRS))
    # The reranker's instructions are fixed; some goldens vary them.
    instructions = (config["query_instruction_for_rerank"] or "", config["passage_instruction_for_rerank"] or "")
    inputs = MatroyshkaInputs(reranker.prompt, reranker.query_max_length, reranker.max_length, *instructions)
    scorer = replace(reranker.scorer(), encode=inputs)
    logits = scorer.score(PAIRS)
    return expit(logits) if config["normalize"] else logits


@pytest.fixture(scope="module", autouse=True)
def keep_weights() -> list[MatroyshkaReranker]:
    """A reranker for each layout that lives through this file, so that each model is opened once."""
    runs = {run["layout"]: run for run in GOLDEN["runs"]}
    return [opened(run, cutoff=None) for run in runs.values() if opened(run).compute_score(PAIRS[0]) is not None]


def ours(head_index: str, weight_row: str) -> list[dict[str, Any]]:
    """Golden runs of this kind; cutoffs of contiguous layers from start_layer on have the same heads in both."""
    return [
        run for run in GOLDEN["runs"] if run["head_index"] == head_index and run["weight_row"] in (weight_row, "any")
    ]


@pytest.mark.parametrize("run", ours("per_layer", "nopad"), ids=lambda run: run["id"])
def test_scores_are_the_original_ones(run: dict[str, Any]) -> None:
    agree("Matroyshka", scores_of(run), run["scores"])


@pytest.mark.parametrize("run", ours("released", "pad8"), ids=lambda run: run["id"])
def test_released_scores_are_the_original_ones(run: dict[str, Any]) -> None:
    """All pairs go into one batch: in this mode, too, a score does not depend on the others."""
    agree("Matroyshka, released", scores_of(run, released=True), run["scores"])


@functools.cache
def full() -> MatroyshkaReranker:
    return MatroyshkaReranker(FULL, dtype="float32")


CUTOFFS = st.lists(st.integers(2, 8), min_size=2, max_size=5, unique=True)
TEXTS = st.lists(st.integers(0, 50), min_size=1, max_size=4).map(lambda ns: [(words(n, 3), words(n, n)) for n in ns])


@settings(max_examples=10, deadline=None)
@given(CUTOFFS, TEXTS, st.sampled_from([1, 2, 4]), st.lists(st.integers(0, 7), max_size=3))
def test_several_cutoffs_in_one_pass_equal_single_passes(
    cutoffs: list[int], pairs: list[tuple[str, str]], ratio: int, layers: list[int]
) -> None:
    shape = {"compress_layers": layers, "compress_ratio": ratio}
    together = full().at(cutoff=cutoffs, **shape).compute_score(pairs)
    apart = np.stack([full().at(cutoff=cutoff, **shape).compute_score(pairs) for cutoff in sorted(cutoffs)])
    np.testing.assert_allclose(together, apart, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 7), max_size=4), st.integers(2, 8))
def test_ratio_one_and_layers_without_effect_are_no_compression(
    pairs: list[tuple[str, str]], layers: list[int], cutoff: int
) -> None:
    plain = full().at(cutoff=cutoff).compute_score(pairs)
    without_effect = [0, *range(cutoff, 8)]
    for shape in (
        {"compress_layers": layers, "compress_ratio": 1},
        {"compress_layers": [], "compress_ratio": 4},
        {"compress_layers": without_effect, "compress_ratio": 4},
    ):
        np.testing.assert_allclose(full().at(cutoff=cutoff, **shape).compute_score(pairs), plain, atol=1e-5)


def test_layers_count_alike_in_all_arguments() -> None:
    """Pooling and pruning after layer 4 leave its score as it is, and have an effect on the next layer."""
    rows = frame(2, 4)
    plain = {layer: full().at(cutoff=layer).transform(rows)["score"] for layer in (4, 5)}
    pooled = full().at(cutoff=[4, 5], compress_layers=[4], compress_ratio=4).transform(rows)
    np.testing.assert_allclose(pooled["score_4"], plain[4], atol=1e-4)
    assert np.abs(pooled["score_5"] - plain[5]).max() > 0.01
    pruned = full().at(cutoff=5, prune={4: 1}).transform(rows)
    np.testing.assert_allclose(pruned["score_4"], plain[4], atol=1e-4)
    for _, query in pruned.groupby("qid"):
        survivors, dropped = (query[query["exit_layer"] == layer] for layer in (5, 4))
        np.testing.assert_allclose(survivors["score"], plain[5][survivors.index], atol=1e-4)
        lowered = dropped["score_4"] - dropped["score_4"].max() + survivors["score"].min() - 1
        np.testing.assert_allclose(dropped["score"], lowered)


def test_several_cutoffs_become_columns() -> None:
    rows = frame()
    got = full().at(cutoff=[8, 3, 8]).transform(rows)
    assert [c for c in got.columns if c not in rows.columns] == ["score_3", "score_8"]
    assert (got["score"] == got["score_8"]).all()
    np.testing.assert_allclose(got["score_3"], full().at(cutoff=3).transform(rows)["score"], atol=1e-4)


def test_one_pair_has_a_float_and_several_have_an_array() -> None:
    one, two = full(), full().at(cutoff=[3, 8])
    assert isinstance(one.compute_score(PAIRS[0]), float)
    assert isinstance(one.compute_score(list(PAIRS[0])), float)
    assert one.compute_score(PAIRS[:3]).shape == (3,)
    assert one.compute_score(PAIRS[:2]).shape == (2,)
    assert one.compute_score([list(PAIRS[0])]).shape == (1,)
    assert one.compute_score([]).shape == (0,)
    assert two.compute_score(PAIRS[0]).shape == (2,)
    assert two.compute_score(PAIRS[:3]).shape == (2, 3)
    assert two.compute_score([]).shape == (2, 0)


@pytest.mark.parametrize("pairs", ["ab", [("a",)], ["ab", "cd", "ef"], [1], [("a", "b", "c")]])
def test_an_invalid_pair_is_named(pairs: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"pairs\[0\] is .*; expected two strings"):
        full().compute_score(pairs)


@pytest.mark.parametrize(("text", "problem"), [(None, "None, not a string"), ("bad \ud83d", "a lone surrogate")])
def test_an_invalid_text_is_named(text: Any, problem: str) -> None:
    for number, pairs in ((0, [("a", text)]), (1, [("a", "b"), ("c", text)])):
        with pytest.raises(ValueError, match=rf"the passage of pairs\[{number}\] is .*{problem}"):
            full().compute_score(pairs)


@pytest.mark.parametrize(
    ("pairs", "kind"),
    [
        ({"query": "a", "passage": "b"}, "dict"),
        ({"a", "b"}, "set"),
        (frozenset([("a", "b")]), "frozenset"),
        (pd.DataFrame({"query": ["x"], "text": ["y"]}), "DataFrame"),
        ({"a": 1, "b": 2}.keys(), "dict_keys"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_unordered_collections_and_scalars_are_refused(pairs: Any, kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(?s)^pairs=.* \({kind}\); allowed: a pair of strings, \(query, passage\), a l"
    ):
        full().compute_score(pairs)


@pytest.mark.parametrize("pair", [{"query": "a", "passage": "b"}, {"a", "b"}, pd.DataFrame({"a": ["b"], "c": ["d"]})])
def test_an_unordered_pair_is_named(pair: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)^pairs\[1\] is .*; expected two strings"):
        full().compute_score([("a", "b"), pair])


@pytest.mark.parametrize("dtype", [object, str])
def test_the_rows_of_an_array_are_pairs(dtype: type) -> None:
    array = np.array(PAIRS[:3], dtype=dtype)
    wanted = full().compute_score(PAIRS[:3])
    for pairs in (array, list(array), tuple(array.tolist()), pd.DataFrame(array).to_numpy(), iter(array)):
        np.testing.assert_array_equal(full().compute_score(pairs), wanted)
    assert full().compute_score(array[0]) == full().compute_score(PAIRS[0])
    assert full().compute_score(array[:1]).shape == (1,)
    assert full().compute_score(array[:0]).shape == (0,)
    items = {"a": "b", "c": "d"}.items()
    np.testing.assert_array_equal(full().compute_score(items), full().compute_score(list(items)))
    for wrong in (np.array([["a", "b", "c"]]), np.array(5), np.array([1, 2]), np.array([[["a", "b"], ["c", "d"]]])):
        with pytest.raises(ValueError, match="pairs"):
            full().compute_score(wrong)


def test_two_lists_of_two_are_two_pairs() -> None:
    for pairs in ([["a", "b"], ["c", "d"]], (("a", "b"), ("c", "d")), np.array([["a", "b"], ["c", "d"]])):
        scores = full().compute_score(pairs)
        np.testing.assert_allclose(
            scores, [full().compute_score(("a", "b")), full().compute_score(("c", "d"))], atol=1e-4
        )


def test_any_iterable_of_pairs_is_accepted() -> None:
    queries, passages = zip(*PAIRS, strict=True)
    np.testing.assert_array_equal(
        full().compute_score(zip(queries, passages, strict=True)), full().compute_score(PAIRS)
    )


def test_lengths_and_prompt_are_honoured() -> None:
    reranker = MatroyshkaReranker(FULL, query_max_length=5, max_length=12, prompt="好" * 9)
    ((prefix, body, suffix, *_),) = reranker.scorer().ids([(words(1, 20), words(2, 60))])
    assert (len(prefix), len(body)) == (1 + 5 + 2, 12)
    assert reranker.tokenizer.decode(suffix).endswith("好" * 9)


def test_normalize_is_the_sigmoid_and_never_overflows() -> None:
    raw = full().compute_score(PAIRS)
    np.testing.assert_allclose(full().at(normalize=True).compute_score(PAIRS), 1 / (1 + np.exp(-raw)), atol=1e-12)
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("cutoff", 0),
        ("cutoff", -3),
        ("cutoff", []),
        ("cutoff", "8"),
        ("cutoff", True),
        ("cutoff", [8, False]),
        ("cutoff", 7.5),
        ("compress_layers", [-1]),
        ("compress_layers", ["2"]),
        ("compress_layers", [True]),
        ("compress_ratio", 3),
        ("compress_ratio", 0),
        ("compress_ratio", 2**34),
        ("compress_ratio", -2),
        ("compress_ratio", 2.0),
        ("compress_ratio", True),
        ("max_length", 0),
        ("query_max_length", 0),
        ("start_layer", 0),
        ("batch_size", 0),
        ("batch_size", True),
        ("prompt", 5),
        ("text_field", ""),
        ("adapters", [""]),
        ("adapters", None),
        ("adapters", [5]),
        ("cutoff", np.array(0)),
        ("model", ""),
        ("dtype", "int8"),
    ],
)
def test_arguments_are_checked(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}=") as info:
        MatroyshkaReranker(**{argument: value})
    said = str(info.value)
    assert "allowed" in said
    assert repr(value) in said or repr(np.ravel(value)[-1].item()) in said or repr(value[-1]) in said


@pytest.mark.parametrize("cutoff", [1, 9, 40, [2, 9]])
def test_a_cutoff_without_a_head_fails_before_any_work(cutoff: object) -> None:
    with pytest.raises(ValueError, match=r"cutoff=\d+: model='.*' has heads at layers 2 to 8\."):
        full().at(cutoff=cutoff)


def test_another_cutoff_of_a_model_with_one_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has heads at layers 8 only; start_layer gives"):
        MatroyshkaReranker(MODELS / "mistral_base", cutoff=6)


def test_a_compress_layer_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compress_layers=\[2, 8\]: .* has 8 layers, so none runs after layer 8"):
        full().at(compress_layers=[8, 2], compress_ratio=2)


def test_a_ratio_without_layers_gives_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    MatroyshkaReranker(FULL, compress_ratio=2)
    assert caplog.messages == ["compress_ratio=2 has no effect without compress_layers (layers from 1 on)"]
    MatroyshkaReranker(FULL, compress_ratio=2, compress_layers=4)
    MatroyshkaReranker(FULL, compress_layers=4)
    assert len(caplog.messages) == 1


def test_at_takes_shapes_only() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_length'"):
        full().at(max_length=3)


def test_arguments_are_normalised() -> None:
    same = MatroyshkaReranker(FULL, cutoff=[np.int64(8), 3, 8], compress_layers=5, adapters=str(MODELS / "adapter_sd"))
    assert (same.cutoff, same.compress_layers, same.adapters) == ((3, 8), (5,), (str(MODELS / "adapter_sd"),))
    assert same == MatroyshkaReranker(FULL, cutoff=(3, 8), compress_layers=[5], adapters=[MODELS / "adapter_sd"])
    assert MatroyshkaReranker(FULL, cutoff=[4]).cutoff == 4


def test_released_needs_the_pad_token_only_to_pool(tmp_path: Any) -> None:
    """Here the tiny Mistral model loses its pad token."""
    import json
    import shutil

    shutil.copytree(FULL, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings_ = json.loads(path.read_text())
    settings_.pop("pad_token")
    path.write_text(json.dumps(settings_))
    (tmp_path / "model" / "special_tokens_map.json").unlink()
    plain = MatroyshkaReranker(tmp_path / "model", released=True, dtype="float32", cutoff=[4, 8])
    assert plain.compute_score(PAIRS[0])[0] != full().at(cutoff=4).compute_score(
        PAIRS[0]
    )  # scored by the head of layer 2
    with pytest.raises(ValueError, match="released=True: the tokenizer of .* has no pad token"):
        plain.at(compress_layers=[2], compress_ratio=2)

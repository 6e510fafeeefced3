"""Arguments, the model's description and its adapters' descriptions agree, or are refused by name."""

import shutil
from pathlib import Path

import pytest
from conftest import Cache, ids_of
from test_description import ADAPTERS, BASE, LONG, PAIRS, POOLED, change, reranker, same

from pyterrier_llmrerank import MatroyshkaReranker


@pytest.mark.parametrize(("name", "value", "own"), [("start_layer", 1, 2), ("layer_sep", 2, 1)])
def test_arguments_that_contradict_the_trained_heads_are_refused(
    tmp_path: Path, name: str, value: int, own: int
) -> None:
    reranker(layer_sep=1).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"{name}={value}: model='.*saved' was trained with {name} {own}; allowed"):
        MatroyshkaReranker(tmp_path / "saved", **{name: value})


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A described adapter: for heads from layer 2 on, another prompt and shorter texts than usual."""
    reranker(adapters=ADAPTERS[0], token_adapters={}, max_length=90).save(tmp_path / "described")
    return tmp_path / "described"


@pytest.mark.parametrize("role", ["adapters", "token_adapters"])
@pytest.mark.parametrize("place", ["local", "hub"])
def test_an_adapter_over_a_base_keeps_its_own_description(
    role: str, place: str, described: Path, cached: Cache
) -> None:
    cached.add("owner/adapter", described, "a" * 40, "main")
    name = str(described) if place == "local" else "owner/adapter"
    if role == "adapters":
        opened, wanted = MatroyshkaReranker(BASE, adapters=name, dtype="float32"), MatroyshkaReranker(described)
    else:
        change(described, adapters=[], token_adapters={"2": "."})
        opened = MatroyshkaReranker(BASE, token_adapters={2: name}, dtype="float32", **POOLED)
        wanted = MatroyshkaReranker(described, **POOLED)
    assert ids_of(opened, LONG) == ids_of(wanted, LONG) == ids_of(reranker(max_length=90), LONG)
    same(opened, type(wanted)(described, dtype="float32", **(POOLED if role == "token_adapters" else {})))
    given = {role: name if role == "adapters" else {2: name}}
    with pytest.raises(ValueError, match=rf"start_layer=3: {role}: '.*' was trained with start_layer 2; allowed: 2"):
        MatroyshkaReranker(BASE, **given, start_layer=3, **POOLED).compute_score(PAIRS)
    other = MatroyshkaReranker(BASE, **given, prompt="Why?", max_length=512, **POOLED)
    assert ids_of(other, LONG) == ids_of(reranker(prompt="Why?"), LONG)


def test_adapters_that_disagree_are_refused(described: Path, tmp_path: Path) -> None:
    other = shutil.copytree(described, tmp_path / "other")
    change(other, prompt="Why?", adapters=["1", "."])
    with pytest.raises(
        ValueError, match=r"described' was trained with prompt 'Is it\?', but .*other' with 'Why\?'; the"
    ):
        MatroyshkaReranker(BASE, adapters=[described, other])
    reranker(adapters=ADAPTERS[0], token_adapters={}).save(tmp_path / "model")
    change(other, adapters=["."])
    message = r"other' was trained with prompt 'Why\?', but model='.*model' with 'Is it\?'; the two must agree"
    with pytest.raises(ValueError, match=message):
        MatroyshkaReranker(tmp_path / "model", adapters=other)
    asked = MatroyshkaReranker(tmp_path / "model", adapters=other, prompt="Why?", dtype="float32")
    same(asked, reranker(adapters=ADAPTERS[0], token_adapters={}, prompt="Why?", max_length=90))
    change(other, layers=5)
    with pytest.raises(ValueError, match="the base has 5 layers, but it has"):
        MatroyshkaReranker(BASE, adapters=other).compute_score(PAIRS)
    change(other, kind="rankllama", start_layer=None, prompt=None, layers=None, max_length=None)
    with pytest.raises(ValueError, match=r"adapters: '.*other': .* describes a rankllama model; open it with Rank"):
        MatroyshkaReranker(BASE, adapters=other)


def test_an_adapter_over_fewer_adapters_than_in_its_training_is_refused(described: Path) -> None:
    change(described, adapters=["adapter-1", "."])
    with pytest.raises(
        ValueError, match=r"described' was trained on this base with 1 adapters before it, but here it has 0"
    ):
        MatroyshkaReranker(BASE, adapters=described)
    opened = MatroyshkaReranker(BASE, adapters=[ADAPTERS[1], described], dtype="float32")
    same(opened, reranker(adapters=[ADAPTERS[1], ADAPTERS[0]], token_adapters={}))
    change(described, base="owner/other")  # into which the first may be merged
    same(MatroyshkaReranker(BASE, adapters=described, dtype="float32"), reranker(adapters=ADAPTERS[0]))


def test_a_change_of_an_adapters_description_is_seen(described: Path) -> None:
    opened = MatroyshkaReranker(BASE, adapters=described, dtype="float32")
    change(described, prompt="Why?")
    same(opened, reranker(adapters=ADAPTERS[0], token_adapters={}, prompt="Why?"))

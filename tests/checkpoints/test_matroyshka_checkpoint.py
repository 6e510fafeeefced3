"""A Matroyshka has a head for each of several layers, its own or copies of the row of Yes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MODELS, heads
from safetensors.torch import load_file

from pyterrier_llmrerank.checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint

RAW, FULL, SD = (str(MODELS / name) for name in ("mistral_base", "costwise_full", "adapter_sd"))
BASE, ADAPTER = str(MODELS / "rankllama_base"), str(MODELS / "rankllama_adapter")


def test_layer_wise_heads_are_the_files() -> None:
    checkpoint = MatroyshkaCheckpoint(FULL, (), None)
    assert list(checkpoint.head_layers) == [2, 3, 4, 5, 6, 7, 8]
    stored = load_file(MODELS / "costwise_full" / "model.safetensors")
    wanted = torch.cat([stored[f"lm_head.{k}.linear_head.weight"] for k in range(7)])
    assert torch.equal(heads(checkpoint), wanted)


def test_a_plain_model_starts_from_the_row_of_yes() -> None:
    row = load_file(MODELS / "mistral_base" / "model.safetensors")["lm_head.weight"][351]
    assert torch.equal(heads(MatroyshkaCheckpoint(RAW, (), 6)), torch.stack([row] * 3))
    only = MatroyshkaCheckpoint(RAW, (), None)
    assert list(only.head_layers) == [8]
    assert torch.equal(heads(only), row[None])


def test_a_tied_head_is_found_in_the_embedding(changed: Callable[..., str]) -> None:
    tied = changed(RAW, {"tie_word_embeddings": True}, **{"lm_head.weight": None})
    row = load_file(MODELS / "mistral_base" / "model.safetensors")["model.embed_tokens.weight"][351]
    assert torch.equal(heads(MatroyshkaCheckpoint(tied, (), None)), row[None])


def test_steps_between_heads(changed: Callable[..., str]) -> None:
    assert list(MatroyshkaCheckpoint(changed(FULL, {"layer_sep": 2}), (), None).head_layers) == [2, 4, 6, 8]


def test_adapters_below_the_models_folder(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "model")
    shutil.copytree(SD, tmp_path / "model" / "compensate" / "layer" / "full")
    checkpoint = MatroyshkaCheckpoint(str(tmp_path / "model"), ["compensate/layer/full"], None)
    assert len(checkpoint.adapters[0].modules_ending_in("linear_head")) == 7


def test_a_missing_lm_head_is_not_replaced_by_the_embedding(changed: Callable[..., str]) -> None:
    untied = changed(RAW, {"tie_word_embeddings": False}, **{"lm_head.weight": None})
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight'"):
        heads(MatroyshkaCheckpoint(untied, (), None))


@pytest.mark.parametrize("start", [1, 3])
def test_an_adapter_trained_from_another_start_layer(start: int) -> None:
    with pytest.raises(ValueError, match=rf"updates 7 layer-wise heads .* has {9 - start} from start_layer={start} on"):
        MatroyshkaCheckpoint(RAW, [SD], start)


@pytest.mark.parametrize(("model", "start"), [(FULL, 3), (RAW, 9)])
def test_a_start_layer_that_does_not_fit(model: str, start: int) -> None:
    with pytest.raises(ValueError, match=rf"start_layer={start}"):
        MatroyshkaCheckpoint(model, (), start)


@pytest.mark.parametrize("config", [{"start_layer": None}, {"start_layer": 0}, {"layer_sep": 0}, {"layer_sep": "1"}])
def test_a_layer_wise_configuration_out_of_bounds(changed: Callable[..., str], config: dict) -> None:
    with pytest.raises(ValueError, match="start_layer=.*layer_sep=.*allowed"):
        MatroyshkaCheckpoint(changed(FULL, config), (), None)


def test_layer_wise_adapter_on_a_model_without_such_heads() -> None:
    with pytest.raises(ValueError, match=r"updates layer-wise heads \(linear_head\).*has none; give the start_layer"):
        MatroyshkaCheckpoint(RAW, [SD], None)


def test_a_rankllama_adapter_among_matroyshkas() -> None:
    with pytest.raises(ValueError, match=r"holds whole tensors"):
        MatroyshkaCheckpoint(RAW, [ADAPTER], 2)


@pytest.mark.parametrize("start", [None, 0, 9, 2.0, True, "y" * 10**5])
def test_a_start_layer_that_is_none_is_shown(changed: Callable[..., str], start: object) -> None:
    with pytest.raises(ValueError, match=r"start_layer=.*: model='.*' has 8 layers; allowed: integers") as info:
        MatroyshkaCheckpoint(changed(FULL, {"start_layer": start}), (), None)
    assert len(str(info.value)) < 500

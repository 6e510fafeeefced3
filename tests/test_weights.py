"""One copy in memory, no deeper than its living sharers need, in the dtype that the device is good at."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MODELS
from safetensors.torch import load_file, save_file

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank import weights as module
from pyterrier_llmrerank.weights import resolve_device, resolve_dtype

FULL = str(MODELS / "costwise_full")
PAIR = ("what is panda", "a bear")


def test_shapes_and_equal_rerankers_share_one_copy() -> None:
    first = MatroyshkaReranker(FULL, dtype="float32")
    first.compute_score(PAIR)
    for other in (
        first.at(cutoff=4),
        first.at(normalize=True),
        MatroyshkaReranker(FULL, dtype="float32", max_length=64),
    ):
        other.compute_score(PAIR)
        assert other._weights() is first._weights()
        assert other._weights().at_depth(1)[0] is first._weights().at_depth(1)[0]


def test_other_weights_are_not_shared() -> None:
    first = MatroyshkaReranker(FULL, dtype="float32")
    others = (
        MatroyshkaReranker(FULL, dtype="bfloat16"),
        MatroyshkaReranker(FULL, dtype="float32", adapters=[MODELS / "adapter_sd"]),
        MatroyshkaReranker(str(MODELS / "mistral_base"), dtype="float32"),
        RankLLaMAReranker(FULL, dtype="float32"),
    )
    assert all(other._weights() is not first._weights() for other in others)


def parameters(weights: module.Weights) -> list[bool]:
    """For each decoder layer, whether it is in memory."""
    model = weights.at_depth(1)[0]
    return [next(layer.parameters()).device.type != "meta" for layer in model.layers]


def test_only_what_is_run_is_loaded_and_what_nobody_needs_is_dropped() -> None:
    shallow = MatroyshkaReranker(FULL, cutoff=3)
    weights = shallow._weights()
    shallow.compute_score(PAIR)
    assert weights.loaded_layers == 3
    deep = shallow.at(cutoff=7)
    before = shallow.compute_score(PAIR)
    assert weights.loaded_layers == 3
    deep.compute_score(PAIR)
    assert parameters(weights) == [True] * 7 + [False]
    del deep
    gc.collect()
    assert parameters(weights) == [True] * 3 + [False] * 5
    assert shallow.compute_score(PAIR) == before


def test_a_template_that_lives_keeps_what_it_may_need() -> None:
    template = MatroyshkaReranker(FULL)
    template.compute_score(PAIR)
    shallow = template.at(cutoff=3)
    shallow.compute_score(PAIR)
    del shallow
    gc.collect()
    assert template._weights().loaded_layers == 8


def test_the_last_sharer_takes_the_weights_with_it() -> None:
    reranker = MatroyshkaReranker(FULL, max_length=100)
    key = (type(reranker).__name__, reranker._weights_key(), None, "auto")
    reranker.compute_score(PAIR)
    assert key in module._shared
    del reranker
    gc.collect()
    assert key not in module._shared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_have_the_dtype_asked_for(dtype: str) -> None:
    reranker = MatroyshkaReranker(
        str(MODELS / "mistral_base"), adapters=[MODELS / "adapter_sd"], start_layer=2, dtype=dtype
    )
    model, heads, _ = reranker._weights().at_depth(8)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert heads.dtype == torch.float32


def test_auto_is_bf16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("float16", cpu) == torch.float16
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert resolve_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(None).type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device(None).type == "cpu"
    for device in ("abacus", "cuda:99"):
        with pytest.raises(ValueError, match=f"device='{device}' cannot be used here"):
            resolve_device(device)


def test_a_tensor_of_another_shape_than_the_configuration_says(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 161}))
    with pytest.raises(ValueError, match=r"'layers\.0\.mlp\.gate_proj\.weight' is \[160, 64\].* asks for \[161, 64\]"):
        MatroyshkaReranker(tmp_path / "model").compute_score(PAIR)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'layers\.1\.mlp\.up_proj\.weight'"):
        MatroyshkaReranker(tmp_path / "model").compute_score(PAIR)


def test_a_changed_argument_leaves_the_old_weights() -> None:
    reranker = MatroyshkaReranker(FULL, dtype="float16")
    reranker.compute_score(PAIR)
    old = reranker._weights()
    reranker.set_parameter("dtype", "float32")
    assert reranker._weights() is not old
    assert old.loaded_layers == 0  # nobody is left who needs them
    reranker.compute_score(PAIR)
    assert reranker._weights().dtype == torch.float32

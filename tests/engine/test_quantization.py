"""Linear layers are quantised to eight bits; nothing else changes."""

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, frame, layers_in_memory
from safetensors.torch import load_file

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.engine import weights as weights_module
from pyterrier_llmrerank.engine.quantization import quantization_of

ao = pytest.importorskip("torchao.quantization")

FULL = str(MODELS / "costwise_full")
CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


def make(**options: object) -> list[LLMReranker]:
    return [
        MatroyshkaReranker(FULL, **options),
        RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", **options),
    ]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "capability", "wanted"),
    [
        ("int8", CPU, "float32", None, "Int8DynamicActivationInt8WeightConfig"),
        ("int8", CPU, "bfloat16", None, "Int8WeightOnlyConfig"),
        ("int8", CUDA, "bfloat16", (8, 0), "Int8WeightOnlyConfig"),
        ("int8", MPS, "float32", None, "Int8WeightOnlyConfig"),
        ("float8", CPU, "float32", None, "Float8WeightOnlyConfig"),
        ("float8", CUDA, "bfloat16", (8, 0), "Float8WeightOnlyConfig"),
        ("float8", CUDA, "bfloat16", (8, 9), "Float8DynamicActivationFloat8WeightConfig"),
        ("float8", CUDA, "float16", (9, 0), "Float8WeightOnlyConfig"),
    ],
)
def test_activations_are_quantised_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, name: str, device: torch.device, dtype: str, capability: object, wanted: str
) -> None:
    given = []
    monkeypatch.setattr(ao, "quantize_", lambda module, config: given.append(config))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    quantization_of(name, device, getattr(torch, dtype))(torch.nn.Linear(2, 2))
    assert type(given[0]).__name__ == wanted
    granularity = given[0].granularity
    assert all(
        isinstance(part, ao.PerRow) for part in (granularity if isinstance(granularity, list) else [granularity])
    )


def test_activations_are_int8_on_cuda_in_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In others, torchao's product prints a tensor, so that the host waits for the GPU."""
    given = []
    monkeypatch.setattr(ao, "quantize_", lambda module, config: given.append(type(config).__name__))
    for compiled in (True, False):
        quantization_of("int8", CUDA, torch.bfloat16, compiled)(torch.nn.Linear(2, 2))
    assert given == ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"]


@pytest.mark.parametrize(("name", "error"), [("int8", 0.02), ("float8", 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_quantised_layer_is_accurate_and_treats_each_token_alone(name: str, error: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(64, 48, dtype=dtype)
    tokens = torch.randn(9, 64, dtype=dtype) * torch.logspace(-2, 2, 9, dtype=dtype)[:, None]
    wanted = layer(tokens).float()
    quantization_of(name, CPU, dtype)(layer)
    got = layer(tokens).float()
    assert type(layer.weight.data).__name__ == f"{name.title()}Tensor"
    assert 0 < ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < error
    last_bit = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        torch.cat([layer(token[None]) for token in tokens]).float(), got, rtol=last_bit, atol=1e-4
    )


def test_quantised_scores_are_close() -> None:
    """The tolerance is wide because a random model's layers amplify the rounding of the processor's kernels."""
    for usual, quantised in zip(make(dtype="float32"), make(dtype="float32", quantization="int8"), strict=True):
        wanted, got = (reranker(frame(6, 4))["score"].to_numpy() for reranker in (usual, quantised))
        assert np.abs(got - wanted).max() > 0
        assert np.corrcoef(got, wanted)[0, 1] > 0.9


@pytest.mark.parametrize("name", ["int8", "float8"])
def test_layers_are_quantised_one_by_one_when_loaded_and_when_loaded_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one layer is in memory unquantised, and a dropped layer leaves nothing there."""
    unquantised = []

    def counted(*arguments: Any) -> Callable[[torch.nn.Module], None]:
        quantize = quantization_of(*arguments)

        def counting(layer: torch.nn.Module) -> None:
            there = [p for other in weights.at_depth(0)[0].layers for p in other.parameters() if not p.is_meta]
            unquantised.append(sum(p.dim() == 2 and type(p.data) is torch.Tensor for p in there))
            quantize(layer)

        return counting

    monkeypatch.setattr(weights_module, "quantization_of", counted)
    own = shutil.copytree(FULL, tmp_path / "own")  # no other test uses this copy
    shallow = MatroyshkaReranker(own, cutoff=3, dtype="float32", quantization=name)
    weights = shallow.scorer().weights[0]
    before = shallow(frame())["score"]
    deep = shallow.at(cutoff=7)
    wanted = deep(frame())["score"]
    assert unquantised == [7] * 7
    del deep
    gc.collect()
    assert layers_in_memory(weights) == [1, 2, 3]
    dropped = weights.at_depth(0)[0].layers[3:]
    assert all(tensor.device.type == "meta" for layer in dropped for tensor in layer.parameters())
    np.testing.assert_array_equal(shallow(frame())["score"], before)
    np.testing.assert_array_equal(shallow.at(cutoff=7)(frame())["score"], wanted)
    assert len(unquantised) == 11


def test_only_projections_are_quantised() -> None:
    weights = MatroyshkaReranker(FULL, dtype="float32", quantization="int8").scorer().weights[0]
    model, heads, _ = weights.at_depth(8)
    kinds = {name: type(parameter.data).__name__ for name, parameter in model.named_parameters()}
    quantised = {name for name, kind in kinds.items() if kind == "Int8Tensor"}
    assert len(quantised) == 8 * 7
    assert quantised == {name for name in kinds if name.endswith("_proj.weight")}
    assert heads.dtype == torch.float32


def test_with_quantised_weights_a_score_does_not_depend_on_its_batch() -> None:
    """With quantised activations scores may differ: a difference in the last bit can change a rounded value."""
    rows = frame(2, 5)
    for reranker in make(dtype="float32", quantization="float8"):
        alone = [reranker(rows.iloc[[row]])["score"].item() for row in range(len(rows))]
        np.testing.assert_allclose(reranker(rows)["score"], alone, atol=1e-4)


def test_a_merged_model_is_not_quantised(tmp_path: Path) -> None:
    saved = []
    for number, reranker in enumerate(make(dtype="bfloat16") + make(dtype="bfloat16", quantization="int8")):
        reranker(frame())
        reranker.save(tmp_path / str(number), merged=True)
        saved.append(load_file(tmp_path / str(number) / "model.safetensors"))
    for usual, quantised in (saved[0::2], saved[1::2]):
        assert usual.keys() == quantised.keys()
        assert all(torch.equal(usual[name], quantised[name]) for name in usual)


def test_without_torchao_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"quantization='int8' needs torchao: pip install 'pyterrier-llmrerank\["):
        MatroyshkaReranker(FULL, dtype="float16", quantization="int8")

"""Packed linear layers equal torch's, and a row's result does not depend on the rows beside it."""

import platform

import pytest
import torch
from conftest import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear, silu
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.engine.linears import (
    PackedLinear,
    can_pack,
    linear_plus,
    mlp_plus,
    pack_linears,
    product,
    replace_linears,
)

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(CPU, dtype)]
#: Relative to the sum of the magnitudes that a product adds: one rounding of the result, and fp32 sums.
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
needs_packing = pytest.mark.skipif(not DTYPES, reason="this CPU or this build of torch has no packed products")


def made(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> tuple[nn.Linear, PackedLinear]:
    """A linear layer with random weights, and the same one packed."""
    plain = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    packed = PackedLinear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    packed.load_state_dict(plain.state_dict())
    packed.pack()
    return plain, packed


@needs_packing
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 90), st.booleans(), st.sampled_from(DTYPES or [None]))
@torch.inference_mode()
def test_products_and_fused_operations_equal_torchs(
    rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    plain, packed = made(inputs, outputs, bias, dtype)
    states, other = torch.randn(1, rows, inputs).to(dtype), torch.randn(1, rows, outputs).to(dtype)
    exact = linear(states.double(), plain.weight.double(), plain.bias.double() if bias else None)
    magnitudes = linear(states.double().abs(), plain.weight.double().abs(), plain.bias.double().abs() if bias else None)
    for got, wanted, size in (
        (packed(states), exact, magnitudes),
        (product(states, packed.weight, packed.bias), exact, magnitudes),
        (packed.silu(states), silu(exact), magnitudes + 1),
        (packed.times(states, other), exact * other, magnitudes * other.abs()),
        (packed.plus(states, other), exact + other, magnitudes + other.abs()),
        (linear_plus(packed, states, other), exact + other, magnitudes + other.abs()),
        (linear_plus(plain, states, other), exact + other, 2 * (magnitudes + other.abs())),  # rounds twice
    ):
        assert (got.dtype, got.shape) == (dtype, other.shape)
        assert ((got - wanted).abs() <= ERRORS[dtype] * size + 1e-30).all()


@needs_packing
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_rows_result_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    for inputs, outputs in ((32, 48), (576, 192), (576, 1536), (1536, 576)):
        _, packed = made(inputs, outputs, False, dtype)
        states = torch.randn(700, inputs).to(dtype)
        together = packed(states)
        for first, last in ((0, 2), (5, 8), (0, 15), (3, 36), (200, 700)):
            alone = packed(states[first:last])
            if dtype == torch.float32:
                assert torch.equal(alone, together[first:last])
            else:  # some CPUs choose another kernel for another number of rows
                torch.testing.assert_close(alone, together[first:last], rtol=2**-7, atol=1e-3)


@needs_packing
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@torch.inference_mode()
def test_a_packed_mlp_equals_transformers(activation: str) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
    for biased in (False, True):
        plain = LlamaMLP(LlamaConfig(**sizes, hidden_act=activation, mlp_bias=biased)).requires_grad_(False)
        with torch.device("meta"):
            packed = LlamaMLP(plain.config)
        replace_linears(packed)
        packed.load_state_dict(plain.state_dict(), assign=True)
        pack_linears(packed)
        assert all(part.weight.is_mkldnn for part in packed.modules() if isinstance(part, nn.Linear))
        states, term = torch.randn(2, 1, 9, 24)
        wanted = term + plain(states)
        for mlp in (plain, packed):
            torch.testing.assert_close(mlp_plus(mlp, states, term), wanted, atol=1e-6, rtol=1e-5)


@needs_packing
@torch.inference_mode()
def test_torch_counts_the_operations_of_packed_products() -> None:
    _, packed = made(24, 40, True, torch.float32)
    states, other = torch.randn(1, 9, 24), torch.randn(1, 9, 40)
    for compute in (packed, packed.silu, lambda s: packed.times(s, other), lambda s: packed.plus(s, other)):
        with FlopCounterMode(display=False) as counter:
            compute(states)
        assert counter.get_total_flops() == 2 * 9 * 24 * 40


@pytest.mark.parametrize("machine", ["arm64", "aarch64"])
def test_only_measured_kinds_of_machines_and_dtypes_pack(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    assert not can_pack(torch.device("cuda"), torch.float32)
    assert not can_pack(CPU, torch.float16)
    assert can_pack(CPU, torch.float32) or not DTYPES
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert not can_pack(CPU, torch.float32)


@needs_packing
def test_a_reranker_holds_packed_weights_alone() -> None:
    reranker = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32", device="cpu")
    reranker.compute_score(("what is panda", "a bear"))
    decoder, _, _ = reranker.scorer().weights[0].at_depth(8)
    linears = [part for layer in decoder.layers for part in layer.modules() if isinstance(part, nn.Linear)]
    assert len(linears) == 7 * 8
    assert all(part.weight.is_mkldnn for part in linears)

"""Norms equal transformers' own, with their gradients, and a row's norm does not depend on the rows beside it."""

import pytest
import torch
from conftest import MODELS
from transformers import Qwen3Config, Qwen3Model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pyterrier_llmrerank.checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
from pyterrier_llmrerank.engine.norms import RMSNorm, replace_norms
from pyterrier_llmrerank.engine.weights import build_decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_norm_has_the_gradient_of_the_decoders(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    states, gradient = (3 * torch.randn(1, 7, 48, generator=generator).to(dtype) for _ in range(2))
    norm.weight.copy_(torch.randn(48, generator=generator))
    (wanted, of_input), (got, of_ours) = (
        (out := module(leaf := states.clone().requires_grad_()), torch.autograd.grad(out, leaf, gradient)[0])
        for module in (norm, RMSNorm(norm))
    )
    torch.testing.assert_close(got, wanted, atol=0, rtol=1e-6 if dtype == torch.float32 else 2**-7)
    torch.testing.assert_close(of_ours, of_input, atol=1e-6 if dtype == torch.float32 else 0.05, rtol=1e-2)
    norm.requires_grad_(True)
    torch.testing.assert_close(RMSNorm(norm)(states), norm(states))
    RMSNorm(norm)(states).sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [48, 576, 2048])
@torch.inference_mode()
def test_scoring_changes_no_input_and_normalises_each_row_by_itself(width: int, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(width, eps=1e-5)
    generator = torch.Generator().manual_seed(width)
    norm.weight.copy_(torch.randn(width, generator=generator))
    norm.to(dtype).requires_grad_(False)
    states = (3 * torch.randn(1, 70, width, generator=generator)).to(dtype)
    before, together = states.clone(), RMSNorm(norm)(states)
    assert torch.equal(states, before)
    error = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]  # two roundings
    torch.testing.assert_close(together, norm(states), atol=0, rtol=error)
    for first, last in ((0, 1), (69, 70), (3, 20), (1, 69)):
        assert torch.equal(RMSNorm(norm)(states[:, first:last]), together[:, first:last])


@torch.inference_mode()
def test_a_weight_of_another_dtype_decides_the_results_dtype() -> None:
    norm = LlamaRMSNorm(48, eps=1e-5).requires_grad_(False)
    states = torch.randn(3, 48).bfloat16()
    assert RMSNorm(norm)(states).dtype == norm(states).dtype == torch.float32


def test_all_norms_of_a_decoder_are_replaced() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    qwen = Qwen3Model(Qwen3Config(vocab_size=20, num_key_value_heads=1, head_dim=8, **sizes))
    replace_norms(qwen)
    for decoder, of_layer in (
        (qwen, 4),
        (build_decoder(MatroyshkaCheckpoint(str(MODELS / "mistral_base"), (), None)), 2),
    ):
        norms = [module for name, module in decoder.named_modules() if name.endswith("norm")]
        assert len(norms) == 1 + of_layer * len(decoder.layers)  # Qwen3 normalises queries and keys too
        assert all(isinstance(norm, RMSNorm) for norm in norms)

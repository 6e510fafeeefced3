"""Element-wise work by torch, and the choice of Triton; its kernels are tested in test_triton_kernels.py."""

import logging
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu

from pyterrier_llmrerank.engine import elementwise


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9))
def test_heads_are_rotated(tokens: int, heads: int, half: int) -> None:
    """Each pair of coordinates is a complex number, turned by the position's angle."""
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(1, tokens, heads, 2 * half, generator=generator, dtype=torch.float64)
    angles = torch.randn(1, tokens, half, generator=generator, dtype=torch.float64)
    table = torch.cat((angles, angles), dim=-1)
    turned = torch.complex(*states.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    wanted = torch.cat((turned.real, turned.imag), dim=-1)
    before = states.clone()
    torch.testing.assert_close(elementwise.rotate(states, table.cos(), table.sin()), wanted)
    assert torch.equal(states, before)


def test_a_gate_is_applied() -> None:
    gate, up = torch.randn(2, 3, 5)
    torch.testing.assert_close(elementwise.silu_times(gate, up), silu(gate) * up)


def test_without_triton_torch_does_it_and_a_warning_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pyterrier_llmrerank.engine.triton_kernels", None)
    monkeypatch.delattr("pyterrier_llmrerank.engine.triton_kernels", raising=False)
    elementwise._triton_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [elementwise._triton_kernels(torch.device("cuda", 7)) for _ in range(2)] == [None, None]
    [record] = caplog.records
    assert record.getMessage().startswith("Triton does not run on cuda:7, so scoring is slower: ")
    elementwise._triton_kernels.cache_clear()

"""Element-wise work by torch, and the choice of Triton; its kernels are tested in test_triton_kernels.py."""

import logging
import sys
from functools import cache

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
    monkeypatch.setattr(elementwise, "_triton_kernels", cache(elementwise._triton_kernels.__wrapped__))
    with caplog.at_level(logging.WARNING):
        for name in ("normalise", "silu_times"):
            assert elementwise._checked.__wrapped__(name, torch.device("cuda", 7), torch.float32, (8,)) is None
    [record] = caplog.records
    assert record.getMessage().startswith("Triton cannot be imported, so scoring is slower: ")

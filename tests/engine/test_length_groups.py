"""Attention in groups equals attention pair by pair, in every dtype, with windows, padding and a prefix from before."""

import numpy as np
import pytest
import torch

from pyterrier_llmrerank.engine import length_groups
from pyterrier_llmrerank.engine.length_groups import LengthGroups
from pyterrier_llmrerank.engine.packing import Packing

HEADS, KEY_HEADS, WIDTH = 6, 2, 32
PREFIX = 25


def packing(padded: bool) -> Packing:
    """Pairs of 10 to 151 tokens: one whose prefix is not in the row, two that share one, and others."""
    body = np.array([30, 0, 3, 120, 88, 30, 4])
    prefix, suffix = np.array([PREFIX, PREFIX, PREFIX, 30, 40, 16, 3]), np.ones(len(body), int)
    padding = -(prefix + body + suffix) % 8 if padded else np.zeros_like(body)
    return Packing(prefix, body, suffix, np.array([-1, 1, 1, 3, 4, 5, 6]), padding)


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, real: int, window: int | None) -> torch.Tensor:
    """Attention of one pair, ``[tokens, heads, width]``, in fp64."""
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (distance >= 0) & (distance < (window or 10**9)) & (torch.arange(len(query)) < real)
    key, value = (states.repeat_interleave(HEADS // KEY_HEADS, 1) for states in (key, value))
    logits = torch.einsum("qhw,khw->hqk", query, key) * 0.3
    return torch.einsum("hqk,khw->qhw", logits.masked_fill(~seen, -1e30).softmax(-1), value)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(
    ("dtype", "close", "products"),
    [
        (torch.float32, 1e-5, False),
        (torch.bfloat16, 0.03, False),
        (torch.bfloat16, 0.03, True),
        (torch.float16, 0.004, False),
    ],
    ids=str,
)
@torch.inference_mode()
def test_equals_attention_pair_by_pair(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, close: float, window: int | None, padded: bool, products: bool
) -> None:
    monkeypatch.setattr(length_groups, "_has_products", lambda: products)
    packed = packing(padded)
    generator = torch.Generator().manual_seed(1)
    tokens = len(packed.positions)
    query, key, value = (
        torch.randn(count, heads, WIDTH, generator=generator).to(dtype)
        for count, heads in ((tokens, HEADS), (tokens + PREFIX, KEY_HEADS), (tokens + PREFIX, KEY_HEADS))
    )
    row = [states.transpose(0, 1)[None] for states in (query, key, value)]
    got = LengthGroups(packed).attend(*row, 0.3, window)[0]
    assert (got.shape, got.dtype) == (query.shape, dtype)
    for pair, length in enumerate(packed.lengths):
        places = packed.places[pair, :length]
        asked = np.where(places < tokens, places, 0)
        wanted = naive(query[asked].double(), key[places].double(), value[places].double(), packed.real[pair], window)
        own = (places < tokens) & (packed.pair_of_token[asked] == pair)
        torch.testing.assert_close(got[asked[own]].double(), wanted[own], atol=close, rtol=close)


@torch.inference_mode()
def test_large_logits_are_not_rounded_before_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys with a large part in common give logits around 18, which bf16 rounds to steps of an eighth."""
    monkeypatch.setattr(length_groups, "_has_products", lambda: True)
    packed, generator = packing(False), torch.Generator().manual_seed(1)
    tokens = len(packed.positions)
    query = torch.randn(tokens, HEADS, WIDTH, generator=generator) + 1.0
    key, value = (torch.randn(tokens + PREFIX, KEY_HEADS, WIDTH, generator=generator) for _ in range(2))
    row = [states.bfloat16().transpose(0, 1)[None] for states in (query, key + 2.0, value)]
    wanted = LengthGroups(packed).attend(*(states.float() for states in row), 0.3, None)

    def error(**options: bool) -> float:
        return float((LengthGroups(packed).attend(*row, 0.3, None, **options).float() - wanted).norm() / wanted.norm())

    assert error(large_logits=True) < 0.005 < error()


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@torch.inference_mode()
def test_a_pair_and_its_prefix_do_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, products: bool
) -> None:
    """Bit for bit."""
    monkeypatch.setattr(length_groups, "_has_products", lambda: products)
    body, length = np.array([100, 30, 0]), 24
    prefix, suffix = np.full(3, length), np.ones(3, int)
    together = Packing(prefix, body, suffix, np.zeros(3, int), np.zeros(3, int))
    tokens, generator = len(together.positions), torch.Generator().manual_seed(1)
    row = [
        torch.randn(1, heads, tokens, WIDTH, generator=generator).to(dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    got = LengthGroups(together).attend(*row, 0.3, None)[0]
    for pair in range(3):
        places = together.places[pair, : together.lengths[pair]]
        alone = Packing(*(part[[pair]] for part in (prefix, body, suffix)), np.zeros(1, int), np.zeros(1, int))
        own = LengthGroups(alone).attend(*(states[:, :, places] for states in row), 0.3, None)[0]
        assert torch.equal(own, got[places])


@torch.inference_mode()
def test_pairs_that_are_nothing_but_a_prefix() -> None:
    """Two of them share one prefix of a whole block, so neither has a query of its own."""
    lengths, none = np.full(2, 16), np.zeros(2, int)
    packed = Packing(lengths, none, none, none, none)
    query, key, value = (torch.randn(16, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    got = LengthGroups(packed).attend(*(states.transpose(0, 1)[None] for states in (query, key, value)), 0.3, None)[0]
    torch.testing.assert_close(got, naive(query, key, value, 16, None), atol=1e-5, rtol=1e-5)

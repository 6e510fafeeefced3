"""Pooling equals its definition, which is written out here token by token."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank.engine.packing import Packing
from pyterrier_llmrerank.engine.pooling import Pooling

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 11), st.integers(1, 4)), min_size=1, max_size=4)


def by_definition(states: torch.Tensor, weights: torch.Tensor, row: tuple[int, int, int], ratio: int) -> torch.Tensor:
    prefix, body, suffix = row
    out = [states[i] for i in range(prefix)]
    for start in range(prefix, prefix + body, ratio):
        group = range(start, min(start + ratio, prefix + body))
        total = sum(weights[i] for i in group)
        out.append(sum(weights[i] / total * states[i] for i in group))
    return torch.stack(out + [states[i] for i in range(prefix + body, prefix + body + suffix)])


CPU = torch.device("cpu")


def packing(rows: list[tuple[int, int, int]], owner: list[int] | None = None) -> Packing:
    prefix, body, suffix = (np.array(part) for part in zip(*rows, strict=True))
    return Packing(prefix, body, suffix, np.array(owner or range(len(rows))), np.zeros(len(rows), dtype=int))


@settings(deadline=None)
@given(ROWS, st.sampled_from([1, 2, 4, 8]), st.booleans(), st.integers(0, 2**16))
def test_pooling_equals_its_definition(rows: list[tuple[int, int, int]], ratio: int, shares: bool, seed: int) -> None:
    rows = [*rows, (rows[0][0], 5, 1)] if shares else rows  # shares the first pair's prefix
    before = packing(rows, [*range(len(rows) - 1), 0] if shares else None)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(before.pair_of_token), 6, generator=generator)
    weights = torch.rand(len(rows), before.longest, generator=generator) + 1e-3
    pooling = Pooling(before, ratio, CPU)
    got = pooling(hidden, weights.log())
    assert got.isfinite().all()
    assert len(got) == len(pooling.after.pair_of_token)
    for index, row in enumerate(rows):
        wanted = by_definition(hidden[before.places[index]], weights[index], row, ratio)
        assert pooling.after.lengths[index] == len(wanted)
        torch.testing.assert_close(got[pooling.after.places[index, : len(wanted)]], wanted, atol=1e-5, rtol=1e-5)


def test_weights_too_small_for_fp32_keep_their_proportions() -> None:
    """Weights of e^-300 are 0 in fp32; their logarithms are not."""
    hidden = torch.tensor([[0.0], [1.0], [3.0], [9.0]])
    log_weights = torch.tensor([[0.0, -300.0, -300.0 + torch.tensor(3.0).log(), 0.0]])
    got = Pooling(packing([(1, 2, 1)]), 2, CPU)(hidden, log_weights)
    torch.testing.assert_close(got, torch.tensor([[0.0], [2.5], [9.0]]))


def test_groups_outside_the_window_become_their_mean() -> None:
    lowest = torch.finfo(torch.float32).min
    got = Pooling(packing([(0, 2, 1)]), 2, CPU)(torch.tensor([[2.0], [4.0], [1.0]]), torch.full((1, 3), lowest))
    torch.testing.assert_close(got, torch.tensor([[3.0], [1.0]]))

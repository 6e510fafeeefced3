"""Pooling does what its definition says, written out here token by token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank.compression import Spans, compress

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 11), st.integers(1, 4)), min_size=1, max_size=4)


def by_definition(states: torch.Tensor, weights: torch.Tensor, row: tuple[int, int, int], ratio: int) -> torch.Tensor:
    prefix, body, suffix = row
    out = [states[i] for i in range(prefix)]
    for start in range(prefix, prefix + body, ratio):
        group = range(start, min(start + ratio, prefix + body))
        total = sum(weights[i] for i in group)
        out.append(sum(weights[i] / total * states[i] for i in group))
    return torch.stack(out + [states[i] for i in range(prefix + body, prefix + body + suffix)])


@settings(deadline=None)
@given(ROWS, st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**16))
def test_equals_the_definition(rows: list[tuple[int, int, int]], ratio: int, seed: int) -> None:
    spans = Spans(*(list(part) for part in zip(*rows, strict=True)))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(rows), max(spans.lengths), 6, generator=generator)
    weights = torch.rand(len(rows), max(spans.lengths), generator=generator) + 1e-3
    got, after = compress(hidden, weights.log(), spans, ratio)
    assert got.isfinite().all()
    assert got.shape[1] == max(after.lengths)
    for index, row in enumerate(rows):
        wanted = by_definition(hidden[index], weights[index], row, ratio)
        assert after.lengths[index] == len(wanted)
        torch.testing.assert_close(got[index, : len(wanted)], wanted, atol=1e-5, rtol=1e-5)


def test_vanishing_weights_still_weigh() -> None:
    """Weights of e^-300 are 0 in fp32, but their proportions are known."""
    hidden = torch.tensor([[[0.0], [1.0], [3.0], [9.0]]])
    log_weights = torch.tensor([[0.0, -300.0, -300.0 + torch.tensor(3.0).log(), 0.0]])
    got, _ = compress(hidden, log_weights, Spans([1], [2], [1]), 2)
    torch.testing.assert_close(got, torch.tensor([[[0.0], [2.5], [9.0]]]))


def test_unseen_groups_become_their_mean() -> None:
    lowest = torch.finfo(torch.float32).min
    got, _ = compress(torch.tensor([[[2.0], [4.0], [1.0]]]), torch.full((1, 3), lowest), Spans([0], [2], [1]), 2)
    torch.testing.assert_close(got, torch.tensor([[[3.0], [1.0]]]))

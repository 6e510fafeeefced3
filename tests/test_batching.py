"""Every row is run once, alike lengths together, and lack of memory makes batches smaller, not scores fewer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_llmrerank import ScoringError
from pyterrier_llmrerank.batching import is_out_of_memory, run_in_batches

LENGTHS = st.lists(st.integers(0, 50), max_size=40)
LIMIT = st.none() | st.integers(1, 200)


@given(LENGTHS, LIMIT, LIMIT)
def test_each_row_once_within_the_limits(lengths: list[int], tokens: int | None, rows: int | None) -> None:
    seen: list[list[int]] = []
    assert run_in_batches(lengths, seen.append, tokens=tokens, rows=rows) is None
    flat = [index for batch in seen for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    for batch in seen:
        assert rows is None or len(batch) <= rows
        assert tokens is None or len(batch) == 1 or len(batch) * lengths[batch[0]] <= tokens


@given(LENGTHS, st.integers(1, 300), LIMIT, LIMIT)
def test_the_work_goes_on_when_memory_is_short(
    lengths: list[int], memory: int, tokens: int | None, rows: int | None
) -> None:
    done: list[int] = []

    def run(batch: list[int]) -> None:
        if len(batch) * lengths[batch[0]] > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(batch)

    failed = run_in_batches(lengths, run, tokens=tokens, rows=rows)
    if max(lengths, default=0) > memory:
        assert failed is not None
        assert lengths[failed] > memory
    else:
        assert failed is None
        assert sorted(done) == list(range(len(lengths)))


def test_what_fitted_once_is_not_tried_larger() -> None:
    """One failure shows the limit; it is not run into again with every batch."""
    failures = 0

    def run(batch: list[int]) -> None:
        nonlocal failures
        if len(batch) > 10:
            failures += 1
            raise MemoryError

    run_in_batches([7] * 100, run)
    assert failures == 4  # 100, 50, 25, 13


def test_a_score_that_failed_is_no_lack_of_memory() -> None:
    def run(batch: list[int]) -> None:
        raise ScoringError("the score of docno 'out of memory' is not finite", None)

    with pytest.raises(ScoringError):
        run_in_batches([1], run)


def test_other_errors_pass() -> None:
    def run(batch: list[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_in_batches([1], run)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_signs_of_short_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)

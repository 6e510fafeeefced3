"""Every pair runs once, beside pairs of similar length; if memory runs out, batches shrink and no score is lost."""

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_llmrerank import ScoringError
from pyterrier_llmrerank.engine.batching import (
    SPREAD,
    Budget,
    is_out_of_memory,
    packed_size,
    query_chunks,
    run_in_batches,
)
from pyterrier_llmrerank.engine.inputs import Ids
from pyterrier_llmrerank.engine.packing import PackedPairs

PAIRS = st.lists(
    st.builds(
        lambda prefix, body, suffix: Ids([prefix] * prefix, [7] * body, [8] * suffix),
        st.integers(1, 9),
        st.integers(0, 50),
        st.integers(0, 3),
    ),
    max_size=40,
)
LIMIT = st.none() | st.integers(1, 200)


def size(pairs: list[Ids], batch: list[int]) -> int:
    return len(PackedPairs([pairs[index] for index in batch]).ids)


@given(PAIRS, LIMIT, LIMIT)
def test_each_pair_runs_once_within_the_limits(pairs: list[Ids], tokens: int | None, rows: int | None) -> None:
    seen: list[list[int]] = []
    assert run_in_batches(pairs, seen.append, Budget(tokens, rows)) is None
    assert sorted(index for batch in seen for index in batch) == list(range(len(pairs)))
    for batch in seen:
        assert packed_size([pairs[index] for index in batch]) == size(pairs, batch)
        assert rows is None or len(batch) <= rows
        if tokens is not None and len(batch) > 1:
            assert size(pairs, batch) <= tokens
            assert len(batch) * max(pairs[index].length for index in batch) <= SPREAD * tokens


@given(PAIRS)
def test_a_prefixs_pairs_follow_each_other_longest_first(pairs: list[Ids]) -> None:
    seen: list[list[int]] = []
    run_in_batches(pairs, seen.append, Budget(pairs=1))
    in_order = [pairs[index] for (index,) in seen]
    runs = [list(run) for _, run in groupby(in_order, key=lambda pair: pair.prefix)]
    assert len(runs) == len({len(pair.prefix) for pair in pairs})
    for run in runs:
        assert [pair.length for pair in run] == sorted((pair.length for pair in run), reverse=True)
    assert [run[0].length for run in runs] == sorted((run[0].length for run in runs), reverse=True)


@given(PAIRS, st.integers(1, 300), LIMIT, LIMIT)
def test_all_pairs_run_when_memory_is_short(
    pairs: list[Ids], memory: int, tokens: int | None, rows: int | None
) -> None:
    done: list[int] = []

    def run(batch: list[int]) -> None:
        if size(pairs, batch) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(batch)

    failed = run_in_batches(pairs, run, Budget(tokens, rows))
    if max((pair.length for pair in pairs), default=0) > memory:
        assert failed is not None
        assert pairs[failed].length > memory
    else:
        assert failed is None
        assert sorted(done) == list(range(len(pairs)))


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 12))
def test_chunks_hold_whole_queries(queries: list[int], size: int) -> None:
    made = list(query_chunks(queries, size))
    assert sorted(index for chunk in made for index in chunk) == list(range(len(queries)))
    assert all(len(chunk) >= size for chunk in made[:-1])
    of_chunks = [{queries[index] for index in chunk} for chunk in made]
    assert sum(map(len, of_chunks)) == len(set(queries))


def test_one_failure_sets_the_limit_for_all_later_batches() -> None:
    failures = 0

    def run(batch: list[int]) -> None:
        nonlocal failures
        if len(batch) > 10:
            failures += 1
            raise MemoryError

    run_in_batches([Ids([1], [2] * 5, [3])] * 100, run, Budget())
    assert failures == 4  # 100, 50, 25, 13


def test_one_failure_halves_a_batch_once() -> None:
    """Long prefixes and short bodies: a batch of half as many pairs has nearly as many tokens."""
    pairs = [Ids([1] * 190, [2] * 10, [3] * 17)] * 80
    sizes: list[int] = []

    def run(batch: list[int]) -> None:
        sizes.append(len(batch))
        if len(sizes) == 1:
            raise MemoryError

    run_in_batches(pairs, run, Budget(tokens=100_000))
    assert sizes == [80, 40, 40]


def test_halving_ends_for_pairs_without_body_and_suffix() -> None:
    def run(batch: list[int]) -> None:
        if len(batch) > 1:
            raise MemoryError

    assert run_in_batches([Ids([1] * 9, [], [])] * 8, run, Budget(tokens=100)) is None


def test_a_scoring_error_is_not_taken_for_lack_of_memory() -> None:
    def run(batch: list[int]) -> None:
        raise ScoringError("the score of docno 'out of memory' is not finite", None)

    with pytest.raises(ScoringError):
        run_in_batches([Ids([1], [2], [])], run, Budget())


def test_errors_other_than_short_memory_are_raised() -> None:
    def run(batch: list[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_in_batches([Ids([1], [2], [])], run, Budget())


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
def test_errors_of_short_memory_are_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_narrow_models_get_larger_batches_on_cuda() -> None:
    tokens = [Budget.of_device(torch.device("cuda"), width).tokens for width in (8192, 4096, 2048, 1024, 576)]
    assert tokens == [8192, 16384, 32768, 65536, 65536]
    assert {Budget.of_device(torch.device("cpu"), width).tokens for width in (576, 4096)} == {4096}

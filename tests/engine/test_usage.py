"""Usage is counted, added up, and logged in one line per call, which is not shown by default."""

import copy
import logging
import pickle
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, MODELS, frame, words
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.engine import attention_kernels, device_scorer, length_groups
from pyterrier_llmrerank.engine.attention_kernels import eager, packed_flash
from pyterrier_llmrerank.engine.batching import packed_size
from pyterrier_llmrerank.engine.device_scorer import attended_positions
from pyterrier_llmrerank.engine.inputs import Ids
from pyterrier_llmrerank.engine.packing import PackedPairs, Row
from pyterrier_llmrerank.engine.usage import Stopwatch, Usage

FULL = str(MODELS / "costwise_full")
COUNTS = st.integers(0, 10**6)
USAGES = st.builds(Usage, *[COUNTS] * 9)


def matroyshka(**options: object) -> MatroyshkaReranker:
    """A reranker without usage."""
    return MatroyshkaReranker(FULL, dtype="float32", **options)


def rankllama(**options: object) -> RankLLaMAReranker:
    return RankLLaMAReranker(
        MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32", **options
    )


@given(USAGES, USAGES, USAGES)
def test_usages_add_up_in_any_order(one: Usage, two: Usage, three: Usage) -> None:
    assert (one + two) + three == one + (two + three) == sum([three, one, two], Usage())
    assert (one + two).model_seconds == one.model_seconds + two.model_seconds


def test_usage_prints_as_one_line() -> None:
    used = Usage(12_345, 678_901, 1000, 875, 1.25, 34.5, 0.125)
    assert str(used) == (
        "12,345 pairs, 678,901 tokens, padding 12.5%, seconds: tokenising 1.25, model 34.50, writing 0.12"
    )
    assert str(Usage()).startswith("0 pairs, 0 tokens, padding 0.0%")
    assert str(Usage(truncated_passages=1_234)).endswith("writing 0.00; truncated: 1,234 passages")
    assert str(Usage(truncated_queries=2, truncated_passages=3)).endswith("; truncated: 2 queries and 3 passages")


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("make", [matroyshka, rankllama])
def test_tokens_and_padding_follow_from_the_batches(
    make: type[LLMReranker], batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix counts once among the tokens, and in each of its pairs among the positions."""
    reranker, rows, batches = make(batch_size=batch_size), frame(3, 4), []
    real = device_scorer.PackedPairs

    def packed(pairs: list, *options: object) -> object:
        batches.append(pairs)
        return real(pairs, *options)

    monkeypatch.setattr(device_scorer, "PackedPairs", packed)
    reranker.transform(rows)
    used = reranker.usage
    assert used.pairs == sum(map(len, batches)) == len(rows)
    assert used.tokens == packed_size([pair for batch in batches for pair in batch])
    assert used.filled == sum(pair.length for batch in batches for pair in batch)
    lengths = [pair.length for batch in batches for pair in batch]
    rounded, longest = (
        sum(-(-length // 16) * 16 for length in lengths),
        sum(len(batch) * max(pair.length for pair in batch) for batch in batches),
    )
    assert used.positions == (rounded if DEVICE.type == "cpu" else longest)
    assert 0 < used.padding == 1 - used.filled / used.positions < 1
    assert used.tokens < used.filled  # passages share queries
    assert used.tokenising_seconds > 0
    assert used.model_seconds > 0
    assert used.writing_seconds == 0


@pytest.mark.parametrize(
    ("make", "queries", "passages"),
    [
        (lambda: matroyshka(query_max_length=5, max_length=12), 1, 3),
        (lambda: matroyshka(query_max_length=5, max_length=4000), 1, 0),
        (lambda: matroyshka(query_max_length=100, max_length=15), 0, 3),
        (lambda: rankllama(query_max_length=5, passage_max_length=12), 2, 3),  # by their joint limit
        (lambda: rankllama(query_max_length=5, passage_max_length=4000), 1, 0),
        (lambda: rankllama(query_max_length=100, passage_max_length=1), 0, 5),
        (lambda: rankllama(query_max_length=15, passage_max_length=15), 1, 3),  # by their joint limit
    ],
)
def test_truncated_texts_are_counted(make: Callable[[], LLMReranker], queries: int, passages: int) -> None:
    """A query counts once for all its passages, and a repeated pair once."""
    long = " ".join([words(1, 9)] * (400 if passages else 1))
    texts = {"a panda": [long, "tide", long + " tide"], words(2, 9): [long, "tide"]}
    reranker = make()
    pairs = [(query, text) for query, of_query in texts.items() for text in of_query]
    reranker.compute_score(pairs * 2)
    assert (reranker.usage.truncated_queries, reranker.usage.truncated_passages) == (queries, passages)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_positions_are_counted_where_attention_computes_them(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def watched(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(query: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
            computed.append(query.shape[0] * query.shape[2])
            return real(query, *rest, **options)

        return call

    monkeypatch.setattr(
        length_groups, "scaled_dot_product_attention", watched(length_groups.scaled_dot_product_attention)
    )
    monkeypatch.setattr(attention_kernels, "eager", watched(attention_kernels.eager))
    # Two layers: the second asks for the last tokens alone.
    reranker = matroyshka(device="cpu", attn_implementation=kernel, cutoff=2, batch_size=5)
    reranker.transform(frame(3, 4))
    assert reranker.usage.positions == sum(computed) > 0


def test_positions_follow_from_device_and_kernel() -> None:
    """FlashAttention over the packed row pads nothing; SDPA takes masks, on CUDA at the length of the longest pair."""
    plain, padded = (PackedPairs([Ids([1], [2] * n, []) for n in (3, 20)], pad_id) for pad_id in (None, 0))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    counts = {
        (device.type, kernel and kernel.__name__): [attended_positions(p, device, kernel) for p in (plain, padded)]
        for device, kernel in ((cpu, None), (cpu, eager), (cuda, None), (cuda, eager), (cuda, packed_flash))
    }
    assert counts == {
        ("cpu", None): [16 + 32, 16 + 32], ("cpu", "eager"): [2 * 21, 16 + 32], ("cuda", None): [2 * 21, 2 * 24],
        ("cuda", "eager"): [2 * 21, 2 * 24], ("cuda", "packed_flash"): [4 + 21, 2 * 24],
    }  # fmt: skip


def test_the_released_codes_padding_is_padding() -> None:
    """It fills a pair to a multiple of 8 tokens; attention on a CPU takes a multiple of 16 positions."""
    shape = {"compress_layers": [2], "compress_ratio": 2}
    plain, padded = matroyshka(**shape), matroyshka(**shape, released=True)
    pair = ("panda", words(1, 9))
    for reranker in (plain, padded):
        reranker.compute_score(pair)
    assert padded.usage.filled == plain.usage.tokens == plain.usage.filled
    assert padded.usage.tokens == -(-plain.usage.tokens // 8) * 8
    assert padded.usage.positions == (
        -(-padded.usage.tokens // 16) * 16 if DEVICE.type == "cpu" else padded.usage.tokens
    )


def test_a_cascade_counts_each_pair_once() -> None:
    """The number of stages makes no difference, and dropped pairs count as scored."""
    whole, cascade, rows = matroyshka(), matroyshka(prune={3: 2, 5: 1}), frame(2, 5)
    for reranker in (whole, cascade):
        reranker.transform(rows)
    counts = [(u.pairs, u.tokens, u.positions, u.filled) for u in (whole.usage, cascade.usage)]
    assert counts[0] == counts[1]
    assert counts[0][0] == 10


def test_models_run_by_their_own_forward_count_prefixes_in_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, packed = frame(2, 3), matroyshka()
    packed.transform(rows)
    monkeypatch.setattr("pyterrier_llmrerank.checkpoints.checkpoint.FAMILIES", ())
    plain = MatroyshkaReranker(str(MODELS / "mistral_base"), dtype="float32")
    plain.transform(rows)
    assert plain.usage.tokens == plain.usage.filled > packed.usage.tokens
    assert plain.usage.pairs == 6


@pytest.mark.usefixtures("devices")
def test_several_devices_add_up() -> None:
    one, several, rows = matroyshka(), matroyshka(device=["cuda:0", "cuda:1"]), frame(8, 3)
    one.transform(rows)
    several.transform(rows)
    assert (several.usage.pairs, several.usage.tokens) == (24, one.usage.tokens)
    assert several.usage.filled == one.usage.filled


def test_a_union_in_one_pass_counts_with_its_first() -> None:
    deep, rows = matroyshka(), frame(2, 3)
    first, second = deep.at(cutoff=4), deep.at(cutoff=8)
    (first**second).compile().transform(rows)
    assert (first.usage.pairs, second.usage.pairs) == (6, 0)
    assert first.usage.tokens > 0


def test_calls_add_up_and_repeated_pairs_count_once() -> None:
    reranker, rows = matroyshka(), frame(2, 3)
    assert reranker.usage == Usage()
    reranker.transform(rows)
    first = reranker.usage
    reranker.transform(rows.loc[[0, 0, 1]])
    assert reranker.usage.pairs == first.pairs + 2
    reranker.compute_score(("a", "b"))
    assert reranker.usage.pairs == first.pairs + 3
    assert reranker.usage.model_seconds > first.model_seconds
    before = reranker.usage
    reranker.transform(rows.head(0))
    reranker.compute_score([])
    assert reranker.usage is before


def test_threads_lose_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker, start, real = matroyshka(), threading.Barrier(4), Usage.__add__

    def lets_others_in(self: Usage, other: Usage) -> Usage:
        added = real(self, other)
        time.sleep(0.001)
        return added

    monkeypatch.setattr(Usage, "__add__", lets_others_in)

    def work() -> None:
        start.wait()
        for number in range(3):
            reranker.compute_score(("a", words(number, 3)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reranker.usage.pairs == 12


def test_usage_is_no_part_of_a_rerankers_value() -> None:
    used, fresh = matroyshka(), matroyshka()
    used.compute_score(("a", "b"))
    assert used == fresh
    assert hash(used) == hash(fresh)
    assert repr(used) == repr(fresh)
    assert pickle.dumps(used) == pickle.dumps(fresh)
    for other in (copy.copy(used), copy.deepcopy(used), pickle.loads(pickle.dumps(used)), used.at(cutoff=4)):
        assert other.usage == Usage()


def test_usage_before_an_error_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reranker, real, calls = matroyshka(batch_size=1), device_scorer.run_layers, []

    def overflows(*args: object, **options: object) -> tuple[torch.Tensor, Row]:
        calls.append(1)
        states, row = real(*args, **options)
        return states * (np.inf if len(calls) == 3 else 1), row

    monkeypatch.setattr(device_scorer, "run_layers", overflows)
    with caplog.at_level(logging.INFO, "pyterrier_llmrerank"), pytest.raises(ScoringError) as info:
        reranker.transform(frame(2, 4))
    assert reranker.usage.pairs == len(info.value.scores) > 0
    assert reranker.usage.tokens > 0
    assert [str(reranker.usage) in record.getMessage() for record in caplog.records] == [True]


def test_a_call_that_cannot_begin_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    reranker = matroyshka(attn_implementation="flash_attention_2")
    with caplog.at_level(logging.INFO, "pyterrier_llmrerank"), pytest.raises(ValueError, match="flash_attention_2"):
        reranker.compute_score(("a", "b"))
    assert not caplog.records
    assert reranker.usage == Usage()


def test_one_line_a_call_is_logged_under_the_packages_name(caplog: pytest.LogCaptureFixture) -> None:
    reranker = matroyshka(cutoff=4)
    with caplog.at_level(logging.INFO, "pyterrier_llmrerank"):
        reranker.transform(frame())
        first = reranker.usage
        reranker.compute_score(("a", "b"))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.records[0].name.split(".")[0] == "pyterrier_llmrerank"
    assert caplog.records[0].getMessage() == f"{reranker!r}: {first}"
    assert f"{reranker!r}: 1 pairs" in caplog.records[1].getMessage()


def test_usage_is_not_shown_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As in a program without handlers: the package adds none and sets no level."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    reranker = matroyshka()
    reranker.compute_score(("a", "b"))
    assert "pyterrier_llmrerank" not in "".join(capsys.readouterr())
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler()])
    caplog.set_level(logging.INFO)
    reranker.compute_score(("a", "b"))
    assert "MatroyshkaReranker(" in capsys.readouterr().err


def test_a_stopwatch_adds_up_also_where_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 11.5])
    monkeypatch.setattr("pyterrier_llmrerank.engine.usage.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = Stopwatch()
    with watch:
        pass
    with pytest.raises(ValueError, match="wrong"), watch:
        raise ValueError("wrong")
    assert watch.seconds == 3.5

"""A score depends on its pair alone; a pair that cannot be scored is named, and no score is lost."""

import gc
import signal
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEVICE, MODELS, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.engine import batching, device_scorer, scoring, threads
from pyterrier_llmrerank.engine.packing import Row

FULL = str(MODELS / "costwise_full")
RERANKERS = {
    "rankllama": RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32"),
    "plain": MatroyshkaReranker(FULL, dtype="float32"),
    "compressed": MatroyshkaReranker(FULL, dtype="float32", compress_layers=[2, 5], compress_ratio=4, cutoff=[3, 8]),
    "released": MatroyshkaReranker(FULL, dtype="float32", compress_layers=[2], compress_ratio=2, released=True),
}
PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60), st.integers(0, 99)), min_size=1, max_size=12)


def pair(query: int, length: int, seed: int) -> tuple[str, str]:
    return words(query, 1 + query % 5), words(seed, length)


@pytest.mark.parametrize("name", RERANKERS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PAIRS, st.none() | st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_score_depends_on_its_pair_alone(name: str, drawn: list, batch_size: int | None, order: object) -> None:
    reranker = RERANKERS[name]
    pairs = [pair(*numbers) for numbers in drawn]
    alone = np.stack([np.asarray(reranker.compute_score(p)) for p in pairs], axis=-1)
    permutation = list(range(len(pairs)))
    order.shuffle(permutation)
    batched = type(reranker)(**{**reranker.arguments(), "batch_size": batch_size})
    together = batched.compute_score([pairs[i] for i in permutation])
    np.testing.assert_allclose(together, alone[..., permutation], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [{}, {"compress_layers": [2, 5], "compress_ratio": 2}])
def test_a_score_depends_on_its_pair_alone_in_bf16(shape: dict) -> None:
    """On a CPU, rounding must not depend on the batch's shape: the layers would amplify any difference."""
    reranker = MatroyshkaReranker(FULL, dtype="bfloat16", device="cpu", **shape)
    pairs = [pair(i, 14 * i, i) for i in range(9)] + [(words(2, 30), words(i, 9 * i)) for i in range(9)]
    alone = [reranker.compute_score(p) for p in pairs]
    np.testing.assert_allclose(reranker.compute_score(pairs), alone, atol=1e-4)


def test_a_large_call_runs_on_the_fastest_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "seconds_of_layer", lambda number: float(number != 2))
    monkeypatch.setattr(scoring, "LARGE", 4)
    real, ran = device_scorer.run_layers, []
    monkeypatch.setattr(
        device_scorer,
        "run_layers",
        lambda *args, **options: ran.append(torch.get_num_threads()) or real(*args, **options),
    )
    reranker, pairs = MatroyshkaReranker(FULL, dtype="float32", device="cpu"), [pair(i, 10, i) for i in range(4)]
    torch.set_num_threads(3)
    try:
        small, large = reranker.compute_score(pairs[:3]), reranker.compute_score(pairs)
        assert ran == [3, 2]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(large[:3], small, atol=1e-4)


def test_an_autocast_around_a_call_changes_nothing() -> None:
    """It would not reach the other devices' threads."""
    reranker, pairs = RERANKERS["compressed"], [pair(i, 10, i) for i in range(4)]
    wanted = reranker.compute_score(pairs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        np.testing.assert_array_equal(reranker.compute_score(pairs), wanted)


def test_memory_running_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = RERANKERS["plain"]
    pairs = [pair(i, 10, i) for i in range(9)]
    wanted = reranker.compute_score(pairs)
    real, sizes = device_scorer.run_layers, []

    def short_of_memory(model: object, row: Row, *args: object, **options: object) -> tuple[torch.Tensor, Row]:
        sizes.append(len(row.packing))
        if len(row.packing) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, row, *args, **options)

    monkeypatch.setattr(device_scorer, "run_layers", short_of_memory)
    np.testing.assert_allclose(reranker.compute_score(pairs), wanted, atol=1e-4)
    assert sizes[:3] == [9, 5, 3]


def test_one_pair_that_does_not_fit_is_named_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = MatroyshkaReranker(FULL, dtype="float32", batch_size=1)
    real = device_scorer.run_layers

    def fails_on_the_short(model: object, row: Row, *args: object, **options: object) -> tuple[torch.Tensor, Row]:
        if row.packing.longest < 60:
            raise MemoryError
        return real(model, row, *args, **options)

    monkeypatch.setattr(device_scorer, "run_layers", fails_on_the_short)
    said = rf"out of memory on {DEVICE} with one pair alone: pairs\[1\], \d+ tokens"
    with pytest.raises(ScoringError, match=said) as info:
        reranker.compute_score([("a", words(1, 60)), ("b", "short")])
    assert np.isfinite(info.value.scores).tolist() == [[True, False]]


def test_default_batches_stay_within_the_devices_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    real = device_scorer.run_layers

    def watched(model: object, row: Row, *args: object, **options: object) -> tuple[torch.Tensor, Row]:
        shapes.append(len(row.states))
        return real(model, row, *args, **options)

    monkeypatch.setattr(device_scorer, "run_layers", watched)
    monkeypatch.setitem(batching.TOKENS, DEVICE.type, 300)
    monkeypatch.setattr(batching, "MOST_TIMES", 1)  # on CUDA, a narrow model may get more
    RERANKERS["plain"].compute_score([pair(i, 20 + i, i) for i in range(20)])
    assert len(shapes) > 2
    assert max(shapes) <= 300


def test_many_queries_go_in_chunks_and_come_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair(i % 7, 5 + i, i) for i in range(40)]
    wanted = RERANKERS["plain"].compute_score(pairs)
    monkeypatch.setattr(scoring, "CHUNK", 6)
    np.testing.assert_allclose(RERANKERS["plain"].compute_score(pairs), wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"cutoff": [3, 8], "compress_layers": [2, 5], "compress_ratio": 4},
        {"compress_layers": [2], "compress_ratio": 2, "released": True},
        {"prune": {3: 3, 5: 2}, "compress_layers": [4], "compress_ratio": 2},
        {"attn_implementation": "eager"},
    ],
)
def test_a_prefix_is_computed_once_in_batches_of_any_size(
    monkeypatch: pytest.MonkeyPatch, shape: dict, dtype: str
) -> None:
    """One query fills many batches, one shares a batch, and one has a single candidate.

    In bf16 this holds on a CPU: on CUDA, a score differs with its batch by up to 0.03 here.
    """
    pairs = [(words(q, 30), words(q + i, 3 + i)) for q, count in ((1, 12), (2, 4), (3, 1)) for i in range(count)]
    reranker = MatroyshkaReranker(FULL, dtype=dtype, device="cpu" if dtype == "bfloat16" else None, **shape)
    computed, real = [0], device_scorer.run_layers

    def watched(model: object, row: Row, *args: object, **options: object) -> tuple[torch.Tensor, Row]:
        computed[-1] += len(row.states) - int(row.packing.padding.sum())
        return real(model, row, *args, **options)

    monkeypatch.setattr(device_scorer, "run_layers", watched)
    rows = pd.DataFrame(pairs, columns=["query", "text"]).assign(docno=[f"d{i}" for i in range(len(pairs))])
    rows["qid"] = rows["query"]
    together = reranker.transform(rows)
    for batch_size in (1, 3):
        computed.append(0)
        reranker.set_parameter("batch_size", batch_size)
        apart = reranker.transform(rows)
        np.testing.assert_allclose(apart["score"], together["score"], atol=1e-4)
    assert computed[0] > 0
    assert len(set(computed)) == 1


def test_the_last_layer_is_run_for_the_last_tokens_only() -> None:
    reranker = RERANKERS["plain"]
    decoder = reranker.scorer().open()
    seen: list[tuple[int, ...]] = []
    hooks = [
        decoder.layers[index].post_attention_layernorm.register_forward_hook(
            lambda module, args, output: seen.append(args[0].shape)
        )
        for index in (6, 7)
    ]
    reranker.compute_score([("panda", words(i, 9)) for i in range(5)])
    for hook in hooks:
        hook.remove()
    assert seen[0][1] > 5 * 9
    assert seen[1] == (5, seen[0][2])


def test_ids_are_made_while_the_chunk_before_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, scored = threading.Event(), threading.Event()
    real_run, scorer, chunks_made = device_scorer.run_layers, RERANKERS["plain"].scorer(), []

    def encode(tokenizer: object, pairs: list[tuple[str, str]]) -> object:
        chunks_made.append(len(pairs))
        if len(chunks_made) == 2:
            begun.set()
            assert not scored.is_set()
        return scorer.encode(tokenizer, pairs)

    def run_layers(*args: object, **options: object) -> object:
        assert begun.wait(10)
        scored.set()
        return real_run(*args, **options)

    monkeypatch.setattr(scoring, "CHUNK", 2)
    monkeypatch.setattr(device_scorer, "run_layers", run_layers)
    replace(scorer, encode=encode).score([pair(i, 9, i) for i in range(6)])
    assert chunks_made == [2, 2, 2]


def test_memory_does_not_grow_with_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither token ids nor hidden states are kept: they would take kilobytes per pair here."""
    monkeypatch.setattr(scoring, "CHUNK", 50)
    reranker = MatroyshkaReranker(FULL, dtype="float32", cutoff=2, batch_size=25, device="cpu")
    texts = [f"{words(i, 60)} {i}" for i in range(400)]

    def peak(count: int) -> int:
        rows = pd.DataFrame({"qid": [str(i // 10) for i in range(count)], "text": texts[:count]}, dtype=object)
        rows["query"], rows["docno"] = rows["qid"], rows.index.astype(str)
        gc.collect()
        tracemalloc.start()
        try:
            reranker.transform(rows)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    growth = (peak(400) - peak(100)) / 300
    assert growth < 800


def test_memory_running_out_between_batches_loses_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, chunks_made = RERANKERS["plain"].scorer(), []

    def encode(tokenizer: object, pairs: list[tuple[str, str]]) -> object:
        chunks_made.append(1)
        if len(chunks_made) == 3:
            raise MemoryError
        return scorer.encode(tokenizer, pairs)

    monkeypatch.setattr(scoring, "CHUNK", 2)
    with pytest.raises(ScoringError, match="out of memory outside the model") as info:
        replace(scorer, encode=encode).score([pair(i, 9, i) for i in range(8)])
    assert np.isfinite(info.value.scores).sum() >= 2


# -- several devices

TWO, THREE = ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1", "cuda:2"]
SEVERAL = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def several(devices: None, name: str) -> list[LLMReranker]:
    """A reranker on two devices and one on three, with their weights in memory."""
    made = [type(RERANKERS[name])(**{**RERANKERS[name].arguments(), "device": device}) for device in (TWO, THREE)]
    for reranker in made:
        reranker.scorer().open()
    return made


@pytest.mark.parametrize("name", RERANKERS)
@SEVERAL
@given(PAIRS, st.none() | st.integers(1, 5))
def test_several_devices_give_the_same_scores(
    several: list[LLMReranker], name: str, drawn: list, batch_size: int | None
) -> None:
    pairs = [pair(*numbers) for numbers in drawn]
    reranker = several[len(drawn) % 2]
    reranker.set_parameter("batch_size", batch_size)
    np.testing.assert_allclose(reranker.compute_score(pairs), RERANKERS[name].compute_score(pairs), atol=1e-4, rtol=0)


class Devices:
    """Two devices whose batches are watched.

    ``on_batch`` gets the device's number and its number of earlier batches; its result multiplies the batch's states.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_batch: Callable[[int, int], float], **options: object):
        self.reranker = MatroyshkaReranker(FULL, dtype="float32", device=TWO, **options)
        self.batches = [0, 0]
        self.stopped = threading.Event()
        models = [weights.at_depth(8)[0] for weights in self.reranker.scorer().weights]
        assert models[0] is not models[1]
        run_layers, run = device_scorer.run_layers, device_scorer.DeviceScorer.run

        def watched(model: object, *args: object, **options: object) -> tuple[torch.Tensor, Row]:
            number = next(number for number, own in enumerate(models) if own is model)
            self.batches[number] += 1
            factor = on_batch(number, self.batches[number] - 1)
            states, row = run_layers(model, *args, **options)
            return states * factor, row

        def seen(device: device_scorer.DeviceScorer) -> None:
            self.stopped = device.call.stopped
            run(device)

        monkeypatch.setattr(device_scorer, "run_layers", watched)
        monkeypatch.setattr(device_scorer.DeviceScorer, "run", seen)


@pytest.mark.usefixtures("devices")
def test_devices_work_at_once_and_the_faster_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    both, rest_done = threading.Barrier(2, timeout=20), threading.Event()

    def on_batch(device: int, before: int) -> float:
        if before == 0:
            both.wait()
        if device == 0:  # the slower one: it has a query, and the token ids of another
            assert rest_done.wait(20)
        elif before == 17:
            rest_done.set()
        return 1

    pairs = [(f"{i} panda", words(i, 9)) for i in range(20)]
    wanted = RERANKERS["plain"].compute_score(pairs)
    devices = Devices(monkeypatch, on_batch)
    monkeypatch.setattr(scoring, "CHUNKS_PER_DEVICE", 10)  # a query per chunk
    np.testing.assert_allclose(devices.reranker.compute_score(pairs), wanted, atol=1e-4)
    assert devices.batches == [2, 18]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("how", ["not finite", "lost", "interrupted"])
def test_a_device_that_fails_stops_the_others_and_no_score_is_lost(
    monkeypatch: pytest.MonkeyPatch, failing: int, how: str
) -> None:
    other_is_on = threading.Event()

    def on_batch(device: int, before: int) -> float:
        if device != failing:
            if before == 2:
                other_is_on.set()
                assert devices.stopped.wait(20)
            return 1
        assert other_is_on.wait(20)
        if how == "lost":
            raise RuntimeError("CUDA error: unspecified launch failure")
        if how == "interrupted":
            raise KeyboardInterrupt
        return np.inf

    pairs = [(f"{i} panda", words(i, 9)) for i in range(30)]
    wanted = RERANKERS["plain"].compute_score(pairs)
    devices = Devices(monkeypatch, on_batch, batch_size=1)
    message = {
        "not finite": r"score of pairs\[\d+\] is not finite",
        "lost": r"failed on cpu at pairs\[\d+\]: RuntimeError: CUDA error: unspec",
    }
    with pytest.raises(KeyboardInterrupt if how == "interrupted" else ScoringError, match=message.get(how)) as info:
        devices.reranker.compute_score(pairs)
    assert devices.batches[failing] == (2 if how == "not finite" else 1)  # noticed when the next batch is running
    assert devices.batches[1 - failing] == 3
    assert devices.reranker.usage.pairs == 3
    scores = info.value.scores[0]
    there = np.isfinite(scores)
    assert there.sum() == 3  # the last one was running when the other device failed
    np.testing.assert_allclose(scores[there], wanted[there], atol=1e-4)


@pytest.mark.usefixtures("devices")
def test_one_query_stays_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch, lambda device, before: 1, batch_size=2)
    devices.reranker.compute_score([("panda", words(i, 9)) for i in range(6)])
    assert sorted(devices.batches) == [0, 3]


def test_a_device_that_fails_alone_loses_no_score_either(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = device_scorer.run_layers, []

    def lost(*args: object, **options: object) -> tuple[torch.Tensor, Row]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return real(*args, **options)

    monkeypatch.setattr(device_scorer, "run_layers", lost)
    with pytest.raises(ScoringError, match=rf"failed on {DEVICE} at pairs\[\d\]: RuntimeError: CUDA") as info:
        MatroyshkaReranker(FULL, dtype="float32", batch_size=1).compute_score([("a", words(i, 9)) for i in range(9)])
    assert np.isfinite(info.value.scores).sum() >= 1


# -- errors


def scored_before(reranker: MatroyshkaReranker, pairs: list[tuple[str, str]], error: BaseException) -> list[bool]:
    """Check the scores in an error, and return the pairs that have one."""
    scores = error.scores[0]
    there = np.isfinite(scores)
    np.testing.assert_allclose(scores[there], reranker.compute_score(pairs)[there], atol=1e-4)
    return there.tolist()


@pytest.mark.parametrize(
    "error", [IndexError("out of range"), KeyError("x"), ZeroDivisionError(), RuntimeError("lost")]
)
def test_any_exception_names_its_pairs_and_keeps_the_scores(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    pairs = [("a", words(i, 40 - 5 * i)) for i in range(6)]  # longest first
    real, calls = device_scorer.run_layers, []

    def fails_at_the_second(*args: object, **options: object) -> tuple[torch.Tensor, Row]:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(device_scorer, "run_layers", fails_at_the_second)
    said = rf"^scoring failed on {DEVICE} at pairs\[2\] or one of 1 other pairs in its batch: {type(error).__name__}: "
    with pytest.raises(ScoringError, match=said) as info:
        MatroyshkaReranker(FULL, dtype="float32", batch_size=2).compute_score(pairs)
    assert info.value.__cause__ is error
    assert scored_before(RERANKERS["plain"], pairs, info.value) == [True, True, False, False, False, False]


def test_ctrl_c_keeps_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of the batch that was still running are kept, too."""
    pairs = [("a", words(i, 40 - 5 * i)) for i in range(6)]
    real, calls = device_scorer.run_layers, []

    def interrupted_at_the_third(*args: object, **options: object) -> tuple[torch.Tensor, Row]:
        calls.append(1)
        if len(calls) == 3:
            signal.default_int_handler(signal.SIGINT, None)
        return real(*args, **options)

    monkeypatch.setattr(device_scorer, "run_layers", interrupted_at_the_third)
    with pytest.raises(KeyboardInterrupt) as info:
        MatroyshkaReranker(FULL, dtype="float32", batch_size=1).compute_score(pairs)
    assert scored_before(RERANKERS["plain"], pairs, info.value) == [True, True, False, False, False, False]

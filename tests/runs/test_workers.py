"""Workers on Ray give the results of one process, even if some are lost."""

import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from conftest import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_streaming import CHUNKS, MATROYSHKA, rows, write_rows

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.engine import devices, scoring
from pyterrier_llmrerank.engine.usage import Usage
from pyterrier_llmrerank.runs import cluster as clusters
from pyterrier_llmrerank.runs import workers
from pyterrier_llmrerank.runs.chunks import Chunk, ScoredChunk
from pyterrier_llmrerank.runs.cluster import resolve_worker_dtype
from pyterrier_llmrerank.runs.formats import read_run
from pyterrier_llmrerank.runs.streaming import rerank_file
from pyterrier_llmrerank.runs.workers import (
    CHUNKS_AHEAD,
    MAX_LOSSES,
    Task,
    WorkerPool,
    score_on_workers,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 5)


# -- with Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


def test_results_equal_those_of_one_process_up_to_an_error(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A killed worker is replaced, and an error in scoring has its own type and keeps the chunks before it."""
    records = [{**record, "title": None} if record["query_id"] == "q9" else record for record in rows()]
    source = write_rows(tmp_path / "rerank.jsonl", records)
    reranker = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32", cutoff=2, text_field="title")
    killed: list[Task] = []
    real = WorkerPool.submit

    def submit(self: WorkerPool, task: Task) -> None:
        worker = self.idle[-1]  # takes the task
        real(self, task)
        if str(task).startswith("scoring queries 'q7'") and not killed:
            cluster.kill(worker, no_restart=False)  # as a crash does
            killed.append(task)

    monkeypatch.setattr(WorkerPool, "submit", submit)
    for name, options in {"one.tsv": {}, "two.tsv": {"workers": 2, "address": "auto"}}.items():
        with pytest.raises(ValueError, match=r"'title' is None, not a string .* for qid 'q9', docno 'd0'") as error:
            rerank_file(reranker, source, tmp_path / name, **options)
        assert type(error.value) is ValueError
        assert "set resume=True" in error.value.__notes__[0]
    assert len(killed) == 1
    assert "A worker was lost while scoring queries 'q7' to 'q7' and is replaced" in caplog.text
    assert len(list(read_run(tmp_path / "two.tsv"))) == sum(CHUNKS[:4])
    assert (tmp_path / "two.tsv").read_bytes() == (tmp_path / "one.tsv").read_bytes()
    assert cluster.is_initialized()  # it was connected before


def test_a_chunk_that_always_ends_its_worker_stops_the_run(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray scores it as often as it is told to, and results before it are kept."""
    monkeypatch.setattr(workers, "MAX_LOSSES", 2)  # each takes the start of a process

    class Crashing:  # pickled whole, as it is defined in a function
        device = None
        marks = tmp_path / "marks"

        def scorer(self) -> Any:
            return SimpleNamespace(open=lambda: None)

        def transform(self, frame: pd.DataFrame) -> pd.DataFrame:
            if frame["qid"].iloc[0] == "bad":
                with self.marks.open("a") as marks:
                    marks.write("x")
                os._exit(1)
            return frame.assign(docno="d", rank=0, score=1.0)

        def take_usage(self) -> Usage:
            return Usage()

    results = score_on_workers(Crashing(), chunks(["q0", "bad", "q2"]), workers=1)
    assert _qid(next(results)[0].frame) == "q0"
    with pytest.raises(ConnectionError, match="2 workers were lost while scoring queries 'bad' to 'bad'"):
        next(results)
    assert Crashing.marks.read_text() == "xx"


# -- losses and order, with a fake of Ray


class LostError(Exception):
    """A fake RayError: a worker was lost."""


class RaisedError(Exception):
    """A fake RayTaskError: a task raised an error."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Reference:
    """A reference to the result of a call."""

    def __init__(self, name: str, frame: pd.DataFrame | None = None) -> None:
        self.name, self.frame = name, frame


class Handle:
    """A handle of an actor."""

    def __init__(self) -> None:
        self.open, self.score = (SimpleNamespace(remote=partial(Reference, name)) for name in ("open", "score"))


class FakeRay:
    """A fake of the ``ray`` module. ``choose`` picks the task to finish next, ``lost`` whether its worker is lost."""

    exceptions = SimpleNamespace(RayError=LostError, RayTaskError=RaisedError)

    def __init__(self, choose: Any, lost: Any, *machines: dict[str, float]) -> None:
        self.choose, self.lost, self.machines = choose, lost, machines or ({"CPU": 4.0},)
        self.slow = False
        self.alive: set[Any] = set()
        self.options: dict[str, Any] = {}
        self.retries = 0
        self.most = 0
        self.broken: Exception | None = None

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [gone, *({"Alive": True, "Resources": machine} for machine in self.machines)]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 1.0, "node:10.0.0.1": 1.0}

    def is_initialized(self) -> bool:
        return True

    def remote(self, kind: type) -> Any:
        def make(reranker: Any) -> Handle:
            self.alive.add(handle := Handle())
            self.most = max(self.most, len(self.alive))
            return handle

        def options(**given: Any) -> Any:
            assert given.pop("max_restarts") == -1
            self.retries = given.pop("max_task_retries")
            self.options = given
            return SimpleNamespace(remote=make)

        return SimpleNamespace(options=options)

    def wait(self, busy: list[Reference], timeout: float | None = None) -> tuple[list[Reference], list[Reference]]:
        assert busy
        if self.slow and timeout is not None:
            return [], busy
        return [self.choose(busy)], []

    def get(self, ready: Reference) -> Any:
        losses = 0
        while self.lost(ready.name, ready.frame):
            if (losses := losses + 1) > self.retries:
                raise LostError
        if ready.frame is None:
            if self.broken:
                raise RaisedError(self.broken)
            return None
        if _qid(ready.frame) == "wrong":
            raise RaisedError(ScoringError("wrong", ready.frame))
        return ScoredChunk(ready.frame.assign(score=1.0), Usage(pairs=1)), losses > 0

    def kill(self, worker: Any) -> None:
        self.alive.discard(worker)


def _qid(frame: pd.DataFrame | None) -> str:
    return "" if frame is None else frame["qid"].iloc[0]


def chunks(names: list[str]) -> Iterator[Chunk]:
    for name in names:
        yield Chunk(pd.DataFrame({"qid": [name]}), 1, 0, 1, 1)


def run(fake: FakeRay, coming: Iterator[Chunk], count: int) -> tuple[list[str], Exception | None]:
    """Return the queries yielded, and the error raised after them."""
    got: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "ray", fake)
        try:
            for chunk, (result, _) in score_on_workers(MATROYSHKA, coming, workers=count):
                pd.testing.assert_frame_equal(result, chunk.frame.assign(score=1.0))
                got.append(_qid(chunk.frame))
        except Exception as error:
            return got, error
    return got, None


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 4), size=st.integers(0, 20), wrong=st.integers(0, 40))
def test_results_keep_their_order_for_any_schedule_and_losses(data: Any, count: int, size: int, wrong: int) -> None:
    """Results stop at the first error; few chunks are held; all workers are killed at the end."""
    names = [f"q{n}" if n != wrong else "wrong" for n in range(size)]
    lost: dict[str, int] = {}

    def loses(name: str, frame: pd.DataFrame | None) -> bool:
        key = _qid(frame)
        if lost.get(key, 0) < MAX_LOSSES - 1 and key and data.draw(st.booleans(), "lost"):
            lost[key] = lost.get(key, 0) + 1
            return True
        return False

    fake = FakeRay(lambda busy: data.draw(st.sampled_from(busy), "ready"), loses)
    taken: list[str] = []

    def coming() -> Iterator[Chunk]:
        for chunk in chunks(names):
            taken.append(_qid(chunk.frame))
            yield chunk

    got, error = run(fake, coming(), count)
    if wrong < size:
        assert got == names[:wrong]
        assert isinstance(error, ScoringError)
        assert len(taken) <= len(got) + CHUNKS_AHEAD * count
    else:
        assert (got, error) == (names, None)
    assert fake.alive == set()
    assert fake.most <= count


def test_few_chunks_are_held_while_the_first_is_slow() -> None:
    taken = []

    def coming() -> Iterator[Chunk]:
        for number, chunk in enumerate(chunks([f"q{n}" for n in range(20)])):
            taken.append(number)
            yield chunk

    def last_but_first(busy: list[Reference]) -> Reference:
        if others := [promise for promise in busy if _qid(promise.frame) != "q0"]:
            return others[-1]
        assert len(taken) == 2 * CHUNKS_AHEAD
        return busy[0]

    assert run(FakeRay(last_but_first, lambda *_: False), coming(), 2)[0] == [f"q{n}" for n in range(20)]


@pytest.mark.parametrize(("call", "over"), [("open", "opening the model"), ("score", "scoring queries 'q1' to 'q1'")])
def test_too_many_losses_over_a_task_are_an_error(call: str, over: str) -> None:
    def loses(name: str, frame: pd.DataFrame | None) -> bool:
        return name == call and _qid(frame) in ("", "q1")

    fake = FakeRay(lambda busy: busy[0], loses)
    got, error = run(fake, chunks(["q0", "q1", "q2"]), 2)
    assert isinstance(error, ConnectionError)
    assert f"{MAX_LOSSES} workers were lost while {over}" in str(error)
    assert got == (["q0"] if call == "score" else [])
    assert fake.alive == set()


def test_a_replaced_worker_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    losses = iter([True, True, False])
    fake = FakeRay(lambda busy: busy[0], lambda name, frame: _qid(frame) == "q1" and next(losses))
    with caplog.at_level(logging.WARNING):
        assert run(fake, chunks(["q0", "q1", "q2"]), 2) == (["q0", "q1", "q2"], None)
    assert caplog.messages == ["A worker was lost while scoring queries 'q1' to 'q1' and is replaced."]


def test_an_error_from_opening_the_model_is_raised() -> None:
    fake = FakeRay(lambda busy: busy[0], lambda *_: False)
    fake.broken = FileNotFoundError("no such model")
    assert run(fake, chunks(["q0"]), 2) == ([], fake.broken)


def test_no_worker_starts_if_there_is_nothing_to_score() -> None:
    fake = FakeRay(lambda busy: busy[0], lambda *_: False)
    assert run(fake, iter([]), 2) == ([], None)
    assert fake.most == 0


def test_arguments_are_checked_before_a_cluster_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "ray_cluster", None)
    source, target = write_rows(tmp_path / "rerank.jsonl", rows()), tmp_path / "run.tsv"
    target.write_text("mine")
    with pytest.raises(FileExistsError):
        rerank_file(MATROYSHKA, source, target, workers=2)


def test_an_error_from_reading_comes_after_earlier_results() -> None:
    bad = ValueError("rerank.jsonl, line 3: not JSON")

    def coming() -> Iterator[Chunk]:
        yield from chunks(["q0", "q1"])
        raise bad

    assert run(FakeRay(lambda busy: busy[-1], lambda *_: False), coming(), 2) == (["q0", "q1"], bad)


@pytest.mark.parametrize(
    ("machines", "device", "count", "wanted"),
    [
        ([{"CPU": 8.0}], None, 3, {"num_cpus": 2}),
        ([{"CPU": 2.0}], None, 3, {"num_cpus": 0}),
        ([{"CPU": 6.0}, {"CPU": 6.0}, {"CPU": 3.0}], None, 4, {"num_cpus": 3}),  # not 15 // 4
        ([{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 4.0}], None, 2, {"num_cpus": 4}),  # at most those of one machine
        ([{"CPU": 8.0, "GPU": 2.0}], None, 2, {"num_cpus": 1, "num_gpus": 1}),
        ([{"CPU": 8.0, "GPU": 2.0}], "cuda", 2, {"num_cpus": 1, "num_gpus": 1}),
        ([{"CPU": 8.0, "GPU": 4.0}], ("cuda:0", "cuda:1"), 2, {"num_cpus": 1, "num_gpus": 2}),
        ([{"CPU": 8.0, "GPU": 2.0}], "cpu", 4, {"num_cpus": 2}),
        ([{"CPU": 1.0, "GPU": 2.0}], None, 2, {"num_cpus": 0, "num_gpus": 1}),
        ([{"CPU": 8.0}, {"GPU": 4.0}], None, 2, {"num_cpus": 0, "num_gpus": 1}),
        ([{"CPU": 8.0, "GPU": 2.0}], ("cuda", "cpu:0"), 2, {"num_cpus": 1, "num_gpus": 1}),
        ([{"CPU": 8.0, "GPU": 2.0}], ("cuda", "cpu"), 2, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_workers_share_the_resources_of_the_machines(
    machines: list[dict[str, float]], device: object, count: int, wanted: dict[str, int]
) -> None:
    fake = FakeRay(None, None, *machines)
    with WorkerPool(fake, SimpleNamespace(device=device), count):
        assert fake.options == wanted
        assert len(fake.alive) == count
    assert fake.alive == set()


@pytest.mark.parametrize(
    ("machines", "device", "count", "message"),
    [
        ([{"GPU": 2.0}], None, 3, "device=None: each worker needs 1 of the cluster's 2 GPUs; allowed: at most 2"),
        (
            [{"GPU": 3.0}, {"GPU": 3.0}],
            ("cuda:0", "cuda:1"),
            3,
            "each worker needs 2 of .* 6 GPUs; allowed: at most 2",
        ),
        ([{"GPU": 2.0}], "cuda:1", 1, "device='cuda:1': each worker numbers its own GPUs from 0 and has no 'cuda:1'"),
        (
            [{"GPU": 4.0}],
            ("cuda:2", "cuda:3"),
            2,
            "has no 'cuda:2'; allowed: None, 'cuda', 'cpu', 'cuda:0', or a list counting up",
        ),
    ],
)
def test_impossible_gpus_are_refused(
    machines: list[dict[str, float]], device: object, count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerPool(FakeRay(None, None, *machines), SimpleNamespace(device=device), count)


def test_a_warning_lists_free_resources_while_no_worker_starts(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeRay(lambda busy: busy[0], lambda *_: False)
    fake.slow = True
    assert run(fake, chunks(["q0", "q1"]), 2) == (["q0", "q1"], None)
    assert caplog.messages == [
        "No worker has opened the model after 120 s; still waiting. Free on the cluster: {'CPU': 1.0}"
    ]


def test_the_dtype_is_resolved_on_a_worker(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "resolve_dtype", None)  # in this process, which may have another device
    assert resolve_worker_dtype(RankLLaMAReranker(dtype="float16"), 2) == ("float16", "")  # asks no worker
    assert resolve_worker_dtype(RankLLaMAReranker(dtype="float16", quantization="int8"), 2) == ("float16", "cpu")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (RaisedError(ValueError("device='xpu' cannot be used here")), ValueError, "device='xpu' cannot be used here"),
        (LostError("out of memory"), ConnectionError, "a worker was lost while resolving its dtype: out of memory"),
    ],
)
def test_an_error_in_resolving_the_dtype_is_raised_here(
    raised: Exception, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(reference: object) -> None:
        raise raised

    submitted = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: "reference"))
    ray = SimpleNamespace(
        nodes=list, remote=lambda max_calls: lambda function: submitted, get=get, exceptions=FakeRay.exceptions,
        wait=lambda references, timeout: (references, []),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(expected, match=message):
        resolve_worker_dtype(RankLLaMAReranker(), 2)


def test_a_missing_ray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = write_rows(tmp_path / "rerank.jsonl", rows())
    with pytest.raises(ImportError, match=r"workers=2 needs Ray: pip install 'pyterrier-llmrerank\[ray\]'"):
        rerank_file(MATROYSHKA, source, tmp_path / "run.tsv", workers=2)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("address", "environment", "wanted"),
    [(None, None, "local"), ("ray://head:10001", "other", "ray://head:10001"), (None, "head:6379", "head:6379")],
)
def test_the_cluster_is_found_by_argument_environment_or_started(
    address: str | None, environment: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda address, **_: calls.append(address),
        shutdown=lambda: calls.append("shutdown"),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    with clusters.ray_cluster(2, address):
        assert calls == [wanted]
    assert calls == [wanted, "shutdown"]


def test_an_address_is_refused_where_ray_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with clusters.ray_cluster(2) as used:
        assert used is ray
    wanted = "address='head:6379': this process is connected to Ray already"
    with pytest.raises(ValueError, match=wanted), clusters.ray_cluster(2, "head:6379"):
        pass

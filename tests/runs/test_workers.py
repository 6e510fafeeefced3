"""Workers on Ray: what they give is what one process gives, also where some are lost."""

import logging
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
from test_streaming import CHUNKS, MATROYSHKA, QUERIES, rows, write_rows

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.engine import devices, scoring
from pyterrier_llmrerank.engine.usage import Usage
from pyterrier_llmrerank.runs import workers
from pyterrier_llmrerank.runs.formats import read_run
from pyterrier_llmrerank.runs.streaming import Chunk, rerank_file
from pyterrier_llmrerank.runs.workers import AHEAD, LOSSES, Workers, resolve_worker_dtype, scored_by


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 5)


# -- Ray itself


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


def test_one_is_killed_and_the_run_is_the_same(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_rows(tmp_path / "rerank.jsonl", rows())
    rerank_file(MATROYSHKA, source, tmp_path / "one.tsv")
    killed = []
    real = Workers.give

    def give(self: Workers, number: int, frame: pd.DataFrame) -> None:
        real(self, number, frame)
        if number == 3:
            [worker] = [worker for worker, task in self._busy.values() if task.number == 3]
            cluster.kill(worker)
            killed.append(number)

    monkeypatch.setattr(Workers, "give", give)
    report = rerank_file(MATROYSHKA, source, tmp_path / "two.tsv", workers=2)
    assert killed == [3]
    assert "a worker was lost over queries 'q7' to 'q7' and is replaced" in caplog.text
    assert (tmp_path / "two.tsv").read_bytes() == (tmp_path / "one.tsv").read_bytes()
    assert report.pairs == sum(QUERIES) == report.usage.pairs
    assert cluster.is_initialized()  # it was there before


def test_what_scoring_raises_arrives_as_itself(cluster: Any, tmp_path: Path) -> None:
    """And what was scored before it stays."""
    records = [{**record, "title": None} if record["query_id"] == "q7" else record for record in rows()]
    source, target = write_rows(tmp_path / "rerank.jsonl", records), tmp_path / "run.tsv"
    of_titles = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32", cutoff=2, text_field="title")
    with pytest.raises(ValueError, match=r"'title' is None, not a string .* for qid 'q7', docno 'd0'") as error:
        rerank_file(of_titles, source, target, address="auto")  # one worker on the cluster that is there
    assert type(error.value) is ValueError
    assert "go on with resume" in error.value.__notes__[0]
    assert len(list(read_run(target))) == sum(CHUNKS[:3])


# -- losses and order, with a stand-in for Ray: what is ready, and what is lost, is drawn


class LostError(Exception):
    """A worker is no more."""


class RaisedError(Exception):
    """A worker raised something."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Promise:
    """What a call will give."""

    def __init__(self, name: str, frame: pd.DataFrame | None = None) -> None:
        self.name, self.frame = name, frame


class Handle:
    """Of a worker."""

    def __init__(self) -> None:
        self.open, self.score = (SimpleNamespace(remote=partial(Promise, name)) for name in ("open", "score"))


class Stand:
    """A cluster that does one thing at a time."""

    exceptions = SimpleNamespace(RayError=LostError, RayTaskError=RaisedError)

    def __init__(self, choose: Any, lost: Any, *machines: dict[str, float]) -> None:
        self.choose, self.lost, self.machines = choose, lost, machines or ({"CPU": 4.0},)
        self.slow = False
        self.alive: set[Any] = set()
        self.options: dict[str, Any] = {}
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
            self.options = given
            return SimpleNamespace(remote=make)

        return SimpleNamespace(options=options)

    def wait(self, busy: list[Promise], timeout: float | None = None) -> tuple[list[Promise], list[Promise]]:
        assert busy
        if self.slow and timeout is not None:
            return [], busy
        return [self.choose(busy)], []

    def get(self, ready: Promise) -> Any:
        if self.lost(ready.name, ready.frame):
            raise LostError
        if ready.frame is None:
            if self.broken:
                raise RaisedError(self.broken)
            return None
        if _qid(ready.frame) == "wrong":
            raise RaisedError(ScoringError("wrong", ready.frame))
        return ready.frame.assign(score=1.0), Usage(pairs=1)

    def kill(self, worker: Any) -> None:
        self.alive.discard(worker)


def _qid(frame: pd.DataFrame | None) -> str:
    return "" if frame is None else frame["qid"].iloc[0]


def chunks(names: list[str]) -> Iterator[Chunk]:
    for name in names:
        yield Chunk(pd.DataFrame({"qid": [name]}), 1, 0, 1, 1)


def run(stand: Stand, coming: Iterator[Chunk], count: int) -> tuple[list[str], Exception | None]:
    """What was given out, and what was raised after that."""
    got: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "ray", stand)
        try:
            for chunk, (result, _) in scored_by(MATROYSHKA, coming, workers=count):
                pd.testing.assert_frame_equal(result, chunk.frame.assign(score=1.0))
                got.append(_qid(chunk.frame))
        except Exception as error:
            return got, error
    return got, None


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 4), size=st.integers(0, 20), wrong=st.integers(0, 40))
def test_in_order_whatever_is_ready_and_whatever_is_lost(data: Any, count: int, size: int, wrong: int) -> None:
    """Results come in the source's order, until what is wrong; few chunks are held; all workers are ended."""
    names = [f"q{n}" if n != wrong else "wrong" for n in range(size)]
    lost: dict[str, int] = {}

    def loses(name: str, frame: pd.DataFrame | None) -> bool:
        key = _qid(frame)
        if lost.get(key, 0) < LOSSES - 1 and key and data.draw(st.booleans(), "lost"):
            lost[key] = lost.get(key, 0) + 1
            return True
        return False

    stand = Stand(lambda busy: data.draw(st.sampled_from(busy), "ready"), loses)
    taken: list[str] = []

    def coming() -> Iterator[Chunk]:
        for chunk in chunks(names):
            taken.append(_qid(chunk.frame))
            yield chunk

    got, error = run(stand, coming(), count)
    if wrong < size:
        assert got == names[:wrong]
        assert isinstance(error, ScoringError)
        assert len(taken) <= len(got) + AHEAD * count
    else:
        assert (got, error) == (names, None)
    assert stand.alive == set()
    assert stand.most <= count


def test_few_are_held_where_the_first_takes_long() -> None:
    """Until it is there, no more are read than may wait for it."""
    taken = []

    def coming() -> Iterator[Chunk]:
        for number, chunk in enumerate(chunks([f"q{n}" for n in range(20)])):
            taken.append(number)
            yield chunk

    def last_but_first(busy: list[Promise]) -> Promise:
        if others := [promise for promise in busy if _qid(promise.frame) != "q0"]:
            return others[-1]
        assert len(taken) == 2 * AHEAD
        return busy[0]

    assert run(Stand(last_but_first, lambda *_: False), coming(), 2)[0] == [f"q{n}" for n in range(20)]


@pytest.mark.parametrize(
    ("what", "over", "replaced"),
    [
        ("open", "opening the model", 2 * (LOSSES - 1)),  # two places, in turns
        ("score", "queries 'q1' to 'q1'", LOSSES - 1),
    ],
)
def test_too_many_losses_over_one_thing_are_an_error(
    what: str, over: str, replaced: int, caplog: pytest.LogCaptureFixture
) -> None:
    def loses(name: str, frame: pd.DataFrame | None) -> bool:
        return name == what and _qid(frame) in ("", "q1")

    stand = Stand(lambda busy: busy[0], loses)
    with caplog.at_level(logging.WARNING):
        got, error = run(stand, chunks(["q0", "q1", "q2"]), 2)
    assert isinstance(error, ConnectionError)
    assert f"{LOSSES} workers were lost over {over}" in str(error)
    assert got == (["q0"] if what == "score" else [])
    assert caplog.text.count(f"a worker was lost over {over} and is replaced") == replaced
    assert stand.alive == set()


def test_a_model_that_cannot_be_opened_is_named() -> None:
    stand = Stand(lambda busy: busy[0], lambda *_: False)
    stand.broken = FileNotFoundError("no such model")
    assert run(stand, chunks(["q0"]), 2) == ([], stand.broken)


def test_where_there_is_nothing_to_score_no_worker_is_started() -> None:
    stand = Stand(lambda busy: busy[0], lambda *_: False)
    assert run(stand, iter([]), 2) == ([], None)
    assert stand.most == 0


def test_what_needs_no_cluster_starts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "connected", None)
    source, target = write_rows(tmp_path / "rerank.jsonl", rows()), tmp_path / "run.tsv"
    target.write_text("mine")
    with pytest.raises(FileExistsError):
        rerank_file(MATROYSHKA, source, target, workers=2)


def test_a_bad_line_waits_for_what_was_read_before_it() -> None:
    bad = ValueError("rerank.jsonl, line 3: not JSON")

    def coming() -> Iterator[Chunk]:
        yield from chunks(["q0", "q1"])
        raise bad

    assert run(Stand(lambda busy: busy[-1], lambda *_: False), coming(), 2) == (["q0", "q1"], bad)


@pytest.mark.parametrize(
    ("machines", "device", "count", "wanted"),
    [
        ([{"CPU": 8.0}], None, 3, {"num_cpus": 2}),
        ([{"CPU": 2.0}], None, 3, {"num_cpus": 0}),
        ([{"CPU": 6.0}, {"CPU": 6.0}, {"CPU": 3.0}], None, 4, {"num_cpus": 3}),  # 15 / 4, which is on none
        ([{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 4.0}], None, 2, {"num_cpus": 4}),  # no more than one has
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
def test_each_has_its_share(
    machines: list[dict[str, float]], device: object, count: int, wanted: dict[str, int]
) -> None:
    stand = Stand(None, None, *machines)
    with Workers(stand, SimpleNamespace(device=device), count):
        assert stand.options == wanted
        assert len(stand.alive) == count
    assert stand.alive == set()


@pytest.mark.parametrize(
    ("machines", "device", "count", "message"),
    [
        ([{"GPU": 2.0}], None, 3, "device=None: 1 of the cluster's 2 GPUs each; allowed: at most 2"),
        ([{"GPU": 3.0}, {"GPU": 3.0}], ("cuda:0", "cuda:1"), 3, "2 of the cluster's 6 GPUs each; allowed: at most 2"),
        ([{"GPU": 2.0}], "cuda:1", 1, "device='cuda:1': each has GPUs of its own, .* so that it has no 'cuda:1'"),
        (
            [{"GPU": 4.0}],
            ("cuda:2", "cuda:3"),
            2,
            "so that it has no 'cuda:2'; allowed: None, 'cuda', 'cpu', or 'cuda:",
        ),
    ],
)
def test_gpus_that_a_worker_cannot_have_are_refused(
    machines: list[dict[str, float]], device: object, count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Workers(Stand(None, None, *machines), SimpleNamespace(device=device), count)


def test_while_none_opens_it_says_what_is_free(caplog: pytest.LogCaptureFixture) -> None:
    stand = Stand(lambda busy: busy[0], lambda *_: False)
    stand.slow = True
    assert run(stand, chunks(["q0", "q1"]), 2) == (["q0", "q1"], None)
    assert caplog.messages == [
        "no worker has opened the model after 120 s; the cluster has {'CPU': 1.0} free. It is waited for."
    ]


def test_the_dtype_is_what_a_worker_finds(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may have no such device."""
    monkeypatch.setattr(devices, "resolve_dtype", None)  # here, not there
    assert resolve_worker_dtype(RankLLaMAReranker(), 2) in (("float32", "cpu"), ("bfloat16", "cpu"))
    assert resolve_worker_dtype(RankLLaMAReranker(dtype="float16"), 2) == ("float16", "")
    assert resolve_worker_dtype(RankLLaMAReranker(dtype="float16", quantization="int8"), 2) == ("float16", "cpu")
    with pytest.raises(ValueError, match="device='xpu' cannot be used here"):
        resolve_worker_dtype(RankLLaMAReranker(device="xpu"), 2)


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = write_rows(tmp_path / "rerank.jsonl", rows())
    with pytest.raises(ImportError, match=r"workers=2 needs Ray: pip install 'pyterrier-llmrerank\[ray\]'"):
        rerank_file(MATROYSHKA, source, tmp_path / "run.tsv", workers=2)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("address", "environment", "wanted"),
    [(None, None, "local"), ("ray://head:10001", "other", "ray://head:10001"), (None, "head:6379", "head:6379")],
)
def test_the_cluster_is_the_one_that_is_named(
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
    with workers.connected(2, address):
        assert calls == [wanted]
    assert calls == [wanted, "shutdown"]

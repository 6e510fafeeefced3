"""Several processes, on one machine or many, that each hold the model and score what one process reads and writes."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from ..engine.usage import Usage

if TYPE_CHECKING:
    from ..reranker import LLMReranker
    from .streaming import Chunk

logger = logging.getLogger(__name__)

#: Chunks a worker that may be under way, or wait for earlier ones to be written.
AHEAD = 3

#: So many workers lost over one frame, or over opening the model, are too many.
LOSSES = 3

#: Seconds without any news of a worker after which a warning says what the cluster has.
PATIENCE = 120

#: A frame with its scores, and what these took.
Scored = tuple[pd.DataFrame, Usage]


def scored_by(
    reranker: LLMReranker, chunks: Iterator[Chunk], *, workers: int, address: str | None = None
) -> Generator[tuple[Chunk, Scored]]:
    """Score chunks in Ray actors.

    Each opens the model once, and gets a chunk whenever it is free. Where the cluster has GPUs each has one of its own,
    or as many as ``device`` lists; else an equal share of the CPUs, and as many threads. One that joins late, or
    never, holds nothing up, but for a warning while none has; where one is lost, another is started, and its chunk is
    scored again. Results come in the order of the chunks, and no more than :data:`AHEAD` chunks a worker are held.
    Scores are those of one process: to the last bit where that has as many threads, on the same hardware.

    Args:
        reranker: what scores; its model has to be there under its name, and this package installed, on each machine.
            Name a ``dtype`` where not all of them compute in bf16: ``"auto"`` is what each finds.
        chunks: what is to be scored.
        workers: how many.
        address: as :func:`connected`.

    Yields:
        Each chunk with its result.

    Raises:
        ImportError, ConnectionError: as :func:`connected`.
        ValueError: there are GPUs, and fewer than the workers want, or ``device`` names others than a worker's own.
        ConnectionError: :data:`LOSSES` workers were lost over one chunk, or over opening the model.
        Exception: whatever reading or scoring a chunk raised, when all chunks before it have been yielded.
    """
    coming = _errors_last(chunks)
    begin = next(coming, None)
    if isinstance(begin, Exception):
        raise begin
    if begin is None:
        return
    coming = chain([begin], coming)
    with connected(workers, address) as ray, Workers(ray, reranker, workers) as pool:
        last: Exception | None = None
        held: dict[int, Chunk] = {}
        done: dict[int, Scored | Exception] = {}
        given = yielded = 0
        more = True
        while True:
            while yielded in done:
                result = done.pop(yielded)
                if isinstance(result, Exception):
                    raise result
                yield held.pop(yielded), result
                yielded += 1
            while more and pool.free and given - yielded < AHEAD * workers:
                chunk = next(coming, None)
                if chunk is None or isinstance(chunk, Exception):
                    more, last = False, chunk
                else:
                    held[given] = chunk
                    pool.give(given, chunk.frame)
                    given += 1
            if yielded == given and not more:
                if last is not None:
                    raise last
                return
            done |= pool.wait()


class Worker:
    """A process that opens the model once, and scores frames."""

    def __init__(self, reranker: LLMReranker) -> None:
        self._reranker = reranker

    def open(self) -> None:
        """Read the model. An error here arrives as itself; one in the constructor of an actor would not."""
        self._reranker.scorer().open()

    def score(self, frame: pd.DataFrame) -> Scored:
        """As :func:`~pyterrier_llmrerank.runs.streaming.score_with_usage`."""
        from .streaming import score_with_usage

        return score_with_usage(self._reranker, frame)


class Task(NamedTuple):
    """What a worker does.

    Args:
        number: by which its result is known.
        frame: what is scored; None to open the model.
        losses: workers that were lost over it.
    """

    number: int
    frame: pd.DataFrame | None
    losses: int = 0

    def __str__(self) -> str:
        if self.frame is None:
            return "opening the model"
        return f"queries {self.frame['qid'].iloc[0]!r} to {self.frame['qid'].iloc[-1]!r}"


class Workers:
    """So many workers, and what they are doing. On leaving they are ended.

    Args:
        ray: the module, connected to a cluster.
        reranker: what each scores with.
        count: how many.

    Raises:
        ValueError: as :func:`scored_by`.
    """

    def __init__(self, ray: Any, reranker: LLMReranker, count: int) -> None:
        self._ray = ray
        self._reranker = reranker
        self._actor = ray.remote(Worker).options(**_worker_resources(ray.nodes(), reranker.device, count))
        self._busy: dict[Any, tuple[Any, Task]] = {}  # worker and task by what is waited for
        self._idle: list[Any] = []
        self._again: deque[Task] = deque()
        self._opened = False  # whether any of them has
        for _ in range(count):
            self._start(Task(-1, None))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)

    @property
    def free(self) -> bool:
        """Whether one has nothing to do."""
        return bool(self._idle)

    def give(self, number: int, frame: pd.DataFrame) -> None:
        """Have a free one score a frame."""
        self._score(self._idle.pop(), Task(number, frame))

    def wait(self) -> dict[int, Scored | Exception]:
        """Wait for one that opens the model or scores to be done with it.

        Returns:
            What came of its frame, by number, or what scoring it raised; nothing if it is free for a first frame, or
            was lost and another is starting.

        Raises:
            ConnectionError: as :func:`scored_by`.
            Exception: whatever opening the model raised.
        """
        if self._opened:
            ready = self._ray.wait(list(self._busy))[0][0]
        else:
            ready = _first(self._ray, list(self._busy), "has opened the model")
        worker, task = self._busy.pop(ready)
        result: Scored | Exception
        try:
            result = self._ray.get(ready)
        except self._ray.exceptions.RayTaskError as error:
            failed: Exception = error.cause
            failed.__cause__ = error  # it tells where in the worker
            if task.frame is None:
                raise failed from error
            result = failed
        except self._ray.exceptions.RayError as error:
            self._replace(worker, task, error)
            return {}
        self._opened = True
        if self._again:
            self._score(worker, self._again.popleft())
        else:
            self._idle.append(worker)
        return {} if task.frame is None else {task.number: result}

    def _start(self, opening: Task) -> None:
        worker = self._actor.remote(self._reranker)
        self._busy[worker.open.remote()] = worker, opening

    def _score(self, worker: Any, task: Task) -> None:
        self._busy[worker.score.remote(task.frame)] = worker, task

    def _replace(self, worker: Any, task: Task, error: Exception) -> None:
        """Start another in place of a lost one, whose frame is scored again by the next that is free."""
        self._ray.kill(worker)  # where it is only out of reach
        task = task._replace(losses=task.losses + 1)
        if task.losses == LOSSES:
            raise ConnectionError(f"{LOSSES} workers were lost over {task}, the last one by: {error}") from error
        logger.warning("a worker was lost over %s and is replaced: %s", task, error)
        if task.frame is None:
            self._start(task)
        else:
            self._again.append(task)
            self._start(Task(-1, None))
        if self._again and self._idle:
            self._score(self._idle.pop(), self._again.popleft())


@contextmanager
def connected(workers: int, address: str | None = None) -> Iterator[Any]:
    """Within, there is a cluster; it is left as it was found.

    Args:
        workers: for how many; named in errors.
        address: the cluster's. None for the one that this process is connected to, or that ``RAY_ADDRESS`` names, or
            else one on this machine that ends with the work.

    Yields:
        Ray's module.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"workers={workers} needs Ray: pip install 'pyterrier-llmrerank[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS", "local")
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def resolve_worker_dtype(reranker: LLMReranker, workers: int) -> tuple[str, str]:
    """The dtype that all workers shall compute in, and on what kind of device: as the first of them finds it.

    Where another dtype than ``"auto"`` is named and nothing is quantised, none is asked, and the kind is ``""``.

    Args:
        reranker: whose ``dtype`` and ``device`` are looked at.
        workers: how many there will be.

    Raises:
        ConnectionError: the first was lost.
        ValueError: as :func:`scored_by`.
    """
    import ray

    if reranker.dtype != "auto" and not reranker.quantization:
        return reranker.dtype, ""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    look = ray.remote(max_calls=1)(_found)  # its process would keep some of a GPU's memory
    found = look.options(**_worker_resources(nodes, reranker.device, workers)).remote(reranker.dtype, reranker.device)
    _first(ray, [found], "says which dtype it computes in")
    try:
        dtype, kind = ray.get(found)
    except ray.exceptions.RayTaskError as error:
        failed: Exception = error.cause
        raise failed from error
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"a worker was lost over its dtype: {error}") from error
    return dtype, kind


def _found(dtype: str, device: str | tuple[str, ...] | None) -> tuple[str, str]:
    from ..engine.devices import resolve_devices, resolve_dtype

    places = resolve_devices(device)
    return str(resolve_dtype(dtype, *places)).removeprefix("torch."), places[0].type


def _first(ray: Any, waited_for: list[Any], what: str) -> Any:
    """The first that is there; a warning, while none is, that resources may be missing."""
    ready, _ = ray.wait(waited_for, timeout=PATIENCE)
    if not ready:
        logger.warning(
            "no worker %s after %d s; the cluster has %s free. It is waited for.",
            what, PATIENCE, {name: amount for name, amount in ray.available_resources().items() if ":" not in name},
        )  # fmt: skip
        ready, _ = ray.wait(waited_for)
    return ready[0]


def _worker_resources(
    nodes: Sequence[Mapping[str, Any]], device: str | tuple[str, ...] | None, workers: int
) -> dict[str, int]:
    """What each worker has to itself, such that all find room on the machines."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]

    def places(**each: int) -> int:
        return sum(min(int(machine.get(name, 0)) // number for name, number in each.items()) for machine in machines)

    names = device if isinstance(device, tuple) else (device,)
    each = sum(name is None or name.startswith("cuda") for name in names)
    if not each or not places(GPU=1):
        # Where there are more workers than CPUs, none: they would wait for one for ever.
        most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
        return {"num_cpus": next((cpus for cpus in range(most, 0, -1) if places(CPU=cpus) >= workers), 0)}
    own = {"cuda", *(f"cuda:{number}" for number in range(each))}
    if others := [name for name in names if name is not None and name.startswith("cuda") and name not in own]:
        raise ValueError(
            f"workers={workers} with device={device!r}: each has GPUs of its own, which it counts from 0, so that it "
            f"has no {others[0]!r}; allowed: None, 'cuda', 'cpu', or 'cuda:0' and those after it."
        )
    if workers > (room := places(GPU=each)):
        raise ValueError(
            f"workers={workers} with device={device!r}: {each} of the cluster's {places(GPU=1)} GPUs each; "
            f"allowed: at most {room}, or device='cpu'."
        )
    return {"num_cpus": int(places(GPU=each, CPU=1) >= workers), "num_gpus": each}


def _errors_last(chunks: Iterator[Chunk]) -> Iterator[Chunk | Exception]:
    """Chunks, and last what reading them raised, if anything: those before it are still to be scored."""
    try:
        yield from chunks
    except Exception as error:
        yield error

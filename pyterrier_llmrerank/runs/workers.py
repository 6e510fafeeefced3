"""Score chunks in several processes, on one machine or many, with Ray."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pandas as pd

from .chunks import Chunk, ScoredChunk, score_chunk

if TYPE_CHECKING:
    from ..reranker import LLMReranker

logger = logging.getLogger(__name__)

#: Chunks per worker that are being scored, or wait until earlier ones have been written.
CHUNKS_AHEAD = 3

#: Losses of a worker over the same task after which a run stops.
MAX_LOSSES = 3

#: Seconds without a first worker after which a warning lists the cluster's free resources.
WARN_AFTER = 120


def score_on_workers(
    reranker: LLMReranker, chunks: Iterator[Chunk], *, workers: int
) -> Generator[tuple[Chunk, ScoredChunk]]:
    """Score chunks in Ray actors, within :func:`ray_cluster`.

    Each worker opens the model once, and takes a chunk whenever it is idle. On a cluster with GPUs, each worker has one
    GPU, or as many as ``device`` lists; otherwise, an equal share of the CPUs, and as many threads. Workers that start
    late hold nothing up. A lost worker is replaced, and its chunk is scored again. Results keep the order of the
    chunks, and memory holds at most :data:`CHUNKS_AHEAD` chunks per worker. Scores equal those of one process, to the
    last bit on the same hardware with as many threads.

    Args:
        reranker: the reranker. Each machine needs this package and the model, under the same name. With a ``dtype``
            of ``"auto"``, each worker chooses its own: resolve it first (:func:`resolve_worker_dtype`).
        chunks: the chunks.
        workers: number of workers.

    Yields:
        Each chunk with its result.

    Raises:
        ValueError: the cluster has fewer GPUs than the workers need, or ``device`` names GPUs outside a worker's own.
        ConnectionError: :data:`MAX_LOSSES` workers were lost over one chunk, or while opening the model.
        Exception: an error from reading or scoring a chunk, once all chunks before it have been yielded.
    """
    import ray

    first = next(chunks, None)
    if first is None:  # no workers are needed
        return
    tasks = _tasks(chain([first], chunks))
    pending: deque[Task] = deque()  # submitted, and not yielded yet
    with WorkerPool(ray, reranker, workers) as pool:
        while True:
            while pool.idle and len(pending) < CHUNKS_AHEAD * workers and (task := next(tasks, None)) is not None:
                pending.append(task)
                if task.result is None:
                    pool.submit(task)
            if pending and (result := pending[0].result) is not None:
                chunk = pending.popleft().chunk
                if isinstance(result, Exception):
                    raise result
                assert chunk is not None
                yield chunk, result
            elif pending or not pool.idle:
                pool.wait()
            else:
                return


class Worker:
    """A process that opens the model once, and scores chunks."""

    def __init__(self, reranker: LLMReranker) -> None:
        self._reranker = reranker

    def open(self) -> None:
        """Open the model. Ray reports an error here as it is, but not one in the constructor of an actor."""
        self._reranker.scorer().open()

    def score(self, frame: pd.DataFrame) -> ScoredChunk:
        """Score the frame of a chunk."""
        return score_chunk(self._reranker, frame)


@dataclass(eq=False)
class Task:
    """Work for a worker: open the model or score a chunk.

    Args:
        chunk: the chunk; None to open the model.
        result: the scored chunk, or the error raised by reading or scoring it; None until then.
        losses: number of workers lost while working on it.
    """

    chunk: Chunk | None
    result: ScoredChunk | Exception | None = None
    losses: int = 0

    def __str__(self) -> str:
        if self.chunk is None:
            return "opening the model"
        qids = self.chunk.frame["qid"]
        return f"scoring queries {qids.iloc[0]!r} to {qids.iloc[-1]!r}"


def _tasks(chunks: Iterator[Chunk]) -> Iterator[Task]:
    """Turn chunks into tasks, and an error from reading them into a last task with that result."""
    try:
        for chunk in chunks:
            yield Task(chunk)
    except Exception as error:
        yield Task(None, result=error)


class WorkerPool:
    """A number of workers and the tasks that they work on. On exit, the workers are killed.

    Args:
        ray: the ``ray`` module, connected to a cluster.
        reranker: the reranker that each worker opens.
        count: number of workers.

    Raises:
        ValueError: as :func:`score_on_workers`.
    """

    def __init__(self, ray: Any, reranker: LLMReranker, count: int) -> None:
        self._ray = ray
        self._reranker = reranker
        self._actor = ray.remote(Worker).options(**_worker_resources(ray.nodes(), reranker.device, count))
        self._busy: dict[Any, tuple[Any, Task]] = {}  # by the reference to the result
        self._queue: deque[Task] = deque()
        self._has_opened = False
        #: Workers without a task.
        self.idle: list[Any] = []
        for _ in range(count):
            self._start(Task(None))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for worker in [*self.idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)

    def submit(self, task: Task) -> None:
        """Have the next idle worker score a chunk."""
        self._queue.append(task)
        self._assign()

    def wait(self) -> None:
        """Wait until a worker has finished or failed a task. A finished task has a ``result``.

        Raises:
            ConnectionError: as :func:`score_on_workers`.
            Exception: an error from opening the model.
        """
        references = list(self._busy)
        if self._has_opened:
            ready = self._ray.wait(references)[0][0]
        else:
            ready = _wait_for_first(self._ray, references, "has opened the model")
        worker, task = self._busy.pop(ready)
        try:
            task.result = self._ray.get(ready)
        except self._ray.exceptions.RayTaskError as error:
            cause: Exception = error.cause
            if task.chunk is None:
                raise cause from error
            cause.__cause__ = error  # has the worker's traceback
            task.result = cause
        except self._ray.exceptions.RayError as error:
            self._replace(worker, task, error)
            return
        self._has_opened = True
        self.idle.append(worker)
        self._assign()

    def _start(self, opening: Task) -> None:
        worker = self._actor.remote(self._reranker)
        self._busy[worker.open.remote()] = worker, opening

    def _assign(self) -> None:
        while self._queue and self.idle:
            worker, task = self.idle.pop(), self._queue.popleft()
            assert task.chunk is not None
            self._busy[worker.score.remote(task.chunk.frame)] = worker, task

    def _replace(self, worker: Any, task: Task, error: Exception) -> None:
        """Start another worker in place of a lost one, and queue its chunk again."""
        self._ray.kill(worker)  # it may only be unreachable
        task.losses += 1
        if task.losses == MAX_LOSSES:
            raise ConnectionError(f"{MAX_LOSSES} workers were lost while {task}; the last error: {error}") from error
        logger.warning("A worker was lost while %s and is replaced: %s", task, error)
        if task.chunk is None:
            self._start(task)
        else:
            self._start(Task(None))
            self.submit(task)


@contextmanager
def ray_cluster(workers: int, address: str | None = None) -> Iterator[Any]:
    """Connect to a Ray cluster, or start one, for the duration of a ``with`` block.

    Args:
        workers: number of workers, for the error message.
        address: address of the cluster. By default, the cluster that this process is connected to, else the one that
            ``RAY_ADDRESS`` names, else a new one on this machine, which is stopped at the end.

    Yields:
        The ``ray`` module.

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
    """Resolve the dtype that all workers compute in, and their type of device, on the first free worker.

    Args:
        reranker: the reranker.
        workers: number of workers.

    Returns:
        The reranker's own ``dtype`` and ``""``, without asking a worker, if it names one and quantizes nothing.

    Raises:
        ConnectionError: the worker was lost.
        ValueError: as :func:`score_on_workers`.
    """
    import ray

    if reranker.dtype != "auto" and not reranker.quantization:
        return reranker.dtype, ""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    resolve = ray.remote(max_calls=1)(_resolve_dtype_here)  # a process that lived on would keep GPU memory
    reference = resolve.options(**_worker_resources(nodes, reranker.device, workers)).remote(
        reranker.dtype, reranker.device
    )
    _wait_for_first(ray, [reference], "has resolved its dtype")
    try:
        dtype, device_type = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause: Exception = error.cause
        raise cause from error
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"a worker was lost while resolving its dtype: {error}") from error
    return dtype, device_type


def _resolve_dtype_here(dtype: str, device: str | tuple[str, ...] | None) -> tuple[str, str]:
    from ..engine.devices import resolve_devices, resolve_dtype

    devices = resolve_devices(device)
    return str(resolve_dtype(dtype, *devices)).removeprefix("torch."), devices[0].type


def _wait_for_first(ray: Any, references: list[Any], event: str) -> Any:
    """Return the first reference that is ready. Warn if that takes long, since resources may be missing."""
    ready, _ = ray.wait(references, timeout=WARN_AFTER)
    if not ready:
        free = {name: amount for name, amount in ray.available_resources().items() if ":" not in name}
        logger.warning("No worker %s after %d s; still waiting. Free on the cluster: %s", event, WARN_AFTER, free)
        ready, _ = ray.wait(references)
    return ready[0]


def _worker_resources(
    nodes: Sequence[Mapping[str, Any]], device: str | tuple[str, ...] | None, workers: int
) -> dict[str, int]:
    """Return the CPUs and GPUs to reserve for each worker, such that all workers fit on the machines."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]

    def capacity(**each: int) -> int:
        """Count the workers that fit if each reserves so much."""
        return sum(min(int(machine.get(name, 0)) // amount for name, amount in each.items()) for machine in machines)

    names = device if isinstance(device, tuple) else (device,)
    gpus = sum(name is None or name.startswith("cuda") for name in names)
    if not gpus or not capacity(GPU=1):
        # More workers than CPUs reserve none: otherwise, some would wait forever.
        most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
        return {"num_cpus": next((cpus for cpus in range(most, 0, -1) if capacity(CPU=cpus) >= workers), 0)}
    own = {"cuda", *(f"cuda:{index}" for index in range(gpus))}
    if others := [name for name in names if name is not None and name.startswith("cuda") and name not in own]:
        raise ValueError(
            f"workers={workers} with device={device!r}: each worker numbers its own GPUs from 0 and has no "
            f"{others[0]!r}; allowed: None, 'cuda', 'cpu', 'cuda:0', or a list counting up from it."
        )
    if workers > (most := capacity(GPU=gpus)):
        raise ValueError(
            f"workers={workers} with device={device!r}: each worker needs {gpus} of the cluster's {capacity(GPU=1)} "
            f"GPUs; allowed: at most {most} workers, or device='cpu'."
        )
    return {"num_cpus": int(capacity(GPU=gpus, CPU=1) >= workers), "num_gpus": gpus}

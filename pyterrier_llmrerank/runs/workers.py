"""Score chunks in several processes, on one machine or many, with Ray."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import pandas as pd

from .chunks import Chunk, ScoredChunk, score_chunk
from .cluster import wait_for_first, worker_resources

if TYPE_CHECKING:
    from ..reranker import LLMReranker

logger = logging.getLogger(__name__)

#: Chunks for each worker that are being scored, or wait until earlier chunks have been written.
CHUNKS_AHEAD = 3

#: The number of workers lost over one task after which a run stops.
MAX_LOSSES = 3


def score_on_workers(
    reranker: LLMReranker, chunks: Iterator[Chunk], *, workers: int
) -> Generator[tuple[Chunk, ScoredChunk]]:
    """Score chunks in Ray actors, within :func:`~pyterrier_llmrerank.runs.cluster.ray_cluster`.

    Each worker opens the model once, and takes a chunk whenever it is idle, so that workers that start late hold
    nothing up. It has one GPU, or as many as ``device`` lists; without GPUs, an equal number of CPUs. Ray restarts a
    lost worker and scores its chunk again. Results keep the order of the chunks, and memory holds at most
    :data:`CHUNKS_AHEAD` chunks per worker. Scores equal those of one process, to the last bit on the same hardware with
    as many threads.

    Args:
        reranker: the reranker. Each machine needs this package and the model, under the same name. With a ``dtype``
            of ``"auto"``, each worker chooses its own: resolve it first
            (:func:`~pyterrier_llmrerank.runs.cluster.resolve_worker_dtype`).
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
    """Opens the model once and scores chunks, in a process of its own."""

    def __init__(self, reranker: LLMReranker) -> None:
        import ray

        self._reranker = reranker
        self._is_replacement = ray.get_runtime_context().was_current_actor_reconstructed

    def open(self) -> None:
        """Open the model. Ray reports an error here as it is, but not one in the constructor of an actor."""
        self._reranker.scorer().open()

    def score(self, frame: pd.DataFrame) -> tuple[ScoredChunk, bool]:
        """Score the frame of a chunk; also return whether this worker has just replaced a lost one."""
        is_replacement, self._is_replacement = self._is_replacement, False
        return score_chunk(self._reranker, frame), is_replacement


@dataclass(eq=False)
class Task:
    """Names a worker's task, to score a chunk or, without a chunk, to open the model. Its result may be an error."""

    chunk: Chunk | None
    result: ScoredChunk | Exception | None = None

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
    """Starts workers, each of which opens the reranker's model, and kills them on exit."""

    def __init__(self, ray: Any, reranker: LLMReranker, count: int) -> None:
        self._ray = ray
        resources = worker_resources(ray.nodes(), reranker.device, count)
        actor = ray.remote(Worker).options(max_restarts=-1, max_task_retries=MAX_LOSSES - 1, **resources)
        self._workers = [actor.remote(reranker) for _ in range(count)]
        self._busy = {worker.open.remote(): (worker, Task(None)) for worker in self._workers}
        self._has_opened = False
        #: Workers without a task.
        self.idle: list[Any] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker)

    def submit(self, task: Task) -> None:
        """Have an idle worker score a chunk."""
        assert task.chunk is not None
        worker = self.idle.pop()
        self._busy[worker.score.remote(task.chunk.frame)] = worker, task

    def wait(self) -> None:
        """Wait until a worker is done with its task, which then has a ``result``; raise an error from opening."""
        references = list(self._busy)
        if self._has_opened:
            ready = self._ray.wait(references)[0][0]
        else:
            ready = wait_for_first(self._ray, references, "has opened the model")
        worker, task = self._busy.pop(ready)
        try:
            found = self._ray.get(ready)
            if found is not None:
                task.result, is_replacement = found
                if is_replacement:
                    logger.warning("A worker was lost while %s and is replaced.", str(task))
        except self._ray.exceptions.RayTaskError as error:
            task.result = error.cause
            error.cause.__cause__ = error  # has the worker's traceback
        except self._ray.exceptions.RayError as error:  # Ray has given up
            task.result = ConnectionError(f"{MAX_LOSSES} workers were lost while {task}; the last error: {error}")
            task.result.__cause__ = error
        if task.chunk is None and isinstance(task.result, Exception):
            raise task.result
        self._has_opened = True
        self.idle.append(worker)

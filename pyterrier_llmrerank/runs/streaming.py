"""Rerank files of any length, and resume after an interruption."""

from __future__ import annotations

import gzip
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyterrier as pt

from ..engine.prefetch import prefetch
from ..engine.usage import Stopwatch, Usage
from ..values import check_positive
from .chunks import Chunk, ScoredChunk, Shard, count_lines, open_shard, read_chunks, score_chunk
from .formats import run_line
from .journal import Block, JournaledFile, refuse_existing

if TYPE_CHECKING:
    from ..reranker import LLMReranker

logger = logging.getLogger(__name__)

#: Constructor arguments that may differ when a run is resumed: without quantization, they do not affect scores beyond
#: the last digits.
MAY_CHANGE = ("batch_size", "device", "training", "verbose")

#: Scores chunks, in their order.
ScoreChunks = Callable[[Iterator[Chunk]], Generator[tuple[Chunk, ScoredChunk]]]


@dataclass(frozen=True)
class Report:
    """Holds counts and times of a call of :func:`rerank_file`.

    Args:
        target: the run.
        pairs: rows scored and written.
        queries: queries scored and written.
        seconds: duration of the call.
        resumed_from: rows that the run contained before.
        usage: tokens and seconds spent on scoring and writing.

    >>> print(Report(Path("run.tsv"), 2000, 20, 12.5, 1000))
    run.tsv: 2,000 pairs of 20 queries in 12.5 s (160 pairs/s), resumed after 1,000 pairs
    """

    target: Path
    pairs: int
    queries: int
    seconds: float
    resumed_from: int = 0
    usage: Usage = field(default_factory=Usage)

    def __str__(self) -> str:
        resumed = f", resumed after {self.resumed_from:,} pairs" if self.resumed_from else ""
        scored = f"; scored {self.usage}" if self.usage != Usage() else ""
        rate = self.pairs / self.seconds if self.seconds else 0.0
        return (
            f"{self.target}: {self.pairs:,} pairs of {self.queries:,} queries in {self.seconds:.1f} s "
            f"({rate:,.0f} pairs/s){resumed}{scored}"
        )


def rerank_file(
    reranker: LLMReranker,
    source: Path,
    target: Path,
    *,
    form: str = "three",
    tag: str = "llmrerank",
    resume: bool = False,
    shard: str | None = None,
    workers: int = 1,
    address: str | None = None,
) -> Report:
    """Rerank a file of any length.

    The file is read in chunks of whole queries, of at least :data:`~pyterrier_llmrerank.engine.scoring.CHUNK` rows.
    Several devices score a chunk together, so it has that many rows for each of them (except in a shard). Each
    chunk is scored in one call and written in one block, while the next chunk is read and tokenised. Memory use does
    not grow with the file, except for the ids of its queries. An interrupted and resumed run has the same bytes as an
    uninterrupted run with the same options.

    ``<target>.journal``, beside the run, records the options that affect scores, the blocks written so far, and
    whether the run is finished. An existing target is never overwritten: it raises an error, unless ``resume`` is set.
    ``resume`` continues after the last complete block. It

    - begins a new run if there is no target, so the same command can be repeated until it succeeds;
    - scores only new rows if the run is finished and its source has grown;
    - raises an error if the target has no journal, if the rows already scored have changed, or if arguments
      that affect scores, or the dtype, have changed. ``workers`` may change; ``batch_size`` and ``device``, too, if the
      reranker is not quantised. The model's files are not compared.

    After an error or Ctrl-C, the target holds complete blocks only, and the error says how to resume if there are any;
    if there are none, both files are removed. After a kill, resuming removes an incomplete block.

    Args:
        reranker: the reranker. If it is ``verbose``, a progress bar counts pairs.
        source: the rerank file, as read by :func:`~pyterrier_llmrerank.runs.formats.read_rerank`.
        target: the run to write, compressed if its name ends in ``.gz``. Queries keep the order of the source; the
            documents of each are sorted by rank.
        form: ``"three"`` or ``"trec"``, as for :func:`~pyterrier_llmrerank.runs.formats.run_line`.
        tag: the run's name in the TREC form.
        resume: continue an existing target.
        shard: rerank one shard of the file, such as ``"2/4"``, the second of four; None for the whole file. Shards have
            whole chunks. Their runs, joined in order, have the bytes of the run over the whole file, which must not
            grow meanwhile. The reranker's ``dtype`` must not be ``"auto"``, which machines resolve differently.
        workers: the number of scoring processes. Several run on Ray (``pip install 'pyterrier-llmrerank[ray]'``), as
            described for :func:`~pyterrier_llmrerank.runs.workers.score_on_workers`; 1 scores in this process, unless
            ``address`` is given. ``usage`` does not count calls that failed on a worker.
        address: address of a Ray cluster. None takes the cluster that this process is connected to, or starts Ray on
            this machine if needed.

    Returns:
        Counts and times. They are also logged (INFO), and the usage is added to ``reranker.usage``.

    Raises:
        ValueError: an argument or a line is invalid, the target is not a file, or it was written from another source
            or with other options.
        FileExistsError: the target exists, and ``resume`` is False or there is no journal.
        ScoringError: as :meth:`LLMReranker.transform`.
        ImportError: Ray is needed and not installed.
        OSError: a file cannot be read or written.

    >>> from pyterrier_llmrerank import RankLLaMAReranker
    >>> report = rerank_file(RankLLaMAReranker(), Path("rerank.jsonl"), Path("run.tsv"), resume=True)  # doctest: +SKIP
    """
    source, target = Path(source), Path(target)
    _check_arguments(source, target, form, tag, resume, workers)
    started = time.perf_counter()
    silent, selected = reranker.silent_copy(), None if shard is None else _open_shard(reranker, shard, source)
    block = _block(reranker, selected)
    with ExitStack() as stack:
        score_chunks, device_type = stack.enter_context(_scoring(silent, workers, address))
        settings = _settings(silent, device_type, form, tag, selected)
        file = stack.enter_context(JournaledFile(target, settings, resume=resume))
        chunks = _read(source, selected, file.blocks, block)
        resumed_from = _skip_written(chunks, file.blocks, source, target)
        bar = stack.enter_context(_progress_bar(reranker, source, selected, resumed_from))
        run = _RunWriter(file, form, tag, bar)
        try:
            run.write_all(score_chunks(chunks))
        except BaseException as error:
            run.usage += silent.usage  # of the call that raised the error
            _add_note(error, target, resumed_from + run.pairs, block)
            raise
        finally:
            reranker.add_usage(run.usage)
    report = Report(target, run.pairs, run.queries, time.perf_counter() - started, resumed_from, run.usage)
    _log(report, source, selected)
    return report


def _check_arguments(source: Path, target: Path, form: str, tag: str, resume: bool, workers: int) -> None:
    """Raise an error for invalid arguments, before Ray or a model starts."""
    check_positive("workers", workers)
    run_line("q", "d", 1, 0.0, form, tag)
    if not source.exists():
        raise FileNotFoundError(f"source={str(source)!r}: no such file; allowed: a rerank file, as written by prepare.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"target={str(target)!r}: no such folder; allowed: a file in an existing folder.")
    if target.exists() and not target.is_file():
        raise ValueError(f"target={str(target)!r} is not a file; allowed: a file that can be resumed, or a new one.")
    if not resume:
        refuse_existing(target)


def _open_shard(reranker: LLMReranker, shard: str, source: Path) -> Shard:
    """Return a shard; ValueError if there is none, or if machines could score their shards in different dtypes."""
    selected = open_shard(shard, source)
    if reranker.dtype == "auto":
        raise ValueError(
            f"dtype='auto' with shard={shard!r}: each machine would choose its own, and the scores of one run would "
            "differ in precision; allowed: float32, bfloat16, float16."
        )
    return selected


def _block(reranker: LLMReranker, shard: Shard | None) -> int:
    """Return the fewest pairs in a block. Several devices score a block together, and wait for the last at its end.

    In a shard, the number is the same on every machine, so that the shards leave no gap.
    """
    from ..engine.scoring import CHUNK

    return CHUNK * (len(reranker.device) if shard is None and isinstance(reranker.device, tuple) else 1)


def _progress_bar(reranker: LLMReranker, source: Path, shard: Shard | None, done: int) -> Any:
    """Return a progress bar of pairs, of which some are done; hidden unless the reranker is verbose."""
    is_counted = reranker.verbose and shard is None and source.is_file()  # a pipe can be read only once
    return pt.tqdm(
        total=count_lines(source) if is_counted else None, initial=done, desc=reranker.label(), unit="pair",
        disable=not reranker.verbose,
    )  # fmt: skip


def _log(report: Report, source: Path, shard: Shard | None) -> None:
    """Log the report, with a warning if nothing was scored."""
    from ..engine.scoring import CHUNK

    if report.resumed_from and not report.pairs:
        logger.warning("%s is already finished; nothing was scored.", report.target)
    if shard is not None and not report.resumed_from + report.pairs:
        logger.warning("%s is empty: %s has fewer blocks of %d pairs than shards.", report.target, source, CHUNK)
    logger.info("%s", str(report))


def _add_note(error: BaseException, target: Path, pairs: int, block: int) -> None:
    """Add to an error the number of pairs that the target holds, and how to resume."""
    if pairs:
        error.add_note(f"{target} holds {pairs:,} pairs, all of complete queries; to continue, set resume=True.")
    elif isinstance(error, KeyboardInterrupt):
        error.add_note(f"Nothing was written yet: results are written in blocks of at least {block:,} pairs.")


# -- reading


def _read(source: Path, shard: Shard | None, blocks: Sequence[Block], block: int) -> Iterator[Chunk]:
    """Read the chunks of a file, or of one shard of it.

    Args:
        source: the rerank file.
        shard: the shard; None for the whole file.
        blocks: the blocks of an earlier call. In a whole file, their sizes come first.
        block: the fewest pairs in each further block.
    """
    if shard is None:
        return read_chunks(source, chain((written.rows for written in blocks), repeat(block)))
    return shard.select(read_chunks(source, repeat(block)))


def _skip_written(chunks: Iterator[Chunk], blocks: Sequence[Block], source: Path, target: Path) -> int:
    """Skip the chunks that the target already contains, and return their number of rows.

    Raises:
        ValueError: a block was written from other rows.
    """
    for block in blocks:
        chunk = next(chunks, None)
        if chunk is None:
            raise ValueError(
                f"{source} has fewer rows than {target} was written from; resume with the original file, or delete "
                f"{target}."
            )
        if (len(chunk.frame), chunk.checksum) != (block.rows, block.source_checksum):
            raise ValueError(
                f"{source}, lines {chunk.first_line} to {chunk.last_line}: the rows have changed since {target} was "
                f"written; resume with the original file, or delete {target}."
            )
    return sum(block.rows for block in blocks)


# -- scoring


@contextmanager
def _scoring(reranker: LLMReranker, workers: int, address: str | None) -> Iterator[tuple[ScoreChunks, str]]:
    """Open the model or connect to Ray, and set the reranker's ``dtype`` to the dtype of the computation.

    Yields:
        A function that scores chunks, and the type of the device (``""`` if scores do not depend on it).
    """
    if workers == 1 and address is None:
        scorer = reranker.scorer()  # the reranker keeps the weights for its next call
        reranker.dtype, device_type = str(scorer.dtype).removeprefix("torch."), scorer.device.type
        yield partial(_score_here, reranker), device_type
    else:
        from .cluster import ray_cluster, resolve_worker_dtype
        from .workers import score_on_workers

        with ray_cluster(workers, address):
            reranker.dtype, device_type = resolve_worker_dtype(reranker, workers)
            yield partial(score_on_workers, reranker, workers=workers), device_type


def _score_here(reranker: LLMReranker, chunks: Iterator[Chunk]) -> Generator[tuple[Chunk, ScoredChunk]]:
    """Score chunks in this process, while a thread reads and tokenises the next one."""

    def tokenised(chunk: Chunk) -> Chunk:
        reranker.tokenise(chunk.frame)
        return chunk

    for chunk in prefetch(map(tokenised, chunks)):
        yield chunk, score_chunk(reranker, chunk.frame)


# -- writing


class _RunWriter:
    """Writes scored chunks to a run, one block each, and counts them and their usage.

    Args:
        file: the run.
        form: ``"three"`` or ``"trec"``.
        tag: the run's name in the TREC form.
        bar: the progress bar of pairs.
    """

    def __init__(self, file: JournaledFile, form: str, tag: str, bar: Any) -> None:
        self._file, self._form, self._tag, self._bar = file, form, tag, bar
        self._compress = partial(gzip.compress, mtime=0) if file.path.suffix == ".gz" else bytes
        self.pairs = self.queries = 0
        self.usage = Usage()

    def write_all(self, results: Generator[tuple[Chunk, ScoredChunk]]) -> None:
        """Write chunks as they are scored. Queries keep their order; the documents of each are sorted by rank."""
        with closing(results):
            for chunk, scored in results:
                self.usage += scored.usage
                self._write(chunk, scored.frame)
                self.pairs += len(chunk.frame)
                self.queries += chunk.queries
                self._bar.update(len(chunk.frame))

    def _write(self, chunk: Chunk, scores: pd.DataFrame) -> None:
        stopwatch = Stopwatch()
        try:
            with stopwatch:
                self._file.append(self._compress(self._lines(scores)), len(chunk.frame), chunk.checksum)
        finally:
            self.usage += Usage(writing_seconds=stopwatch.seconds)

    def _lines(self, scores: pd.DataFrame) -> bytes:
        order = np.lexsort((scores["rank"], pd.factorize(scores["qid"])[0]))
        columns = (scores[name].to_numpy()[order] for name in ("qid", "docno", "rank", "score"))
        return "".join(
            run_line(qid, docno, rank + 1, score, self._form, self._tag)
            for qid, docno, rank, score in zip(*columns, strict=True)
        ).encode()


def _settings(reranker: LLMReranker, device_type: str, form: str, tag: str, shard: Shard | None) -> dict[str, Any]:
    """Return the settings that must stay the same when a run is resumed.

    These are the arguments that affect scores, the base that an adapter names, and the shard. With quantization, the
    batch size and the type of device affect scores, too.
    """
    arguments = {name: value for name, value in reranker.equality_key().items() if name not in MAY_CHANGE}
    if reranker.quantization:
        arguments |= {"batch_size": reranker.batch_size, "device": device_type}
    if shard is not None:
        arguments |= {"shard": f"{shard.number}/{shard.of}", "lines": shard.lines}
    return {"reranker": type(reranker).__name__, **arguments, "form": form, "tag": tag}

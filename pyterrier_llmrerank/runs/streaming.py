"""Files of any length: rerank JSON lines go in, a run comes out, and what is interrupted goes on where it was."""

from __future__ import annotations

import gzip
import logging
import time
import zlib
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyterrier as pt

from ..engine.usage import Stopwatch, Usage
from ..reranker import LLMReranker
from ..values import positive
from .formats import RerankRow, by_query, read_rerank, run_line
from .journal import Block, JournaledFile, refuse

logger = logging.getLogger(__name__)

#: Constructor arguments with which a run may go on although it was begun with others: they leave scores as they are,
#: to the last digits, unless something is quantised.
FREE = ("batch_size", "device", "training", "verbose")


@dataclass(frozen=True)
class Report:
    """What :func:`rerank_file` did.

    Args:
        target: the run.
        pairs: rows that were scored and written.
        queries: those they belong to.
        seconds: from call to return.
        resumed_from: rows that stood in the run before.
        usage: what scoring took; seconds in which the run was written are in it.

    >>> print(Report(Path("run.tsv"), 2000, 20, 12.5, 1000))
    run.tsv: 2,000 pairs of 20 queries in 12.5 s (160 pairs/s), after 1,000 pairs that stood there
    """

    target: Path
    pairs: int
    queries: int
    seconds: float
    resumed_from: int = 0
    usage: Usage = field(default_factory=Usage)

    def __str__(self) -> str:
        after = f", after {self.resumed_from:,} pairs that stood there" if self.resumed_from else ""
        model = f"; scored {self.usage}" if self.usage != Usage() else ""
        rate = self.pairs / self.seconds if self.seconds else 0.0
        return (
            f"{self.target}: {self.pairs:,} pairs of {self.queries:,} queries in {self.seconds:.1f} s "
            f"({rate:,.0f} pairs/s){after}{model}"
        )


class Chunk(NamedTuple):
    """Whole queries that are scored in one call, and written in one block.

    Args:
        frame: a result frame: ``qid``, ``query``, ``docno``, ``title``, ``url``, ``text``.
        queries: how many.
        checksum: the CRC-32 of what the frame holds.
        first, last: their lines in the source, from 1.
    """

    frame: pd.DataFrame
    queries: int
    checksum: int
    first: int
    last: int


def rerank_file(
    reranker: LLMReranker,
    source: Path,
    target: Path,
    *,
    form: str = "three",
    tag: str = "llmrerank",
    resume: bool = False,
    workers: int = 1,
    address: str | None = None,
) -> Report:
    """Rerank a file of any length.

    Memory does not grow with the file, but for the queries' ids; the rows of one query are held together. Whole
    queries are read until there are :data:`~pyterrier_llmrerank.engine.scoring.CHUNK` rows, scored in one call while
    the next are read, and written in one block. Which queries go together depends on the source alone, so that a run
    that was interrupted ends up with the same bytes as one that was not.

    ``<target>.journal`` lies beside it: what the run was made with, what of it is done, and whether it is finished. A
    target that is there is never written over: without ``resume`` it is an error; with it

    - it is gone on with after the last block that was written whole, if there is one: a finished run stays as it is,
      unless rows have been added to its source. The rows before must be the same as then, and so must the arguments
      and the dtype that scores depend on; later rows may have been mended, and workers, batch size and device may be
      others (the last two where nothing is quantised). That a model's files are the same is not checked;
    - without a journal it is an error: nothing says what made it;
    - without a target, the run begins, so that the same command can be given again until it succeeds.

    What stops it, an error, Ctrl-C, a full disk or a kill, leaves whole blocks; an error has a note that says how
    to go on. The files go if nothing had been written.

    Args:
        reranker: what scores. Where it is ``verbose``, a progress bar counts pairs.
        source: what :func:`~pyterrier_llmrerank.runs.formats.read_rerank` reads.
        target: the run; compressed where the name ends in ``.gz``. Queries stand as in the source, the documents of
            each from the best.
        form: ``"three"`` or ``"trec"``, as :func:`~pyterrier_llmrerank.runs.formats.run_line`.
        tag: the run's name, in the TREC form.
        resume: go on with a target that is there.
        workers: processes that score, on Ray (``pip install 'pyterrier-llmrerank[ray]'``), as
            :func:`~pyterrier_llmrerank.runs.workers.scored_by`; 1 scores in this process, unless ``address`` is given.
            What a call took that failed in a worker is not in ``usage``.
        address: a Ray cluster's; None for one on this machine.

    Returns:
        What was done. It is logged, too (INFO), and added to ``reranker.usage``.

    Raises:
        ValueError: an argument or a line is not what is allowed, or the target was begun with another source or
            re-ranker, or is no file.
        FileExistsError: the target is there, and ``resume`` is False, or nothing says how it was made.
        ScoringError: as :meth:`LLMReranker.transform`.
        ImportError: Ray is asked for, and not installed.
        OSError: a file cannot be read or written.

    >>> from pyterrier_llmrerank import RankLLaMAReranker
    >>> report = rerank_file(RankLLaMAReranker(), Path("rerank.jsonl"), Path("run.tsv"), resume=True)  # doctest: +SKIP
    """
    from ..engine.scoring import CHUNK

    source, target = Path(source), Path(target)
    positive("workers", workers)
    run_line("q", "d", 1, 0.0, form, tag)  # raises on what none could be written with
    if target.exists() and not target.is_file():
        raise ValueError(f"target={str(target)!r} is no file; wanted one that can be gone on with.")
    if not resume:
        refuse(target)  # before anything is started
    begun, writing = time.perf_counter(), Stopwatch()
    pairs = queries = stood = 0
    usage = Usage()
    quiet = reranker.quiet()  # the whole run has one progress bar, and one log line
    compress = partial(gzip.compress, mtime=0) if target.suffix == ".gz" else bytes
    total = _count(source) if reranker.verbose and source.is_file() else None  # a pipe is read once
    with ExitStack() as stack:
        if workers == 1 and address is None:
            scorer = reranker.scorer()  # the reranker keeps the weights for its next call
            quiet.dtype, kind = str(scorer.dtype).removeprefix("torch."), scorer.device.type
            scored = partial(_scored, quiet)
        else:
            from .workers import connected, resolve_worker_dtype, scored_by

            stack.enter_context(connected(workers, address))
            quiet.dtype, kind = resolve_worker_dtype(quiet, workers)
            scored = partial(scored_by, quiet, workers=workers)
        run = stack.enter_context(JournaledFile(target, _settings(quiet, kind, form, tag), resume=resume))
        chunks = _chunks(source, chain((block.rows for block in run.blocks), repeat(CHUNK)))
        for block in run.blocks:
            _check(next(chunks, None), block, source, target)
            stood += block.rows
        bar = pt.tqdm(
            total=total, initial=stood, desc=type(reranker).__name__, unit="pair", disable=not reranker.verbose
        )
        try:
            with bar, closing(scored(chunks)) as results:
                for chunk, (result, used) in results:
                    usage += used
                    with writing:
                        data = compress(_written(result, form, tag))
                        run.append(data, len(chunk.frame), chunk.checksum)
                    pairs += len(chunk.frame)
                    queries += chunk.queries
                    bar.update(len(chunk.frame))
        except BaseException as error:
            usage += quiet.usage  # of the call that it came out of
            if stood + pairs:
                error.add_note(
                    f"{target} holds {stood + pairs:,} pairs, of whole queries; go on with resume (--resume)."
                )
            elif isinstance(error, KeyboardInterrupt):
                error.add_note(f"Nothing had been written: that is done in blocks of {CHUNK:,} pairs or more.")
            raise
        finally:
            usage += Usage(writing_seconds=writing.seconds)
            reranker.add_usage(usage)
    report = Report(target, pairs, queries, time.perf_counter() - begun, stood, usage)
    if stood and not pairs:
        logger.warning("%s was finished already: nothing was scored.", target)
    logger.info("%s", report)
    return report


# -- reading


def _chunks(source: Path, sizes: Iterable[int]) -> Iterator[Chunk]:
    """Whole queries until there are so many rows, for each of these sizes."""
    queries = by_query(read_rerank(source))
    for size in sizes:
        rows: list[RerankRow] = []
        count = 0
        while len(rows) < size and (query := next(queries, None)) is not None:
            rows += query[1]
            count += 1
        if not rows:
            return
        yield _chunk(rows, count)


def _chunk(rows: list[RerankRow], queries: int) -> Chunk:
    names = ("qid", "query", "docno", "title", "url", "text")
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    return Chunk(
        pd.DataFrame(columns, dtype=object), queries, zlib.crc32(repr(columns).encode()), rows[0].line, rows[-1].line
    )


def _check(chunk: Chunk | None, block: Block, source: Path, target: Path) -> None:
    """Raise ValueError where a block was written from other rows."""
    if chunk is None:
        raise ValueError(f"{source} has fewer rows than {target} was written from; go on with the same, or delete it.")
    if (len(chunk.frame), chunk.checksum) != (block.rows, block.source):
        raise ValueError(
            f"{source}, lines {chunk.first} to {chunk.last}: not those that {target} was written from; "
            "go on with the same, or delete it."
        )


def _count(path: Path) -> int | None:
    """Its lines, in a fraction of the time that any model takes; None where a damaged file does not tell."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return sum(part.count(b"\n") for part in iter(partial(file.read, 1 << 20), b""))
    except (EOFError, gzip.BadGzipFile, zlib.error):  # who reads it will say so, with the line
        return None


# -- scoring


def _scored(reranker: LLMReranker, chunks: Iterator[Chunk]) -> Generator[tuple[Chunk, tuple[pd.DataFrame, Usage]]]:
    """Each chunk with its result; the next one is read, in a thread, while one is scored."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, chunks, None)
            yield chunk, score_with_usage(reranker, chunk.frame)


def score_with_usage(reranker: LLMReranker, frame: pd.DataFrame) -> tuple[pd.DataFrame, Usage]:
    """A frame's scores and ranks without its texts, and what they took; the re-ranker's usage begins anew."""
    result = reranker.transform(frame)[["qid", "docno", "rank", "score"]]
    return result, reranker.take_usage()


# -- writing


def _written(result: pd.DataFrame, form: str, tag: str) -> bytes:
    """The lines of a run; queries as they stand in the result, the documents of each from the best."""
    order = np.lexsort((result["rank"], pd.factorize(result["qid"])[0]))
    columns = (result[name].to_numpy()[order] for name in ("qid", "docno", "rank", "score"))
    return "".join(
        run_line(qid, docno, rank + 1, score, form, tag) for qid, docno, rank, score in zip(*columns, strict=True)
    ).encode()


def _settings(reranker: LLMReranker, kind: str, form: str, tag: str) -> dict[str, Any]:
    """What a run is the same by: the arguments that its scores depend on; where it is quantised, the kind of device."""
    arguments = {name: value for name, value in reranker.arguments().items() if name not in FREE}
    if reranker.quantization:
        arguments |= {"batch_size": reranker.batch_size, "device": kind}
    return {"reranker": type(reranker).__name__, **arguments, "form": form, "tag": tag}

"""Chunks: whole queries of a rerank file, read, scored and written together."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from ..engine.usage import Usage
from ..values import refuse
from .formats import RerankRow, by_query, read_rerank

if TYPE_CHECKING:
    from ..reranker import LLMReranker


class Chunk(NamedTuple):
    """Holds consecutive rows of a rerank file, of whole queries.

    Args:
        frame: the candidates: ``qid``, ``query``, ``docno``, ``title``, ``url``, ``text``.
        queries: the number of queries.
        checksum: CRC-32 of the frame's contents.
        first_line, last_line: position in the rerank file, counted from 1.
    """

    frame: pd.DataFrame
    queries: int
    checksum: int
    first_line: int
    last_line: int


class Shard(NamedTuple):
    """Selects the chunks of a rerank file for one of several jobs.

    The lines of the file are divided into equal ranges, one for each shard. A shard has the chunks that begin in its
    range, so that the joined runs of all shards have the bytes of one run over the whole file.

    Args:
        number: the number of the shard, from 1.
        of: the number of shards.
        lines: the number of lines in the file.
    """

    number: int
    of: int
    lines: int

    def select(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Pass on the chunks of this shard, and drop all other chunks of the file."""
        return takewhile(
            lambda chunk: self._number_of(chunk) == self.number,
            dropwhile(lambda chunk: self._number_of(chunk) < self.number, chunks),
        )

    def _number_of(self, chunk: Chunk) -> int:
        """Return the number of the shard that a chunk belongs to."""
        before = chunk.first_line - 1
        return 1 + before * self.of // max(self.lines, before + 1)  # a last line may have no line end


class ScoredChunk(NamedTuple):
    """Holds the result of scoring a chunk.

    Args:
        frame: ``qid``, ``docno``, ``rank`` (from 0) and ``score``, without the texts.
        usage: tokens and seconds spent on it.
    """

    frame: pd.DataFrame
    usage: Usage


def read_chunks(source: Path, sizes: Iterable[int]) -> Iterator[Chunk]:
    """Read a rerank file in chunks.

    Args:
        source: the rerank file.
        sizes: the fewest rows in each chunk. A chunk ends with the query that reaches this number.

    Raises:
        ValueError, OSError: as :func:`~pyterrier_llmrerank.runs.formats.read_rerank`.
    """
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


def open_shard(shard: str, source: Path) -> Shard:
    """Return the shard that ``"2/4"`` names, the second of four.

    Raises:
        ValueError: there is no such shard, or the lines of the file cannot be counted.
        OSError: the file cannot be read.

    >>> open_shard("5/4", Path("rerank.jsonl"))
    Traceback (most recent call last):
    ValueError: shard='5/4'; allowed: i/n with i from 1 to n, such as 2/4.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard) if isinstance(shard, str) else None
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        refuse("shard", shard, "i/n with i from 1 to n, such as 2/4")
    if source.exists() and not source.is_file():
        raise ValueError(f"shard={shard!r}: {source} is read twice, so it must be a file rather than a pipe.")
    if (lines := count_lines(source)) is None:
        raise ValueError(f"shard={shard!r}: the lines of {source} cannot be counted; it is truncated or damaged.")
    return Shard(int(match[1]), int(match[2]), lines)


def _chunk(rows: list[RerankRow], queries: int) -> Chunk:
    names = ("qid", "query", "docno", "title", "url", "text")
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    checksum = zlib.crc32(repr(columns).encode())
    return Chunk(pd.DataFrame(columns, dtype=object), queries, checksum, rows[0].line, rows[-1].line)


def count_lines(path: Path) -> int | None:
    """Count the lines of a file; return None if it is a damaged ``.gz`` file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return sum(part.count(b"\n") for part in iter(partial(file.read, 1 << 20), b""))
    except (EOFError, gzip.BadGzipFile, zlib.error):  # reading its rows raises the error, with the line
        return None


def score_chunk(reranker: LLMReranker, frame: pd.DataFrame) -> ScoredChunk:
    """Score the frame of a chunk, and move the reranker's usage into the result."""
    result = reranker.transform(frame)[["qid", "docno", "rank", "score"]]
    return ScoredChunk(result, reranker.take_usage())

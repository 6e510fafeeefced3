"""Chunks: whole queries of a rerank file, read, scored and written together."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from ..engine.usage import Usage
from .formats import RerankRow, by_query, read_rerank

if TYPE_CHECKING:
    from ..reranker import LLMReranker


class Chunk(NamedTuple):
    """Consecutive rows of a rerank file, without splitting a query.

    Args:
        frame: the candidates: ``qid``, ``query``, ``docno``, ``title``, ``url``, ``text``.
        queries: number of queries.
        checksum: CRC-32 of the frame's contents.
        first_line, last_line: position in the rerank file, counted from 1.
    """

    frame: pd.DataFrame
    queries: int
    checksum: int
    first_line: int
    last_line: int


class ScoredChunk(NamedTuple):
    """The result of scoring a chunk.

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
        sizes: the minimum number of rows of each chunk. A chunk ends with the query that reaches it.

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
    """Score the frame of a chunk, and reset the reranker's usage."""
    result = reranker.transform(frame)[["qid", "docno", "rank", "score"]]
    return ScoredChunk(result, reranker.take_usage())

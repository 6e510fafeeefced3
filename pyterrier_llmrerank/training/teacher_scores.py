"""Teacher scores for training data: a transformer scores the passages of each line."""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyterrier as pt

from ..errors import short
from ..runs.journal import Block, JournaledFile, refuse_existing
from ..runs.text_files import MAX_LINE, malformed, objects
from ..values import is_finite
from .records import read_example

logger = logging.getLogger(__name__)

#: The least number of passages to score in one call and write in one block.
CHUNK = 1024

#: The keys of scores, each with the keys of its passages in Tevatron's form and in Matroyshka's.
SCORES = {"pos_scores": ("positive_passages", "pos"), "neg_scores": ("negative_passages", "neg")}


class Passage(NamedTuple):
    """Holds a passage, and its place in a record, such as ``positive_passages[0]``."""

    place: str
    text: str
    title: str | None

    @property
    def docno(self) -> str:
        """An id that only equal passages share, so that caches of scores can use it."""
        return sha256(repr((self.title, self.text)).encode()).hexdigest()[:32]


def teach(
    source: str | Path,
    target: str | Path,
    transformer: pt.Transformer,
    *,
    overwrite: bool = False,
    resume: bool = False,
    verbose: bool = False,
) -> int:
    """Add a teacher's scores, ``pos_scores`` and ``neg_scores``, to each line of a training file.

    The transformer gets frames with the columns ``qid``, ``query``, ``docno``, ``text``, and ``title`` if a passage has
    one, and returns a ``score`` for each row. ``qid`` is the line's number; ``docno`` is derived from title and text.
    For a transformer that reads ``text`` alone, ``join_titles() >> transformer`` scores titles too. A ``prompt``
    in the data is not used.

    All lines are checked before the first one is scored. Memory does not grow with the file. Lines keep their order,
    and all other keys their values. ``<target>.journal`` records the progress in blocks of whole lines, and ``resume``
    continues after the last complete block. It refuses lines that have changed, a different transformer (by its
    ``repr``) or a different ``overwrite``; it does not notice that a model's files have changed.

    Args:
        source: JSON lines in the form of the training data, compressed if the name ends in ``.gz``.
        target: the file to write; compressed if the name ends in ``.gz``. An existing file is never replaced.
        transformer: the teacher: a reranker, a dense encoder, an API.
        overwrite: replace scores that a line has already. Without it, such a line raises an error.
        resume: continue an interrupted target.
        verbose: show a progress bar.

    Returns:
        The number of lines scored by this call.

    Raises:
        ValueError: a line is malformed or has scores already, or a score is missing or not finite; names the line and
            the passage. Or the target was begun with another source or teacher.
        FileExistsError: the target exists, and ``resume`` is False or the target has no journal.
        OSError: a file cannot be read or written.

    >>> from pyterrier_llmrerank import RankLLaMAReranker
    >>> teach("train.jsonl", "taught.jsonl", RankLLaMAReranker("smollm2-135m"))  # doctest: +SKIP
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"source={str(source)!r}: no such file; expected JSON lines.")
    if not resume:  # before the whole source is read
        refuse_existing(target)
    total = _count(source, overwrite)
    compress = partial(gzip.compress, mtime=0) if target.suffix == ".gz" else bytes
    teacher = re.sub(r" at 0x[0-9a-f]+", "", repr(transformer))  # an address differs in the next process
    scored = 0
    with JournaledFile(target, {"teacher": teacher, "overwrite": overwrite}, resume=resume) as file:
        blocks = _blocks(_records(source, overwrite), chain((block.rows for block in file.blocks), repeat(0)))
        resumed = _skip_written(blocks, file.blocks, source, target)
        try:
            with pt.tqdm(total=total, initial=resumed, desc="teach", unit="line", disable=not verbose) as bar:
                for records in blocks:
                    taught = _score_block(source, records, transformer)
                    file.append(compress(taught), len(records), _checksum(records))
                    scored += len(records)
                    bar.update(len(records))
        except BaseException as error:
            if resumed + scored:
                error.add_note(
                    f"{target} holds {resumed + scored:,} lines, all complete; to continue, set resume=True."
                )
            raise
    logger.info("%s: %d lines scored, after %d from before", target, scored, resumed)
    return scored


def join_titles() -> pt.Transformer:
    """Return a transformer that puts titles before texts, for a teacher that reads texts alone."""

    def join(frame: pd.DataFrame) -> pd.DataFrame:
        if "title" not in frame:
            return frame
        pairs = zip(frame["title"], frame["text"], strict=True)
        texts = [f"{title} {text}" if title else text for title, text in pairs]
        return frame.drop(columns="title").assign(text=texts)

    return pt.apply.generic(join)


def _count(source: Path, overwrite: bool) -> int:
    """Check the records of a file, and return their number."""
    count = sum(1 for _ in _records(source, overwrite))
    if not count:
        raise ValueError(f"{source}: no training data in it.")
    return count


Records = list[tuple[int, dict[str, Any]]]


def _records(source: Path, overwrite: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read and check the records, each with its line."""
    for line, record in objects(source):
        present = [key for key in SCORES if record.get(key) is not None]
        if present and not overwrite:
            raise malformed(source, line, f"{present[0]} is already present; allowed with overwrite=True")
        try:
            read_example({**record, **dict.fromkeys(SCORES)}, lambda text, title: text)
        except ValueError as error:
            raise malformed(source, line, str(error)) from error
        yield line, record


def _passages(record: dict[str, Any]) -> dict[str, list[Passage]]:
    """Return the passages of a record by the key of their scores."""
    tevatron = record.get("positive_passages") is not None
    return {
        scores: [
            Passage(f"{key}[{index}]", value["text"], value.get("title"))
            if tevatron
            else Passage(f"{key}[{index}]", value, None)
            for index, value in enumerate(record[key])
        ]
        for scores, (documents, texts) in SCORES.items()
        for key in [documents if tevatron else texts]
    }


def _blocks(records: Iterator[tuple[int, dict[str, Any]]], lines: Iterator[int]) -> Iterator[Records]:
    """Split records into blocks.

    Args:
        records: the records, each with its line.
        lines: the number of lines in each block; 0 for as many as hold :data:`CHUNK` passages.
    """
    for count in lines:
        block = list(islice(records, count))
        passages = 0
        while not count and passages < CHUNK and (following := next(records, None)) is not None:
            block.append(following)
            passages += sum(map(len, _passages(following[1]).values()))
        if not block:
            return
        yield block


def _skip_written(blocks: Iterator[Records], written: Sequence[Block], source: Path, target: Path) -> int:
    """Skip the blocks that the target already contains, and return their number of lines.

    Raises:
        ValueError: a block was written from other lines.
    """
    for block in written:
        records = next(blocks, [])
        if (len(records), _checksum(records)) != (block.rows, block.source_checksum):
            first = f"line {records[0][0]}" if records else "its end"
            raise ValueError(
                f"{source}, from {first}: the lines have changed since {target} was written; resume with the original "
                f"file, or delete {target}."
            )
    return sum(block.rows for block in written)


def _checksum(records: Records) -> int:
    return zlib.crc32(repr(records).encode())


def _score_block(source: Path, records: Records, transformer: pt.Transformer) -> bytes:
    """Score the passages of a block, and return its lines with the scores."""
    passages = {line: _passages(record) for line, record in records}
    rows = {
        (str(line), passage.docno): (record["query"], passage)  # equal passages of a line are scored once
        for line, record in records
        for side in passages[line].values()
        for passage in side
    }
    frame = pd.DataFrame(
        [(qid, query, docno, passage.text, passage.title) for (qid, docno), (query, passage) in rows.items()],
        columns=["qid", "query", "docno", "text", "title"],
        dtype=object,
    )
    if frame["title"].isna().all():
        frame = frame.drop(columns="title")
    scores = _scores(transformer.transform(frame))
    lines = []
    for line, record in records:
        taught = dict(record)
        for key, side in passages[line].items():
            try:
                taught[key] = [_one_score(passage, scores.get((str(line), passage.docno), [])) for passage in side]
            except ValueError as error:
                raise malformed(source, line, str(error)) from None
        data = _line(taught)
        if len(data) > MAX_LINE:
            raise malformed(source, line, f"{len(data)} bytes with scores; allowed: up to {MAX_LINE}")
        lines.append(data)
    return b"".join(lines)


def _one_score(passage: Passage, scores: list[Any]) -> Any:
    """Return the score of a passage; ValueError unless there is one, and it is finite."""
    if len(scores) != 1 or not is_finite(scores[0]):
        value = "missing" if not scores else short(scores[0] if len(scores) == 1 else scores)
        raise ValueError(f"the teacher's score of {passage.place} is {value}; expected one finite number")
    return scores[0]


def _scores(result: pd.DataFrame) -> dict[tuple[str, str], list[Any]]:
    """Return the scores of each qid and docno, as Python values."""
    if missing := [name for name in ("qid", "docno", "score") if name not in result]:
        raise ValueError(f"the teacher returns columns {list(result.columns)}; missing: {', '.join(missing)}.")
    scores: dict[tuple[str, str], list[Any]] = {}
    for qid, docno, score in zip(result["qid"], result["docno"], result["score"].tolist(), strict=True):
        scores.setdefault((str(qid), str(docno)), []).append(score)
    return scores


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a key that is not read
        return json.dumps(record).encode() + b"\n"

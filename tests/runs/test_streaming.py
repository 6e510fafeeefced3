"""Reranking of files: an interruption loses nothing that was written, and the resumed run has the same bytes."""

import copy
import gzip
import itertools
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt
import pytest
from conftest import DEVICE, MODELS, words
from hypothesis import given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.engine import device_scorer, scoring
from pyterrier_llmrerank.engine.inputs import Ids, MatroyshkaInputs
from pyterrier_llmrerank.engine.usage import Usage
from pyterrier_llmrerank.runs import chunks, journal
from pyterrier_llmrerank.runs.formats import read_rerank, read_run
from pyterrier_llmrerank.runs.journal import JournaledFile, journal_path
from pyterrier_llmrerank.runs.streaming import Report, rerank_file

MATROYSHKA = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32", cutoff=2)
RANKLLAMA = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32")

#: Rows of each query, and of each chunk if chunks have at least 5 rows.
QUERIES = (3, 3, 1, 6, 2, 2, 1, 5, 4, 5, 1)
CHUNKS = (6, 7, 5, 5, 9, 1)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CHUNK", 5)
        patch.setattr(os, "fsync", lambda file: None)  # only a power failure would need it
        yield


def rows() -> list[dict[str, object]]:
    return [
        {
            "query_id": f"q{q}",
            "query": words(q, 3),
            "docid": f"d{d}",
            "title": words(50 + d, 1),
            "text": words(100 * q + d, 3 + d),
            "score": -d,
        }
        for q, count in enumerate(QUERIES)
        for d in range(count)
    ]


def write_rows(path: Path, records: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("source") / "rerank.jsonl", rows())


@pytest.fixture(scope="module")
def whole(source: Path) -> bytes:
    """Return the bytes of an uninterrupted run."""
    target = source.with_name("whole.tsv")
    rerank_file(MATROYSHKA, source, target)
    return target.read_bytes()


@contextmanager
def transforming(instead: Callable[[LLMReranker, pd.DataFrame, int], None]) -> Iterator[list[int]]:
    """Call a function before each ``transform``, with the number of calls so far. Yields the rows of each call."""
    calls: list[int] = []
    real = LLMReranker.transform

    def transform(self: LLMReranker, inp: pd.DataFrame) -> pd.DataFrame:
        instead(self, inp, len(calls))
        calls.append(len(inp))
        return real(self, inp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLMReranker, "transform", transform)
        yield calls


def interrupted(source: Path, target: Path, error: BaseException, after: int, **options: object) -> None:
    """Rerank, and raise an error in place of scoring the chunk of this index."""

    def stop(reranker: LLMReranker, inp: pd.DataFrame, calls: int) -> None:
        if calls == after:
            raise error

    with transforming(stop), pytest.raises(type(error)):
        rerank_file(MATROYSHKA, source, target, **options)


# -- output


@pytest.mark.parametrize("name", ["run.tsv", "run.tsv.gz"])
@pytest.mark.parametrize("form", ["three", "trec"])
@pytest.mark.parametrize("reranker", [MATROYSHKA, RANKLLAMA], ids=["matroyshka", "rankllama"])
def test_a_run_has_the_scores_of_transform(
    reranker: LLMReranker, form: str, name: str, source: Path, tmp_path: Path
) -> None:
    """RankLLaMA also reads titles."""
    target = tmp_path / name
    report = rerank_file(reranker, write_rows(tmp_path / "rerank.jsonl.gz", rows()), target, form=form, tag="mine")
    given = pd.DataFrame(rows()).rename(columns={"query_id": "qid", "docid": "docno"})
    wanted = reranker.transform(given)
    got = pd.DataFrame(read_run(target))
    assert list(got["qid"].unique()) == [f"q{q}" for q in range(len(QUERIES))]
    both = got.merge(wanted, on=["qid", "docno"])
    assert len(both) == len(got) == len(wanted) == report.pairs
    assert abs(both["score_x"] - both["score_y"]).max() < 1e-5
    for _, query in got.groupby("qid"):
        assert query["score"].is_monotonic_decreasing
        assert form == "three" or list(query["rank"]) == list(range(1, len(query) + 1))


def test_ties_keep_the_order_of_the_source(tmp_path: Path) -> None:
    records = [{**record, "docid": f"d{9 - n}"} for n, record in enumerate([rows()[0]] * 4)]
    rerank_file(MATROYSHKA, write_rows(tmp_path / "rerank.jsonl", records), tmp_path / "run.tsv")
    assert [row.docno for row in read_run(tmp_path / "run.tsv")] == ["d9", "d8", "d7", "d6"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list of the pairs that have been tokenised so far; the text ``bad`` fails."""
    pairs: list[tuple[str, str]] = []
    real = MatroyshkaInputs.__call__

    def encode(self: MatroyshkaInputs, tokenizer: Any, given: list[tuple[str, str]]) -> list[Ids]:
        if any(passage == "bad" for _, passage in given):
            raise OverflowError("odd text")
        ids = real(self, tokenizer, given)
        pairs.extend(given)
        return ids

    monkeypatch.setattr(MatroyshkaInputs, "__call__", encode)
    return pairs


def test_chunks_hold_whole_queries_and_the_next_is_read_and_tokenised_while_one_is_scored(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[tuple[str, str]]
) -> None:
    read = 0

    def counted(path: Path) -> Iterator[object]:
        nonlocal read
        for row in read_rerank(path):
            read += 1
            yield row

    def check(reranker: LLMReranker, inp: pd.DataFrame, calls: int) -> None:
        ahead = sum(CHUNKS[: calls + 2])
        deadline = time.monotonic() + 10
        while len(encoded) < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(encoded) == ahead
        assert read <= ahead + 1  # and the row after it, of another query
        assert set(inp["qid"]) & written == set()
        written.update(inp["qid"])

    written: set[str] = set()
    monkeypatch.setattr(chunks, "read_rerank", counted)
    with transforming(check) as calls:
        rerank_file(MATROYSHKA, source, tmp_path / "run.tsv")
    assert tuple(calls) == CHUNKS
    assert sorted(encoded) == sorted((str(row["query"]), str(row["text"])) for row in rows())  # each once


def test_a_row_that_cannot_be_tokenised_is_named_and_the_chunks_before_it_are_kept(
    tmp_path: Path, encoded: list[tuple[str, str]]
) -> None:
    target, records = tmp_path / "run.tsv", rows()
    records[15]["text"] = "bad"
    with pytest.raises(ScoringError, match="cannot tokenise qid 'q5', docno 'd0': OverflowError: odd text"):
        rerank_file(MATROYSHKA, write_rows(tmp_path / "rerank.jsonl", records), target)
    assert len(list(read_run(target))) == sum(CHUNKS[:2])


def test_an_empty_file_gives_an_empty_run(tmp_path: Path) -> None:
    report = rerank_file(MATROYSHKA, write_rows(tmp_path / "rerank.jsonl", []), tmp_path / "run.tsv")
    assert (report.pairs, (tmp_path / "run.tsv").read_bytes()) == (0, b"")


def test_the_report_is_one_line_and_logged(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, reranker = tmp_path / "run.tsv", copy.copy(MATROYSHKA)
    interrupted(source, target, KeyboardInterrupt(), 2)
    before = reranker.usage
    with caplog.at_level(logging.INFO, "pyterrier_llmrerank"):
        report = rerank_file(reranker, source, target, resume=True)
    assert (report.pairs, report.queries, report.resumed_from) == (20, 7, 13)
    assert report.usage.pairs == 20
    assert report.usage.tokens > 0
    assert report.usage.writing_seconds > 0
    assert reranker.usage == before + report.usage
    assert caplog.messages[-1:] == [str(report)] == [m for m in caplog.messages if "tokens" in m]  # not once per chunk
    assert str(Report(Path("run.tsv"), 2000, 20, 12.5, 1000, Usage(pairs=1990))) == (
        "run.tsv: 2,000 pairs of 20 queries in 12.5 s (160 pairs/s), resumed after 1,000 pairs; scored "
        "1,990 pairs, 0 tokens, padding 0.0%, seconds: tokenising 0.00, model 0.00, writing 0.00"
    )


def test_verbose_shows_a_progress_bar_of_pairs(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target, verbose = tmp_path / "run.tsv", copy.copy(MATROYSHKA)
    verbose.verbose = True
    interrupted(source, target, KeyboardInterrupt(), 2)
    assert capfd.readouterr().err == ""
    rerank_file(verbose, source, target, resume=True)
    shown = capfd.readouterr().err
    assert "MatroyshkaReranker(cutoff=2):  39%" in shown
    assert "13/33" in shown  # resumed
    assert "33/33" in shown
    assert verbose.verbose


# -- shards


@pytest.mark.parametrize("name", ["run.tsv", "run.trec.gz"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 11])
def test_joined_shards_equal_the_whole_run(
    name: str, count: int, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"form": "trec" if "trec" in name else "three"}
    rerank_file(MATROYSHKA, source, tmp_path / name, **options)
    parts = [tmp_path / f"{number}-{name}" for number in range(1, count + 1)]
    with transforming(lambda *_: None) as calls:
        for number, part in enumerate(parts, 1):
            rerank_file(MATROYSHKA, source, part, shard=f"{number}/{count}", **options)
    assert tuple(calls) == CHUNKS  # of the whole file, each once
    assert b"".join(part.read_bytes() for part in parts) == (tmp_path / name).read_bytes()
    sizes = [part.stat().st_size for part in parts]
    assert sizes.count(0) == max(0, count - len(CHUNKS))
    assert caplog.text.count("rerank.jsonl has fewer blocks of 5 pairs than shards") == sizes.count(0)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), max_size=12), blank=st.integers(0, 3), count=st.integers(1, 9),
    ended=st.booleans(),
)  # fmt: skip
def test_each_chunk_is_in_one_shard(sizes: list[int], blank: int, count: int, ended: bool) -> None:
    """With blank lines between the chunks, and with or without a line end after the last."""
    ends = list(itertools.accumulate(size + blank for size in sizes))
    made = [chunks.Chunk(pd.DataFrame(), 1, 0, end - size + 1, end) for end, size in zip(ends, sizes, strict=True)]
    lines = (ends or [0])[-1] - (not ended and bool(ends))
    shards = [list(chunks.Shard(number, count, lines).select(iter(made))) for number in range(1, count + 1)]
    assert list(itertools.chain(*shards)) == made
    for shard in shards:  # about an equal share of the lines
        assert sum(chunk.last_line - chunk.first_line + 1 for chunk in shard[:-1]) <= lines / count + 1


def test_shards_need_a_dtype_by_name(source: Path, tmp_path: Path) -> None:
    """With auto, machines of two kinds would write parts of a run in two dtypes."""
    reranker = MatroyshkaReranker(MODELS / "costwise_full", cutoff=2)
    with pytest.raises(ValueError, match="dtype='auto' with shard='1/2': .*; allowed: float32, bfloat16, float16"):
        rerank_file(reranker, source, tmp_path / "run.tsv", shard="1/2")
    assert list(tmp_path.glob("run.tsv*")) == []


def test_an_interrupted_shard_resumes_to_the_same_bytes(source: Path, whole: bytes, tmp_path: Path) -> None:
    rest = tmp_path / "2.tsv"
    interrupted(source, rest, KeyboardInterrupt(), 1, shard="2/2")
    assert len(list(read_run(rest))) == CHUNKS[3]
    with transforming(lambda *_: None) as calls:
        rerank_file(MATROYSHKA, source, rest, shard="2/2", resume=True)
    assert tuple(calls) == CHUNKS[4:]
    assert whole.endswith(rest.read_bytes())
    assert rerank_file(MATROYSHKA, source, rest, shard="2/2", resume=True).pairs == 0
    for other, message in (("1/2", "shard='2/2', not '1/2'"), ("2/3", "not '2/3'"), (None, "shard='2/2', not None")):
        with pytest.raises(ValueError, match=f"was written with {message}" if message[0] == "s" else message):
            rerank_file(MATROYSHKA, source, rest, shard=other, resume=True)
    grown = write_rows(tmp_path / "rerank.jsonl", [*rows(), {**rows()[0], "query_id": "new"}])
    with pytest.raises(ValueError, match="was written with lines=33, not 34"):  # the shares are others now
        rerank_file(MATROYSHKA, grown, rest, shard="2/2", resume=True)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "-1/2", "1/2/3", "a/b", "", 2, (1, 4)])
def test_a_shard_that_does_not_exist_is_refused(shard: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shard={shard!r}; allowed: i/n with i from 1 to n")):
        rerank_file(MATROYSHKA, source, tmp_path / "run.tsv", shard=shard)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_a_file_that_cannot_be_counted_is_refused(source: Path, tmp_path: Path) -> None:
    cut = write_rows(tmp_path / "rerank.jsonl.gz", rows())
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"shard='1/2': the lines of .*rerank\.jsonl\.gz cannot be counted"):
        rerank_file(MATROYSHKA, cut, tmp_path / "run.tsv", shard="1/2")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"shard='1/2': .*pipe is read twice, so it must be a file"):
        rerank_file(MATROYSHKA, tmp_path / "pipe", tmp_path / "run.tsv", shard="1/2")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rerank_file(MATROYSHKA, tmp_path / "nowhere.jsonl", tmp_path / "run.tsv", shard="1/2")
    assert not (tmp_path / "run.tsv").exists()


# -- interruptions


@pytest.fixture(scope="module")
def stopped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs that were interrupted before the last chunk."""
    folder = tmp_path_factory.mktemp("stopped")
    for name in ("run.tsv", "run.tsv.gz"):
        interrupted(source, folder / name, KeyboardInterrupt(), 5)
    return folder


@settings(max_examples=10, deadline=None)
@given(name=st.sampled_from(["run.tsv", "run.tsv.gz"]), data=st.data())
def test_a_run_truncated_anywhere_resumes_to_the_same_bytes(
    name: str, source: Path, whole: bytes, stopped: Path, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / name
        shutil.copytree(stopped, folder, dirs_exist_ok=True)
        stood = target.read_bytes()
        wanted = gzip.decompress(stood) if name.endswith(".gz") else stood
        assert whole.startswith(wanted)
        ends = [0, *(sum(block) for block in _cumulated(journal_path(target)))]
        for _ in range(data.draw(st.integers(1, 2), "kills")):
            cut = data.draw(st.integers(0, target.stat().st_size), "bytes left")
            os.truncate(target, cut)
            kept = sum(end <= cut for end in ends) - 1
            stop = data.draw(st.integers(0, 5 - kept), "chunks until the next")
            if stop:
                interrupted(source, target, KeyboardInterrupt(), stop, resume=True)
        kept = sum(end <= target.stat().st_size for end in ends) - 1
        with transforming(lambda *_: None) as calls:
            rerank_file(MATROYSHKA, source, target, resume=True)
        assert tuple(calls) == CHUNKS[kept:]  # no chunk is scored twice
        assert (gzip.decompress(target.read_bytes()) if name.endswith(".gz") else target.read_bytes()) == whole
        assert target.read_bytes().startswith(stood)


def _cumulated(journal: Path) -> list[list[int]]:
    sizes = [json.loads(line)[2] for line in journal.read_text().splitlines()[1:]]
    return [sizes[: n + 1] for n in range(len(sizes))]


def killed_in(fatal: int | None, part: float) -> type[FileIO]:
    """Return a kind of file that kills the process in the middle of the write with the number ``fatal``."""
    numbers = itertools.count(1)

    class Torn(FileIO):
        def write(self, data: Any) -> int:
            if next(numbers) == fatal:
                super().write(data[: int(part * len(data))])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    return Torn


@pytest.mark.parametrize("name", ["run.tsv", "run.trec.gz"])
def test_a_run_killed_in_any_write_resumes_to_the_same_bytes(name: str, source: Path, tmp_path: Path) -> None:
    draw, form = random.Random(name), "trec" if "trec" in name else "three"
    reranker = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32", cutoff=2, device="cpu")  # CUDA cannot fork
    rerank_file(reranker, source, tmp_path / name, form=form)
    target = tmp_path / f"killed-{name}"
    for fatal in (1, 2, 3, 1, 4, None):  # journal lines and blocks alternate
        part = draw.random()
        child = os.fork()
        if child == 0:
            journal.FileIO = killed_in(fatal, part)
            status = 1
            try:
                rerank_file(reranker, source, target, form=form, resume=True)
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) if fatal else os.WEXITSTATUS(status) == 0
    assert target.read_bytes() == (tmp_path / name).read_bytes()
    assert journal_path(target).read_bytes() == journal_path(tmp_path / name).read_bytes()


def test_ctrl_c_leaves_complete_queries_and_a_note_on_resuming(source: Path, whole: bytes, tmp_path: Path) -> None:
    target, stop = tmp_path / "run.tsv", KeyboardInterrupt()
    interrupted(source, target, stop, 3)
    assert stop.__notes__ == [f"{target} holds 18 pairs, all of complete queries; to continue, set resume=True."]
    assert len(list(read_run(target))) == 18
    assert whole.startswith(target.read_bytes())
    rerank_file(MATROYSHKA, source, target, resume=True)
    assert target.read_bytes() == whole


def test_a_score_that_is_not_finite_names_its_row(source: Path, whole: bytes, tmp_path: Path) -> None:
    """The chunks before it are kept."""
    target = tmp_path / "run.tsv"
    real = device_scorer.run_layers
    with pytest.MonkeyPatch.context() as patch, transforming(lambda *_: None) as calls:

        def run_layers(*args: object, **options: object) -> object:
            states, row = real(*args, **options)
            return (states * float("nan") if len(calls) == 3 else states), row

        patch.setattr(device_scorer, "run_layers", run_layers)
        with pytest.raises(ScoringError, match=r"the score of qid 'q[45]', docno 'd\d' is not finite"):
            rerank_file(MATROYSHKA, source, target)
    assert len(list(read_run(target))) == 13
    rerank_file(MATROYSHKA, source, target, resume=True)
    assert target.read_bytes() == whole


def test_a_full_disk_is_named_and_complete_blocks_are_kept(source: Path, tmp_path: Path) -> None:
    target, form = (
        tmp_path / "run.tsv",
        {"form": "trec", "tag": "x" * 200},
    )  # so that the run reaches the limit before its journal
    rerank_file(MATROYSHKA, source, tmp_path / "whole.tsv", **form)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # a write beyond it is partial, and then fails
    try:
        with pytest.raises(OSError, match=r"File too large: '.*run\.tsv'") as error:
            rerank_file(MATROYSHKA, source, target, **form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    pairs = len(list(read_run(target)))
    assert 0 < pairs < len(rows())
    assert f"holds {pairs} pairs" in error.value.__notes__[0]
    rerank_file(MATROYSHKA, source, target, resume=True, **form)
    assert target.read_bytes() == (tmp_path / "whole.tsv").read_bytes()


def test_a_bad_line_is_named_and_can_be_fixed(source: Path, whole: bytes, tmp_path: Path) -> None:
    target, mended = tmp_path / "run.tsv", tmp_path / "rerank.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    mended.write_text("".join([*lines[:27], "{\n", *lines[28:]]))
    for resume, stood in ((False, 23), (True, 23)):
        with pytest.raises(ValueError, match=r"rerank\.jsonl, line 28: not JSON"):
            rerank_file(MATROYSHKA, mended, target, resume=resume)
        assert len(list(read_run(target))) == stood
    mended.write_text("".join(lines))
    rerank_file(MATROYSHKA, mended, target, resume=True)
    assert target.read_bytes() == whole


def test_a_repeated_query_is_named(tmp_path: Path) -> None:
    records = rows()
    bad = write_rows(tmp_path / "rerank.jsonl", [*records, {**records[0], "docid": "other"}])
    with pytest.raises(ValueError, match=r"rerank\.jsonl, line 34: query 'q0' again"):
        rerank_file(MATROYSHKA, bad, tmp_path / "run.tsv")


# -- resuming


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"cutoff": 4}, {}, r"run\.tsv was written with cutoff=2, not 4;"),
        ({"dtype": "bfloat16"}, {}, "dtype='float32', not 'bfloat16'"),
        ({"compress_layers": [1], "compress_ratio": 2}, {}, r"compress_layers=.*, not \[1\], compress_ratio=1, not 2"),
        ({}, {"form": "trec"}, "form='three', not 'trec'"),
        ({}, {"tag": "x"}, "tag='llmrerank', not 'x'"),
    ],
)
def test_options_that_affect_scores_cannot_change(
    change: dict[str, object], options: dict[str, str], message: str, source: Path, whole: bytes, tmp_path: Path
) -> None:
    target = tmp_path / "run.tsv"
    interrupted(source, target, KeyboardInterrupt(), 2)
    other = MatroyshkaReranker(**{**MATROYSHKA.arguments(), **change})
    with pytest.raises(ValueError, match=message):
        rerank_file(other, source, target, resume=True, **options)
    rerank_file(MATROYSHKA, source, target, resume=True)  # the error changed nothing
    assert target.read_bytes() == whole


def test_a_models_input_format_cannot_change(source: Path, tmp_path: Path) -> None:
    """Whether it is given or in the model's description."""
    model, target = tmp_path / "model", tmp_path / "run.tsv"
    adapter = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32")
    adapter.save(model)
    rerank_file(RankLLaMAReranker(model, dtype="float32"), source, target)
    same = RankLLaMAReranker(model, dtype="float32", input_format="tevatron-2023", query_prefix="query: ")
    rerank_file(same, source, target, resume=True)
    other = RankLLaMAReranker(model, dtype="float32", input_format="tevatron-2024")
    other.save(tmp_path / "other")
    (model / "reranker.json").write_bytes((tmp_path / "other" / "reranker.json").read_bytes())
    for changed in (other, RankLLaMAReranker(model, dtype="float32")):
        with pytest.raises(ValueError, match=r"was written with input_format=None, not 'tevatron-2024'"):
            rerank_file(changed, source, target, resume=True)


def test_the_base_that_an_adapter_names_cannot_change(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("x", "y"):
        shutil.copytree(MODELS / "rankllama_base", tmp_path / folder / "rankllama_base")
    target = tmp_path / "run.tsv"
    monkeypatch.chdir(tmp_path / "x")
    rerank_file(RankLLaMAReranker(MODELS / "rankllama_adapter", dtype="float32"), source, target)
    monkeypatch.chdir(tmp_path / "y")
    with pytest.raises(ValueError, match=r"was written with named_base='.*/x/\w+', not '.*/y/\w+'"):
        rerank_file(RankLLaMAReranker(MODELS / "rankllama_adapter", dtype="float32"), source, target, resume=True)


def test_options_that_do_not_affect_scores_may_change(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run.tsv"
    interrupted(source, target, KeyboardInterrupt(), 2)
    other = MatroyshkaReranker(**{**MATROYSHKA.arguments(), "batch_size": 2, "device": "cpu"})
    assert rerank_file(other, source, target, resume=True).resumed_from == 13


def test_rows_already_scored_cannot_change(source: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "run.tsv", tmp_path / "rerank.jsonl"
    interrupted(source, target, KeyboardInterrupt(), 2)
    before = target.read_bytes()
    for key in ("query", "text", "title", "docid"):
        changed = rows()
        changed[8][key] = f"{changed[8][key]}s"
        if key == "query":
            for record in changed[7:]:
                record["query"] = changed[8][key]
        with pytest.raises(ValueError, match=r"rerank\.jsonl, lines 7 to 13: the rows have changed since .*run\.tsv"):
            rerank_file(MATROYSHKA, write_rows(other, changed), target, resume=True)
    with pytest.raises(ValueError, match=r"rerank\.jsonl, lines 7 to 10: the rows have changed"):
        rerank_file(MATROYSHKA, write_rows(other, rows()[:10]), target, resume=True)
    with pytest.raises(ValueError, match=r"rerank\.jsonl has fewer rows than .*run\.tsv was written from"):
        rerank_file(MATROYSHKA, write_rows(other, rows()[:6]), target, resume=True)
    assert target.read_bytes() == before


def test_an_existing_target_is_not_overwritten(source: Path, whole: bytes, tmp_path: Path) -> None:
    target = tmp_path / "run.tsv"
    interrupted(source, target, KeyboardInterrupt(), 2)
    before = target.read_bytes()
    with pytest.raises(FileExistsError, match=r"set resume=True\."):
        rerank_file(MATROYSHKA, source, target)
    assert target.read_bytes() == before


def test_a_finished_run_is_unchanged_unless_its_source_has_grown(
    source: Path, whole: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, grown = tmp_path / "run.tsv", tmp_path / "rerank.jsonl"
    write_rows(grown, rows()[:13])
    rerank_file(MATROYSHKA, grown, target, resume=True)  # begins the run
    with transforming(lambda *_: None) as calls:
        report = rerank_file(MATROYSHKA, grown, target, resume=True)
        assert (report.pairs, report.resumed_from) == (0, 13)
        assert "run.tsv is already finished; nothing was scored." in caplog.text
        assert calls == []
        other = MatroyshkaReranker(**{**MATROYSHKA.arguments(), "cutoff": 3})
        with pytest.raises(ValueError, match="was written with cutoff=2, not 3"):
            rerank_file(other, grown, target, resume=True)
        rerank_file(MATROYSHKA, source, target, resume=True)
        assert tuple(calls) == CHUNKS[2:]
    assert target.read_bytes() == whole


def test_batch_size_and_device_cannot_change_with_quantization(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    target, arguments = tmp_path / "run.tsv", {**MATROYSHKA.arguments(), "quantization": "int8"}
    rerank_file(MatroyshkaReranker(**arguments), source, target)
    rerank_file(MatroyshkaReranker(**{**arguments, "device": DEVICE.type}), source, target, resume=True)  # as None
    with pytest.raises(ValueError, match="was written with batch_size=None, not 2"):
        rerank_file(MatroyshkaReranker(**{**arguments, "batch_size": 2}), source, target, resume=True)
    settings, *lines = journal_path(target).read_text().splitlines()
    assert json.loads(settings)["device"] == DEVICE.type
    journal_path(target).write_text("\n".join([settings.replace(f'"{DEVICE.type}"', '"xpu"'), *lines, ""]))
    with pytest.raises(ValueError, match=f"was written with device='xpu', not '{DEVICE.type}'"):
        rerank_file(MatroyshkaReranker(**arguments), source, target, resume=True)


def test_a_target_must_be_a_file(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target='/dev/null' is not a file"):
        rerank_file(MATROYSHKA, source, Path("/dev/null"))


def test_usage_includes_a_failed_call(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker, real = copy.copy(MATROYSHKA), device_scorer.run_layers

    def run_layers(*args: object, **options: object) -> object:
        states, row = real(*args, **options)
        return states * float("nan"), row

    before = reranker.usage
    with monkeypatch.context() as patch:
        patch.setattr(device_scorer, "run_layers", run_layers)
        with pytest.raises(ScoringError):
            rerank_file(reranker, source, tmp_path / "run.tsv")
    failed = reranker.usage
    assert failed.tokens > before.tokens
    assert failed.pairs == before.pairs
    full = OSError("full")
    monkeypatch.setattr(JournaledFile, "append", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="full"):
        rerank_file(reranker, source, tmp_path / "run.tsv")
    assert reranker.usage.pairs == before.pairs + CHUNKS[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "two"}, "form='two'; allowed: three, trec"),
        ({"tag": "a b"}, "tag is 'a b'; expected no whitespace"),
        ({"workers": 0}, "workers=0; allowed: an integer of at least 1"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rerank_file(MATROYSHKA, source, tmp_path / "run.tsv", **options)
    assert list(tmp_path.iterdir()) == []


def test_no_files_are_left_if_nothing_was_written(source: Path, tmp_path: Path) -> None:
    """After Ctrl-C, a note says so."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        rerank_file(MATROYSHKA, tmp_path / "nowhere.jsonl", tmp_path / "run.tsv")
    of_bodies = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32", text_field="body")
    with pytest.raises(pt.validate.InputValidationError, match="body"):
        rerank_file(of_bodies, source, tmp_path / "run.tsv")
    stop = KeyboardInterrupt()
    interrupted(source, tmp_path / "run.tsv", stop, 0)
    assert stop.__notes__ == ["Nothing was written yet: results are written in blocks of at least 5 pairs."]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_source_with_a_progress_bar_is_scored_up_to_the_damage(tmp_path: Path) -> None:
    cut = write_rows(tmp_path / "rerank.jsonl.gz", rows())
    cut.write_bytes(cut.read_bytes()[:-9])
    verbose = copy.copy(MATROYSHKA)
    verbose.verbose = True
    with pytest.raises(ValueError, match=r"rerank\.jsonl\.gz, line 34: the compressed file is truncated"):
        rerank_file(verbose, cut, tmp_path / "run.tsv")
    assert len(list(read_run(tmp_path / "run.tsv"))) == sum(CHUNKS[:-1])


def test_a_pipe_works_with_a_progress_bar(source: Path, whole: bytes, tmp_path: Path) -> None:
    pipe, target = tmp_path / "pipe", tmp_path / "run.tsv"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(pipe.write_bytes, source.read_bytes())
        shown = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32", cutoff=2, verbose=True)
        rerank_file(shown, pipe, target)
        writing.result()
    assert target.read_bytes() == whole


def test_blocks_grow_with_the_devices_that_share_them(devices: None, source: Path, tmp_path: Path) -> None:
    """And the run is the same."""
    sizes: list[int] = []

    class Counting(MatroyshkaReranker):
        def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
            sizes.append(len(inp))
            return super().transform(inp)

    options = {"dtype": "float32", "cutoff": 2}
    rerank_file(Counting(MODELS / "costwise_full", **options), source, tmp_path / "one.tsv")
    assert tuple(sizes) == CHUNKS
    sizes.clear()
    two = Counting(MODELS / "costwise_full", device=["cuda:0", "cuda:1"], **options)
    rerank_file(two, source, tmp_path / "two.tsv")
    assert sizes == [13, 10, 10]
    one, other = (list(read_run(tmp_path / name)) for name in ("one.tsv", "two.tsv"))
    assert [row[:2] for row in one] == [row[:2] for row in other]

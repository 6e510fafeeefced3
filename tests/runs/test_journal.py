"""Files with a journal: after any damage to either, resuming gives the same bytes."""

import fcntl
import json
import logging
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank.runs.journal import FINISHED, Block, JournaledFile, journal_path

SETTINGS = {"cutoff": [4, 8], "form": "three"}
#: Without NULs, which stand for holes left by a power failure.
BLOCKS = st.lists(
    st.binary(min_size=1, max_size=40).map(lambda data: data.replace(b"\0", b"\n")), min_size=1, max_size=6
)


@pytest.fixture(autouse=True, scope="module")
def synced() -> Iterator[list[int]]:
    """Collect the files that are synced to disk, without syncing them."""
    files: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", files.append)
        yield files


def write(path: Path, blocks: list[bytes], *, resume: bool = False, stop: int | None = None) -> list[Block]:
    """Write the missing blocks; raise KeyboardInterrupt before block ``stop``. Return the blocks found on opening."""
    with JournaledFile(path, SETTINGS, resume=resume) as file:
        for number, block in list(enumerate(blocks))[len(file.blocks) :]:
            if number == stop:
                raise KeyboardInterrupt
            file.append(block, rows=1, source_checksum=number)
    return file.blocks


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Limit the size of files: a write beyond it is partial, and then fails."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_the_journal_records_each_block(tmp_path: Path, synced: list[int]) -> None:
    path = tmp_path / "run.tsv"
    with JournaledFile(path, SETTINGS) as file:
        synced.clear()
        file.append(b"one\n", rows=2, source_checksum=11)
        assert len(set(synced)) == 2  # the journal and the file
        assert path.read_bytes() == b"one\n"  # at once, in case of a kill
        settings, block = map(json.loads, journal_path(path).read_text().splitlines())
        assert settings == SETTINGS
        assert block[:3] == [2, 11, 4]
        file.append(b"two\n", rows=1, source_checksum=12)
    assert path.read_bytes() == b"one\ntwo\n"
    assert [json.loads(line) for line in journal_path(path).read_text().splitlines()][2:] == [[1, 12, 4, ANY], FINISHED]


@settings(max_examples=50, deadline=None)
@given(BLOCKS, st.data())
def test_incomplete_blocks_are_removed_and_written_again(blocks: list[bytes], data: st.DataObject) -> None:
    """Any prefixes of the file and of the journal may have reached the disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.tsv"
        with pytest.raises(KeyboardInterrupt):
            write(path, [*blocks, b"more"], stop=len(blocks))
        assert path.read_bytes() == b"".join(blocks)
        journal = journal_path(path)
        lines = journal.read_bytes().splitlines(keepends=True)
        written = data.draw(st.integers(0, path.stat().st_size), "bytes of the file")
        logged = data.draw(st.integers(len(lines[0]), journal.stat().st_size), "bytes of the journal")
        path.write_bytes(path.read_bytes()[:written] + data.draw(st.sampled_from([b"", b"\0\0\0"]), "a hole"))
        journal.write_bytes(journal.read_bytes()[:logged] + data.draw(st.sampled_from([b"", b"\0\0\0"]), "a hole"))
        whole = [n for n in range(len(blocks) + 1) if len(b"".join(blocks[:n])) <= written]
        known = [n for n in range(len(blocks) + 1) if len(b"".join(lines[: n + 1])) <= logged]
        stood = write(path, blocks, resume=True)
        assert len(stood) == min(max(whole), max(known))  # complete blocks are not written again
        assert [block.source_checksum for block in stood] == list(range(len(stood)))
        assert path.read_bytes() == b"".join(blocks)
        assert journal.read_bytes() == b"".join([*lines[: len(blocks) + 1], b'"finished"\n'])


def test_a_finished_file_can_grow(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    for blocks in ([b"one\n"], [b"one\n"], [b"one\n", b"two\n"]):
        write(path, blocks, resume=True)
        assert path.read_bytes() == b"".join(blocks)
        assert journal_path(path).read_text().endswith(']\n"finished"\n')
    with pytest.raises(ValueError, match=r"was written with form='three', not 'trec'"):
        JournaledFile(path, {**SETTINGS, "form": "trec"}, resume=True)


@pytest.mark.parametrize("changed", [b"", b"one\n", b"two\none\n", b"one\ntwo\nmine\n"])
def test_a_finished_file_that_was_changed_is_refused(changed: bytes, tmp_path: Path) -> None:
    """Resuming a finished file without writing leaves it finished."""
    path = tmp_path / "run.tsv"
    write(path, [b"one\n", b"two\n"])
    with pytest.raises(KeyboardInterrupt):
        write(path, [b"one\n", b"two\n", b"three\n"], resume=True, stop=2)
    path.write_bytes(changed)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"run\.tsv was changed after it was finished"):
            JournaledFile(path, SETTINGS, resume=True)
    assert path.read_bytes() == changed


def test_an_empty_file_can_be_finished(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    write(path, [])
    with pytest.raises(ValueError, match=r"was written with cutoff=\[4, 8\], not None"):
        JournaledFile(path, {"form": "three"}, resume=True)
    write(path, [b"one\n"], resume=True)
    assert path.read_bytes() == b"one\n"


def test_an_empty_file_that_existed_before_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    path.touch()
    with pytest.raises(FileExistsError, match=r"set resume=True"):
        JournaledFile(path, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        write(path, [b"one\n"], resume=True, stop=0)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_replaced_before_it_is_locked_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.tsv"
    path.write_bytes(b"old")
    real, replaced = fcntl.flock, []

    def lock(file: FileIO, operation: int) -> None:
        if not replaced:
            replaced.append(path)
            path.unlink()
            write(path, [b"one\n"])
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    assert len(write(path, [b"one\n", b"two\n"], resume=True)) == 1
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_file_without_a_journal_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    path.write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"without a journal \(run\.tsv\.journal\)"):
        JournaledFile(path, SETTINGS, resume=True)
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("")  # as after a kill before the first write
    assert write(path, [b"one\n"], resume=True) == []
    assert path.read_bytes() == b"one\n"


def test_a_changed_block_and_all_after_it_are_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.tsv"
    with pytest.raises(KeyboardInterrupt):
        write(path, [b"one\n", b"two\n", b"three\n", b"four\n"], stop=3)
    path.write_bytes(b"one\ntoo\nthree\n")
    with caplog.at_level(logging.INFO, "pyterrier_llmrerank"):
        assert len(write(path, [b"one\n", b"two\n", b"three\n", b"four\n"], resume=True)) == 1
    assert "removed 10 bytes after the last complete block" in caplog.text
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize(
    "line", [b"null\n", b"[1, 2]\n", b'[1, 2, "3", 4]\n', b"[1, 1, 9999999999999, 1]\n", b"\xff\n"]
)
def test_blocks_after_an_invalid_journal_line_are_written_again(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    with pytest.raises(KeyboardInterrupt):
        write(path, [b"one\n", b"two\n"], stop=1)
    with journal_path(path).open("ab") as journal:
        journal.write(line)
    assert len(write(path, [b"one\n", b"two\n"], resume=True)) == 1
    assert path.read_bytes() == b"one\ntwo\n"


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    path.write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"run\.tsv already exists and is not overwritten; delete it or choose"):
        JournaledFile(path, SETTINGS)
    assert list(tmp_path.iterdir()) == [path]
    journal_path(path).touch()
    with pytest.raises(FileExistsError, match=r"set resume=True\."):
        JournaledFile(path, SETTINGS)
    assert path.read_text() == "mine\n"


def test_resume_without_a_file_begins_one(tmp_path: Path) -> None:
    """A journal left by an earlier file is ignored."""
    path = tmp_path / "run.tsv"
    journal_path(path).write_bytes(b'{"other')
    assert write(path, [b"one\n"], resume=True) == []
    assert path.read_bytes() == b"one\n"


def test_changed_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    with pytest.raises(KeyboardInterrupt):
        write(path, [b"one\n", b"two\n"], stop=1)
    before = journal_path(path).read_bytes()
    with pytest.raises(
        ValueError, match=r"written with cutoff=\[4, 8\], not \[4\], form='three', not None, tag=None, not"
    ):
        JournaledFile(path, {"cutoff": [4], "tag": "x"}, resume=True)
    assert (path.read_bytes(), journal_path(path).read_bytes()) == (b"one\n", before)
    assert len(write(path, [b"one\n", b"two\n"], resume=True)) == 1  # the error released the lock


def test_a_journal_without_settings_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    path.write_bytes(b"one\n")
    for damaged in (b"", b'{"cut', b"[]\n"):
        journal_path(path).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run\.tsv\.journal is damaged"):
            JournaledFile(path, SETTINGS, resume=True)
    assert path.read_bytes() == b"one\n"


def test_two_processes_cannot_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    with JournaledFile(path, SETTINGS) as file:
        file.append(b"one\n", rows=1, source_checksum=0)
        with pytest.raises(BlockingIOError, match=r"another process is writing this file: '.*run\.tsv'"):
            JournaledFile(path, SETTINGS, resume=True)
        file.append(b"two\n", rows=1, source_checksum=1)
    assert path.read_bytes() == b"one\ntwo\n"


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 11))
def test_a_full_disk_keeps_complete_blocks(room: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.tsv"
        blocks = [b"first block" * 30, b"second block" * 30]
        with pytest.raises(KeyboardInterrupt):
            write(path, blocks, stop=1)
        full = pytest.raises(OSError, match=r"File too large: '.*run\.tsv")
        with full, disk_of(path.stat().st_size + room * 30):
            write(path, blocks, resume=True)
        assert path.read_bytes() == blocks[0]
        write(path, blocks, resume=True)
        assert path.read_bytes() == b"".join(blocks)


def test_no_files_are_left_if_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        JournaledFile(tmp_path / "nowhere" / "run.tsv", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "run.tsv", [b"one\n"], stop=0)
    with pytest.raises(OSError, match="File too large"), disk_of(0):
        JournaledFile(tmp_path / "run.tsv", SETTINGS)
    assert list(tmp_path.iterdir()) == []

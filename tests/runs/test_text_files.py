"""A written file appears only once it is complete, even if writing fails."""

import gzip
import os
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import written

from pyterrier_llmrerank.runs import text_files
from pyterrier_llmrerank.runs.text_files import writing


def test_a_file_appears_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text("before")
    with pytest.raises(KeyError), writing(path) as file:  # noqa: PT012
        file.write("x" * 100_000)
        raise KeyError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["run.txt"]
    assert written(path, "after").read_text() == "after"
    assert os.listdir(tmp_path) == ["run.txt"]


def test_a_full_disk_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "run.gz", "before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        written(path, "after")
    assert gzip.decompress(path.read_bytes()) == b"before"
    assert os.listdir(tmp_path) == ["run.gz"]


def test_equal_texts_give_equal_gz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = written(tmp_path / "one.gz", "q1 d1 1\n").read_bytes()
    monkeypatch.setattr("time.time", lambda: 10.0**9)
    two = written(tmp_path / "two.gz", "q1 d1 1\n").read_bytes()
    assert one == two
    assert gzip.decompress(one) == b"q1 d1 1\n"


def test_links_devices_and_pipes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    written(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "x"
    assert written(Path(os.devnull), "x").is_char_device()
    reading, end = os.pipe()
    written(Path(f"/dev/fd/{end}"), "through a pipe")
    assert os.read(reading, 100) == b"through a pipe"
    os.close(reading)
    os.close(end)
    with pytest.raises(FileNotFoundError, match="the folder .*none does not exist"):
        written(tmp_path / "none" / "run.txt", "x")


def test_a_pipe_gets_nothing_if_writing_fails(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with suppress(ValueError), writing(pipe) as lines:
            lines.write("x" * 10_000)
            raise ValueError
        assert os.read(reader, 10) == b""
        with writing(pipe) as lines:
            lines.write("all")
        assert os.read(reader, 10) == b"all"
    finally:
        os.close(reader)

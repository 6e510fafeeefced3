"""A file that is written block by block, and the journal beside it: whatever interrupts the writing, it can go on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class Block(NamedTuple):
    """What the journal says of a block.

    Args:
        rows: of the source, that it came of.
        source: the CRC-32 of these.
        size: bytes that it has in the file.
        checksum: the CRC-32 of these.
    """

    rows: int
    source: int
    size: int
    checksum: int


class JournaledFile:
    """A file of which blocks are there whole or not at all.

    Until it is finished, ``<file>.journal`` lies beside it: a JSON line of settings, and one a block, which goes to
    disk ahead of the block. A block counts if its bytes are in the file and have the checksum; after a kill or power
    cut at any moment, what comes after the last one that counts is cut off, from both files. Each block is on disk
    (fsync) when :meth:`append` returns. Left by an error, the file ends with the last whole block.

    Args:
        path: the file.
        settings: what must be the same for the file to be gone on with; names, and values that JSON can hold.
        resume: go on with a file that is there; without one, or without this, a new one is begun.

    Raises:
        FileExistsError: the file is there, and ``resume`` is False.
        ValueError: the file was begun with other settings; or its journal is damaged.
        BlockingIOError: another process is writing it.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.journal = journal_of(path)
        #: Those that stood there when the file was opened.
        self.blocks: list[Block] = []
        self._end = 0
        if resume and path.exists():
            self._log = FileIO(self.journal, "r+")
            self._file = FileIO(path, "r+")
            try:
                self._lock()
                if not self.journal.exists():
                    raise FileExistsError(f"{path} has just been finished by another process.")
                self._go_on(settings)
            except BaseException:
                self._close()
                raise
            return
        if path.exists():
            can = "; go on with resume (--resume)" if self.journal.exists() else ""
            raise FileExistsError(f"{path} is there already, and is not written over{can}.")
        # The journal comes first: a file without one is finished.
        self._log = FileIO(self.journal, "w")
        try:
            self._write(self._log, self.journal, _line(settings))
            self._file = FileIO(path, "x")
        except BaseException:
            self._log.close()
            if not path.exists():
                self.journal.unlink()
            raise
        self._lock()
        _sync_folder(path.parent)

    def append(self, data: bytes, rows: int, source: int) -> None:
        """Write a block, to the disk.

        Args:
            data: its bytes.
            rows: of the source, that it came of.
            source: the CRC-32 of these.

        Raises:
            OSError: it could not be written, for example on a full disk; nothing before it is lost.
        """
        self._write(self._log, self.journal, _line(Block(rows, source, len(data), zlib.crc32(data))))
        self._write(self._file, self.path, data)
        self._end += len(data)

    def __enter__(self) -> JournaledFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        finished, empty = kind is None, self._end == 0
        if not finished:
            self._file.truncate(self._end)
        if empty and not finished:  # nothing to go on with: not to stand in the way of another try
            self.path.unlink()
        if empty or finished:
            self.journal.unlink()
        self._close()  # last: it gives up the lock

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is writing it", str(self.path)) from None
        except OSError as error:  # some network file systems
            logger.info("%s cannot be locked: %s", self.path, error)

    def _go_on(self, settings: Mapping[str, Any]) -> None:
        """Find the blocks that count, and cut off what comes after them."""
        first, *lines = self._log.readall().split(b"\n")[:-1] or [b""]  # what follows the last newline is torn
        begun, given = _json(first), json.loads(_line(settings))
        if not isinstance(begun, dict):
            raise ValueError(f"{self.journal} is damaged: its first line is no JSON object. Delete {self.path}.")
        if changed := [name for name in {**begun, **given} if begun.get(name) != given.get(name)]:
            differences = ", ".join(f"{name}={begun.get(name)!r}, not {given.get(name)!r}" for name in changed)
            raise ValueError(f"{self.path} was begun with {differences}; go on with the same, or delete it.")
        size, kept = os.fstat(self._file.fileno()).st_size, len(first) + 1
        for line in lines:
            fields = _json(line)
            if not isinstance(fields, list) or [type(field) for field in fields] != [int] * len(Block._fields):
                break
            block = Block(*fields)
            if self._end + block.size > size or zlib.crc32(self._file.read(block.size)) != block.checksum:
                break
            self.blocks.append(block)
            self._end += block.size
            kept += len(line) + 1
        if size > self._end:
            logger.warning("%s: %d bytes after the last whole block are cut off.", self.path, size - self._end)
        for file, end in ((self._file, self._end), (self._log, kept)):
            file.truncate(end)
            file.seek(end)

    def _write(self, file: FileIO, path: Path, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error

    def _close(self) -> None:
        self._file.close()
        self._log.close()


def _sync_folder(folder: Path) -> None:
    """Names of new files go to disk with the folder that they stand in."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def journal_of(path: Path) -> Path:
    """Where the journal of an unfinished file lies."""
    return path.with_name(f"{path.name}.journal")


def _line(value: object) -> bytes:
    return json.dumps(value, default=repr).encode() + b"\n"


def _json(line: bytes) -> Any:
    """What a line holds; None where it is torn."""
    try:
        return json.loads(line)
    except ValueError:
        return None

"""A file that is written block by block, and the journal beside it: whatever interrupts the writing, it can go on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

#: The last line of the journal of a file that is whole.
FINISHED = "finished"


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

    ``<file>.journal`` lies beside it: a JSON line of settings, one a block, which goes to disk ahead of the block, and
    one that says when the file was finished. A block counts if its bytes are in the file and have the checksum; after
    a kill or power cut at any moment, what comes after the last one that counts is cut off, from both files. Each
    block is on disk (fsync) when :meth:`append` returns. Left by an error, the file ends with the last whole block.

    Args:
        path: the file.
        settings: what must be the same for the file to be gone on with; names, and values that JSON can hold.
        resume: go on with a file that is there, be it finished; without one, or without this, a new one is begun.

    Raises:
        FileExistsError: the file is there, and ``resume`` is False, or there is no journal of it.
        ValueError: the file was begun with other settings, or was changed after it had been finished; or its journal is
            damaged.
        BlockingIOError: another process is writing it.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.journal = journal_of(path)
        #: Those that stood there when the file was opened.
        self.blocks: list[Block] = []
        self._end = 0
        self._file, self._created = self._opened(resume)
        #: Where the journal goes on, while a file that was finished has not been added to.
        self._finished_at: int | None = None
        with ExitStack() as undo:
            undo.callback(self._file.close)
            if self._created:
                undo.callback(path.unlink)
            # A kill may have left an empty file.
            self._begun = os.fstat(self._file.fileno()).st_size > 0 or _is_finished(self.journal)
            self._log = self._opened_journal("r+" if self._begun else "w")
            undo.callback(self._log.close)
            if self._begun:
                self._go_on(settings)
            else:
                undo.callback(self.journal.unlink)
                self._write(self._log, self.journal, _line(settings))
                _sync_folder(path.parent)
            undo.pop_all()

    def append(self, data: bytes, rows: int, source: int) -> None:
        """Write a block, to the disk.

        Args:
            data: its bytes.
            rows: of the source, that it came of.
            source: the CRC-32 of these.

        Raises:
            OSError: it could not be written, for example on a full disk; nothing before it is lost.
        """
        if self._finished_at is not None:
            self._log.truncate(self._log.seek(self._finished_at))
            self._finished_at = None
        self._write(self._log, self.journal, _line(Block(rows, source, len(data), zlib.crc32(data))))
        self._write(self._file, self.path, data)
        self._end += len(data)

    def __enter__(self) -> JournaledFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self._finished_at is not None:  # nothing was added
                return
            if kind is None:
                self._write(self._log, self.journal, _line(FINISHED))
                return
            self._file.truncate(self._end)
            if not self._begun and not self._end:  # nothing to go on with: not to stand in the way of another try
                self.journal.unlink()
                if self._created:
                    self.path.unlink()
        finally:
            self._log.close()
            self._file.close()  # last: it gives up the lock

    def _opened(self, resume: bool) -> tuple[FileIO, bool]:
        """The file, locked, and whether it is new."""
        while True:
            there = resume and self.path.exists()
            if not resume:
                refuse(self.path)
            try:
                file = FileIO(self.path, "r+" if there else "x")
            except (FileNotFoundError, FileExistsError):
                if there or self.path.exists():
                    continue  # another process has just taken it away, or made it
                raise
            try:
                self._lock(file)
                if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file, not there
            except BaseException:
                file.close()
                raise
            file.close()  # another process has put a file in its place

    def _lock(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is writing it", str(self.path)) from None
        except OSError as error:  # some network file systems
            logger.info("%s cannot be locked: %s", self.path, error)

    def _opened_journal(self, mode: str) -> FileIO:
        try:
            return FileIO(self.journal, mode)
        except FileNotFoundError:
            raise FileExistsError(
                f"{self.path} is there already, with no journal ({self.journal.name}) that says how it was made; "
                "it is not written over."
            ) from None

    def _go_on(self, settings: Mapping[str, Any]) -> None:
        """Find the blocks that count, and cut off what comes after them."""
        first, *lines = self._log.readall().split(b"\n")[:-1] or [b""]  # what follows the last newline is torn
        begun, given = _json(first), json.loads(_line(settings))
        if not isinstance(begun, dict):
            raise ValueError(f"{self.journal} is damaged: its first line is no JSON object. Delete {self.path}.")
        if changed := [name for name in {**begun, **given} if begun.get(name) != given.get(name)]:
            differences = ", ".join(f"{name}={begun.get(name)!r}, not {given.get(name)!r}" for name in changed)
            raise ValueError(f"{self.path} was begun with {differences}; go on with the same, or delete it.")
        finished = bool(lines) and _json(lines[-1]) == FINISHED
        size, kept = os.fstat(self._file.fileno()).st_size, len(first) + 1
        for line in lines[: len(lines) - finished]:
            fields = _json(line)
            if not isinstance(fields, list) or [type(field) for field in fields] != [int] * len(Block._fields):
                break
            block = Block(*fields)
            if self._end + block.size > size or zlib.crc32(self._file.read(block.size)) != block.checksum:
                break
            self.blocks.append(block)
            self._end += block.size
            kept += len(line) + 1
        if finished and (size, len(self.blocks)) != (self._end, len(lines) - 1):
            raise ValueError(f"{self.path} was changed after it had been finished; it is not gone on with.")
        if size > self._end:
            logger.warning("%s: %d bytes after the last whole block are cut off.", self.path, size - self._end)
        if finished:
            self._finished_at = kept
            return
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


def _sync_folder(folder: Path) -> None:
    """Names of new files go to disk with the folder that they stand in."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse(path: Path) -> None:
    """Raise FileExistsError where there is something that a new file would be written over."""
    if path.exists():
        can = "; if it is of the same run, go on with resume (--resume)"
        known = journal_of(path).exists() or not path.stat().st_size
        raise FileExistsError(f"{path} is there already, and is not written over{can if known else ''}.")


def _is_finished(journal: Path) -> bool:
    """Whether it says that its file is whole."""
    return journal.exists() and journal.read_bytes().endswith(b"\n" + _line(FINISHED))


def journal_of(path: Path) -> Path:
    """Where the journal of a file lies."""
    return path.with_name(f"{path.name}.journal")


def _line(value: object) -> bytes:
    return json.dumps(value, default=repr).encode() + b"\n"


def _json(line: bytes) -> Any:
    """What a line holds; None where it is torn."""
    try:
        return json.loads(line)
    except ValueError:
        return None

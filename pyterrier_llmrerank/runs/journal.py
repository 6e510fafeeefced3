"""Write a file in blocks, with a journal beside it, so that writing can resume after any interruption."""

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

#: Last line of the journal of a complete file.
FINISHED = "finished"


class Block(NamedTuple):
    """Holds a journal entry.

    Args:
        rows: the number of source rows in the block.
        source_checksum: CRC-32 of these rows.
        size: length of the block in bytes.
        checksum: CRC-32 of the block.
    """

    rows: int
    source_checksum: int
    size: int
    checksum: int


class JournaledFile:
    """Writes a file in blocks; each is kept completely or not at all.

    The journal, ``<file>.journal``, has one JSON line for the settings, one for each block, and a last one once the
    file is complete. A block's line reaches the disk before the block does. A block is valid if the file has its bytes
    and they match the checksum. After a kill or a power failure, resuming truncates both files after the last valid
    block. Each block is on disk (fsync) when :meth:`append` returns. After an error in the ``with`` block, the file
    ends with the last complete block.

    Args:
        path: the file.
        settings: values that must be the same to resume the file; JSON must be able to represent them.
        resume: resume an existing file, complete or not; begin a new one if there is none.

    Raises:
        FileExistsError: the file exists, and ``resume`` is False or there is no journal.
        ValueError: the file was written with other settings or changed after it was complete, or its journal is
            damaged.
        BlockingIOError: another process is writing the file.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.journal = journal_path(path)
        #: The blocks that the file had when it was opened.
        self.blocks: list[Block] = []
        self._end = 0
        self._file, self._created = self._open_file(resume)
        #: Offset of the journal's last line, if the file was complete and has not grown since.
        self._finished_at: int | None = None
        with ExitStack() as undo:
            undo.callback(self._file.close)
            if self._created:
                undo.callback(path.unlink)
            # A killed process leaves an empty file without a complete journal: begin it again.
            self._resumed = os.fstat(self._file.fileno()).st_size > 0 or _is_finished(self.journal)
            self._log = self._open_journal("r+" if self._resumed else "w")
            undo.callback(self._log.close)
            if self._resumed:
                self._resume(settings)
            else:
                undo.callback(self.journal.unlink)
                self._write(self._log, self.journal, _line(settings))
                _sync_folder(path.parent)
            undo.pop_all()

    def append(self, data: bytes, rows: int, source_checksum: int) -> None:
        """Write a block to disk.

        Args:
            data: the block.
            rows: the number of source rows in the block.
            source_checksum: CRC-32 of these rows.

        Raises:
            OSError: the block could not be written, for example on a full disk. Earlier blocks are kept.
        """
        if self._finished_at is not None:
            self._log.truncate(self._log.seek(self._finished_at))
            self._finished_at = None
        self._write(self._log, self.journal, _line(Block(rows, source_checksum, len(data), zlib.crc32(data))))
        self._write(self._file, self.path, data)
        self._end += len(data)

    def __enter__(self) -> JournaledFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self._finished_at is not None:  # unchanged
                return
            if kind is None:
                self._write(self._log, self.journal, _line(FINISHED))
                return
            self._file.truncate(self._end)
            if not self._resumed and not self._end:  # an empty file would make the next attempt fail
                self.journal.unlink()
                if self._created:
                    self.path.unlink()
        finally:
            self._log.close()
            self._file.close()  # last, since it releases the lock

    def _open_file(self, resume: bool) -> tuple[FileIO, bool]:
        """Open and lock the file; return it, and whether it is new."""
        while True:
            existed = resume and self.path.exists()
            if not resume:
                refuse_existing(self.path)
            try:
                file = FileIO(self.path, "r+" if existed else "x")
            except (FileNotFoundError, FileExistsError):
                if existed or self.path.exists():
                    continue  # another process has just removed or created it
                raise
            try:
                self._lock(file)
                if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file, not existed
            except BaseException:
                file.close()
                raise
            file.close()  # another process has replaced it

    def _lock(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is writing this file", str(self.path)) from None
        except OSError as error:  # on some network file systems
            logger.info("Cannot lock %s: %s", self.path, str(error))

    def _open_journal(self, mode: str) -> FileIO:
        try:
            return FileIO(self.journal, mode)
        except FileNotFoundError:
            raise FileExistsError(
                f"{self.path} already exists, without a journal ({self.journal.name}), and is not overwritten; delete "
                "it or choose another file."
            ) from None

    def _resume(self, settings: Mapping[str, Any]) -> None:
        """Read the valid blocks, and truncate both files after them.

        Raises:
            ValueError: as the constructor.
        """
        first, *lines = self._log.readall().split(b"\n")[:-1] or [b""]  # bytes after the last newline are incomplete
        self._check_settings(_parse(first), json.loads(_line(settings)))
        finished = bool(lines) and _parse(lines[-1]) == FINISHED
        size, journal_end = os.fstat(self._file.fileno()).st_size, len(first) + 1
        for line in lines[: len(lines) - finished]:
            fields = _parse(line)
            if not isinstance(fields, list) or [type(field) for field in fields] != [int] * len(Block._fields):
                break
            block = Block(*fields)
            if self._end + block.size > size or zlib.crc32(self._file.read(block.size)) != block.checksum:
                break
            self.blocks.append(block)
            self._end += block.size
            journal_end += len(line) + 1
        if finished and (size, len(self.blocks)) != (self._end, len(lines) - 1):
            raise ValueError(f"{self.path} was changed after it was finished and cannot be resumed; delete it.")
        if size > self._end:
            logger.warning("%s: removed %d bytes after the last complete block.", self.path, size - self._end)
        if finished:
            self._finished_at = journal_end
            return
        for file, end in ((self._file, self._end), (self._log, journal_end)):
            file.truncate(end)
            file.seek(end)

    def _check_settings(self, before: object, now: dict[str, Any]) -> None:
        if not isinstance(before, dict):
            raise ValueError(f"{self.journal} is damaged: its first line is not a JSON object. Delete {self.path}.")
        if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            differences = ", ".join(f"{name}={before.get(name)!r}, not {now.get(name)!r}" for name in changed)
            raise ValueError(
                f"{self.path} was written with {differences}; resume with the original settings, or delete it."
            )

    def _write(self, file: FileIO, path: Path, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Write a folder's list of files to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(path: Path) -> None:
    """Raise FileExistsError if a file exists. The message advises ``resume`` if that may be possible."""
    if path.exists():
        resumable = journal_path(path).exists() or not path.stat().st_size
        hint = "to continue it, set resume=True" if resumable else "delete it or choose another file"
        raise FileExistsError(f"{path} already exists and is not overwritten; {hint}.")


def _is_finished(journal: Path) -> bool:
    """Return whether a journal ends with :data:`FINISHED`."""
    return journal.exists() and journal.read_bytes().endswith(b"\n" + _line(FINISHED))


def journal_path(path: Path) -> Path:
    """Return the path of a file's journal."""
    return path.with_name(f"{path.name}.journal")


def _line(value: object) -> bytes:
    return json.dumps(value, default=repr).encode() + b"\n"


def _parse(line: bytes) -> Any:
    """Parse a journal line; return None if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None

"""An append-only file of records that survives the end of its process at any moment.

    {"format": "maskwright annotations", ...}       the first record: what the file is
    CRC HEAD <tab> BODY                             one line for each record

CRC is that of the rest of the line, HEAD and BODY are JSON in ASCII. A record is on the disk before `append` returns. A
process that is killed while it writes leaves an incomplete last line, which is cut off when the file is opened again.
HEAD is small and is read at the start; BODY is read when it is needed, so that the size of the file does not matter.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskwright.errors import DataError
from maskwright.files import AtomicFile, describe_os_error, write_bytes, write_errors_as

VERSION = 1
_READ = 1 << 20  # bytes at a time


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is in the file.

    Attributes:
        offset: Its first byte.
        length: Number of its bytes, with the end of the line.
    """

    offset: int
    length: int


@dataclass(frozen=True)
class Record:
    """A record as it is found when a file is opened.

    Attributes:
        head: Its head.
        place: Where it is.
    """

    head: dict[str, Any]
    place: Place


class Reader:
    """Reads records of one state of a file, also after the file has been replaced by a compacted one."""

    def __init__(self, file: int, name: Path):
        self._file, self._name = file, name

    def body(self, place: Place) -> Any:
        """Return the body of a record.

        Raises:
            DataError: If it cannot be read, or is damaged.
        """
        try:
            line = read_at(self._file, place.length, place.offset)
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read: {describe_os_error(error)}") from None
        parsed = parse(line)
        if parsed is None or len(line) != place.length:
            raise DataError(f"{self._name}: a record at byte {place.offset} is damaged; restore the file from a copy")
        return json.loads(parsed[1])

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Journal:
    """A file of records, of which one process appends.

    Not for several threads at a time; `reader` gives another thread a view that it can read meanwhile.

    Args:
        path: The file; it and its folder are created if they are missing.
        about: Of a new file, what its first record says besides the format.
        sync: Whether records are flushed to the disk; without, those of the last seconds before a power failure can be
            lost, but not those before the end of a process.

    Attributes:
        path: The file.
        about: Its first record.
        size: Its bytes.
        cut: Number of bytes that an interrupted process had left at the end, and that were removed.
        damaged: Number of damaged records that were found between intact ones.

    Raises:
        DataError: By all methods, if the file cannot be read or written, or is of another format.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any] | None = None, *, sync: bool = True):
        self.path, self.sync = Path(path), sync
        self.cut = self.damaged = 0
        self.about: dict[str, Any] = {**(about or {}), "format": "maskwright annotations", "version": VERSION}
        with write_errors_as(DataError, self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._opened()
        try:
            self.size = os.fstat(self._file).st_size
            self._begin = self._read_about()
        except BaseException:
            os.close(self._file)
            raise

    # ---- opening -----------------------------------------------------------------------------------------------------

    def _opened(self) -> int:
        fresh = not self.path.exists()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        if fresh and self.sync:
            sync_folder(self.path.parent)
        return file

    def _read_about(self) -> int:
        """Read the first record, or write it; returns where the second one begins."""
        start = read_at(self._file, 1 << 16, 0)
        line, end, _ = start.partition(b"\n")
        parsed = parse(line + end)
        if parsed is not None:
            about: Any = json.loads(parsed[0])
            if about.get("format") == self.about["format"]:
                if about.get("version") != VERSION:
                    raise DataError(
                        f"{self.path}: was written by a newer version of maskwright; update maskwright to read it"
                    )
                self.about = about
                return len(line) + 1
        if end or not _begins_like(start, self.about):
            raise DataError(f"{self.path}: is not a journal of annotations; move it away, or restore it from a copy")
        self.size = 0
        self._truncate()
        return self._write(encode(self.about, None)).length

    def records(self) -> Iterator[Record]:
        """Yield the heads of all records in order, and cut off what an interrupted process has left at the end.

        To be exhausted before the first `append`. Damaged records before intact ones are left out and counted.
        """
        offset, good, bad = self._begin, self._begin, 0
        for line in self._lines(self._begin):
            parsed = parse(line)
            place = Place(offset, len(line))
            offset += len(line)
            if parsed is None:
                bad += 1
                continue
            self.damaged += bad
            bad, good = 0, offset
            yield Record(json.loads(parsed[0]), place)
        self.cut = self.size - good
        if self.cut:
            if b"\n" in (
                end := read_at(self._file, min(self.cut, 1 << 26), good)
            ):  # not only what a killed process left
                write_bytes(self.path.with_name(f"{self.path.name}.cut"), end, DataError)
            self.size = good
            with write_errors_as(DataError, self.path):
                self._truncate()

    def _lines(self, offset: int) -> Iterator[bytes]:
        rest = bytearray()
        while data := read_at(self._file, _READ, offset):
            offset += len(data)
            first = 0
            while (end := data.find(b"\n", first)) >= 0:
                rest += data[first : end + 1]
                yield bytes(rest)
                rest.clear()
                first = end + 1
            rest += data[first:]
        if rest:
            yield bytes(rest)

    # ---- writing -----------------------------------------------------------------------------------------------------

    def append(self, head: Mapping[str, Any], body: Any) -> Place:
        """Append a record, which is on the disk when this returns.

        If it cannot be written, for instance because the disk is full, the file is as before.
        """
        line = encode(head, body)
        with write_errors_as(DataError, self.path):
            self._check_present()
            return self._write(line)

    def _write(self, line: bytes) -> Place:
        place = Place(self.size, len(line))
        if os.fstat(self._file).st_size != self.size:  # an earlier failure could not be undone at once
            self._truncate()
        try:
            at = self.size
            left = memoryview(line)
            while left:
                count = write_at(self._file, left, at)
                left, at = left[count:], at + count
            if self.sync:
                sync_file(self._file)
        except BaseException:
            with contextlib.suppress(OSError):
                self._truncate()
            raise
        self.size += len(line)
        return place

    def _truncate(self) -> None:
        os.ftruncate(self._file, self.size)
        if self.sync:
            sync_file(self._file)

    def _check_present(self) -> None:
        """Refuse to write into a file that has been removed or replaced: what is written would be lost."""
        own = os.fstat(self._file)
        try:
            there = self.path.stat()
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
            what = "has been removed" if there is None else "has been replaced"
            raise OSError(errno.ESTALE, f"it {what} while it was in use; restore it, and start again", str(self.path))

    # ---- reading and compacting --------------------------------------------------------------------------------------

    def body(self, place: Place) -> Any:
        """Return the body of a record."""
        return Reader(self._file, self.path).body(place)

    def reader(self) -> Reader:
        """Return a view of the records of this moment; the caller closes it."""
        return Reader(os.dup(self._file), self.path)

    def rewrite(self, records: Iterable[tuple[Mapping[str, Any], Any]]) -> list[Place]:
        """Replace all records; the file is either the former one or the new one, whenever the process ends.

        Args:
            records: Head and body of each new record. Former records can be read meanwhile.

        Returns:
            Their places.
        """
        self._check_with_errors()
        places: list[Place] = []
        first = encode(self.about, None)
        with AtomicFile(self.path, DataError, sync=self.sync) as file:
            offset = file.write(first)
            for head, body in records:
                line = encode(head, body)
                places.append(Place(offset, len(line)))
                offset += file.write(line)
        with write_errors_as(DataError, self.path):
            if self.sync:
                sync_folder(self.path.parent)
            former, self._file = self._file, os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        os.close(former)
        self.size, self._begin = offset, len(first)
        return places

    def _check_with_errors(self) -> None:
        with write_errors_as(DataError, self.path):
            self._check_present()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


# ---- lines -----------------------------------------------------------------------------------------------------------


def encode(head: Mapping[str, Any], body: Any) -> bytes:
    """Return a record as a line."""
    parts = [json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii") for value in (head, body)]
    data = b"\t".join(parts)
    return b"%08x %b\n" % (zlib.crc32(data), data)


def parse(line: bytes) -> tuple[bytes, bytes] | None:
    """Return head and body of a line; None if it is incomplete or damaged."""
    if len(line) < 11 or line[8:9] != b" " or line[-1:] != b"\n":
        return None
    data = memoryview(line)[9:-1]
    try:
        if int(line[:8], 16) != zlib.crc32(data):
            return None
    except ValueError:
        return None
    head, tab, body = bytes(data).partition(b"\t")
    return (head, body) if tab else None


def _begins_like(start: bytes, about: Mapping[str, Any]) -> bool:
    """Whether a file without a whole line is what an interrupted process has left of a new journal."""
    if len(start) > 4096:
        return False
    return not start.strip(b"\0") or (start[:8].strip(b"0123456789abcdef") == b"" and _follows(start[9:], about))


def _follows(data: bytes, about: Mapping[str, Any]) -> bool:
    return not data or data[:1] == encode(about, None)[9:10]


# ---- the disk --------------------------------------------------------------------------------------------------------


_place = threading.Lock()  # of open files, on systems without `pread`


def read_at(file: int, count: int, offset: int) -> bytes:
    """Read from an open file, from any thread."""
    if sys.platform != "win32":
        return os.pread(file, count, offset)
    with _place:
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, count)


def write_at(file: int, data: memoryview, offset: int) -> int:
    """Write to an open file; returns the number of bytes that were written."""
    if sys.platform != "win32":
        return os.pwrite(file, data, offset)
    with _place:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)


def sync_file(file: int) -> None:
    """Flush an open file to the disk."""
    if sys.platform == "darwin":  # there fsync does not reach the disk
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)

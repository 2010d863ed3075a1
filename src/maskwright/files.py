"""Atomic writing of files: a file appears under its final name complete, or not at all.

Data is written to a temporary file in the same folder, flushed to disk and renamed. The temporary name is unique per
call (``.NAME.PID.TOKEN.part``), so processes and threads that write the same file do not interfere: the last rename
wins. The temporary file is removed on every failure, including KeyboardInterrupt; `remove_stale_parts` removes those
of processes that were killed.

Failures become one sentence with the path and the reason, raised as the exception class that the caller passes as
``error``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from maskwright.errors import DataError, MaskwrightError

ErrorClass = Callable[[str], MaskwrightError]  # an exception class of `errors`, or a function from message to exception

STALE_AFTER = 24 * 60 * 60  # seconds after which a temporary file of another machine counts as abandoned

_PART = re.compile(r"\..*\.(\d+)\.([0-9a-f]{8})[0-9a-f]{8}\.part")
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_active: set[str] = set()  # names of the temporary files that this process is writing


class AtomicFile:
    """A binary file that replaces `path` when it is complete.

    As a context manager it yields the open file, commits at the end of the block and discards on any exception::

        with AtomicFile(path) as file:
            file.write(data)

    A stream that outlives one block calls `write`, then `commit` or `discard`.

    Args:
        path: Final path. Missing parent folders are created.
        error: Exception class for failures of the file system.
        sync: Flush the data to disk before the rename. Without it, a power failure may leave an empty file;
            acceptable where many files are written that can be made again.

    Attributes:
        path: The final path.
        part: The temporary path.
        file: The open temporary file.

    Raises:
        MaskwrightError: Of class `error`, if the file cannot be created.
    """

    def __init__(self, path: str | Path, error: ErrorClass = DataError, *, sync: bool = True):
        self.path, self.error, self.sync = Path(path), error, sync
        self.part = _part_path(self.path)
        with self._errors():
            _prepare(self.path)
            _active.add(self.part.name)
            try:
                self.file: BinaryIO = self.part.open("xb")
            except BaseException:
                self.discard()
                raise

    def write(self, data: bytes) -> None:
        """Append `data`; on failure, discard the file and raise."""
        with self._errors(), _discard_on_failure(self.discard):
            self.file.write(data)

    def commit(self) -> Path:
        """Flush, close and rename to the final path, which is returned."""
        with self._errors(), _discard_on_failure(self.discard):
            if not self.file.closed:
                self.file.flush()
                if self.sync:
                    os.fsync(self.file.fileno())
                self.file.close()
            self.part.replace(self.path)
            _active.discard(self.part.name)
        return self.path

    def discard(self) -> None:
        """Close and remove the temporary file; no effect after `commit`."""
        with contextlib.suppress(OSError, AttributeError):  # closing flushes, which fails again on a full disk
            self.file.close()
        with contextlib.suppress(OSError):
            self.part.unlink(missing_ok=True)
        _active.discard(self.part.name)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return write_errors_as(self.error, self.path, self.part)

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if raised is None:
            self.commit()
            return
        self.discard()
        failure = _failure(raised, self.error, self.path, self.part)
        if failure is not None:
            raise failure from raised


@contextlib.contextmanager
def atomic_path(path: str | Path, error: ErrorClass = DataError, *, sync: bool = True) -> Generator[Path, None, None]:
    """Yield a temporary file for libraries that open files by name; rename it to `path` at the end of the block.

    The file has the permissions of any new file in that folder, as the umask gives, whatever the library sets.

    Args:
        path: Final path. Missing parent folders are created.
        error: Exception class for failures of the file system.
        sync: Flush the data to disk before the rename.

    Raises:
        MaskwrightError: Of class `error`, if the file cannot be written.
    """
    path = Path(path)
    part = _part_path(path)
    _active.add(part.name)
    try:
        with write_errors_as(error, path, part):
            _prepare(path)
            part.touch(exist_ok=False)
            mode = stat.S_IMODE(part.stat().st_mode)
            yield part
            if stat.S_IMODE(part.stat().st_mode) != mode:  # some libraries write files that only their owner can read
                part.chmod(mode)
            if sync:
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        _active.discard(part.name)


@contextlib.contextmanager
def atomic_folder(path: str | Path, error: ErrorClass = DataError) -> Generator[Path, None, None]:
    """Yield a temporary folder; rename it to `path`, which must not exist, at the end of the block.

    Args:
        path: Final path. Missing parent folders are created.
        error: Exception class for failures of the file system.

    Raises:
        MaskwrightError: Of class `error`, if the folder cannot be written or `path` exists.
    """
    path = Path(path)
    part = _part_path(path)
    _active.add(part.name)
    try:
        with write_errors_as(error, path, part):
            part.mkdir(parents=True)
            yield part
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _active.discard(part.name)


def write_bytes(path: str | Path, data: bytes, error: ErrorClass = DataError, *, sync: bool = True) -> Path:
    """Write `data` to `path` atomically.

    Args:
        path: Final path. Missing parent folders are created.
        data: The content.
        error: Exception class for failures of the file system.
        sync: Flush the data to disk before the rename.

    Returns:
        The path.

    Raises:
        MaskwrightError: Of class `error`, if the file cannot be written; an existing file is unchanged.
    """
    with AtomicFile(path, error, sync=sync) as file:
        file.write(data)
    return Path(path)


def write_text(path: str | Path, text: str, error: ErrorClass = DataError, *, sync: bool = True) -> Path:
    """Write `text` to `path` atomically, as UTF-8 with ``\\n`` line ends; see `write_bytes`.

    Bytes of file names that are not UTF-8 (lone surrogates in Python) are written as escapes, ``\\udcff``.
    """
    return write_bytes(path, text.encode(errors="backslashreplace"), error, sync=sync)


def write_json(
    path: str | Path, value: Any, error: ErrorClass = DataError, *, indent: int | None = None, sync: bool = True
) -> Path:
    """Write `value` to `path` atomically, as strict JSON in UTF-8; see `write_bytes`.

    A file name that is not UTF-8 is written as Python represents it: each undecodable byte as the escape of a lone
    surrogate, ``\\udc80`` ... ``\\udcff`` (PEP 383). `json.loads` returns the same name, which `open` accepts.

    Raises:
        ValueError: If `value` contains NaN or infinity, which JSON does not have.
    """
    return write_bytes(path, json_bytes(value, indent), error, sync=sync)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """`value` as strict JSON in UTF-8; see `write_json`."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)
    try:
        return text.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: Python reads it with lone surrogates
        return json.dumps(value, allow_nan=False, indent=indent, separators=separators).encode()


def remove_stale_parts(folder: str | Path) -> list[Path]:
    """Remove temporary files and folders that killed processes left in `folder`; not those of running processes.

    Those of a process whose number another process has now count as abandoned too. Files of another machine (a shared
    file system) are removed when they have not changed for `STALE_AFTER` seconds.
    Only names that this module makes are considered.

    Args:
        folder: The folder to clean; subfolders are not searched. It need not exist.

    Returns:
        What was removed.
    """
    removed: list[Path] = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(folder).iterdir()):
            match = _PART.fullmatch(path.name)
            if match is None or not _is_stale(path, int(match[1]), match[2]):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
            removed.append(path)
    return removed


# ---- failures --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def write_errors_as(error: ErrorClass, path: str | Path, part: str | Path | None = None) -> Generator[None, None, None]:
    """Turn failures of the file system inside the block into one sentence of class `error` about `path`.

    An OSError about a file other than `path`, its parent folders and `part` passes through unchanged, as does every
    other exception. torch and safetensors report a full disk as exceptions of their own; these are recognised.

    Args:
        error: Exception class, or a function from the message to the exception.
        path: The file that is being written.
        part: Its temporary file, if there is one.
    """
    try:
        yield
    except Exception as raised:
        failure = _failure(raised, error, Path(path), None if part is None else Path(part))
        if failure is None:
            raise
        raise failure from raised


def describe_os_error(error: OSError) -> str:
    """The reason of a file system error and what to do about it, as a clause: "the disk is full; free some space"."""
    number = error.errno
    reason, advice = _REASONS.get(number, ("", "")) if number is not None else ("", "")
    reason = reason or (error.strerror or str(error) or type(error).__name__)
    return f"{reason}; {advice}" if advice else reason


_FULL = ("the disk is full (no space left on device)", "free some space or choose a folder on another disk")
_REASONS = {
    errno.ENOSPC: _FULL,
    errno.EFBIG: ("the disk is full or the file exceeds a size limit", "free some space or raise the limit"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EACCES: ("permission denied", "choose another folder or change its permissions"),
    errno.EPERM: ("operation not permitted", "choose another folder or change its permissions"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.ENOENT: ("no such file or directory", "check the spelling of the path"),
    errno.ENOTDIR: ("not a directory", "a file exists where a folder is needed; choose another path"),
    errno.EISDIR: ("is a directory", "a folder exists where a file is needed; choose another path"),
    errno.EEXIST: ("file exists", "choose another path, or remove the existing one"),
    errno.EMFILE: ("too many open files", "use fewer worker processes (--workers)"),
    errno.ENAMETOOLONG: ("the file name is too long", "choose a shorter one"),
}


def _failure(raised: BaseException, error: ErrorClass, path: Path, part: Path | None) -> MaskwrightError | None:
    """The exception to raise instead of `raised`; None if that is not about writing this file."""
    reason = _os_reason(raised, path, part) if isinstance(raised, OSError) else _library_reason(raised)
    if reason is None:
        return None
    return error(f"{path}: cannot be written: {reason}. Existing files are unchanged.")


def _os_reason(raised: OSError, path: Path, part: Path | None) -> str | None:
    """The reason, if `raised` is about this file, one of its parent folders, or names no file."""
    names = (raised.filename, raised.filename2)  # two for a copy, a link or a rename
    about = [Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes)]
    own = [a in (path, part) or a in path.parents or part in a.parents for a in about]  # `part` may be a folder
    return describe_os_error(raised) if any(own) or not about else None


def _library_reason(raised: BaseException) -> str | None:
    """The reason, if `raised` is what torch or safetensors report for a failed write."""
    text = str(raised)
    if type(raised).__name__ == "SafetensorError":
        return "; ".join(_FULL) if "No space left" in text else text.strip().partition("\n")[0]
    if not isinstance(raised, RuntimeError) or not re.search("PytorchStreamWriter|inline_container", text):
        return None
    cause = raised.__cause__ or raised.__context__  # torch closes its archive after the error that matters
    while cause is not None:
        if isinstance(cause, OSError):
            return describe_os_error(cause)
        cause = cause.__cause__ or cause.__context__
    return "; ".join(_FULL)  # torch gives no reason; this is the usual one


# ---- temporary names -------------------------------------------------------------------------------------------------


def _part_path(path: Path) -> Path:
    name = path.name
    if len(os.fsencode(name)) > 200:  # file systems allow 255 bytes per name
        name = name.encode(errors="ignore")[:200].decode(errors="ignore")
    return path.with_name(f".{name}.{os.getpid()}.{_HOST}{secrets.token_hex(4)}.part")


def _prepare(path: Path) -> None:
    """Make the parent folders; refuse a device or a pipe, which the rename would replace by a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(None, "it is not a regular file; choose another path", str(path))


@contextlib.contextmanager
def _discard_on_failure(discard: Callable[[], None]) -> Generator[None, None, None]:
    try:
        yield
    except BaseException:
        discard()
        raise


def _is_stale(path: Path, process: int, host: str) -> bool:
    if host != _HOST:
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > STALE_AFTER
        return False
    if process == os.getpid():  # in containers the process before often had the same number
        return path.name not in _active
    if not process_exists(process):
        return True
    with contextlib.suppress(OSError):
        changed, began = path.stat().st_mtime, _process_began(process)
        # A process that began later only has the same number.
        return began > changed + 2 if began is not None else time.time() - changed > STALE_AFTER
    return False


def _process_began(process: int) -> float | None:
    """When a process began, in seconds since the epoch; None where that is not known (other systems than Linux)."""
    try:
        ticks = int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
        return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration, AttributeError):
        return None


def process_exists(process: int) -> bool:
    """Whether a process with this number runs on this machine."""
    if sys.platform == "win32":  # os.kill would end the process there
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, process)  # PROCESS_QUERY_LIMITED_INFORMATION
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, but belongs to another user
        return True
    except OverflowError:
        return False
    return True

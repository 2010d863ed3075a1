"""Locks on output folders: one process at a time trains in a run folder or predicts into an output folder.

The lock is a byte-range lock of the operating system on a hidden file in the folder, so that it ends with its process,
however that ends. Network file systems pass such locks on to other machines. Where the file system has no locks, the
existence of the file is the lock: its holder renews its time stamp, and it is void when the holder is known to have
ended or has not renewed it for `SILENT_AFTER` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from maskwright.errors import UsageError
from maskwright.files import ErrorClass, process_exists, write_errors_as

SILENT_AFTER = 300.0  # seconds without a sign of life after which a lock without support of the file system is void
RENEW_EVERY = 30.0  # seconds between signs of life

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTSUP)
_held: dict[tuple[int, int, str], int] = {}  # device, inode and name of each lock file's folder -> process


class FolderLock:
    """The exclusive right of a process to write one kind of output into a folder; a context manager.

    Args:
        folder: The folder; created if missing, and removed again by `release` if it is still empty then.
        purpose: What the folder is used for, a word for the file name: "train", "predict".
        what: What the other process does, for the message: "another process trains in this folder".
        error: Exception class for failures of the file system.

    Raises:
        UsageError: If another process, or another call in this process, holds the lock.
    """

    def __init__(self, folder: str | Path, purpose: str, what: str, error: ErrorClass = UsageError):
        self.folder, self.what = Path(folder), what
        self.path = self.folder / f".{purpose}.lock"
        self._file: int | None = None
        self._made: list[Path] = []
        self._ended = threading.Event()
        with write_errors_as(error, self.folder):
            self._make_folder()
            about = self.folder.stat()
            self._key = (about.st_dev, about.st_ino, purpose)
            if _held.get(self._key) == os.getpid():
                raise self._refusal({"pid": os.getpid(), "host": socket.gethostname()})
            with write_errors_as(error, self.path):
                self._acquire()
        _held[self._key] = os.getpid()

    def release(self) -> None:
        """Give the folder free; no effect if it has been, or in a process forked from the holder."""
        if self._file is None or _held.get(self._key) != os.getpid():
            return
        self._ended.set()
        del _held[self._key]
        # Removed before it is unlocked: who locks the removed file afterwards notices, see `_acquire`.
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = None
        with contextlib.suppress(OSError):  # Windows does not remove open files
            self.path.unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if hasattr(self, "_key"):
            self.release()

    # ---- acquiring ---------------------------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _acquire(self) -> None:
        for _ in range(100):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                locked = _lock(file)
                if locked is None:
                    os.close(file)
                    self._create()
                    return
                if not locked:
                    raise self._refusal(_read(self.path))
                if _is_same(file, self.path):  # its former holder may have removed it meanwhile
                    self._file = file
                    _write(file)
                    return
            except BaseException:
                if self._file != file:
                    with contextlib.suppress(OSError):
                        os.close(file)
                raise
            os.close(file)
        raise self._refusal(_read(self.path))

    def _create(self) -> None:
        """Acquire without locks of the file system: by creating the file."""
        for _ in range(3):
            holder = _read(self.path)
            if holder is not None and _lives(holder, self.path):
                raise self._refusal(holder)
            aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            with contextlib.suppress(OSError):  # the rename succeeds in one process only
                self.path.rename(aside)
                if _read(aside) != holder:  # another process was faster
                    aside.rename(self.path)
                    continue
                aside.unlink()
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                continue
            _write(self._file)
            threading.Thread(target=self._renew, daemon=True, name="maskwright-lock").start()
            return
        raise self._refusal(_read(self.path))

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _refusal(self, holder: dict[str, Any] | None) -> UsageError:
        holder = holder or {}
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown machine')}"
        since = f" since {holder['since']}" if "since" in holder else ""
        return UsageError(f"{self.folder}: {self.what}: {who}{since}; wait until it has ended, or give another folder")


def _lock(file: int) -> bool | None:
    """Lock an open file without waiting; False if another process holds it, None if the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 20, os.SEEK_SET)  # beyond the text, which others can thus read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not `flock`: its locks are inherited by forked workers, which may outlive a killed process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_same(file: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(file)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _write(file: int) -> None:
    """Write who holds the lock."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, text.encode())


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; None if the file does not say."""
    try:
        value: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _lives(holder: dict[str, Any], path: Path) -> bool:
    """Whether the process that wrote the file may still run."""
    pid = holder.get("pid")
    if holder.get("host") == socket.gethostname() and isinstance(pid, int):
        return pid != os.getpid() and process_exists(pid)  # in containers, processes often have the same number
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime < SILENT_AFTER
    return False

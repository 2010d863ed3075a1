"""One process at a time in an output folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskwright import locks
from maskwright.errors import UsageError
from maskwright.locks import FolderLock

HOLD = """
import sys, time
from maskwright.locks import FolderLock
lock = FolderLock(sys.argv[1], "train", "another process trains in this folder")
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(folder: Path) -> FolderLock:
    return FolderLock(folder, "train", "another process trains in this folder")


def test_the_second_process_learns_who_holds_the_folder_and_a_killed_holder_frees_it(tmp_path: Path):
    holder = hold(tmp_path)
    with pytest.raises(UsageError) as refused:
        take(tmp_path)
    text = str(refused.value)
    assert text.startswith(f"{tmp_path}: another process trains in this folder: process {holder.pid} on ")
    assert f" since {time.strftime('%Y-%m-')}" in text
    assert text.endswith("; wait until it has ended, or give another folder")
    FolderLock(tmp_path, "predict", "another purpose").release()
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / ".train.lock").exists()
    with take(tmp_path):
        pass
    assert not (tmp_path / ".train.lock").exists()


@pytest.mark.fast
def test_a_lock_holds_within_the_process_too(tmp_path: Path):
    (tmp_path / "same").symlink_to(tmp_path, target_is_directory=True)
    first = take(tmp_path)
    for folder in (tmp_path, tmp_path / "same"):
        with pytest.raises(UsageError, match=f"process {os.getpid()} on "):
            take(folder)
    first.release()
    first.release()
    take(tmp_path).release()


@pytest.mark.fast
def test_a_folder_that_stays_empty_is_removed_again(tmp_path: Path):
    take(tmp_path / "a" / "b").release()
    assert list(tmp_path.iterdir()) == []
    with take(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


def claim(path: Path, pid: int, host: str, age: float = 0.0) -> None:
    path.write_text(json.dumps({"pid": pid, "host": host, "since": "2026-01-01"}))
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.mark.fast
@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_file_decides_and_is_void_once_its_process_is_gone(tmp_path: Path):
    import socket

    own, path = socket.gethostname(), tmp_path / ".train.lock"
    with take(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()
    claim(path, os.getppid(), own, age=10 * locks.SILENT_AFTER)
    with pytest.raises(UsageError, match=f"process {os.getppid()} on {own} since 2026-01-01"):
        take(tmp_path)
    claim(path, 2**22 + 1, own)
    take(tmp_path).release()
    claim(path, 1, "elsewhere", age=locks.SILENT_AFTER / 2)
    with pytest.raises(UsageError, match="process 1 on elsewhere"):
        take(tmp_path)
    claim(path, 1, "elsewhere", age=2 * locks.SILENT_AFTER)
    take(tmp_path).release()
    path.write_text("{damaged")
    take(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "RENEW_EVERY", 0.02)
    with take(tmp_path):
        os.utime(tmp_path / ".train.lock", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / ".train.lock").stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)

"""Atomic writing: files appear complete or not at all, and failures are one sentence."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from maskwright import files
from maskwright.errors import CheckpointError, DataError, TrainingError
from maskwright.files import (
    _HOST,
    AtomicFile,
    atomic_folder,
    atomic_path,
    remove_stale_parts,
    write_errors_as,
)

pytestmark = pytest.mark.fast


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_content_is_written_and_nothing_else_remains(tmp_path: Path):
    assert files.write_bytes(tmp_path / "new/a.bin", b"\0\1").read_bytes() == b"\0\1"
    assert files.write_text(tmp_path / "new/b.txt", "é\n").read_bytes() == "é\n".encode()
    assert json.loads(files.write_json(tmp_path / "new/c.json", {"é": [1, None]}).read_text("utf-8")) == {
        "é": [1, None]
    }
    assert files.write_json(tmp_path / "new/d.json", [1], indent=1, sync=False).read_text() == "[\n 1\n]"
    with atomic_path(tmp_path / "new/e.safetensors", CheckpointError) as part:
        assert part.parent == tmp_path / "new"
        save_file({"a": torch.ones(2)}, part)
    assert names(tmp_path / "new") == ["a.bin", "b.txt", "c.json", "d.json", "e.safetensors"]
    files.write_text(tmp_path / "new/b.txt", "replaced")
    assert (tmp_path / "new/b.txt").read_text() == "replaced"


def test_json_is_strict_and_takes_any_file_name(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", [float("nan")])
    name = "caf\udce9.jpg"  # as Python reads a name that is not UTF-8
    assert json.loads(files.write_json(tmp_path / "a.json", [name]).read_text()) == [name]


def test_permissions_are_those_of_any_new_file(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    files.write_bytes(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_up_to_the_file_systems_limit_are_possible(tmp_path: Path):
    assert files.write_bytes(tmp_path / ("é" * 127), b"x").read_bytes() == b"x"
    with pytest.raises(DataError, match="the file name is too long; choose a shorter one"):
        files.write_bytes(tmp_path / ("a" * 256), b"x")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_keeps_the_earlier_file_and_leaves_no_other(kind: type[BaseException], tmp_path: Path):
    path = files.write_text(tmp_path / "a.txt", "before")
    with pytest.raises(kind), AtomicFile(path) as file:  # noqa: PT012 - the write is part of it
        file.write(b"half")
        raise kind
    with pytest.raises(kind), atomic_path(path) as part:  # noqa: PT012
        part.write_text("half")
        raise kind
    with pytest.raises(kind), atomic_folder(tmp_path / "folder") as part:  # noqa: PT012
        (part / "half").write_text("half")
        raise kind
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "before"


def test_a_stream_is_committed_or_discarded(tmp_path: Path):
    stream = AtomicFile(tmp_path / "a.txt")
    stream.write(b"one ")
    stream.write(b"two")
    assert not stream.path.exists()
    assert stream.commit().read_bytes() == b"one two"
    stream.discard()
    assert stream.path.exists(), "nothing to discard after a commit"
    other = AtomicFile(tmp_path / "a.txt")
    other.write(b"three")
    other.discard()
    assert stream.path.read_bytes() == b"one two"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [DataError, CheckpointError, lambda text: TrainingError(f"{text} Resume later.")])
def test_a_full_disk_is_called_so(error: files.ErrorClass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = files.write_text(tmp_path / "a.txt", "before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    kind = type(error("")) if isinstance(error, type) else TrainingError
    with pytest.raises(kind) as raised:
        files.write_text(path, "after", error)
    assert str(raised.value).startswith(
        f"{path}: cannot be written: the disk is full (no space left on device); free some space or choose a folder on "
        "another disk. Existing files are unchanged."
    )
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_torch_on_a_full_disk():
    sentence = "x: cannot be written: the disk is full"
    with (
        Path("/dev/full").open("wb", buffering=0) as file,
        pytest.raises(TrainingError, match=sentence),
        write_errors_as(TrainingError, "x"),
    ):
        torch.save({"a": torch.ones(1 << 20)}, file)


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (SafetensorError('IoError(Os { code: 28, message: "No space left on device" })'), "the disk is full"),
        (SafetensorError("Error while serializing: bad header"), "Error while serializing: bad header"),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"), "the disk is full"),
    ],
)
def test_what_libraries_report_instead_of_an_os_error(raised: Exception, sentence: str):
    with (
        pytest.raises(CheckpointError, match=f"x: cannot be written: {sentence}"),
        write_errors_as(CheckpointError, "x"),
    ):
        raise raised


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_devices_are_not_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for write in (AtomicFile, lambda path: atomic_path(path).__enter__()):
        with pytest.raises(DataError, match="pipe: cannot be written: it is not a regular file; choose another path"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_where_no_file_can_be_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/a: cannot be written: .*; (a file exists where|choose another path)"):
        files.write_text(tmp_path / "file/a", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: cannot be written: is a directory; a folder exists where a file"):
        files.write_text(tmp_path / "folder", "")
    with pytest.raises(DataError, match="folder: cannot be written: file exists"), atomic_folder(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["file", "folder"]


def test_errors_about_other_files_and_other_errors_pass_through(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="source"), AtomicFile(tmp_path / "a"):
        (tmp_path / "source").read_bytes()
    with pytest.raises(RuntimeError, match="CUDA"), atomic_path(tmp_path / "a"):
        raise RuntimeError("CUDA error")
    with pytest.raises(CheckpointError, match="another"), atomic_path(tmp_path / "a"):
        raise CheckpointError("another")
    assert names(tmp_path) == []


def test_threads_that_write_the_same_file_do_not_interfere(tmp_path: Path):
    path, texts = tmp_path / "a.txt", [str(n) * 10_000 for n in range(8)]
    threads = [threading.Thread(target=files.write_text, args=(path, text), kwargs={"sync": False}) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert names(tmp_path) == ["a.txt"]


def test_parts_of_dead_processes_are_removed_and_no_others(tmp_path: Path):
    code = (
        "import os, sys; from maskwright.files import AtomicFile, atomic_folder; "
        "AtomicFile(sys.argv[1] + '/dead'); f = atomic_folder(sys.argv[1] + '/f'); f.__enter__(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    dead = names(tmp_path)
    assert len(dead) == 2
    own, other = AtomicFile(tmp_path / "own"), tmp_path / ".x.1.ffffffff00000000.part"
    parent = tmp_path / own.part.name.replace(str(os.getpid()), str(os.getppid()))
    for path in (other, parent, tmp_path / "weights.pth.part", tmp_path / ".hidden.part"):
        path.write_text("")
    assert [p.name for p in remove_stale_parts(tmp_path)] == dead
    assert own.commit().exists()
    assert parent.exists()
    os.utime(other, (time.time() - 2 * files.STALE_AFTER,) * 2)
    assert remove_stale_parts(tmp_path) == [other], "of another machine, and old"
    own.part.write_text("")
    assert remove_stale_parts(tmp_path) == [own.part], "of an earlier process with this number"
    assert names(tmp_path) == sorted([".hidden.part", parent.name, "own", "weights.pth.part"])
    assert remove_stale_parts(tmp_path / "absent") == []


def test_a_part_is_not_that_of_a_later_process_with_the_same_number(tmp_path: Path):
    reused = tmp_path / f".b.json.{os.getppid()}.{_HOST}01234567.part"
    alive = tmp_path / f".c.json.{os.getppid()}.{_HOST}01234567.part"
    for path in (reused, alive):
        path.touch()
    os.utime(reused, (1, 1))  # long before the process with this number began
    assert remove_stale_parts(tmp_path) == [reused]
    assert names(tmp_path) == [alive.name]

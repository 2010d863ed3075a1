"""The journal: what is in it after its process has ended at any moment, and after failures of the disk."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maskwright.errors import DataError
from maskwright.web import journal as module
from maskwright.web.journal import Journal, encode, parse

RECORDS = [({"image": f"{n}.jpg", "version": n}, {"put": ["\u00e9\t\n", n], "more": "x" * n}) for n in range(1, 6)]


def written(path: Path, count: int = len(RECORDS)) -> Path:
    journal = Journal(path, {"source": "photos"})
    for head, body in RECORDS[:count]:
        journal.append(head, body)
    journal.close()
    return path


def content(path: Path) -> list[tuple[Any, Any]]:
    journal = Journal(path, sync=False)
    found = [(record.head, journal.body(record.place)) for record in journal.records()]
    journal.close()
    return found


@pytest.mark.fast
def test_records_are_read_as_they_were_written(tmp_path):
    path = written(tmp_path / "deep" / "journal.jsonl")
    assert content(path) == RECORDS
    assert len(path.read_bytes().splitlines()) == len(RECORDS) + 1  # tabs and line breaks of values are escaped
    journal = Journal(path, {"source": "others"})
    assert journal.about["source"] == "photos"
    assert (journal.cut, journal.damaged) == (0, 0)
    journal.close()


@pytest.mark.fast
def test_a_file_that_ends_at_any_byte_of_the_last_record_has_the_records_before(tmp_path):
    whole = written(tmp_path / "journal.jsonl").read_bytes()
    last = len(encode(*RECORDS[-1]))
    for length in range(len(whole) - last, len(whole)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:length])
        assert content(path) == RECORDS[:-1]
        assert path.stat().st_size == len(whole) - last  # what was left is gone, so that the next record is intact
        journal = Journal(path, sync=False)
        list(journal.records())
        journal.append(*RECORDS[-1])
        journal.close()
        assert path.read_bytes() == whole


@pytest.mark.fast
def test_a_new_file_that_ends_at_any_byte_is_empty(tmp_path):
    whole = written(tmp_path / "journal.jsonl", 0).read_bytes()
    path = tmp_path / "cut.jsonl"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert content(path) == []
    path.write_bytes(bytes(100))  # what some file systems leave after a power failure
    assert content(path) == []


@pytest.mark.fast
def test_damaged_records_are_left_out_and_counted(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"jpg", b"gpj")
    path.write_bytes(b"".join(lines) + b"complete but wrong\nincomplete")
    journal = Journal(path)
    heads = [record.head for record in journal.records()]
    assert heads == [head for n, (head, _) in enumerate(RECORDS) if n != 1]
    assert journal.damaged == 1
    assert journal.cut == len(b"complete but wrong\nincomplete")
    assert path.with_name("journal.jsonl.cut").read_bytes() == b"complete but wrong\nincomplete"
    journal.close()


@pytest.mark.fast
@pytest.mark.parametrize("data", [b"\xff\xd8\xff photo", b"name,age\n1,2\n", b'{"format": "other"}\n', b"0" * 5000])
def test_other_files_are_refused_and_left_as_they_are(tmp_path, data):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match="is not a journal of annotations"):
        Journal(path)
    assert path.read_bytes() == data


@pytest.mark.fast
def test_a_file_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(encode({"format": "maskwright annotations", "version": 2}, None))
    with pytest.raises(DataError, match="newer version"):
        Journal(path)


@pytest.mark.fast
@pytest.mark.parametrize("where", ["write", "sync"])
def test_a_record_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path, monkeypatch, where):
    path = written(tmp_path / "journal.jsonl", 3)
    before = path.read_bytes()
    journal = Journal(path)
    assert len(list(journal.records())) == 3

    def full(file: int, data: Any = b"", offset: int = 0) -> int:
        if data and offset == len(before):
            return os.pwrite(file, data[: len(data) // 2], offset)  # the disk takes half of it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_at" if where == "write" else "sync_file", full)
        with pytest.raises(DataError, match=r"the disk is full.*free some space"):
            journal.append(*RECORDS[3])
    assert path.read_bytes() == before
    journal.append(*RECORDS[3])
    journal.close()
    assert content(path) == RECORDS[:4]


@pytest.mark.fast
def test_nothing_is_written_into_a_file_that_was_removed_or_replaced(tmp_path):
    path = written(tmp_path / "journal.jsonl", 1)
    journal = Journal(path)
    path.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="has been removed while it was in use"):
        journal.append(*RECORDS[1])
    written(path, 2)
    with pytest.raises(DataError, match="has been replaced while it was in use"):
        journal.append(*RECORDS[2])
    with pytest.raises(DataError, match="has been replaced"):
        journal.rewrite([])
    journal.close()
    assert content(path) == RECORDS[:2]


@pytest.mark.fast
def test_a_file_is_compacted_completely_or_not_at_all(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    before = path.read_bytes()
    journal = Journal(path)
    places = [record.place for record in journal.records()]
    reader = journal.reader()

    def failing() -> Any:
        yield RECORDS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.rewrite(failing())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]
    new = journal.rewrite((head, journal.body(place)) for (head, _), place in zip(RECORDS[3:], places[3:], strict=True))
    assert [journal.body(place) for place in new] == [body for _, body in RECORDS[3:]]
    assert reader.body(places[0]) == RECORDS[0][1]  # a view keeps what it has seen
    reader.close()
    journal.append(*RECORDS[0])
    journal.close()
    assert content(path) == [*RECORDS[3:], RECORDS[0]]


@pytest.mark.fast
def test_lines_that_are_not_records_are_none():
    line = encode({"a": 1}, [2])
    assert parse(line) == (b'{"a":1}', b"[2]")
    for other in (
        b"",
        b"\n",
        line[:-1],
        b"0" + line[1:] if line[:1] != b"0" else b"1" + line[1:],
        b"zzzzzzzz {}\t[]\n",
    ):
        assert parse(other) is None
    with pytest.raises(ValueError, match="JSON"):
        encode({}, float("nan"))


WRITER = """
import random, sys
from maskwright.web.journal import Journal
journal = Journal(sys.argv[1])
count = sum(1 for _ in journal.records())
compact = random.Random(count).random() < 0.3
while True:
    count += 1
    journal.append({"n": count}, "x" * random.randrange(200_000))
    print(count, flush=True)
    if compact and count % 7 == 0:
        places = [record.place for record in Journal(sys.argv[1]).records()]
        journal.rewrite([({"n": n + 1}, journal.body(place)[:99]) for n, place in enumerate(places)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_is_killed_at_any_moment_loses_only_what_it_had_not_confirmed(tmp_path):
    path, random_ = tmp_path / "journal.jsonl", random.Random(0)
    confirmed = 0
    for _ in range(int(os.environ.get("MASKWRIGHT_KILLS", "6"))):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            wanted = random_.randrange(1, 12)
            for _ in range(wanted):
                confirmed = int(process.stdout.readline())
            try:
                process.wait(random_.random() * 0.01)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split(b"\n")[:-1]
            confirmed = int(rest[-1]) if rest else confirmed
        numbers = [head["n"] for head, _ in content(path)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) in (confirmed, confirmed + 1)

"""Control characters in names reach neither the terminal nor the lines of a report."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from maskwright.data.findings import Finding, finding_lines
from maskwright.errors import AnnotationError, UsageError
from maskwright.files import write_json, write_text
from maskwright.terminal import explain, print_error, print_line
from maskwright.text import encodable, printable

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("bell\x07 \x7f \x9b2J", r"bell\x07 \x7f \x9b2J"),
        ("photo\u202egpj.exe\u2066", r"photo\u202egpj.exe\u2066"),
        ("line\u2028break", r"line\u2028break"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("\ud800", r"\ud800"),
        ("Käse 日本 👩‍🚀 C:\\new", "Käse 日本 👩‍🚀 C:\\new"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str):
    assert printable(text) == shown
    shown.encode()


def test_line_breaks_of_our_own_are_kept():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert encodable("Käse 日", "ascii") == r"K\xe4se \u65e5"


def test_output_contains_no_control_characters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    print_line("one\ntwo\x1b]0;title\x07")
    print_error(os.fsdecode(b"\xff.jpg"))
    assert capsys.readouterr() == ("one\ntwo\\x1b]0;title\\x07\n", "\\xff.jpg\n")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", narrow)
    print_line("日")
    narrow.seek(0)
    assert narrow.read() == "\\u65e5\n"


def test_a_finding_and_an_error_are_one_line_each():
    finding = Finding("skip", "image", "set/a\nnote: all is well", "is \x1b[2Jdamaged", "replace it")
    assert finding_lines([finding]) == [r"set/a\nnote: all is well: is \x1b[2Jdamaged; replace it"]
    assert explain(UsageError("a\nb: no such file")) == r"a\nb: no such file"
    assert explain(AnnotationError("one\ntwo")) == "one\ntwo"
    assert (
        explain(FileNotFoundError(2, "", "x\x1b"))
        == r"x\x1b: no such file or directory; check the spelling of the path"
    )


def test_file_names_that_are_not_utf8_are_written_and_read_back(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9 \xff.jpg")
    text = write_json(tmp_path / "a.json", {"file_name": name, "other": "é"}).read_text("ascii")
    assert json.loads(text) == {"file_name": name, "other": "é"}
    assert os.fsencode(json.loads(text)["file_name"]) == b"caf\xe9 \xff.jpg"
    assert write_text(tmp_path / "a.txt", f"{name} é").read_bytes().decode() == r"caf\udce9 \udcff.jpg é"

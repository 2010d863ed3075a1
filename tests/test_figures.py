"""The manifest of published figures: docs/figures.toml and docs/figures.py."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from maskwright import cli

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.fast


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


figures = script()
MANIFEST = figures.read_manifest(figures.MANIFEST.read_text("utf-8"))


def test_every_table_of_figures_belongs_to_an_entry_and_every_entry_is_valid():
    listed, _ = figures.today()
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in figures.documents()}
    assert figures.faults(MANIFEST, texts, listed) == []
    named = {
        mark.partition(": ")[2] for page, text in texts.items() for t in figures.tables(page, text) for mark in t.marks
    }
    in_text = {name for name, figure in MANIFEST.figures.items() if "in the text" in figure.conditions}
    assert {*MANIFEST.figures} - named == in_text, "entries without a table say so"


def test_every_option_of_a_command_exists():
    for figure in MANIFEST.figures.values():
        for command in figure.commands:
            words = shlex.split(command)
            options = [word for word in words if re.match("--[a-z]", word)]
            if words[0] == "maskwright":
                assert words[1] in cli.VERBS, figure.name
                continue
            text = (ROOT / words[1]).read_text("utf-8")
            for option in options:
                assert f'"{option}"' in text, f"{figure.name}: {words[1]} has no {option}"
            for option, value in itertools.pairwise(words):
                if option in ("--option", "--decode"):
                    json.loads(value.partition("=")[2])


TABLE = "# Speed of it\n\n{mark}| a | b |\n|---|--:|\n| x | 1 |\n"


@pytest.mark.parametrize(
    ("mark", "fault"),
    [
        ("", "page.md:3: the table '| a | b |' belongs to no entry"),
        ("<!-- figure: other -->\n", "names 'other', which docs/figures.toml does not have"),
        ("<!-- figure: speed -->\n", None),
        ("<!-- figure: speed -->\n<!-- begin -->\n", None),
        ("<!-- published -->\n", None),
        ("<!-- no figures -->\n", None),
        ("<!-- published -->\n\nText.\n\n", "belongs to no entry"),
        ("<!-- figure: speed --> <!-- begin -->\n", None),
        ("````\n```\n````\n\n", "page.md:7: the table '| a | b |' belongs to no entry"),
        ("~~~\n```\n~~~\n", "page.md:6: the table"),
        ("```x``` is code\n\n", "page.md:5: the table"),
        ("- In a list:\n\n  ", "page.md:5: the table '  | a | b |' belongs to no entry"),
        ("````\n```\n", None),
        ("~~~\n\n", None),
        ("<!-- old:\n", None),
        ("Text. <!-- old:\n", None),
    ],
)
def test_tables_are_found_and_named(mark, fault):
    entry = figures.Figure(
        "speed", "page.md", "speed-of-it", ("python benchmarks/a.py",), "", None, "one", ("src/a.py",), "", ""
    )
    manifest = figures.Manifest({"speed": entry}, {}, {"one": ""})
    found = figures.faults(manifest, {"page.md": TABLE.format(mark=mark)}, ["src/a.py", "benchmarks/a.py"])
    assert (len(found), fault in "".join(found)) == (1, True) if fault else found == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"page": "other.md"}, "there is no page other.md"),
        ({"anchor": "speed"}, "page.md has no heading 'speed'"),
        ({"machine": "two"}, "machine must be one of one"),
        ({"sources": ("src/b.py",)}, "no file is called src/b.py"),
        ({"sources": ("@more",)}, "there is no group @more"),
        ({"commands": ("python benchmarks/b.py",)}, "there is no benchmarks/b.py"),
        ({"commands": ("make speed",)}, "the command must be one of maskwright or a script"),
        ({"commands": ("make benchmarks/a.py",)}, "the command must be one of maskwright or a script"),
        ({"commands": ("A=1 python benchmarks/a.py",)}, "the command must be one of maskwright or a script"),
        ({"commands": ("python 'benchmarks/a.py",)}, "the command must be one of maskwright or a script"),
        ({"commands": ("",)}, "the command must be one of maskwright or a script"),
        ({"commands": ()}, "has no command; the note must say why"),
    ],
)
def test_entries_are_checked(change, fault):
    values = {
        "name": "speed", "page": "page.md", "anchor": "speed-of-it", "commands": ("python benchmarks/a.py",),
        "conditions": "", "date": None, "machine": "one", "sources": ("src/a.py",), "code": "", "commit": "", **change,
    }  # fmt: skip
    manifest = figures.Manifest({"speed": figures.Figure(**values)}, {}, {"one": ""})
    found = figures.faults(manifest, {"page.md": "# Speed of it\n"}, ["src/a.py", "benchmarks/a.py"])
    assert len(found) == 1
    assert fault in found[0]


def test_a_figure_is_older_when_its_code_changes_and_not_when_words_do():
    first = 'import os\n\n\ndef area(w, h):\n    """The area."""\n    return f"{w * h:.1f}"\n'
    words = 'import os\n\ndef area(w, h):  # of a box\n    """Another text."""\n\n    return f\'{w * h:.1f}\'\n'
    code = first.replace("w * h", "w + h")
    digests = [figures.digest(["a.py"], {"a.py": text}.get) for text in (first, words, code)]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] == "b6ec293a8d4d", "the same for every version of Python"


def test_parts_that_a_system_imports_are_measured_too():
    listed, read = figures.today()
    entry = figures.Figure("", "", "", (), "", None, "", ("+src/maskwright/systems/yolact.py",), "", "")
    found = figures.files_of(entry, MANIFEST, listed, read)
    assert {"src/maskwright/blocks/yolact.py", "src/maskwright/ops/prototypes.py"} < set(found)
    assert "src/maskwright/systems/system.py" not in found
    assert not [path for path in found if "/data/" in path or "/training/" in path]


def test_a_stamp_writes_date_and_digest(tmp_path, monkeypatch):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    copy = tmp_path / "figures.toml"
    shutil.copy(figures.MANIFEST, copy)
    monkeypatch.setattr(figures, "MANIFEST", copy)
    figures.stamp("pooling", None, "h200")
    before, after = MANIFEST.figures, figures.read_manifest(copy.read_text("utf-8")).figures
    assert {name for name in before if before[name] != after[name]} == {"pooling"}
    assert after["pooling"].machine == "h200"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert head.startswith(after["pooling"].commit)
    listed, read = figures.today()
    manifest = figures.read_manifest(copy.read_text("utf-8"))
    assert "pooling" not in [figure.name for figure in figures.older(
        figures.Manifest({"pooling": after["pooling"]}, manifest.groups, manifest.machines), listed, read)]  # fmt: skip


def test_nothing_is_stamped_with_an_unknown_name_machine_or_commit(tmp_path, monkeypatch):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    copy = tmp_path / "figures.toml"
    shutil.copy(figures.MANIFEST, copy)
    monkeypatch.setattr(figures, "MANIFEST", copy)
    for words, message in [
        (["pooling", "puling"], "there is no figure 'puling'"),
        (["pooling", "--machine", "abacus"], "machine must be one of epyc-shared, "),
        (["pooling", "--commit", "no-such-commit"], "no-such-commit"),
    ]:
        monkeypatch.setattr(sys, "argv", ["figures.py", "stamp", *words])
        with pytest.raises(SystemExit, match=message):
            figures.main()
    assert copy.read_bytes() == (ROOT / "docs/figures.toml").read_bytes()


def test_fields_of_an_entry_are_checked():
    text = '[machines]\n[groups]\n[figures.a]\npage = "x"\nspeed = 3\n'
    with pytest.raises(ValueError, match=r"figures\.a: missing or unknown anchor, code, .*speed"):
        figures.read_manifest(text)

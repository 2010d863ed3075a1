"""The figures of the documents and the commands that make them: docs/figures.toml.

    python docs/figures.py check             # which figures are older than the code that they measure
    python docs/figures.py run NAME          # run the command of a figure again
    python docs/figures.py stamp NAME        # after its table was updated: date, digest and commit of today's code

`check` fails (exit code 1) if a table of figures in README.md or docs belongs to no entry, or an entry is invalid.
Figures that are older than their code are listed, which is no failure. A table belongs to an entry if a comment in the
lines above it names it: `<!-- figure: NAME -->`. Tables that hold figures of others have `<!-- published -->`, other
tables that look like figures `<!-- no figures -->`.

The version of the code is a digest over the source files that an entry names, without comments, docstrings and
formatting.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "docs/figures.toml"
FIELDS = {"page", "anchor", "commands", "conditions", "date", "code", "commit", "machine", "sources", "note"}
NUMBER = re.compile(r"[*~±<(]*[-+]?\d")

CONTRACT = {f"src/maskwright/systems/{name}.py" for name in ("card", "system")}

Reader = Callable[[str], str]


@dataclass(frozen=True)
class Figure:
    """An entry of the manifest.

    Attributes:
        name: Its name in comments.
        page: The document.
        anchor: Heading in the document, as in a link.
        commands: The commands that make it again; none if there is no such command.
        conditions: What else decides about the figures.
        date: Day of the measurement.
        machine: Kind of machine, one of [machines].
        sources: The files that are measured; "@GROUP" stands for a group of [groups].
        code: Digest of the sources when it was measured.
        commit: Commit when it was measured.
        note: What else there is to know.
    """

    name: str
    page: str
    anchor: str
    commands: tuple[str, ...]
    conditions: str
    date: datetime.date
    machine: str
    sources: tuple[str, ...]
    code: str
    commit: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a document.

    Attributes:
        page: The document.
        line: Line number of its header.
        header: The header.
        marks: What the comments above it contain.
        measured: Whether it looks like a table of figures.
    """

    page: str
    line: int
    header: str
    marks: tuple[str, ...]
    measured: bool


@dataclass(frozen=True)
class Manifest:
    """All entries, and what they refer to."""

    figures: Mapping[str, Figure]
    groups: Mapping[str, Sequence[str]]
    machines: Mapping[str, str]


def read_manifest(text: str) -> Manifest:
    """Parses the manifest.

    Raises:
        ValueError: If an entry lacks a field or has an unknown one.
    """
    raw = tomllib.loads(text)
    figures: dict[str, Figure] = {}
    for name, values in raw["figures"].items():
        if wrong := sorted((set(values) ^ FIELDS) - {"note"}):
            raise ValueError(f"figures.{name}: missing or unknown {', '.join(wrong)}")
        lists = {field: tuple(values[field]) for field in ("commands", "sources")}
        figures[name] = Figure(name, **{**values, **lists})
    return Manifest(figures, raw["groups"], raw["machines"])


# ---- digests ---------------------------------------------------------------------------------------------------------


def files_of(figure: Figure, manifest: Manifest, listed: Sequence[str], read: Reader) -> list[str]:
    """The files that an entry names.

    Args:
        figure: The entry. A source is a path, a pattern, or "@GROUP" for those of a group; "+PATH" also stands for the
            parts of systems that the file imports.
        manifest: The manifest.
        listed: All files.
        read: Reads one.
    """
    found: set[str] = set()
    for source in figure.sources:
        for pattern in manifest.groups.get(source[1:], ()) if source.startswith("@") else (source,):
            new = matching(pattern, listed)
            while new:
                found |= set(new)
                more = {path for each in new if pattern.startswith("+") for path in imported(read(each))}
                new = sorted(more.intersection(listed) - found)
    return sorted(found)


def matching(pattern: str, listed: Sequence[str]) -> list[str]:
    """The files that a path or pattern stands for."""
    expression = re.compile(re.escape(pattern.removeprefix("+")).replace(r"\*\*", ".*").replace(r"\*", "[^/]*"))
    return [path for path in listed if expression.fullmatch(path)]


@cache
def imported(text: str) -> frozenset[str]:
    """What a module may import of blocks, ops and systems, as paths, without the contract of all systems."""
    names: list[str] = []
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.ImportFrom) and re.match(r"maskwright\.(blocks|ops|systems)\b", node.module or ""):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(f"src/{name.replace('.', '/')}.py" for name in names) - CONTRACT


def digest(paths: Sequence[str], read: Reader) -> str:
    """A digest of source files that comments, docstrings and formatting do not change."""
    total = hashlib.sha256()
    for path in sorted(paths):
        text = read(path)
        total.update(f"{path}\0{essence(text) if path.endswith('.py') else text}\0".encode())
    return total.hexdigest()[:12]


@cache
def _parsed(text: str) -> ast.AST:
    return ast.parse(text)


@cache
def essence(text: str) -> str:
    """A digest of a module without comments, docstrings and formatting."""
    return hashlib.sha256(repr(_essence(_parsed(text))).encode()).hexdigest()


def _essence(node: Any) -> Any:
    """A syntax tree without docstrings and positions, the same for all versions of Python that can parse it."""
    if isinstance(node, list):
        return [_essence(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
        node, clean=False
    ):
        fields["body"] = body[1:] if isinstance(body, list) else body
    kept = [
        (name, _essence(value))
        for name, value in fields.items()
        if value is not None and value != [] and name != "kind"
    ]
    return type(node).__name__, kept


def today() -> tuple[list[str], Reader]:
    """The files of the working tree."""
    folders = ("src/maskwright", "benchmarks", "docs", "weights")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".toml")]
    return [path.relative_to(ROOT).as_posix() for path in found], cache(lambda path: (ROOT / path).read_text("utf-8"))


def at(commit: str) -> tuple[list[str], Reader]:
    """The files of a commit."""
    listed = _git("ls-tree", "-r", "--name-only", commit).splitlines()
    return listed, cache(lambda path: _git("show", f"{commit}:{path}"))


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


# ---- documents -------------------------------------------------------------------------------------------------------


def documents() -> list[Path]:
    """The documents whose tables are checked."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown(text: str) -> Iterator[str]:
    """The lines of a document; empty ones for those of longer comments, "```" for those of code blocks."""
    fence, commented = "", False
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}(?=[^`]*$)|~{3,})", line)
        if fence:
            if mark and mark[1] == line.strip() and mark[1].startswith(fence):
                fence = ""
            yield "```"
        elif commented:
            commented = "-->" not in line
            yield ""
        elif mark:
            fence = mark[1]
            yield "```"
        else:
            commented = "<!--" in line and "-->" not in line.rpartition("<!--")[2]
            yield line


def tables(page: str, text: str) -> Iterator[Table]:
    """The tables of a document, outside of code blocks and comments."""
    lines, marks = list(shown(text)), list[str]()
    for index, line in enumerate(lines):
        if re.fullmatch(r"\s*(<!--.*?-->\s*)+", line):
            marks += re.findall(r"<!--\s*(.*?)\s*-->", line)
            continue
        begins = index + 1 < len(lines) and re.fullmatch(r"\s*\|[-:| ]*-[-:| ]*", lines[index + 1])
        if begins and line.lstrip().startswith("|"):
            body: list[str] = []
            for row in lines[index + 2 :]:
                if not row.lstrip().startswith("|"):
                    break
                body += [cell.strip() for cell in row.strip().strip("|").split("|")]
            filled = [cell for cell in body if cell]
            numbers = sum(NUMBER.match(cell) is not None for cell in filled)
            measured = "--:" in lines[index + 1] or numbers > 0.3 * len(filled)
            yield Table(page, index + 1, line, tuple(marks), measured)
        if line.strip():
            marks = []


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def faults(manifest: Manifest, texts: Mapping[str, str], listed: Sequence[str]) -> list[str]:
    """What is wrong with the manifest and the documents.

    Args:
        manifest: The manifest.
        texts: The documents by path.
        listed: All source files.
    """
    found: list[str] = []
    for page, text in texts.items():
        for table in tables(page, text):
            where = f"{page}:{table.line}: the table {table.header[:60]!r}"
            names = [mark.partition(":")[2].strip() for mark in table.marks if mark.startswith("figure:")]
            if not names and table.measured and not {"published", "no figures"} & set(table.marks):
                found.append(f"{where} belongs to no entry of docs/figures.toml; write <!-- figure: NAME --> above it, "
                             "or <!-- published --> or <!-- no figures -->")  # fmt: skip
            for name in names:
                entry = manifest.figures.get(name)
                if entry is None:
                    found.append(f"{where} names {name!r}, which docs/figures.toml does not have")
                elif entry.page != page:
                    found.append(f"{where} names {name!r}, whose page is {entry.page}")
    for figure in manifest.figures.values():
        where = f"figures.{figure.name}"
        if figure.page not in texts:
            found.append(f"{where}: there is no page {figure.page}")
        elif figure.anchor not in anchors(texts[figure.page]):
            found.append(f"{where}: {figure.page} has no heading {figure.anchor!r}")
        if figure.machine not in manifest.machines:
            found.append(f"{where}: machine must be one of {', '.join(manifest.machines)}")
        for source in figure.sources:
            if source.startswith("@") and source[1:] not in manifest.groups:
                found.append(f"{where}: there is no group {source}")
            elif not source.startswith("@") and not matching(source, listed):
                found.append(f"{where}: no file is called {source}")
        for command in figure.commands:
            try:
                program, script = [*shlex.split(command), "", ""][:2]
            except ValueError:  # a quote without its end
                program = script = ""
            if program == "python" and script.endswith(".py"):
                if script not in listed:
                    found.append(f"{where}: there is no {script}")
            elif program != "maskwright":
                found.append(f"{where}: the command must be one of maskwright or a script, got {command!r}")
        if not figure.commands and not figure.note:
            found.append(f"{where}: has no command; the note must say why")
    for name, patterns in manifest.groups.items():
        found += [f"groups.{name}: no file is called {p}" for p in patterns if not matching(p, listed)]
    return found


def older(manifest: Manifest, listed: Sequence[str], read: Reader) -> list[Figure]:
    """The figures whose code has changed since they were measured."""
    return [f for f in manifest.figures.values() if digest(files_of(f, manifest, listed, read), read) != f.code]


# ---- commands --------------------------------------------------------------------------------------------------------


def check() -> int:
    manifest = read_manifest(MANIFEST.read_text("utf-8"))
    listed, read = today()
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in documents()}
    wrong = faults(manifest, texts, listed)
    for fault in wrong:
        print(fault, file=sys.stderr)
    stale, total = older(manifest, listed, read), len(manifest.figures)
    prefix = "::warning title=figures::" if os.environ.get("GITHUB_ACTIONS") else ""
    print(f"{prefix}{len(stale)} of {total} figures are older than the code that they measure")
    for figure in stale:
        print(f"  {figure.name:24} {figure.date}  {figure.page}#{figure.anchor}")
    without = [figure.name for figure in manifest.figures.values() if not figure.commands]
    if without:
        print(f"{len(without)} have no command: {', '.join(without)}")
    return 1 if wrong else 0


def run(name: str) -> int:
    figure = _named(name)
    print(f"{name}: {figure.page}#{figure.anchor}, measured {figure.date} on {figure.machine}")
    print(f"conditions: {figure.conditions}" + (f"\nnote: {figure.note}" if figure.note else ""))
    if not figure.commands:
        print("there is no command that makes it again", file=sys.stderr)
        return 2
    for command in figure.commands:
        if "$DATA" in command and not os.environ.get("DATA"):
            print("set DATA to the folder of the data sets (pedestrians, nuclei, ...)", file=sys.stderr)
            return 2
    for command in figure.commands:
        words = [os.path.expandvars(word) for word in shlex.split(command)]
        words = [sys.executable, "-m", *words] if words[0] == "maskwright" else [sys.executable, *words[1:]]
        print(f"$ {command}", flush=True)
        if code := subprocess.run(words, cwd=ROOT).returncode:
            return code
    print(f"update {figure.page}, then: python docs/figures.py stamp {name}")
    return 0


def stamp(name: str, commit: str | None, machine: str | None) -> int:
    """Writes date, digest and commit of an entry: those of a commit, or those of the working tree."""
    manifest, figure = read_manifest(MANIFEST.read_text("utf-8")), _named(name)
    if machine is not None and machine not in manifest.machines:
        raise SystemExit(f"machine must be one of {', '.join(manifest.machines)}, got {machine!r}")
    listed, read = today() if commit is None else at(commit)
    values = {
        "date": str(datetime.date.today()) if commit is None else _git("show", "-s", "--format=%cs", commit).strip(),
        "code": f'"{digest(files_of(figure, manifest, listed, read), read)}"',
        "commit": f'"{_git("rev-parse", "--short=9", commit or "HEAD").strip()}"',
    } | ({"machine": f'"{machine}"'} if machine else {})
    text = MANIFEST.read_text("utf-8")
    head, tail = text.split(f"[figures.{name}]\n", 1)
    section, gap, rest = tail.partition("\n[")
    for field, value in values.items():
        section = re.sub(rf"^{field} = .*$", f"{field} = {value}", section, count=1, flags=re.MULTILINE)
    MANIFEST.write_text(f"{head}[figures.{name}]\n{section}{gap}{rest}", "utf-8")
    return 0


def _named(name: str) -> Figure:
    figures = read_manifest(MANIFEST.read_text("utf-8")).figures
    if name not in figures:
        raise SystemExit(f"there is no figure {name!r}; there are {', '.join(figures)}")
    return figures[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("check")
    verbs.add_parser("list")
    verbs.add_parser("run").add_argument("name")
    stamped = verbs.add_parser("stamp")
    stamped.add_argument("names", nargs="+")
    stamped.add_argument("--commit", help="the commit that was measured; default: the working tree")
    stamped.add_argument("--machine")
    arguments = parser.parse_args()
    if arguments.verb == "check":
        return check()
    if arguments.verb == "run":
        return run(arguments.name)
    if arguments.verb == "stamp":
        for name in arguments.names:
            _named(name)  # before anything is written
        return max(stamp(name, arguments.commit, arguments.machine) for name in arguments.names)
    for figure in read_manifest(MANIFEST.read_text("utf-8")).figures.values():
        print(f"{figure.name:24} {figure.date}  {figure.page}#{figure.anchor}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

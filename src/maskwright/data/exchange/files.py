"""Files of data sets: finding them, and parsing text, JSON, YAML and XML that others have written.

Foreign files are data: sizes are limited, YAML is parsed without objects and aliases, XML without entities.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, cast
from xml.parsers import expat

from maskwright.data.image_names import SUFFIXES
from maskwright.data.table import Table

LARGEST = 1 << 31  # bytes of an annotation file
LARGEST_SETTINGS = 1 << 22  # bytes of a file of settings or class names
MOST_SNIFFED = 300_000  # files below a folder by which its format is recognized
DEEPEST = 6  # levels of folders below a source that are searched
_HEAD = 1 << 16  # bytes by which the kind of a JSON file is recognized
_DEPTH = 64  # levels of elements in an XML file
_TRUNCATED = (3, 5, 6, 20)  # expat: no element found, unclosed token, partial character, unclosed CDATA section


class FileProblem(Exception):
    """An invalid file; the message is a sentence without the name of the file, and advice after '; '."""


# ---- finding -------------------------------------------------------------------------------------------------------


def files_below(folder: Path, wanted: Callable[[str], bool], depth: int = DEEPEST) -> Iterator[str]:
    """Yield the files below a folder whose names are wanted, as sorted relative paths with "/".

    Hidden files and folders are omitted, and symbolic links to folders are not followed. Inside `listed_once`, folders
    are listed once, and at most `MOST_SNIFFED` files are.

    Args:
        folder: The folder.
        wanted: Called with the name of a file.
        depth: Number of levels of folders that are searched.
    """
    listings = _listings.get()
    if listings is None:
        files: Iterable[tuple[int, str, str]] = _listed(folder)
    else:
        if folder not in listings:
            listings[folder] = list(islice(_listed(folder), MOST_SNIFFED))
        files = listings[folder]
    return (prefix + name for level, prefix, name in files if level <= depth and wanted(name))


def _listed(folder: Path) -> Iterator[tuple[int, str, str]]:
    """The level, the folder (with a final "/") and the name of each file below a folder."""
    for place, folders, files in os.walk(folder):
        relative = Path(place).relative_to(folder).as_posix()
        prefix = "" if relative == "." else relative + "/"
        level = prefix.count("/")
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if level < DEEPEST else []
        yield from ((level, prefix, name) for name in sorted(files) if not name.startswith("."))


_listings: ContextVar[dict[Path, list[tuple[int, str, str]]] | None] = ContextVar("maskwright_listings", default=None)


@contextlib.contextmanager
def listed_once() -> Generator[None, None, None]:
    """List each folder once inside the `with` block, in which all formats look for their files."""
    token = _listings.set({})
    try:
        yield
    finally:
        _listings.reset(token)


def is_image_name(name: str) -> bool:
    """Return whether the suffix of a file name is that of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - much faster for many files


def json_kind(path: Path) -> str | None:
    """Return what a JSON file is by the keys in its first 64 kB: "labelme", "via" or "cityscapes"; None for others."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for its other end
        return None
    return _json_kind(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1 << 16)
def _json_kind(path: Path, _changed: int, _size: int) -> str | None:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.replace(b"\0", b"")
    if b'"imgHeight"' in head or b'"imgWidth"' in head:
        return "cityscapes"
    if b'"_via_' in head or (b'"regions"' in head and b'"filename"' in head):
        return "via"
    if b'"imagePath"' in head or b'"imageData"' in head or (b'"shapes"' in head and b'"version"' in head):
        return "labelme"
    return None


# ---- text ----------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a file.

    Raises:
        FileProblem: If it cannot be read, or is larger than `largest` bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for its other end
            raise FileProblem("is not a regular file; remove it")
        size = status.st_size
        if size > largest:
            raise FileProblem(f"is too large ({size} bytes); at most {largest} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileProblem("does not exist; restore it") from None
    except OSError as error:
        raise FileProblem(f"cannot be read ({error.strerror}); check its permissions") from None


def read_text(path: Path, largest: int = LARGEST_SETTINGS) -> str:
    """Return the text of a file in UTF-8, or UTF-16 with a byte-order mark; line ends become "\\n".

    Raises:
        FileProblem: If it cannot be read or is in another encoding.
    """
    data = read_bytes(path, largest)
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise FileProblem(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty, without surrounding blanks."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """Return the value of a JSON file.

    Raises:
        FileProblem: If the file cannot be read or parsed.
    """
    text = read_text(path, largest)
    if not text.strip():
        raise FileProblem("is empty; export it again, or remove it")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        truncated = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        what = "is truncated JSON" if truncated else "is invalid JSON"
        raise FileProblem(
            f"{what} ({error.msg} at line {error.lineno}, column {error.colno}); export it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"is invalid JSON ({error}); export it again") from None


def as_dict(value: Any) -> dict[str, Any]:
    """Return a JSON object; an empty one for any other value."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return a JSON list; an empty one for any other value."""
    return cast(list[Any], value) if isinstance(value, list) else []


def add_file_problem(table: Table, path: Path, problem: FileProblem, severity: Any = "error", **about: Any) -> None:
    """Add the finding that a file cannot be parsed."""
    what, _, advice = str(problem).partition("; ")
    shown = what if path == table.path else f"{shown_path(table, path)} {what}"
    table.add_finding(severity, "file", f"the file {what}" if path == table.path else shown, advice, **about)


def shown_path(table: Table, path: Path) -> str:
    """Return a path for messages: relative to the folder of the data set, if it is inside."""
    base = table.path if table.path.is_dir() else table.path.parent
    for folder in (base, table.folder):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return str(path)


# ---- XML -----------------------------------------------------------------------------------------------------------


class Element:
    """One XML element.

    Attributes:
        tag: Its name.
        attributes: Its attributes.
        text: Its own text, before and between its children.
        children: The elements inside.
        line: Its line in the file.
    """

    __slots__ = ("attributes", "children", "line", "tag", "text")

    def __init__(self, tag: str, attributes: dict[str, str], line: int):
        self.tag, self.attributes, self.line = tag, attributes, line
        self.text = ""
        self.children: list[Element] = []

    def all(self, *tags: str) -> list[Element]:
        """Return the children with one of these names."""
        return [child for child in self.children if child.tag in tags]

    def find(self, path: str) -> Element | None:
        """Return the first element at a path of names such as "size/width"; None if there is none."""
        place: Element | None = self
        for tag in path.split("/"):
            place = next((child for child in place.children if child.tag == tag), None) if place is not None else None
        return place

    def text_at(self, path: str) -> str | None:
        """Return the text of the first element at a path, without surrounding blanks; None if there is none."""
        found = self.find(path)
        return None if found is None else found.text.strip()


def read_xml(path: Path) -> Element:
    """Return the root element of an XML file.

    Entities, which could expand to any size or name other files, are refused; nothing is loaded from elsewhere.

    Raises:
        FileProblem: If the file cannot be read or parsed.
    """
    data = read_bytes(path)
    if not data.strip():
        raise FileProblem("is empty; export it again, or remove it")
    parser = expat.ParserCreate()
    parser.buffer_text = True
    root = Element("", {}, 0)
    stack = [root]

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(stack) > _DEPTH:
            raise FileProblem(f"has more than {_DEPTH} levels of elements; export it again")
        element = Element(tag, attributes, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(_: str) -> None:
        stack.pop()

    def characters(text: str) -> None:
        stack[-1].text += text

    def entity(*_: Any) -> None:
        raise FileProblem("declares XML entities, which are not read; remove the DOCTYPE declaration")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, characters
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        text = expat.ErrorString(error.code)
        what = "is truncated XML" if error.code in _TRUNCATED else "is invalid XML"
        raise FileProblem(f"{what} ({text} at line {error.lineno}); export it again") from None
    except (LookupError, UnicodeError, ValueError) as error:
        raise FileProblem(f"is invalid XML ({error}); export it again") from None
    return root.children[0]


# ---- YAML ----------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file of settings; only plain values, lists and mappings are read.

    Values are text as written, or None for an empty value: a class named no, 007 or 1e3 keeps its name.

    Raises:
        FileProblem: If the file cannot be read or parsed, has aliases, or a key twice in one mapping.
    """
    yaml: Any = importlib.import_module("yaml")  # without types
    text = read_text(path)
    if not text.strip():
        raise FileProblem("is empty; export it again, or remove it")
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise FileProblem(f"has an alias (*name) in line {event.start_mark.line + 1}; write the value out")
        _check_keys(yaml.compose(text, yaml.SafeLoader), yaml)
        return yaml.load(text, _text_loader(yaml))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        problem = " ".join(str(getattr(error, "problem", None) or "cannot be parsed").split())
        raise FileProblem(f"is invalid YAML ({problem}{where}); correct it") from None
    except (RecursionError, ValueError, TypeError) as error:
        raise FileProblem(f"is invalid YAML ({error}); correct it") from None


def _text_loader(yaml: Any) -> Any:
    """A loader without objects that leaves all values text, except null."""
    null = [pair for pair in yaml.SafeLoader.yaml_implicit_resolvers["~"] if pair[0].endswith(":null")]
    resolvers = dict.fromkeys(["~", "n", "N", ""], null)
    return type("TextLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": resolvers})


def _check_keys(node: Any, yaml: Any) -> None:
    """Refuse keys that occur twice in one mapping, of which the parser would keep the last one."""
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, yaml)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, str] = {}
    for key, value in node.value:
        name = str(key.value)
        shown = repr(value.value)[:40] if isinstance(value, yaml.ScalarNode) else "a list"
        if name in seen:
            line = key.start_mark.line + 1
            raise FileProblem(
                f"has key {name} twice, for {seen[name]} and {shown} (line {line}); give each its own key"
            )
        seen[name] = shown
        _check_keys(value, yaml)

"""Finding the files of images that an annotation file lists under other names.

Annotation tools write names that no longer fit the files beside them: paths of an upload folder or of another computer,
encoded URLs, other letter case, another suffix, another Unicode form. A listed name is matched with a file if exactly
one file fits it; files that the set lists under their own names do not take part.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from maskwright.data import splits

SUFFIXES = frozenset(
    ".avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)

_MOST_FILES = 500_000  # files that are indexed below a folder
_HEX_PREFIX = re.compile(r"^[0-9a-f]{8}[-_]", re.I)  # Label Studio's uploads: 1a2b3c4d-name.jpg
_ANY_PREFIX = re.compile(r"^[0-9a-z]+[-_]", re.I)


def is_file(path: Path) -> bool:
    """Return whether a path is a file; False for one that the system cannot look up, such as one that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def listed_name(entry: Mapping[str, Any]) -> str | None:
    """Return the name of an image in a COCO file: `file_name`, or the end of `coco_url` (LVIS); None if it has none."""
    name = entry.get("file_name")
    if isinstance(name, str) and name:
        return name
    address = entry.get("coco_url")
    if name is None and isinstance(address, str):
        parts = [part for part in unquote(urlsplit(address).path).split("/") if part not in ("", ".", "..")]
        return "/".join(parts[-2:]) or None
    return None


@dataclass
class NameMatches:
    """Listed names and the files they belong to.

    Attributes:
        folder: The folder that the files are relative to.
        files: File of each name that was matched, with "/".
        ambiguous: Candidates of each name that fits several files, or whose file fits several names.
        reasons: In what the matched names differ from their files, with counts.
    """

    folder: Path
    files: dict[str, str] = field(default_factory=dict[str, str])
    ambiguous: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    reasons: Counter[str] = field(default_factory=Counter[str])


def match_names(
    folder: Path, names: Iterable[str], present: Iterable[str], roots: Sequence[Path] = (), split: str | None = None
) -> NameMatches:
    """Find the files of listed names that are not names of files.

    Args:
        folder: The folder of the images, searched with its subfolders.
        names: The listed names without a file.
        present: Files in `folder` that other images are listed under.
        roots: Folders that are searched if no image at all is in `folder`.
        split: The split that the images belong to; subfolders of other splits are omitted in `roots`.

    Returns:
        The matches.
    """
    names, present = list(dict.fromkeys(names)), set(present)
    result = _matched(folder, _image_files(folder), names, present)
    if present or result.files or result.ambiguous:
        return result
    for root in roots:
        files = [file for file in _image_files(root) if not _of_another_split(file, split)]
        found = _matched(root, files, names, set())
        if found.files or found.ambiguous:
            return _moved_down(found)
    return result


def _matched(folder: Path, files: Sequence[str], names: Sequence[str], present: set[str]) -> NameMatches:
    index = _Index([file for file in files if file not in present])
    result = NameMatches(folder)
    reasons: dict[str, str] = {}
    for name in names:
        candidates, reason = index.lookup(name)
        if len(candidates) == 1:
            result.files[name], reasons[name] = candidates[0], reason
        elif candidates:
            result.ambiguous[name] = candidates
    counts = Counter(result.files.values())
    for name, file in list(result.files.items()):
        if counts[file] > 1:
            result.ambiguous[name] = [result.files.pop(name)]
    result.reasons = Counter(reasons[name] for name in result.files)
    return result


def _moved_down(result: NameMatches) -> NameMatches:
    """The same matches relative to the deepest folder that contains all files."""
    parents = [file.rpartition("/")[0] for file in result.files.values()]
    common = os.path.commonpath(parents) if parents and all(parents) and not result.ambiguous else ""
    if common:
        result.folder = result.folder / common
        result.files = {name: file.removeprefix(f"{common}/") for name, file in result.files.items()}
    return result


def _image_files(folder: Path) -> list[str]:
    """Image files below a folder, with "/"; links to folders are not followed."""
    files: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        files += [prefix + name for name in sorted(names) if _split(name)[1].lower() in SUFFIXES]
        if len(files) > _MOST_FILES:
            break
    return files


def _of_another_split(file: str, split: str | None) -> bool:
    """Whether a file is in the folder of a split of another kind: "val/1.jpg" for split "train"."""
    own = None if split is None else splits.kind_of(split)
    kinds = {splits.kind_of(part) for part in file.split("/")[:-1]} - {None}
    return own is not None and bool(kinds) and own not in kinds


# ---- comparing names -----------------------------------------------------------------------------------------------


class _Index:
    """Files by several forms of their names, from the most exact to the least."""

    def __init__(self, files: Sequence[str]):
        self.files = files
        self._tables: dict[int, dict[str, list[str]]] = {}

    def lookup(self, name: str) -> tuple[list[str], str]:
        """The files that fit a listed name best, and in what they differ from it."""
        parts = _parts(name)
        if not parts:
            return [], ""
        uploaded = any("upload" in part.lower() for part in parts[:-1])
        for level in range(len(_FORMS)):
            keys = _keys(parts[-1], level, _ANY_PREFIX if uploaded else _HEX_PREFIX)
            candidates = list(dict.fromkeys(file for key in keys for file in self._table(level).get(key, ())))
            if candidates:
                best = _nearest(candidates, parts)
                return best, _difference(parts[-1], best[0].rpartition("/")[2])
        return [], ""

    def _table(self, level: int) -> dict[str, list[str]]:
        if level not in self._tables:
            table: dict[str, list[str]] = defaultdict(list)
            for file in self.files:
                for key in _keys(file.rpartition("/")[2], level, _HEX_PREFIX):
                    table[key].append(file)
            self._tables[level] = table
        return self._tables[level]


def _parts(name: str) -> list[str]:
    """The components of a listed path or URL."""
    if "?" in name:
        address = urlsplit(name)
        inner = parse_qs(address.query).get("d")  # Label Studio's local files: /data/local-files/?d=folder/name.jpg
        name = inner[0] if inner else address.path or name
    return [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]


def _split(name: str) -> tuple[str, str]:
    """Stem and suffix of a file name."""
    stem, point, suffix = name.rpartition(".")
    return (stem, point + suffix) if stem else (name, "")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _decoded(name: str) -> str:
    return _composed(unquote(name, errors="surrogateescape")) if "%" in name else _composed(name)


def _folded(name: str) -> str:
    return _composed(_decoded(name).casefold())


def _with_family(name: str) -> str:
    stem, suffix = _split(_folded(name))
    return stem + {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)


def _stem(name: str) -> str:
    stem, suffix = _split(_folded(name))
    return stem if suffix in SUFFIXES else stem + suffix


def _slug(name: str) -> str:
    """The name as upload forms store it: without spaces and special characters."""
    return re.sub(r"[^\w.-]", "", _with_family(name).replace(" ", "_"))


_FORMS: tuple[Callable[[str], str], ...] = (_folded, _with_family, _stem, _slug)


def _keys(name: str, level: int, prefix: re.Pattern[str]) -> list[str]:
    """The forms of a name by which it is compared at a level; the last level also omits a prefix of uploads."""
    keys = [_FORMS[level](reading) for reading in _readings(name)]
    if level == len(_FORMS) - 1:
        keys += [prefix.sub("", key) for key in keys if prefix.match(key)]
    return list(dict.fromkeys(keys))


def _readings(name: str) -> list[str]:
    """A name, and what its bytes are in older encodings if they are not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        try:
            data = os.fsencode(name)
        except UnicodeEncodeError:  # surrogates that stand for no byte
            return [name]
        return [name, data.decode("cp1252", "replace"), data.decode("cp437")]
    return [name]


def _nearest(candidates: list[str], parts: list[str]) -> list[str]:
    """Those candidates that share most trailing folders with the listed path; of these, those of the same name."""

    def shared(file: str) -> int:
        own = [_folded(part) for part in file.split("/")[-2::-1]]
        listed = [_folded(part) for part in parts[-2::-1]]
        differing = (number for number, (a, b) in enumerate(zip(own, listed, strict=False)) if a != b)
        return next(differing, min(len(own), len(listed)))

    scores = [shared(file) for file in candidates]
    best = [file for file, score in zip(candidates, scores, strict=True) if score == max(scores)]
    return [file for file in best if file.rpartition("/")[2] == parts[-1]] or best


def _difference(name: str, file: str) -> str:
    """In what a listed base name differs from that of its file."""
    forms = {
        "folder": str,
        "Unicode form": _composed,
        "URL encoding": _decoded,
        "letter case": _folded,
        "suffix": _stem,
    }
    for reason, form in forms.items():
        if form(name) == form(file):
            return reason
    return "encoding" if len(_readings(name)) + len(_readings(file)) > 2 else "upload prefix"

"""Names of output files, and the recognition of output files among the images of a folder."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDERS = ("drawn", "masks", "panoptic", "labels", "geojson")  # of an output folder
RECORDS = tuple(  # files beside them; the partial ones are those of an interrupted run
    f"{name}{mark}.json" for mark in ("", ".partial") for name in ("pictures", "panoptic", "results")
)
MARKED = ("drawn", "masks", "panoptic", "labels")  # those whose files have the mark
MARK = "maskwright predict"  # in the metadata of every image that is written


class OutputNames:
    """Gives every image a name for its output files that no other image has.

    The name is the image's path relative to the source that it was found in, without suffix: ``x.jpg`` becomes ``x``.
    Where that is taken, it is the path with suffix, then a numbered one. Names that differ only by case or by Unicode
    normalization count as equal, since they are the same file on many file systems.

    Args:
        sources: The files, folders and globs that the images come from.
    """

    def __init__(self, sources: Iterable[str | Path] = ()):
        self._roots = [source_root(source) for source in sources]
        self._names: set[str] = set()
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def relative(self, path: Path) -> Path:
        """The image's path relative to the source that it was found in."""
        whole = path.absolute()
        inside = (root for root in self._roots if whole.is_relative_to(root))
        return whole.relative_to(max(inside, key=lambda root: len(root.parts), default=whole.parent))

    def add(self, path: Path) -> str:
        """A new name for the output files of an image, relative to their folder and without suffix."""
        inside = self.relative(path)
        plain, whole = str(inside.with_suffix("")), str(inside)
        candidates = itertools.chain(
            [plain, whole],
            (
                name
                for number in itertools.count(2)
                for name in (
                    f"{plain}-{number}",
                    str(
                        Path(*(f"{part}-{number}" for part in Path(plain).parts))
                    ),  # where a folder's name is that of a file
                )
            ),
        )
        name = next(name for name in candidates if self._is_free(name))
        files, folders = _files_and_folders(name)
        self._names.add(name_key(name))
        self._files |= files
        self._folders |= folders
        return name

    def _is_free(self, name: str) -> bool:
        """Whether the name is not taken, and none of its files would be a folder of another one or vice versa."""
        files, folders = _files_and_folders(name)
        return name_key(name) not in self._names and not files & self._folders and not folders & self._files


def _files_and_folders(name: str) -> tuple[set[str], set[str]]:
    """The files that a name stands for, and the folders that they are in, as keys."""
    parents = {name_key(str(parent)) for parent in Path(name).parents if parent.parts}
    return {name_key(name + suffix) for suffix in (".jpg", ".png", ".tif", ".geojson")}, parents


def source_root(source: str | Path) -> Path:
    """The folder that the images of a file, folder or glob are in."""
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        return path
    parts = path.parts
    fixed = next((k for k, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts) - 1)
    return Path(*parts[: min(fixed, len(parts) - 1)])


def without_outputs(paths: Iterable[Path], source: str | Path) -> list[Path]:
    """Leave out the files that earlier predictions wrote into a source.

    Args:
        paths: Files that were found in the source.
        source: A folder or a glob. Files in an output folder that it names itself are kept.

    Returns:
        The other files, in order.
    """
    root = source_root(source)
    known: dict[Path, bool] = {}
    return [path for path in paths if not _is_output(path, root, known)]


def _is_output(path: Path, root: Path, known: dict[Path, bool]) -> bool:
    """Whether the file lies below ``drawn``, ``masks`` or ``panoptic``, and beside records or with the mark."""
    whole = path.absolute()
    if not whole.is_relative_to(root):
        return False
    inside = whole.relative_to(root)
    parents = [root / parent for parent in inside.parents if parent.name in FOLDERS]
    for folder in parents:
        if folder.parent not in known:
            known[folder.parent] = has_records(folder.parent)
        if known[folder.parent]:
            return True
    return bool(parents) and root.name not in FOLDERS and has_mark(path)


def has_records(folder: Path) -> bool:
    """Whether predictions were written into a folder: it has a file that lists them."""
    return any(_is_record(folder / name) for name in RECORDS)


def _is_record(path: Path) -> bool:
    """Whether the file lists predictions of ours."""
    try:
        if path.name.startswith("results"):
            with path.open("rb") as file:
                return file.read(16).startswith(b'[{"image_id":')
        value: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "images" in value and "categories" in value


def mark_options(suffix: str) -> dict[str, Any]:
    """Options of Pillow's `save` that put the mark into an image; none for formats without comments."""
    kind = suffix.lower()
    if kind in (".jpg", ".jpeg"):
        return {"comment": MARK.encode()}
    if kind == ".png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("Software", MARK)
        return {"pnginfo": info}
    return {}


def has_mark(path: Path) -> bool:
    """Whether the image has the mark in its metadata. Only its beginning or end is read."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            if start.startswith(b"II+\0"):  # of label images, near the end
                file.seek(max(0, path.stat().st_size - 4096))
                return MARK.encode() in file.read()
    except OSError:
        return False
    kinds = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
    return start.startswith(kinds) and MARK.encode() in start


def name_key(name: str) -> str:
    """What names have in common that are the same file on many file systems: those that differ by case or Unicode
    normalization.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

"""Writing the repaired copy of a data set.

The copy has the layout of the source, so that whatever opens the source opens the copy. Images are copied, by reference
where the file system can (reflinks), so that editing the copy never changes the source.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskwright.data.findings import Finding
from maskwright.data.formats import load_format
from maskwright.data.image_folder import split_of_path
from maskwright.data.table import Table
from maskwright.errors import DataError
from maskwright.files import atomic_folder, describe_os_error, write_json

_FICLONE = 0x40049409  # Linux: share the blocks of another file until one of the two is changed


@dataclass(frozen=True)
class Copying:
    """How files are copied.

    Attributes:
        link: Make hard links instead of copies: editing one of the two files then changes both.
        follow_links: Copy what symbolic links to files outside of the image folder point to, instead of omitting them.
    """

    link: bool = False
    follow_links: bool = False


@dataclass
class _Copy:
    """A copy that is being written.

    Attributes:
        folder: Its folder.
        how: How files are copied.
        origins: The source of each file that was copied.
        findings: Files that were omitted.
    """

    folder: Path
    how: Copying
    origins: dict[Path, Path] = field(default_factory=dict[Path, Path])
    findings: list[Finding] = field(default_factory=list[Finding])

    def add(self, path: Path, base: Path, target: Path, about: str) -> bool:
        """Copy one file, or add the finding that it is omitted; `target` is relative to the folder of the copy."""
        problem = None if self.how.follow_links else _leads_out(path, (base,))
        if problem is None:
            real, place = path.resolve(), self.folder / target
            if self.origins.setdefault(target, real) != real:
                raise DataError(
                    f"{target}: two different files would have this name in the copy: {self.origins[target]} and "
                    f"{real}; rename one of them"
                )
            try:
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    copy_file(real, place, self.how.link)
                return True
            except OSError as error:
                names = {os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)}
                if error.errno != errno.ENAMETOOLONG and not (error.errno == errno.EACCES and str(real) in names):
                    raise
                problem = f"cannot be copied ({describe_os_error(error).partition(';')[0]})"
        self.findings.append(Finding("skip", "copy", str(path), f"{about} {problem}", "it is omitted from the copy"))
        return False


def write_copy(
    source: Path, tables: Sequence[tuple[str, Table]], damaged: Mapping[Path, Finding | None], target: Path,
    how: Copying,
) -> list[Finding]:  # fmt: skip
    """Write a repaired copy of a data set.

    Args:
        source: What was checked: a folder or an annotation file.
        tables: The tables that can be used, with the names of their formats.
        damaged: The problem of each image file, None if it is intact.
        target: The folder of the copy; must not exist.
        how: How files are copied.

    Returns:
        Findings about files that were omitted.

    Raises:
        DataError: If two different files would have the same name, or the copy cannot be written. Nothing is left of
            an incomplete copy.
    """
    with atomic_folder(target, DataError) as folder:
        copy = _Copy(folder, how)
        for (name, table), (document, place) in zip(tables, _layout(source, [t for _, t in tables]), strict=True):
            repaired: Callable[[Table, set[int], Path], dict[str, Any]] | None
            repaired = getattr(load_format(name), "repaired", None)  # optional in a format
            if repaired is None:
                continue
            skipped = _omitted_maps(copy, table)
            for index, file in enumerate(table.files):
                finding = damaged.get(table.folder / file)
                bad = finding is not None and finding.severity == "skip"
                if index not in skipped and (
                    bad or not copy.add(table.folder / file, table.folder, place / file, f"image {file!r}")
                ):
                    skipped.add(index)
            before = set(skipped)
            path = folder / document
            content = repaired(table, skipped, path.with_suffix(""))
            for index in skipped - before:  # its map of segments is damaged
                with contextlib.suppress(OSError):
                    (folder / place / table.files[index]).unlink()
            if path.exists():
                raise DataError(f"{document}: two annotation files would have this name in the copy; check them singly")
            write_json(path, content, DataError)
    return copy.findings


def write_repaired(
    tables: Sequence[tuple[str, Table, str | None]], damaged: Mapping[Path, Finding | None], target: Path, how: Copying
) -> list[Finding]:
    """Write a repaired copy of a data set with the writer of its format.

    Args:
        tables: The tables that can be used, with the names of their formats and splits; all of one format.
        damaged: The problem of each image file, None if it is intact.
        target: The folder of the copy; must not exist.
        how: How files are copied.

    Returns:
        Findings about images that were omitted.

    Raises:
        DataError: If the copy cannot be written. Nothing is left of an incomplete copy.
    """
    from maskwright.data.convert import with_equal_classes
    from maskwright.data.exchange.writing import ImageFiles, Part
    from maskwright.data.table_datasets import InstanceDataset
    from maskwright.data.views import Subset

    module: Any = load_format(tables[0][0])
    findings: list[Finding] = []
    with atomic_folder(target, DataError) as folder, tempfile.TemporaryDirectory() as place:
        parts: list[Part] = []
        for number, (_, table, split) in enumerate(tables):
            kept: list[int] = []
            for index, file in enumerate(table.files):
                path = table.folder / file
                finding = damaged.get(path)
                problem = None if how.follow_links else _leads_out(path, (table.folder,))
                if problem is not None:
                    what = f"image {file!r} {problem}"
                    findings.append(Finding("skip", "copy", str(path), what, "it is omitted from the copy"))
                elif finding is None or finding.severity != "skip":
                    kept.append(index)
            parts.append(Part(split, Subset(InstanceDataset(table), kept)))
            rescued = getattr(module, "rescued", None)  # optional in a format: a table of images that are embedded
            extra = None if rescued is None else rescued(table, Path(place) / str(number))
            if extra is not None:
                parts.append(Part(split, InstanceDataset(extra)))
        module.write(folder, with_equal_classes(parts), ImageFiles(folder, how.link))
    return findings


def copy_images(source: Path, paths: Sequence[Path], target: Path, how: Copying) -> list[Finding]:
    """Copy images of a folder, or a single one, that have no annotations; arguments and result as of `write_copy`."""
    base = source if source.is_dir() else source.parent
    with atomic_folder(target, DataError) as folder:
        copy = _Copy(folder, how)
        for path in paths:
            copy.add(path, base, path.relative_to(base), "the image")
    return copy.findings


def copy_file(source: Path, target: Path, link: bool = False) -> None:
    """Copy the content and the times of a file; permissions are those of new files.

    Args:
        source: The file.
        target: The copy; must not exist.
        link: Make a hard link, or a copy where the file system has none.
    """
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    if not _reflink(source, target):
        shutil.copyfile(source, target)
    status = source.stat()
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return False
    with source.open("rb") as given, target.open("xb") as made:
        try:
            fcntl.ioctl(made.fileno(), _FICLONE, given.fileno())
        except OSError:
            return False
    return True


# ---- inside --------------------------------------------------------------------------------------------------------


def _layout(source: Path, tables: Sequence[Table]) -> list[tuple[Path, Path]]:
    """The annotation file and the image folder of each table in the copy, as in the source if they are inside of it."""
    if source.is_dir():
        for root in (source, source.parent) if source.name == "annotations" else (source,):
            try:
                return [(t.path.relative_to(root), t.folder.relative_to(root)) for t in tables]
            except ValueError:
                continue
    if len(tables) == 1:
        return [(Path("annotations") / tables[0].path.name, Path("images"))]
    places: dict[Path, Path] = {}  # one for each folder of the source
    for table in tables:
        name = split_of_path(table.path) or table.path.stem
        used = set(places.values())
        number = 1
        while table.folder not in places:
            candidate = Path("images") / (name if number == 1 else f"{name}-{number}")
            number += 1
            if candidate not in used:
                places[table.folder] = candidate
    return [(Path("annotations") / t.path.name, places[t.folder]) for t in tables]


def _omitted_maps(copy: _Copy, table: Table) -> set[int]:
    """The images whose maps of segments lead out of the data set; findings are added."""
    omitted: set[int] = set()
    bases = (table.path.parent, table.path.parent.parent)
    for index, path in enumerate(table.maps or ()):
        problem = None if copy.how.follow_links else _leads_out(path, bases)
        if problem is not None:
            what = f"the map of image {table.image_ids[index]!r} {problem}"
            copy.findings.append(Finding("skip", "copy", str(path), what, "the image is omitted from the copy"))
            omitted.add(index)
    return omitted


def _leads_out(path: Path, bases: Sequence[Path]) -> str | None:
    """What is wrong with a path that symbolic links lead out of these folders; None if they do not."""
    try:
        real = path.resolve()
        if any(real.is_relative_to(base.resolve()) for base in bases):
            return None
    except (OSError, RuntimeError) as error:
        return f"cannot be looked up ({error})"
    return f"is a symbolic link to {str(real)!r}, outside of its folder (--follow-links copies it)"

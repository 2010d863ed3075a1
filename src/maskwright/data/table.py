"""A checked annotation file as columns, whatever its format.

Readers put into a table only what they have checked: the rasterizer of pycocotools crashes on coordinates that are not
finite, reads invalid memory for short run-length strings, and accepts strings of another size. Columns rather than a
list of objects, because Python objects take ten times the memory of the file and are copied into every worker process,
whereas arrays are shared.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from maskwright.data.findings import Cause, Finding, Severity, first_few
from maskwright.data.image_names import is_file
from maskwright.data.images import probe
from maskwright.data.shapes import Shapes, ShapesBuilder
from maskwright.errors import ImageError

Verify = Literal["all", "some", "none"]

# Up to this many images, all headers are compared with the annotation file, at about 50 us each; of larger data sets an
# evenly spaced sample.
VERIFY_ALL_BELOW = 20_000
VERIFY_SOME = 2_000


@dataclass
class Table:
    """M images and A annotations, sorted by image, in the order of the file within an image.

    Attributes:
        path: The annotation file (or folder), for messages.
        folder: The folder that `files` are relative to.
        classes: Class names.
        category_ids: Category id of each class in the file.
        keypoint_names: Names of the keypoints; None if there are none.
        stuff: Those of `classes` that are regions.
        image_ids: (M,) ids as in the file.
        files: (M,) image files, relative to `folder`, with "/".
        sizes: (M,) H, W with the EXIF orientation applied.
        listed_sizes: (M,) H, W as the file lists them; `sizes` where it does not.
        stored_sizes: (M,) H, W as stored, before the EXIF orientation is applied; `sizes` where it is not known.
        image_rows: (M,) positions in the file's list of images.
        image_index: (A,) int64, position of the image of each annotation.
        labels: (A,) int64.
        ids: (A,) ids as in the file.
        crowd: (A,) bool.
        boxes: (A, 4) float64, x0, y0, x1, y1 in the continuous frame.
        areas: (A,) float64, pixels; NaN: to be counted on the mask.
        keypoints: (A, J, 3) float32, continuous coordinates and visibility; None if there are none.
        shapes: (A,) outlines and run-length strings; None: the objects have boxes only.
        rows: (A,) int64, positions in the file's list of annotations.
        maps: (M,) image files whose pixels are segment ids, in place of `shapes`; None if the masks are in `shapes`.
        ignored: Number of crowd regions that have a flag "ignore".
        findings: What is wrong with the file.
        usable: False if the file is too damaged for anything to be read.
        raw: The parsed file, for writing a repaired copy.
        name: Short name of the data set; empty: derived from `path`.
        scores: (A,) float64, of predictions; None for annotations.
    """

    path: Path
    folder: Path
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    keypoint_names: tuple[str, ...] | None = None
    stuff: tuple[str, ...] = ()
    image_ids: list[int | str] = field(default_factory=list[int | str])
    files: list[str] = field(default_factory=list[str])
    sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    listed_sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    stored_sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    image_rows: list[int] = field(default_factory=list[int])
    image_index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ids: list[int | str] = field(default_factory=list[int | str])
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    keypoints: np.ndarray | None = None
    shapes: Shapes | None = field(default_factory=lambda: ShapesBuilder().finish()[0])
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    maps: list[Path] | None = None
    ignored: int = 0
    findings: list[Finding] = field(default_factory=list[Finding])
    usable: bool = True
    raw: dict[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""
    scores: np.ndarray | None = None

    def add_finding(self, severity: Severity, kind: str, sentence: str, advice: str = "", **about: Any) -> None:
        """Append a finding about this file; `about` gives `image` and `annotation` ids."""
        self.findings.append(Finding(severity, kind, str(self.path), sentence, advice, **about))

    def add_cause(self, cause: Cause) -> None:
        """Append what is wrong throughout; an error that is not repaired makes the table unusable."""
        self.add_finding(cause.severity, cause.kind, cause.sentence, cause.advice, repaired=cause.repaired)
        if cause.severity == "error" and not cause.repaired:
            self.usable = False

    def findings_with(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [f for f in self.findings if f.severity == severity]

    def bounds(self) -> np.ndarray:
        """Return the first annotation of each image, and A: (M + 1,) int64."""
        return np.searchsorted(self.image_index, np.arange(len(self.files) + 1))


class ImageEntry(NamedTuple):
    """One image as an annotation file lists it; sides are None if the file does not give them."""

    row: int
    id: int | str
    file: str
    height: int | None
    width: int | None


def add_images(table: Table, entries: Sequence[ImageEntry], verify: Verify | None) -> dict[int | str, int]:
    """Append to `table` the images that exist; add findings for the others.

    Images of another size than listed are appended too: `diagnosis` or `report_sizes` reports them.

    Args:
        table: The table; its `folder` is set.
        entries: The images that the file lists, with unique ids.
        verify: Number of images whose headers are compared with the listed sizes: "all", "some" or "none"; None: all
            of up to `VERIFY_ALL_BELOW` images, some of more. Sizes that are not listed are always read.

    Returns:
        The position in the table of each image that was added, by its id.
    """
    if verify is None:
        verify = "all" if len(entries) <= VERIFY_ALL_BELOW else "some"
    folder = table.folder
    missing = [e for e in entries if not is_file(folder / e.file)] if verify != "none" else []
    if missing:
        advice = "add them, or remove them from the annotation file"
        if len(missing) == len(entries):
            advice = "specify the folder that contains the images"
        what = f"{len(missing)} of {len(entries)} images are not in {folder}: {first_few([e.file for e in missing])}"
        table.add_finding("error", "missing", what, advice)
        absent = {e.id for e in missing}
        entries = [e for e in entries if e.id not in absent]
    step = 1 if verify == "all" else max(1, len(entries) // VERIFY_SOME)
    probed = [
        e
        for number, e in enumerate(entries)
        if e.height is None or e.width is None or (verify != "none" and number % step == 0)
    ]
    results = _probed(folder, probed)
    if len(probed) < len(entries) and any(_is_turned(e, results[e.id]) for e in probed):
        results = _probed(folder, entries)
    positions: dict[int | str, int] = {}
    for entry in entries:
        size = _checked_size(table, entry, results.get(entry.id))
        if size is None:
            continue
        positions[entry.id] = len(table.files)
        table.image_ids.append(entry.id)
        table.files.append(entry.file)
        table.sizes.append(size)
        listed = (entry.height, entry.width)
        table.listed_sizes.append(size if listed[0] is None or listed[1] is None else (listed[0], listed[1]))
        result = results.get(entry.id)
        table.stored_sizes.append(result[1] if isinstance(result, tuple) else size)
        table.image_rows.append(entry.row)
    return positions


_Probed = tuple[tuple[int, int], tuple[int, int]] | ImageError


def _checked_size(table: Table, entry: ImageEntry, probed: _Probed | None) -> tuple[int, int] | None:
    """H, W of an image; None, with a finding, if the file is damaged."""
    path, height, width = table.folder / entry.file, entry.height, entry.width
    if isinstance(probed, ImageError):
        reason = str(probed).removeprefix(f"{path}: ")
        table.add_finding("skip", "image", f"image {entry.id!r}, {path}: {reason}", image=entry.id)
        return None
    if probed is None:
        assert height is not None
        assert width is not None
        return height, width
    return probed[0]


def _is_turned(entry: ImageEntry, probed: _Probed) -> bool:
    """Whether an image is listed in the size in which it is stored although its EXIF orientation turns it."""
    return not isinstance(probed, ImageError) and probed[0] != probed[1] == (entry.height, entry.width)


def report_sizes(table: Table) -> None:
    """Add an error for each image whose file has another size than listed."""
    for index, (listed, size) in enumerate(zip(table.listed_sizes, table.sizes, strict=True)):
        if listed != size:
            number = table.image_ids[index]
            what = _listed(table, number, table.files[index], listed, size)
            advice = "correct the listed size, or restore the image that was annotated; the masks would be displaced"
            table.add_finding("error", "size", what, advice, image=number)


def _listed(table: Table, number: int | str, file: str, listed: tuple[int, int], size: tuple[int, int]) -> str:
    path = table.folder / file
    return f"image {number!r} is listed as {listed[1]} x {listed[0]}, but {path} is {size[1]} x {size[0]}"


def _probed(folder: Path, entries: Sequence[ImageEntry]) -> dict[int | str, _Probed]:
    return dict(zip((e.id for e in entries), _probe([folder / e.file for e in entries]), strict=True))


def _probe(paths: list[Path]) -> list[_Probed]:
    """The sizes of images, or the exceptions that reading them raised."""

    def one(path: Path) -> _Probed:
        try:
            return probe(path)
        except ImageError as error:
            return error

    if len(paths) < 64:
        return [one(p) for p in paths]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as threads:
        return list(threads.map(one, paths, chunksize=64))

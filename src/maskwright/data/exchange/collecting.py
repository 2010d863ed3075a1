"""Collecting the images and objects of a data set into a checked table; used by all readers of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maskwright.data import splits
from maskwright.data.columns import Columns
from maskwright.data.diagnosis import diagnose
from maskwright.data.findings import first_few
from maskwright.data.formats import Match, Request
from maskwright.data.image_folder import locate_images
from maskwright.data.judging import judge, skip_annotation
from maskwright.data.shapes import ShapesBuilder
from maskwright.data.table import ImageEntry, Table, add_images
from maskwright.data.values import clean_name
from maskwright.structures import rle

Segmentation = list[Any] | dict[str, Any] | None
Box = tuple[float, float, float, float]  # x, y, width, height

_FEW = 3  # up to this many entries with the same problem are named one by one


class Collector:
    """Builds a table: first its images, then its objects.

    Args:
        table: A table with its path; findings are added.
        request: What the caller wants; its folder of images and number of inspected headers are used.

    Attributes:
        table: The table.
        positions: Position in the table of each listed image, by its place in the list; unusable images are missing.
    """

    def __init__(self, table: Table, request: Request):
        self.table, self.request = table, request
        self.positions: dict[int, int] = {}
        self._shapes = ShapesBuilder()
        self._images: list[int] = []
        self._labels: list[int] = []
        self._names: list[str] = []
        self._crowd: list[bool] = []
        self._boxes: list[Box | None] = []
        self._added = 0
        self._excluded: set[int] = set()
        self._skipped: dict[str, list[tuple[str, int | None, str]]] = {}

    # ---- images -----------------------------------------------------------------------------------------------------

    def place_images(self, files: Sequence[str], sizes: Sequence[tuple[int, int] | None] | None = None) -> None:
        """Find the files of the images and read their sizes.

        Args:
            files: The names of the images as listed, relative to the folder of the table. Names that lead out of the
                folder are not opened; see `locate_images`.
            sizes: H, W as listed; None for images whose size is not listed.
        """
        listed = [None] * len(files) if sizes is None else list(sizes)
        entries = [
            ImageEntry(row, row + 1, file, *((None, None) if size is None else size))
            for row, (file, size) in enumerate(zip(files, listed, strict=True))
        ]
        root = self.request.images or self.table.folder
        entries = locate_images(self.table, entries, root, self.request.verify)
        found = add_images(self.table, entries, self.request.verify)
        self.positions = {int(number) - 1: position for number, position in found.items()}
        if files and not self.table.files and not self.table.findings_with("error"):
            what = f"none of the {len(files)} images can be used"
            self.table.add_finding("error", "image", what, "see the other findings")

    def size(self, row: int) -> tuple[int, int] | None:
        """Return H, W of a listed image; None if it is not usable."""
        position = self.positions.get(row)
        return None if position is None else self.table.sizes[position]

    def exclude(self, row: int) -> None:
        """Leave out a listed image and its objects: its annotations cannot be read, so it is not background."""
        if row in self.positions:
            self._excluded.add(self.positions[row])

    # ---- objects ----------------------------------------------------------------------------------------------------

    def add(
        self, row: int, label: int, segmentation: Segmentation, name: str, crowd: bool = False, box: Box | None = None
    ) -> None:
        """Add one object.

        Args:
            row: Place of its image in the list; objects of unusable images are omitted.
            label: Its label.
            segmentation: A list of rings `[x, y, x, y, ...]`, a run-length code, or None.
            name: What messages call it, such as "labels/1.txt:3".
            crowd: Whether it is a region to be ignored.
            box: Its box, if the file has one.
        """
        position = self.positions.get(row)
        if position is None:
            return
        self._added += 1
        problem = self._shapes.add(segmentation)
        if problem is not None:
            self.skip(name, row, problem)
            return
        self._images.append(position)
        self._labels.append(label)
        self._names.append(name)
        self._crowd.append(crowd)
        self._boxes.append(box)

    def skip(self, name: str, row: int | None, sentence: str, kind: str | None = None) -> None:
        """Note that an object is skipped.

        Args:
            name: What messages call the object.
            row: Place of its image in the list; None if it has none.
            sentence: What is wrong, without the subject.
            kind: Skipped objects of one kind become one finding if there are many; None: each is named.
        """
        position = None if row is None else self.positions.get(row)
        if kind is None:
            skip_annotation(self.table, name, position, sentence)
        else:
            self._skipped.setdefault(kind, []).append((name, position, sentence))

    def finish(self) -> Table:
        """Correct what is wrong throughout, judge the objects, and return the table."""
        self._report_skipped()
        shapes, problems = self._shapes.finish()
        boxes = np.full((len(self._boxes), 4), np.nan)
        for index, box in enumerate(self._boxes):
            if box is not None:
                boxes[index] = box
        coded = shapes.coded & shapes.present()
        own = np.isnan(boxes[:, 0]) & coded
        frames = shapes.frames[own].astype(np.float64)
        boxes[own] = np.concatenate([frames[:, :2], frames[:, 2:] - frames[:, :2]], 1)
        given = ~np.isnan(boxes[:, 0])
        for index, text in problems.items():
            skip_annotation(self.table, self._names[index], self._images[index], text)
        for index, text in self._shapes.notes:
            self.table.add_finding("note", "outline", f"annotation {self._names[index]!r} {text}")
        columns = Columns(
            image_index=np.array(self._images, np.int64),
            labels=np.array(self._labels, np.int64),
            ids=list(self._names),
            rows=np.arange(len(self._names), dtype=np.int64),
            crowd=np.array(self._crowd, bool),
            boxes=boxes,
            boxed=given,
            areas=np.full(len(boxes), np.nan),
            sized=np.zeros(len(boxes), bool),
            shapes=shapes,
            code_sizes=np.array(self._shapes.code_sizes, np.int64).reshape(-1, 2),
        )
        absent = self._shapes.absent
        if problems:
            columns = columns.take(np.array([i for i in range(len(boxes)) if i not in problems], np.int64))
        _judged(self.table, self._without_excluded(columns), absent)
        return self.table

    def _without_excluded(self, columns: Columns) -> Columns:
        """Remove the excluded images from the table and from its objects."""
        if not self._excluded:
            return columns
        table = self.table
        kept = [position for position in range(len(table.files)) if position not in self._excluded]
        places = np.full(len(table.files), -1, np.int64)
        places[kept] = np.arange(len(kept))
        table.image_ids = [table.image_ids[position] for position in kept]
        table.files = [table.files[position] for position in kept]
        table.sizes = [table.sizes[position] for position in kept]
        table.listed_sizes = [table.listed_sizes[position] for position in kept]
        table.stored_sizes = [table.stored_sizes[position] for position in kept]
        table.image_rows = [table.image_rows[position] for position in kept]
        columns = columns.take(np.flatnonzero(places[columns.image_index] >= 0))
        return replace(columns, image_index=places[columns.image_index])

    def _report_skipped(self) -> None:
        """One finding for each kind of skipped objects; the first few are named one by one."""
        for skipped in self._skipped.values():
            if len(skipped) <= _FEW:
                for name, position, sentence in skipped:
                    skip_annotation(self.table, name, position, sentence)
                continue
            name, _, sentence = skipped[0]
            what = f"{len(skipped)} annotations {plural(sentence)}, the first is {name!r}"
            severity = "error" if len(skipped) >= 0.5 * (self._added + len(skipped)) else "skip"
            advice = "correct them" if severity == "error" else "these annotations are skipped"
            self.table.add_finding(severity, "annotation", what, advice)


def _judged(table: Table, columns: Columns, absent: Mapping[int, str]) -> None:
    """Fill the annotations of a table; afterwards their ids count from 1."""
    total = len(columns)
    kept = diagnose(table, columns)
    if not table.usable:
        return
    rows: list[int] = kept.rows.tolist()
    given = [(box.tolist(), None) for box in kept.boxes]
    judge(table, kept, {i: absent[row] for i, row in enumerate(rows) if row in absent}, given)
    if total and not table.ids and table.files and not table.findings_with("error"):
        what = f"none of its {total} annotations can be used"
        table.add_finding("error", "annotation", what, "see the other findings")
    table.ids = list(range(1, len(table.ids) + 1))


def plural(sentence: str) -> str:
    """Return a sentence that begins with a verb in the third person for several subjects."""
    verb, blank, rest = sentence.partition(" ")
    return {"has": "have", "is": "are", "names": "name", "covers": "cover"}.get(verb, verb) + blank + rest


def run_length_code(plane: np.ndarray, x0: int, y0: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return the run-length code of a mask (h, w) whose upper left corner is at x0, y0 of an image of `size` (H, W)."""
    return {"size": list(size), "counts": rle.from_crop(plane, x0, y0, size).decode("ascii")}


# ---- classes -------------------------------------------------------------------------------------------------------


class ClassNames:
    """Labels of class names, in the order of a given list, or sorted by name.

    Args:
        listed: Names that the data set lists; may be empty.
        used: Names that its objects have.

    Attributes:
        names: All names, cleaned; first those listed, then others in alphabetical order.
        unlisted: Names that objects have and a list lacks.
    """

    def __init__(self, listed: Sequence[str], used: Iterable[str]):
        own = [clean_name(name) for name in listed]
        self.names = list(dict.fromkeys(name for name in own if name))
        others = sorted({clean_name(name) or "unnamed" for name in used} - set(self.names))
        self.unlisted = others if self.names else []
        self.names += others
        self._labels = {name: label for label, name in enumerate(self.names)}

    def label(self, name: str) -> int:
        """Return the label of a name."""
        return self._labels[clean_name(name) or "unnamed"]

    def fill(self, table: Table, first: int = 1) -> None:
        """Set the classes of a table; their ids count from `first`."""
        table.classes = tuple(self.names)
        table.category_ids = tuple(range(first, first + len(self.names)))
        if self.unlisted:
            what = f"objects have {len(self.unlisted)} class names that are not in the list: {first_few(self.unlisted)}"
            table.add_finding("note", "class", what, "they are added at the end")


# ---- splits --------------------------------------------------------------------------------------------------------


def split_in_path(relative: str) -> str | None:
    """Return the first folder of a relative path that is the name of a split; None if there is none."""
    return next((part for part in relative.split("/")[:-1] if splits.kind_of(part) is not None), None)


def chosen_splits(found: Iterable[str | None], request: Request) -> list[str | None]:
    """Return those of the splits of a source that a request refers to.

    Args:
        found: The splits; None stands for data that is not divided and serves as any split.
        request: What the caller wants.

    Returns:
        All splits for a request for every split. Otherwise those that fit, see `splits.fitting`, or None, if the source
        has data that is not divided.
    """
    known = list(dict.fromkeys(found))
    if request.split is None:
        return known
    fitting = splits.fitting(request.split, [name for name in known if name is not None])
    return [*fitting] or [name for name in known if name is None]


def matches_of(
    found: Mapping[str | None, str], request: Request, confidence: float, location: Callable[[str | None], str]
) -> list[Match]:
    """Return a match for each split that a request refers to.

    Args:
        found: For each split, what the match rests on.
        request: What the caller wants.
        confidence: Confidence of all matches.
        location: What `read` opens for a split.
    """
    return [Match(location(split), confidence, found[split], split) for split in chosen_splits(found, request)]


def unwanted(request: Request) -> bool:
    """Return whether a request asks for what only COCO files have: keypoints, or regions."""
    return bool(request.keypoints) or bool(request.panoptic)


def new_table(path: Path, folder: Path, name: str) -> Table:
    """Return an empty table; `name` is the short name of the data set."""
    return replace(Table(path, folder), name=name)

"""Prompts for `predict`: given on the command line or in a file, or the boxes that another system has found."""

# Values of JSON files are unknown until they are checked.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from maskwright.data.findings import DataWarning
from maskwright.errors import AnnotationError, UsageError
from maskwright.evaluation.result_ids import Listing, checked_id, listing_beside
from maskwright.structures import Embedding, Instances, Prompts
from maskwright.systems import System
from maskwright.systems.kinds.promptable import PromptableSystem
from maskwright.text import printable

Size = tuple[int, int]
KEYS = ("points", "labels", "box", "class", "score", "id")  # of an object in a file of prompts


@dataclass(frozen=True)
class Asked:
    """The prompts for an image, and what is known of the objects.

    Attributes:
        prompts: One for each object.
        labels: Their classes; None if the objects have none.
        scores: Their scores; None to use the predicted IoU.
    """

    prompts: Prompts
    labels: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class PromptBook:
    """Prompts for the images of a run.

    Attributes:
        of: The prompts for an image, from its path (None for an image in memory) and its height and width; None if it
            has none.
        classes: The class names that labels refer to; None if the objects have no class.
        unused: A sentence if there are prompts for named images, and for none of those that `of` was asked for.
    """

    of: Callable[[Path | None, Size], Asked | None]
    classes: tuple[str, ...] | None = None
    unused: Callable[[], str | None] = lambda: None


PromptsLike = Prompts | PromptBook | str | Path


def promptable(system: System) -> PromptableSystem:
    """`system`, if it reads prompts; UsageError otherwise."""
    if not isinstance(system, PromptableSystem):
        raise UsageError(f"{system.name} does not read prompts; systems that do, such as sam, list the task 'prompts'")
    return system


def prompt_book(given: PromptsLike) -> PromptBook:
    """The prompts for a run: those of one image, of a file (see `read_prompts`), or a book."""
    if isinstance(given, PromptBook):
        return given
    if isinstance(given, Prompts):
        return PromptBook(lambda image, size: _same(given, image, size))
    if not isinstance(given, (str, Path)):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not be checked
        raise UsageError(
            "prompts must be Prompts, which are the same for every image, a JSON file or a PromptBook, got "
            f"{type(given).__name__}"
        )
    return read_prompts(given)


def _same(prompts: Prompts, image: Path | None, size: Size) -> Asked:
    """The prompts, if they are for images of this size."""
    if prompts.image_size != size:
        (height, width), (h, w) = prompts.image_size, size
        name = "the image" if image is None else image.name
        raise UsageError(
            f"{name} is {w} x {h}, but the prompts are for images of {width} x {height}; call predict for each image"
        )
    return Asked(prompts)


def answered(system: PromptableSystem, embedding: Embedding, asked: Asked | None) -> Instances:
    """The object for each prompt, with its class and score if they are known; no objects without prompts."""
    if asked is None or not len(asked.prompts):
        return Instances.empty(embedding.image_size)
    found = system.segment(embedding, asked.prompts).best()
    scores = found.scores if asked.scores is None else asked.scores
    return replace(found, labels=found.labels if asked.labels is None else asked.labels, scores=scores)


# ---- command line ----------------------------------------------------------------------------------------------------


def written_prompts(points: Sequence[str], boxes: Sequence[str]) -> PromptBook:
    """Prompts from the command line, the same for every image.

    Args:
        points: An object each: "x,y", or several points "x,y;x,y,0", where 0 marks a point outside of the object.
        boxes: An object each: "x0,y0,x1,y1".

    Raises:
        UsageError: If a text has another form.
    """
    rows = [[_point(part, text) for part in text.split(";")] for text in points]
    corners = [_numbers(text, (4,), "x0,y0,x1,y1") for text in boxes]

    def of(image: Path | None, size: Size) -> Asked:
        places = [[(x, y) for x, y, _ in row] for row in rows]
        try:
            clicked = Prompts.from_points(size, places, [[int(v[2]) for v in row] for row in rows])
            parts = [clicked if rows else Prompts.empty(size), Prompts.from_boxes(corners, size)]
        except UsageError as error:
            raise UsageError(str(error) if image is None else f"{image.name}: {error}") from None
        return Asked(Prompts.join(parts))

    return PromptBook(of)


def _point(part: str, text: str) -> tuple[float, float, float]:
    x, y, *label = _numbers(part, (2, 3), "x,y or x,y,0 (several points of an object separated by ';')")
    if label and label[0] not in (0, 1):
        raise UsageError(f"--points {text}: the label of a point must be 1 (on the object) or 0 (outside of it)")
    return x, y, label[0] if label else 1


def _numbers(text: str, counts: tuple[int, ...], form: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts or not all(math.isfinite(v) for v in values):
        raise UsageError(f"{text!r} is not {form}")
    return values


# ---- files -----------------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> PromptBook:
    """Reads prompts from a JSON file.

    The file holds a list of objects, for every image, or a mapping from names of image files to such lists. An object
    has `points` ([[x, y], ...]), `labels` (1 or 0 for each point; default 1) and `box` ([x0, y0, x1, y1]), in pixels,
    at least one of them, and may have `class` (a name) and `score`.

    Raises:
        AnnotationError: If the file cannot be read or has another form.
    """
    path = Path(path)
    document = _document(path)
    if isinstance(document, list):
        entries: dict[str, list[Any]] | None = None
        lists: list[Any] = [document]
    elif isinstance(document, dict) and all(isinstance(v, list) for v in document.values()):
        entries = {str(name): own for name, own in document.items()}
        lists = list(entries.values())
    else:
        raise AnnotationError(
            f"{path}: expected a list of objects with points and boxes, or a mapping from file names to such lists"
        )
    given = [o["class"] for own in lists for o in own if isinstance(o, dict) and "class" in o]
    if any(isinstance(name, bool) or not isinstance(name, (str, int)) for name in given):
        raise AnnotationError(f"{path}: the class of an object must be a name")
    classes = tuple(dict.fromkeys(str(name) for name in given)) or None
    find = None if entries is None else ByName(path, entries)

    def of(image: Path | None, size: Size) -> Asked | None:
        own = document if find is None else find(image)
        where = str(path) if image is None else f"{path}, {printable(image.name)}"
        return None if own is None else _objects(cast(list[Any], own), size, classes, where)

    return PromptBook(of, classes) if find is None else PromptBook(of, classes, find.unused)


def _objects(values: Sequence[Any], size: Size, classes: tuple[str, ...] | None, where: str) -> Asked:
    """The objects of an image."""
    parts, labels, scores = [Prompts.empty(size)], list[int](), list[float]()
    for number, value in enumerate(values):
        place = f"{where}: object {number}"
        if not isinstance(value, dict) or not ({"points", "box"} & value.keys()):
            raise AnnotationError(f"{place} must be a mapping with points or box, got {str(value)[:60]}")
        unknown = [printable(str(key)) for key in value if key not in KEYS]
        if unknown:
            warnings.warn(
                f"{place}: {unknown[0]} is not read; the keys are {', '.join(KEYS)}", DataWarning, stacklevel=2
            )
        try:
            points, labelled, box = value.get("points") or [], value.get("labels"), value.get("box")
            row = Prompts.from_points(size, [points], None if labelled is None else [labelled])
            if not len(points) and box is None:
                raise UsageError("has neither points nor a box")
            if box == []:
                raise UsageError("box must be 4 numbers, x0, y0, x1 and y1, got []")
            boxes = None if box is None else Prompts.from_boxes([box], size).boxes
            parts.append(replace(row, boxes=boxes))
        except (UsageError, ValueError, TypeError, RuntimeError) as error:
            raise AnnotationError(f"{place}: {error}") from None
        labels.append(0 if classes is None or "class" not in value else classes.index(str(value["class"])))
        scores.append(_score(value.get("score", 1.0), place))
    known = any("score" in value for value in values)
    return Asked(
        Prompts.join(parts),
        None if classes is None else torch.tensor(labels, dtype=torch.int64),
        torch.tensor(scores) if known else None,
    )


def read_detections(path: str | Path) -> PromptBook:
    """Reads the boxes that a system has found, as prompts.

    Args:
        path: COCO results, such as the `results.json` that `predict` writes, with `pictures.json` beside it; or a COCO
            file with annotations. Classes and scores are kept.

    Raises:
        AnnotationError: If the file cannot be read or has another form, or nothing says which image a box belongs to.
    """
    path = Path(path)
    document = _document(path)
    records: Any = document
    listing = listing_beside(path)
    if isinstance(document, dict):
        records, listing = document.get("annotations"), Listing.of(path, document)
    if not isinstance(records, list) or not all(isinstance(r, dict) and "bbox" in r for r in records):
        raise AnnotationError(f"{path}: expected COCO results or annotations, records with image_id and bbox")
    ids = [checked_id(r.get("category_id"), f"{path}: record {n}", "category_id") for n, r in enumerate(records)]
    if listing is not None:
        classes = dict(listing.categories)
    else:
        classes = {number: f"category {number}" for number in sorted(set(ids), key=str)}
    labels = {number: label for label, number in enumerate(classes)}
    grouped = dict[str, list[tuple[list[float], int, float]]]()
    for number, record in enumerate(records):
        place = f"{path}: record {number}"
        image = checked_id(record.get("image_id"), place, "image_id")
        known = None if listing is None else listing.images.get(image)
        if ids[number] not in labels:
            raise AnnotationError(f"{place} has the category_id {ids[number]!r}, which is not listed")
        if known is None and listing is not None and listing.images:
            raise AnnotationError(f"{place} has the image_id {image!r}, which is not listed")
        name = str(image) if known is None or not known[0] else known[0]
        entry = _box(record["bbox"], place), labels[ids[number]], _score(record.get("score", 1.0), place)
        grouped.setdefault(name, []).append(entry)
    find = ByName(path, grouped)

    def of(image: Path | None, size: Size) -> Asked | None:
        own = find(image)
        if own is None:
            return None
        boxes = torch.tensor([box for box, _, _ in own])
        limit = boxes.new_tensor([size[1], size[0]]).repeat(2)
        inside = boxes.clamp(min=0).minimum(limit)
        kept = ((inside[:, 2:] > inside[:, :2]).all(1)).nonzero()[:, 0]  # others are outside of the image, or empty
        return Asked(
            Prompts.from_boxes(inside[kept], size),
            torch.tensor([label for _, label, _ in own])[kept],
            torch.tensor([score for _, _, score in own])[kept],
        )

    return PromptBook(of, tuple(classes.values()), find.unused)


def _box(value: Any, place: str) -> list[float]:
    """COCO's x, y, width, height as corners."""
    if not isinstance(value, list) or len(value) != 4 or not all(_finite(v) for v in value):
        raise AnnotationError(f"{place}: bbox must be 4 numbers, x, y, width and height, got {str(value)[:60]}")
    x, y, width, height = (float(v) for v in value)
    return [x, y, x + width, y + height]


def _score(value: Any, place: str) -> float:
    if not _finite(value):
        raise AnnotationError(f"{place}: score must be a number, got {str(value)[:60]}")
    return float(value)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise AnnotationError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: it cannot be read as JSON ({str(error)[:120]})") from None


class ByName:
    """Finds the entry of an image: by its path, by the name of its file, or by that without suffix, if it is unique.

    Args:
        path: The file that the entries are from, for messages.
        entries: What belongs to each name of a file.
    """

    def __init__(self, path: Path, entries: Mapping[str, Any]):
        self.path, self.entries = path, entries
        self.asked: Path | None = None  # an image, if none of those that were asked for has an entry
        self._found = False
        paths = {str(Path(name)): own for name, own in entries.items()}
        tails = _unique((Path(name).name, own) for name, own in entries.items())
        stems = _unique((Path(name).stem, own) for name, own in entries.items())
        self._tables = paths, tails, stems

    def __call__(self, image: Path | None) -> Any:
        """Returns the entry; None if there is none."""
        if image is None:
            if len(self.entries) == 1:
                self._found = True
                return next(iter(self.entries.values()))
            raise UsageError("prompts for several images need images from files, whose names tell them apart")
        paths, tails, stems = self._tables
        for table, key in (
            (paths, str(image)),
            (paths, str(image.absolute())),
            (paths, image.name),
            (tails, image.name),
            (stems, image.stem),
        ):
            if key in table:
                self._found = True
                return table[key]
        self.asked = image
        return None

    def unused(self) -> str | None:
        """See `PromptBook`."""
        if self._found or self.asked is None or not self.entries:
            return None
        count = len(self.entries)
        some = ", ".join(printable(name) for name in list(self.entries)[:3]) + ", ..." * (count > 3)
        return (
            f"{self.path}: there are prompts for {count} image{'s' * (count > 1)} ({some}), but for none of those "
            f"given, such as {printable(self.asked.name)}"
        )


def _unique(pairs: Any) -> dict[str, Any]:
    """The pairs whose key is there once."""
    found, twice = dict[str, Any](), set[str]()
    for key, value in pairs:
        if key in found:
            twice.add(key)
        found[key] = value
    return {key: value for key, value in found.items() if key not in twice}

"""What the writers of all formats have in common: the parts of a data set, names of images, outlines and maps."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from maskwright.data.dataset import Dataset
from maskwright.data.exchange.outlines import Ring
from maskwright.data.repair import copy_file
from maskwright.errors import DataError
from maskwright.files import write_bytes
from maskwright.structures import Instances

_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')

# What a format can hold; everything that is not listed by a writer is lost.
Feature = str
PARTS: Feature = "parts"  # objects in several parts
HOLES: Feature = "holes"
OVERLAPS: Feature = "overlaps"  # pixels of several objects
CROWD: Feature = "crowd"  # crowd regions
BOXES: Feature = "boxes"  # objects with a box and without a mask
KEYPOINTS: Feature = "keypoints"
STUFF: Feature = "stuff"  # regions, told apart from objects
SCORES: Feature = "scores"  # of predictions
CUT: Feature = "cut"  # holes and parts are kept, as one outline joined by lines without width


@dataclass(frozen=True)
class Part:
    """One split of the data set that is written.

    Attributes:
        split: Its name; None for a data set that is not divided.
        dataset: Its images and objects.
    """

    split: str | None
    dataset: Dataset


class Writer(Protocol):
    """What the module of a format that can be written defines, in addition to `formats.Format`."""

    HOLDS: frozenset[str]

    def write(self, folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
        """Write a data set into a new folder.

        Args:
            folder: The folder; empty.
            parts: The splits, all with the same classes.
            images: Copies the images.
        """
        ...


@dataclass
class Item:
    """One image of a part with its objects.

    Attributes:
        index: Its position in the part.
        id: Its id.
        size: H, W.
        objects: Its objects.
        scores: Scores of predictions; None for annotations.
    """

    index: int
    id: int | str
    size: tuple[int, int]
    objects: Instances
    scores: list[float] | None


def items(part: Part) -> Iterator[Item]:
    """Yield the images of a part with their objects, one at a time."""
    sizes, ids = part.dataset.sizes(), part.dataset.image_ids()
    for index, (size, number) in enumerate(zip(sizes, ids, strict=True)):
        yield Item(index, number, size, part.dataset.targets(index), part.dataset.scores(index))


def crowd_of(objects: Instances) -> list[bool]:
    """Return which objects are crowd regions."""
    return [False] * len(objects) if objects.crowd is None else cast(list[bool], cast(Any, objects.crowd).tolist())


def labels_of(objects: Instances) -> list[int]:
    """Return the labels of objects."""
    return cast(list[int], cast(Any, objects.labels).tolist())


def boxes_of(objects: Instances) -> list[tuple[float, float, float, float]]:
    """Return the boxes of objects, x0, y0, x1, y1, rounded to thousandths of a pixel."""
    rows = cast(list[list[float]], cast(Any, objects.boxes).double().tolist())
    return [cast(tuple[float, float, float, float], tuple(round(value, 3) for value in row)) for row in rows]


# ---- images --------------------------------------------------------------------------------------------------------


@dataclass
class ImageFiles:
    """Copies the images of a data set under names that are unique without their suffixes.

    Attributes:
        folder: The folder that is written.
        link: Make hard links instead of copies.
        renamed: Earlier and new name of each image that has another name than its file.
    """

    folder: Path
    link: bool = False
    renamed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    _used: dict[str, set[str]] = field(default_factory=dict[str, set[str]])

    def names(self, part: Part, scope: str) -> list[str]:
        """Return the names of all images of a part; names in one `scope` have different stems."""
        ids = part.dataset.image_ids()
        return [
            self._unique(f"{ids[index]}.png" if path is None else path.name, scope, path is not None)
            for index, path in enumerate(part.dataset.paths())
        ]

    def _unique(self, given: str, scope: str, is_file: bool) -> str:
        name = _UNSAFE.sub("_", given).strip() or "image.png"
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if not suffix and is_file:  # files without a suffix are recognized by their content, but not by other tools
            suffix = ".jpg"
        used = self._used.setdefault(scope, set())
        number, chosen = 2, stem
        while chosen.casefold() in used:
            chosen = f"{stem}-{number}"
            number += 1
        used.add(chosen.casefold())
        if chosen + suffix != given:
            self.renamed.append((given, chosen + suffix))
        return chosen + suffix

    def copy(self, part: Part, index: int, target: str) -> None:
        """Copy an image to a path relative to the folder; an image without a file is written as PNG.

        Raises:
            DataError: If the image cannot be read.
        """
        place = self.folder / target
        place.parent.mkdir(parents=True, exist_ok=True)
        path = part.dataset.paths()[index]
        if path is None:
            from PIL import Image

            data = io.BytesIO()
            pixels = part.dataset[index].image.permute(1, 2, 0).numpy()
            Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(data, "PNG")
            write_bytes(place, data.getvalue(), DataError, sync=False)
            return
        try:
            copy_file(path.resolve(), place, self.link)
        except FileNotFoundError:
            raise DataError(f"{path}: no such image; restore it") from None


# ---- masks ---------------------------------------------------------------------------------------------------------


@dataclass
class Outline:
    """The rings of an object.

    Attributes:
        rings: Outer borders of its parts and, if `holes`, borders of holes.
        holes: Whether it has holes; the rings are then filled "even-odd", otherwise each ring is a part.
    """

    rings: list[Ring]
    holes: bool

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self.rings) if not self.holes else sum(_signed_area(ring) > 0 for ring in self.rings)


def outlines_of(objects: Instances) -> list[Outline]:
    """Return the outlines of objects with masks; exact along pixel borders for those that are no polygons."""
    assert objects.masks is not None
    exact = objects.masks.kind == "polygon" and objects.masks.fill == "union"
    found: list[Outline] = []
    for rings in objects.masks.polygons():
        holes = not exact and any(_signed_area(ring) < 0 for ring in rings)
        found.append(Outline(list(rings), holes))
    return found


def separate(outline: Outline, size: tuple[int, int]) -> Outline:
    """Return an outline whose rings may be filled "even-odd": parts that could overlap are united first."""
    if outline.holes or len(outline.rings) < 2 or not _may_overlap(outline.rings):
        return outline
    from maskwright.structures import Masks

    rings = Masks.from_polygons([outline.rings], size).pack().polygons()[0]
    return Outline(list(rings), any(_signed_area(ring) < 0 for ring in rings))


def _may_overlap(rings: Sequence[Ring]) -> bool:
    """Whether the boxes of two rings overlap."""
    low, high = np.array([r.min(0) for r in rings]), np.array([r.max(0) for r in rings])
    apart = np.asarray((low[:, None] > high[None] + 1).any(2), np.bool_)
    return not bool((apart | apart.T | np.eye(len(rings), dtype=bool)).all())


def _signed_area(ring: Ring) -> float:
    """The area of a ring; positive if it is clockwise on the screen."""
    x, y = (ring - ring[0]).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def present(objects: Instances) -> list[bool]:
    """Return which objects have pixels or, without masks, a box."""
    if objects.masks is None:
        return [box[2] > box[0] and box[3] > box[1] for box in boxes_of(objects)]
    return cast(list[bool], cast(Any, objects.masks.areas() > 0).tolist())


def crops_of(objects: Instances) -> tuple[list[tuple[int, int, int, int]], list[npt.NDArray[np.bool_]]]:
    """Return the pixel windows of masks, x0, y0, x1, y1, and their pixels inside these windows."""
    assert objects.masks is not None
    frames, crops = cast(tuple[Any, list[Any]], objects.masks.crops())
    windows = [cast(tuple[int, int, int, int], tuple(row)) for row in cast(list[list[int]], frames.tolist())]
    return windows, [cast(npt.NDArray[np.bool_], crop.numpy()) for crop in crops]


@dataclass
class Painted:
    """Objects as one map.

    Attributes:
        plane: (H, W), k + 1 where object k is, 0 elsewhere.
        lost: Number of pixels of each object that others cover.
        areas: Number of pixels of each object.
    """

    plane: npt.NDArray[np.int32]
    lost: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]


def painted(objects: Instances, below: Sequence[bool] | None = None) -> Painted:
    """Draw objects into a map, smaller ones over larger ones, so that the least of each is covered.

    Args:
        objects: Objects with masks.
        below: Objects that are drawn first, under all others.
    """
    assert objects.masks is not None
    height, width = objects.image_size
    plane = np.zeros((height, width), np.int32)
    areas: npt.NDArray[np.int64] = objects.masks.areas().cpu().numpy().astype(np.int64)
    under = np.zeros(len(objects), bool) if below is None else np.array(below, bool)
    order: list[int] = np.lexsort((np.arange(len(objects)), -areas, ~under)).tolist()
    windows, crops = crops_of(objects)
    for index in order:
        x0, y0, x1, y1 = windows[index]
        plane[y0:y1, x0:x1][crops[index]] = index + 1
    seen = np.bincount(plane.ravel(), minlength=len(objects) + 1)[1:]
    return Painted(plane, areas - seen, areas)


# ---- files ---------------------------------------------------------------------------------------------------------


def write_text_file(path: Path, text: str) -> None:
    """Write a text file of the folder that is written, which is renamed when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_plane(path: Path, plane: npt.NDArray[Any], colours: Sequence[tuple[int, int, int]] | None = None) -> None:
    """Write a map of numbers as PNG with 8 or 16 bits, or as TIFF with 32 bits; 8 bits may have a palette."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(plane)
    if colours is not None:
        image.putpalette([value for colour in colours for value in colour])
    if path.suffix == ".tif":
        image.save(path, "TIFF", compression="tiff_deflate")
    else:
        image.save(path, "PNG")


def number(value: float) -> float | int:
    """Return a coordinate for JSON: an integer if it is one."""
    return int(value) if float(value).is_integer() else float(value)


def object_name(part: Part, index: int, position: int, label: int) -> str:
    """Return what messages call an object: its image, its id and its class."""
    path = part.dataset.paths()[index]
    where = str(part.dataset.image_ids()[index]) if path is None else path.name
    own: list[Any] = []
    with contextlib.suppress(Exception):
        own = part.dataset.annotation_ids(index)
    shown = own[position] if position < len(own) else position
    name = part.dataset.classes[label] if label < len(part.dataset.classes) else str(label)
    return f"{where}: annotation {shown} ({name})"

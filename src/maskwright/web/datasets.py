"""Data sets of any format as what is annotated, and the opening of everything that can be annotated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.clips import Clips
from maskwright.data.convert import open_parts, with_equal_classes
from maskwright.data.dataset import Dataset
from maskwright.data.exchange.writing import Part, boxes_of, crowd_of, labels_of
from maskwright.data.formats import Request
from maskwright.data.images import MAX_PIXELS
from maskwright.data.opening import find_matches
from maskwright.errors import ImageError, UsageError
from maskwright.inference.sources import SUFFIXES
from maskwright.structures import Instances, Masks
from maskwright.text import printable
from maskwright.web.objects import Object, step
from maskwright.web.sources import ClipFrames, FolderImages, Original, Size, Source, read_rgb


class DatasetImages(Source):
    """The images of a data set with their annotations.

    Args:
        path: What was opened.
        parts: Its splits, with the same classes.
        format: Name of its format.
        max_pixels: Largest number of pixels of an image.
    """

    def __init__(self, path: Path, parts: Sequence[Part], format: str, max_pixels: int = MAX_PIXELS):
        super().__init__(path, max_pixels)
        self.parts, self.format = list(parts), format
        first = self.parts[0].dataset
        self.classes, self.category_ids, self.stuff = first.classes, tuple(first.category_ids), first.stuff
        self.keypoint_names = first.keypoint_names
        self.splits = tuple(part.split for part in self.parts)
        self._place = [(p, i) for p, part in enumerate(self.parts) for i in range(len(part.dataset))]
        self._files = [file for part in self.parts for file in part.dataset.paths()]
        self._ids = [id for part in self.parts for id in part.dataset.image_ids()]
        self._sizes = [size for part in self.parts for size in part.dataset.sizes()]
        self._keys = self._named()
        self._clips = self._sequences()
        if self._clips:
            self.kind = "clip"

    def _named(self) -> list[str]:
        """Paths relative to what was opened, if they are unique; otherwise splits and ids."""
        root = self.path if self.path.is_dir() else self.path.parent
        names: list[str] = []
        for file in self._files:
            if file is None:
                break
            names.append(os.path.relpath(file, root).replace(os.sep, "/"))
        if len(names) == len(self._files) == len(set(names)):
            return names
        return [f"{self.parts[p].split or ''}#{id}" for (p, _), id in zip(self._place, self._ids, strict=True)]

    def _sequences(self) -> list[tuple[int, int]]:
        """The first and last + 1 frame of each clip; empty for images."""
        found: list[tuple[int, int]] = []
        begin = 0
        for part in self.parts:
            if not isinstance(part.dataset, Clips):
                return []
            for clip in part.dataset.clips:
                found.append((begin, begin + len(clip.annotated)))
                begin += len(clip.annotated)
        return found

    def __len__(self) -> int:
        return len(self._place)

    def _at(self, index: int) -> tuple[Dataset, int]:
        part, position = self._place[index]
        return self.parts[part].dataset, position

    def key(self, index: int) -> str:
        return self._keys[index]

    def file(self, index: int) -> Path | None:
        return self._files[index]

    def known_size(self, index: int) -> Size | None:
        return self._sizes[index]

    def size(self, index: int) -> Size:
        return self._sizes[index]

    def read(self, index: int) -> UInt8[Tensor, "3 H W"]:
        dataset, position = self._at(index)
        file = self._files[index]
        image = dataset[position].image if file is None else read_rgb(file, self.max_pixels, dataset.white)
        if (image.shape[1], image.shape[2]) != self._sizes[index]:
            height, width = self._sizes[index]
            raise ImageError(
                f"{printable(str(file))}: is {image.shape[2]} x {image.shape[1]}, but the annotations are for "
                f"{width} x {height}; restore the image that was annotated"
            )
        return image if len(image) == 3 else image[:1].expand(3, -1, -1)

    def count(self, index: int) -> int | None:
        dataset, position = self._at(index)
        return None if isinstance(dataset, Clips) else len(dataset.image_labels(position))

    def original(self, index: int) -> Original:
        dataset, position = self._at(index)
        return Original(dataset.targets(position), dataset.annotation_ids(position), dataset.areas(position))

    def imported(self, index: int) -> list[Object]:
        dataset, position = self._at(index)
        found, ids = dataset.targets(position), dataset.annotation_ids(position)
        masks = filled(found) if found.masks is None else found.masks.pack()
        made = (step(self.format or "data set", "import"),)
        scores = dataset.scores(position)
        keypoints = None if found.keypoints is None else cast("list[Any]", cast(Any, found.keypoints).tolist())
        tracks = cast("list[int]", cast(Any, found.ids).tolist()) if self._clips and found.ids is not None else None
        areas = cast("list[int]", cast(Any, masks.areas()).tolist())
        names, labels, crowd = unique_names(ids, len(found)), labels_of(found), crowd_of(found)
        objects: list[Object] = []
        for n, code in enumerate(masks.rle()):
            if not areas[n]:
                continue
            kept: dict[str, Any] = {"number": ids[n] if n < len(ids) else None, "source": True}
            kept |= {"crowd": True} if crowd[n] else {}
            kept |= {"box_only": True} if found.masks is None else {}
            kept |= {} if keypoints is None else {"keypoints": keypoints[n]}
            score = None if scores is None else scores[n]
            track = tracks[n] if tracks is not None and tracks[n] > 0 else None
            objects.append(Object(names[n], labels[n], code["counts"].decode("ascii"), made, 0, score, track, kept))
        return objects

    def sequence(self, index: int) -> tuple[int, int]:
        for first, end in self._clips:
            if first <= index < end:
                return first, end
        return index, index + 1

    def split(self, index: int) -> str | None:
        return self.parts[self._place[index][0]].split

    def id(self, index: int) -> int | str:
        return self._ids[index]


def filled(objects: Instances) -> Masks:
    """Return the boxes of objects as masks."""
    rings = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes_of(objects)]
    return Masks.from_polygons(rings, objects.image_size).pack()


def unique_names(ids: Sequence[Any], count: int) -> list[str]:
    """Return the ids of annotations as texts that are unique in their image."""
    names: dict[str, None] = {}
    for n in range(count):
        name = printable(str(ids[n]))[:200] if n < len(ids) else f"a{n}"
        names[name if name not in names else f"{name}#{n}"] = None
    return list(names)


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_source(
    path: str | Path,
    *,
    split: str | None = None,
    format: str | None = None,
    images: str | Path | None = None,
    clip: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Open what is annotated.

    Args:
        path: A folder of images; a video file, or with `clip` a folder of frames; or a data set in any format that
            `open_dataset` reads, of which all splits are opened.
        split: Open only this split of a data set.
        format: Name of the format of a data set; None: detected.
        images: The folder of the images of a data set; None: searched for.
        clip: Whether a folder of images holds the frames of a clip.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: If there is nothing at `path`, it has no images, or several formats fit equally well.
    """
    place, text = Path(path).expanduser(), str(path)
    if clip:
        return ClipFrames(place, max_pixels)
    if place.is_file() and place.suffix.lower() in SUFFIXES:
        return FolderImages(place, max_pixels)
    request = Request(split, images=None if images is None else Path(images), verify="none")
    wanted = format is not None or split is not None or images is not None
    if wanted or find_matches(text, request, format):
        parts = with_equal_classes(open_parts(text, split, format, images))
        if not any(len(part.dataset) for part in parts):
            raise UsageError(f"{path}: the data set has no images")
        name = parts[0].dataset.origin.rpartition("(")[2].rstrip(")") or "data set"
        return DatasetImages(place, parts, name, max_pixels)
    if not place.exists():
        raise UsageError(f"{path}: no such file or folder; give a folder of images, a video file or a data set")
    return FolderImages(place, max_pixels) if place.is_dir() else ClipFrames(place, max_pixels)

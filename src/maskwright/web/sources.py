"""What is annotated: a folder of images, a clip, or a data set of any format with its annotations."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.clips import Clips
from maskwright.data.convert import open_parts, with_equal_classes
from maskwright.data.dataset import Dataset
from maskwright.data.exchange.writing import Part, boxes_of, crowd_of, labels_of
from maskwright.data.formats import Request
from maskwright.data.images import MAX_PIXELS, Reading, common_white, read_image, read_size, reading
from maskwright.data.opening import find_matches
from maskwright.errors import ImageError, UsageError
from maskwright.inference.frames import Frames, open_frames
from maskwright.inference.sources import SUFFIXES
from maskwright.structures import Instances, Masks
from maskwright.text import printable
from maskwright.web.objects import Object, step

HIDDEN = ".maskwright"  # the folder of the journal in an annotated folder
Size = tuple[int, int]


class Source(ABC):
    """Images that are annotated, in a fixed order; positions count from 0.

    Attributes:
        path: What was opened.
        kind: Whether consecutive images are frames of a clip.
        classes: Classes of existing annotations.
        stuff: Those of `classes` that are regions.
        category_ids: Their ids in the data set.
        keypoint_names: Names of the keypoints; None if there are none.
        format: Name of the format of existing annotations; None if there are none.
        splits: Names of the splits of a data set; None for one that is not divided.
    """

    kind: Literal["images", "clip"] = "images"
    classes: tuple[str, ...] = ()
    stuff: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    keypoint_names: tuple[str, ...] | None = None
    format: str | None = None
    splits: tuple[str | None, ...] = (None,)

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS):
        self.path, self.max_pixels = path, max_pixels

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def key(self, index: int) -> str:
        """Return what identifies an image when other images have been added or removed."""

    @abstractmethod
    def known_size(self, index: int) -> Size | None:
        """Return H, W of an image if it is known without opening it."""

    @abstractmethod
    def size(self, index: int) -> Size:
        """Return H, W of an image.

        Raises:
            ImageError: If it cannot be read.
        """

    @abstractmethod
    def read(self, index: int) -> UInt8[Tensor, "3 H W"]:
        """Return the pixels of an image.

        Raises:
            ImageError: If it cannot be read.
        """

    def name(self, index: int) -> str:
        """Return the name of an image for display."""
        return printable(self.key(index))

    def file(self, index: int) -> Path | None:
        """Return the file of an image; None for an image without one of its own."""
        del index
        return None

    def stamp(self, index: int) -> str:
        """Return a text that changes when the file of an image changes."""
        file = self.file(index) or self.path
        try:
            about = file.stat()
        except OSError:
            return "missing"
        return f"{file}|{about.st_size}|{about.st_mtime_ns}|{index if self.file(index) is None else ''}"

    def content(self, index: int) -> str:
        """Return a digest of the content of an image.

        Raises:
            ImageError: If it cannot be read.
        """
        file = self.file(index)
        if file is None:
            pixels = self.read(index)
            digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
            digest.update(np.ascontiguousarray(pixels.numpy()).data)
        else:
            digest = hashlib.sha256()
            try:
                with file.open("rb") as opened:
                    while block := opened.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise ImageError(f"{printable(str(file))}: cannot be read ({error.strerror})") from None
        return digest.hexdigest()[:32]

    def count(self, index: int) -> int | None:
        """Return the number of existing annotations of an image; None if it is only known after reading them."""
        del index
        return 0

    def imported(self, index: int) -> list[Object]:
        """Return the existing annotations of an image."""
        del index
        return []

    def original(self, index: int) -> tuple[Instances, list[Any]] | None:
        """Return the existing annotations as the data set has them, and their ids; None if there are none."""
        del index
        return None

    def sequence(self, index: int) -> tuple[int, int]:
        """Return the first and the last + 1 frame of the clip of an image."""
        return (0, len(self)) if self.kind == "clip" else (index, index + 1)

    def split(self, index: int) -> str | None:
        """Return the name of the split of an image."""
        del index
        return None

    def id(self, index: int) -> int | str:
        """Return the id of an image in the data set."""
        return index + 1

    def close(self) -> None:  # noqa: B027 - most sources have nothing to close
        """Close files."""


# ---- folders ---------------------------------------------------------------------------------------------------------


class FolderImages(Source):
    """The images of a folder and its subfolders, without annotations; none is opened at first.

    Args:
        path: The folder, or an image.
        max_pixels: Largest number of pixels of an image.
    """

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS):
        super().__init__(path, max_pixels)
        if path.is_dir():
            self.folder, self._files = path, sorted(listed(path), key=natural)
        else:
            self.folder, self._files = path.parent, [path.name]
        if not self._files:
            raise UsageError(f"{path}: no images in this folder")
        self._sizes = dict[int, Size]()
        self._white: tuple[int | None] | None = None

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return self._files[index]

    def file(self, index: int) -> Path:
        return self.folder / self._files[index]

    def known_size(self, index: int) -> Size | None:
        return self._sizes.get(index)

    def size(self, index: int) -> Size:
        if index not in self._sizes:
            self._sizes[index] = read_size(self.file(index), self.max_pixels)
        return self._sizes[index]

    def read(self, index: int) -> UInt8[Tensor, "3 H W"]:
        return read_rgb(self.file(index), self.max_pixels, self.white)

    def white(self) -> int | None:
        """Return the value that becomes 255 in all images of more than 8 bits."""
        if self._white is None:
            self._white = (common_white([self.file(index) for index in range(len(self))]),)
        return self._white[0]


def listed(folder: Path) -> list[str]:
    """Return the images of a folder and its subfolders, relative to it, with "/"; hidden ones are left out."""
    found: list[str] = []
    waiting = [("", os.fspath(folder))]
    while waiting:
        prefix, place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((f"{prefix}{entry.name}/", entry.path))
                    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():  # noqa: PTH122
                        found.append(prefix + entry.name)
        except OSError as error:
            if not prefix:
                raise UsageError(f"{folder}: cannot be read ({error.strerror})") from None
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Return the key that sorts names by the numbers in them."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in _NUMBERS.split(name)]


_NUMBERS = re.compile(r"([0-9]{1,18})")


def read_rgb(path: Path, max_pixels: int, white: Callable[[], int | None] | None = None) -> UInt8[Tensor, "3 H W"]:
    """Read an image file for display and prompts: three channels, whatever it has.

    Of files with other bands than colours the first three are shown, or the first one as grey.

    Raises:
        ImageError: If it cannot be read.
    """
    try:
        image = read_image(path, max_pixels, warn=False, white=white)
    except ImageError as error:
        if "bands" not in str(error):
            raise
        for bands in ((1, 2, 3), (1,)):
            try:
                with reading(Reading(white() if white is not None else None, bands)):
                    image = read_image(path, max_pixels, warn=False)
                break
            except ImageError:
                continue
        else:
            raise
    return image if len(image) == 3 else image[:1].expand(3, -1, -1)


# ---- clips -----------------------------------------------------------------------------------------------------------


class ClipFrames(Source):
    """The frames of a video file or of a folder of images.

    Args:
        path: The file or folder.
        max_pixels: Largest number of pixels of a frame.
    """

    kind = "clip"

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS):
        super().__init__(path, max_pixels)
        self.frames: Frames = open_frames(path)
        self._lock = threading.Lock()
        self._length = self.frames.length or self._counted()
        self._size: Size | None = None
        self._items: Sequence[Any] | None = getattr(self.frames, "_items", None)

    def _counted(self) -> int:
        """The number of frames of a file that does not state it."""
        count = sum(1 for _ in self.frames)
        self.frames.length = count
        return count

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        return self.frames.frame_name(index)

    def file(self, index: int) -> Path | None:
        return None if self._items is None else self._items[index].path

    def known_size(self, index: int) -> Size | None:
        return self._size

    def size(self, index: int) -> Size:
        if self._size is None:
            image = self.read(index)
            self._size = (image.shape[1], image.shape[2])
        return self._size

    def read(self, index: int) -> UInt8[Tensor, "3 H W"]:
        with self._lock:
            image = self.frames.get(index)
        if image is None:
            raise ImageError(f"{self.path}: there is no frame {index}; the file may be incomplete")
        return image

    def close(self) -> None:
        with self._lock:
            self.frames.close()


# ---- data sets -------------------------------------------------------------------------------------------------------


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

    def original(self, index: int) -> tuple[Instances, list[Any]]:
        dataset, position = self._at(index)
        return dataset.targets(position), dataset.annotation_ids(position)

    def imported(self, index: int) -> list[Object]:
        found, ids = self.original(index)
        dataset, position = self._at(index)
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

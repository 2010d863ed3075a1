"""What is annotated: a folder of images or a clip; data sets are in `web.datasets`."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.images import MAX_PIXELS, Reading, common_white, read_image, read_size, reading
from maskwright.errors import ImageError, UsageError
from maskwright.inference.frames import Frames, open_frames
from maskwright.inference.sources import SUFFIXES
from maskwright.structures import Instances
from maskwright.text import printable
from maskwright.web.objects import Object

HIDDEN = ".maskwright"  # the folder of the journal in an annotated folder
Size = tuple[int, int]


@dataclass(frozen=True)
class Original:
    """The annotations of an image as the data set has them.

    Attributes:
        instances: The objects.
        ids: Their ids.
        areas: Their areas, as the data set states them.
    """

    instances: Instances
    ids: list[Any]
    areas: npt.NDArray[np.float64]


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

    def is_there(self, index: int) -> bool:
        """Return whether the file of an image still exists."""
        file = self.file(index)
        return file is None or file.is_file()

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

    def original(self, index: int) -> Original | None:
        """Return the existing annotations as the data set has them; None if there are none."""
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

    Attributes:
        left_out: Images of kinds that are not read.
    """

    left_out: Sequence[str] = ()

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS):
        super().__init__(path, max_pixels)
        if path.is_dir():
            self.folder, self._files = path, sorted(listed(path), key=natural)
            self.left_out = sorted(listed(path, UNREAD), key=natural)
        else:
            self.folder, self._files = path.parent, [path.name]
        if not self._files:
            others = f"; {of_unread(self.left_out)}" if self.left_out else ""
            raise UsageError(f"{path}: no images in this folder{others}")
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
        image, size = read_rgb(self.file(index), self.max_pixels, self.white), self.size(index)
        if (image.shape[1], image.shape[2]) != size:
            raise ImageError(
                f"{printable(str(self.file(index)))}: is {image.shape[2]} x {image.shape[1]} now, but was {size[1]} x "
                f"{size[0]} when it was opened; restore it, or start the server again"
            )
        return image

    def white(self) -> int | None:
        """Return the value that becomes 255 in all images of more than 8 bits."""
        if self._white is None:
            self._white = (common_white([self.file(index) for index in range(len(self))]),)
        return self._white[0]


def listed(folder: Path, suffixes: frozenset[str] = SUFFIXES) -> list[str]:
    """Return the images of a folder and its subfolders, relative to it, with "/"; hidden ones are left out.

    Args:
        folder: The folder.
        suffixes: Those of images, in lower case.
    """
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
                    elif os.path.splitext(entry.name)[1].lower() in suffixes and entry.is_file():  # noqa: PTH122
                        found.append(prefix + entry.name)
        except OSError as error:
            if not prefix:
                raise UsageError(f"{folder}: cannot be read ({error.strerror})") from None
    return found


def of_unread(names: Sequence[str]) -> str:
    """Return a sentence about images of kinds that are not read."""
    shown = ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} image{'s' * (len(names) != 1)} of other kinds left out ({shown}); convert them to JPEG or PNG"


def natural(name: str) -> list[tuple[int, str]]:
    """Return the key that sorts names by the numbers in them."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in _NUMBERS.split(name)]


_NUMBERS = re.compile(r"([0-9]{1,18})")
# What cameras and editors write besides. Without this list they would be missing without a word.
UNREAD = frozenset(".arw .cr2 .cr3 .dng .heic .heif .nef .orf .psd .raf .rw2 .svg".split())  # noqa: SIM905


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

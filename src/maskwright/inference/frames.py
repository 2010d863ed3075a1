"""Sources of frames: a folder of images, a video file, a list, or any iterable, one frame at a time.

Frames are read when they are needed. A source that can be searched gives any frame again; of an iterable, such as a
camera, only the frame that was read last is kept.
"""

from __future__ import annotations

import operator
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex, cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.findings import DataWarning
from maskwright.data.images import Reading, common_white, common_white_of, white_words
from maskwright.data.pixel_values import range_end
from maskwright.errors import DataError, ImageError, MissingExtraError, UsageError
from maskwright.inference.sources import SUFFIXES, Item, displayed, items

KINDS = (
    "a folder of images, a video file, a list of images, an array (T, H, W, 3), a tensor (T, 3, H, W) or an iterable"
)
HELD = 256 << 20  # bytes of decoded frames of a video file that is read backwards


class Frames(ABC):
    """Frames of a video, all of one size.

    Attributes:
        name: What messages call the source.
        length: Number of frames, as far as it is known in advance; None if it is not.
        rate: Frames per second; None if it is not known.
        size: H, W; None before the first frame has been read.
        searchable: Whether frames can be read in any order.
        problem: Why the source ended early; None if it did not.
    """

    searchable = True

    def __init__(self, name: str, length: int | None, rate: float | None = None):
        self.name, self.rate = name, rate
        self.length: int | None = length
        self.size: tuple[int, int] | None = None
        self.problem: str | None = None

    @abstractmethod
    def _read(self, index: int) -> UInt8[Tensor, "3 H W"] | None:
        """Reads a frame; None after the last one."""

    def get(self, index: int) -> UInt8[Tensor, "3 H W"] | None:
        """Returns the pixels of a frame, RGB; None after the last one.

        Raises:
            ImageError: If the frame cannot be read, or has another size than those before.
            UsageError: If the source cannot be searched and the frame is over.
        """
        number = frame_number(index, self.name)
        image = self._read(number)
        return None if image is None else self._checked(image, number)

    def _checked(self, image: UInt8[Tensor, "3 H W"], index: int) -> UInt8[Tensor, "3 H W"]:
        """`image`, which must have the size of the frames before."""
        size = (image.shape[1], image.shape[2])
        if self.size is None:
            self.size = size
        if size != self.size:
            raise ImageError(
                f"{self.name}: frame {index} has {size[1]} x {size[0]} pixels, but those before have {self.size[1]} x "
                f"{self.size[0]}; all frames must have one size"
            )
        return image

    def frame_name(self, index: int) -> str:
        """The name of a frame's output files, without suffix."""
        return f"{index:05d}"

    def close(self) -> None:  # noqa: B027 - most sources have nothing to close
        """Closes files."""

    def __iter__(self) -> Iterator[UInt8[Tensor, "3 H W"]]:
        index = 0
        while (image := self.get(index)) is not None:
            yield image
            index += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def open_frames(source: Any) -> Frames:
    """Opens a source of frames.

    Args:
        source: A folder of images, whose names are sorted by the numbers in them; a video file (needs the extra
            "video"); a list of images as `predict` accepts them; an array (T, H, W, 3) or a tensor (T, 3, H, W); an
            iterable, which is read once; or `Frames`.

    Raises:
        UsageError: If there are no frames, or the source is of another kind.
        DataError: If a video file cannot be opened.
        MissingExtraError: If a video file is given and PyAV is not installed.
    """
    if isinstance(source, Frames):
        return source
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            raise UsageError(f"{path}: there is no such file or folder; expected {KINDS}")
        if path.suffix.lower() in SUFFIXES - {".gif"}:
            raise UsageError(f"{path}: is a single image; expected {KINDS}")
        return VideoFile(path)
    if isinstance(source, (np.ndarray, Tensor)):
        values = cast("np.ndarray[Any, Any] | Tensor", source)
        if values.ndim != 4:
            raise UsageError(f"frames must be {KINDS}, got shape {tuple(values.shape)}")
        return ListedFrames(list(values), "the list of frames")
    kind = type(source).__name__
    if isinstance(source, (Mapping, Set, bytes, bytearray)) or not isinstance(source, Iterable):
        raise UsageError(f"frames must be {KINDS}, got {kind}")
    if isinstance(source, Sequence):
        return ListedFrames(cast("Sequence[Any]", source), "the list of frames")
    return StreamedFrames(cast("Iterable[Any]", source))


def frame_number(value: SupportsIndex, name: str) -> int:
    """The number of a frame, an integer of any library from 0; UsageError, which names the source, for others."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(f"{name}: frames are counted by integers from 0, got {value!r}")
    return number


# ---- lists and folders -----------------------------------------------------------------------------------------------


class ListedFrames(Frames):
    """Frames that are all there: files or images in memory.

    Args:
        source: Paths or images.
        name: What messages call the source.
    """

    def __init__(self, source: Sequence[Any], name: str):
        super().__init__(name, len(source))
        if not len(source):
            raise UsageError(f"{name}: there are no frames")
        self._items = [_item(entry) for entry in source]
        paths = [item.path for item in self._items if item.path is not None]
        ranges = [common_white(paths) if paths else None, _white_of_arrays([item.given for item in self._items])]
        white = max((end for end in ranges if end is not None), default=None)
        if white is not None and white < 0xFFFF:
            warnings.warn(white_words(white), DataWarning, stacklevel=3)
        self._reading = Reading(white)

    def _read(self, index: int) -> UInt8[Tensor, "3 H W"] | None:
        if index >= len(self._items):
            return None
        return displayed(replace(self._items[index], reading=self._reading))

    def frame_name(self, index: int) -> str:
        path = self._items[index].path
        return f"{index:05d}" if path is None else path.stem


def _white_of_arrays(given: Sequence[Any]) -> int | None:
    """The value that becomes 255 in all frames, if some are arrays of integers of more than 8 bits.

    Judged frame by frame, the brightness of a clip would change with the largest value of each frame.
    """

    def white(number: int) -> int | None:
        values = given[number]
        if not isinstance(values, (np.ndarray, Tensor)) or (isinstance(values, Tensor) and values.is_floating_point()):
            return None
        array = cast("np.ndarray[Any, Any]", values.detach().cpu().numpy() if isinstance(values, Tensor) else values)
        largest = int(array.max()) if array.dtype.kind in "ui" and array.dtype.itemsize > 1 and array.size else 0
        return range_end(largest) if largest > 255 else None

    return common_white_of(len(given), white)


def _folder(path: Path) -> ListedFrames:
    """The images of a folder, sorted by the numbers in their names; numbers that are missing are mentioned."""
    found = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not found:
        raise UsageError(f"{path}: no images in this folder")
    found.sort(key=lambda p: [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", p.name)])
    missing = _gaps([p.stem for p in found])
    if missing:
        first, count = missing
        others = f" and {count - 1} other number{'s' * (count > 2)}" if count > 1 else ""
        warnings.warn(
            f"{path}: there is no frame with number {first}{others}; the {len(found)} frames are taken one after the "
            "other",
            DataWarning,
            stacklevel=3,
        )
    stems = Counter(p.stem for p in found)
    stem, times = stems.most_common(1)[0]
    if times > 1:
        raise UsageError(
            f"{path}: {times} images are named {stem!r}; a folder of frames must hold one image of each name"
        )
    return ListedFrames(found, str(path))


def _gaps(stems: Sequence[str]) -> tuple[int, int] | None:
    """The first missing number in the names of frames and how many are missing; None if there is no gap.

    Names may count in steps: the most frequent difference is the step.
    """
    ends = [re.search(r"(\d+)\D*$", stem) for stem in stems]
    if len(stems) < 3 or not all(ends):
        return None
    numbers = [int(m[1]) for m in ends if m]
    steps = np.diff(numbers)
    if (steps <= 0).any():
        return None
    step = Counter(steps.tolist()).most_common(1)[0][0]
    wide = [n for n, own in zip(numbers, steps, strict=False) if own > step]
    if not wide:
        return None
    return wide[0] + step, int(sum((own - 1) // step for own in steps if own > step))


def _item(entry: Any) -> Item:
    found = items(entry, False)
    if not isinstance(found, list) or len(found) != 1:
        raise UsageError("each frame must be a single image: a path, an array, a tensor, a PIL image or bytes")
    return found[0]


# ---- iterables -------------------------------------------------------------------------------------------------------


class StreamedFrames(Frames):
    """Frames of an iterable, which are read one by one and not kept, apart from the last one.

    Args:
        source: Images as `predict` accepts them.
    """

    searchable = False

    def __init__(self, source: Iterable[Any]):
        super().__init__("the stream", None)
        self._source = iter(source)
        self._index: int = -1
        self._ended = False
        self._last: Tensor | None = None

    def _read(self, index: int) -> UInt8[Tensor, "3 H W"] | None:
        if index < self._index:
            raise UsageError(
                f"frame {index} of the stream is over: only the last one, {self._index}, is kept; to go back, give a "
                "list, a folder or a video file"
            )
        while self._index < index and not self._ended:
            try:
                entry = next(self._source)
            except StopIteration:
                self._ended, self.length = True, self._index + 1
                break
            self._index += 1
            self._last = displayed(_item(entry))
        return self._last if self._index == index else None


class PushedFrames(StreamedFrames):
    """Frames that are given one by one with `push`, for live use."""

    def __init__(self) -> None:
        super().__init__(())

    def push(self, image: Any) -> int:
        """Takes the next frame.

        Returns:
            Its number.

        Raises:
            ImageError: If it cannot be read or has another size than those before; it is not counted then.
        """
        self._last = self._checked(displayed(_item(image)), self._index + 1)
        self._index += 1
        return self._index

    def _read(self, index: int) -> UInt8[Tensor, "3 H W"] | None:
        if index > self._index:
            return None
        return super()._read(index)


# ---- video files -----------------------------------------------------------------------------------------------------


class VideoFile(Frames):
    """Frames of a video file, decoded by PyAV one at a time.

    Reading forwards decodes every frame once. Reading backwards decodes stretches of frames again, of which as many are
    kept as fit into a budget of bytes.

    Args:
        path: The file.

    Raises:
        DataError: If the file cannot be opened, or has no video.
        MissingExtraError: If PyAV is not installed.
    """

    def __init__(self, path: Path):
        try:
            import av
        except ImportError:
            raise MissingExtraError("PyAV, which reads video files,", "video") from None
        self.path, self._av = path, cast(Any, av)
        self._container: Any = None
        self._decoder: Iterator[Any] = iter(())
        self._keys = dict[int, int]()  # number of each key frame that was seen, and its time stamp
        self._held = OrderedDict[int, Tensor]()
        self._next = 0
        self._end: float | None = None
        self._open()
        stream = self._container.streams.video[0]
        rate = stream.average_rate or stream.base_rate
        super().__init__(str(path), int(stream.frames) or None, float(rate) if rate else None)

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> None:
        """Opens the file at its beginning."""
        self.close()
        try:
            self._container = self._av.open(str(self.path))
            streams = self._container.streams.video
            if not streams:
                raise DataError(f"{self.path}: contains no video; expected a video file or a folder of images")
            streams[0].thread_type = "AUTO"
            self._decoder = self._container.decode(streams[0])
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be opened as a video ({_reason(error)})") from None
        self._next = 0

    def _read(self, index: int) -> UInt8[Tensor, "3 H W"] | None:
        if index in self._held:
            return self._held[index]
        room = 1
        if index < self._next:  # backwards: frames before this one will be asked for next
            height, width = self.size or (1, 1)
            room = max(1, min(64, HELD // (3 * height * width)))
            self._search(max(0, index - room + 1))
        self._held.clear()
        while self._next <= index:
            wanted = self._next > index - room
            image = self._decode(wanted)
            if image is None:
                return None
            if wanted:
                self._held[self._next - 1] = image
        return self._held[index]

    def _decode(self, wanted: bool) -> Tensor | None:
        """The next frame; None at the end. A frame that is not `wanted` is not converted."""
        if self._container is None:
            self._open()
        try:
            frame = next(self._decoder, None)
        except (self._av.FFmpegError, ValueError) as error:
            raise self._broken(_reason(error)) from None
        if frame is None:
            self._check_end()
            return None
        if getattr(frame, "is_corrupt", False):
            raise self._broken("its data is damaged")
        if frame.key_frame and frame.pts is not None:
            self._keys[self._next] = int(frame.pts)
        if frame.time is not None:
            self._end = float(frame.time)
        self._next += 1
        if not wanted:
            return torch.empty(0)
        pixels: Any = frame.to_ndarray(format="rgb24")
        turns = round(float(getattr(frame, "rotation", 0) or 0) / 90) % 4
        if turns:
            pixels = np.rot90(pixels, turns)
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)  # pyright: ignore[reportUnknownMemberType] - untyped in torch

    def _broken(self, reason: str) -> ImageError:
        return ImageError(f"{self.path}: frame {self._next} cannot be decoded ({reason})")

    def _check_end(self) -> None:
        """Remembers that the video has ended before the time that its header states."""
        stream, count, declared = self._container.streams.video[0], self._next, self.length
        self.length = count
        if not count:
            raise DataError(f"{self.path}: contains no frame that can be decoded")
        duration = None if stream.duration is None else float(stream.duration * stream.time_base)
        if duration is None and self._container.duration and len(self._container.streams) == 1:
            duration = self._container.duration / 1e6
        last = None if self._end is None else self._end - float((stream.start_time or 0) * stream.time_base)
        late = duration is None or last is None or last + 1.5 / (self.rate or duration) < duration
        if declared is not None and count < declared and late:
            self.problem = f"{self.path}: ends after {count} of {declared} frames; the file may be incomplete"
        elif declared is None and duration is not None and last is not None and last + 2 / (self.rate or 1) < duration:
            seconds = f"{last:.1f} of {duration:.1f} seconds"
            self.problem = f"{self.path}: ends after {count} frames, {seconds}; the file may be incomplete"

    def _search(self, index: int) -> None:
        """Moves to the last key frame that is known before a frame, or to the beginning."""
        known = max((number for number in self._keys if number <= index), default=0)
        self._open()
        if not known:
            return
        try:
            self._container.seek(self._keys[known], stream=self._container.streams.video[0])
            for frame in self._decoder:
                if frame.pts == self._keys[known]:
                    self._decoder, self._next = chain([frame], self._decoder), known
                    return
        except (self._av.FFmpegError, ValueError):
            pass
        self._open()


def _reason(error: BaseException) -> str:
    """What a decoder says, without the name of the file."""
    text = str(getattr(error, "strerror", None) or error or type(error).__name__)
    return " ".join(text.split())[:120]

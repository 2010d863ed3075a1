"""Results of tracking, written frame by frame: maps of ids, COCO results, drawn images and a video."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from maskwright.errors import DataError, MissingExtraError, UsageError, interruption
from maskwright.files import atomic_path, remove_stale_parts, write_json
from maskwright.inference.outputs import RecordStream, write_image
from maskwright.locks import FolderLock
from maskwright.structures import Instances

Kind = Literal["masks", "coco", "drawn", "video"]
MOST = 65535  # largest id in a map
KINDS: tuple[Kind, ...] = ("masks", "coco", "drawn", "video")


class TrackWriter:
    """Writes the objects of a video to a folder, one frame at a time.

    - "masks": ``masks/NAME.png``, indexed as in DAVIS: the value of a pixel is the id of its object, 0 is background;
      16 bits if an id is above 254, because 255 stands for void pixels in maps of 8 bits.
    - "coco": ``results.json``, COCO results with image_id = frame + 1 and ``track_id``; ``frames.json``, the "images"
      and "categories" that they refer to.
    - "drawn": ``drawn/NAME.jpg``, the frame with its objects drawn over it.
    - "video": ``tracked.mp4``, the same as a video (needs the extra "video").

    The files about all frames appear in `close`, also if the work ends early: what was added before is complete. If it
    fails before the first frame, nothing is written.

    Args:
        folder: The output folder; created if missing.
        kinds: What to write.
        rate: Frames per second of the video.
        classes: Class names.
        labels: The class of each object by id; None: all have the first.

    Raises:
        DataError: By all methods, if a file cannot be written.
        UsageError: If a kind is unknown, or another process writes into the folder.
        MissingExtraError: If a video is asked for and PyAV is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        kinds: Collection[Kind] = ("masks", "coco"),
        *,
        rate: float | None = None,
        classes: Sequence[str] = ("object",),
        labels: Mapping[int, int] | None = None,
    ):
        unknown = set(kinds) - set(KINDS)
        if unknown:
            raise UsageError(f"format must be among {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
        self.folder, self.kinds, self.rate = Path(folder), frozenset(kinds), rate or 25.0
        self.classes, self.labels = tuple(classes), labels
        self.frames: list[dict[str, Any]] = []
        self.ids: set[int] = set()
        self._results = RecordStream(self.folder / "results.json")
        self._video = _Video(self.folder / "tracked.mp4", self.rate) if "video" in kinds else None
        self._lock = FolderLock(self.folder, "track", "another process writes tracks here", DataError)
        remove_stale_parts(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is not None and not self.frames:  # nothing to keep, and earlier results are not replaced
            self._results.abandon()
            if self._video is not None:
                self._video.abandon()
            self._lock.release()
            return
        self.close()
        if isinstance(error, KeyboardInterrupt):
            number, count = getattr(error, "exit_code", 130) - 128, len(self.frames)
            words = f"interrupted after {count} frame{'s' * (count != 1)}, whose results are in {self.folder}"
            raise interruption(words, number) from None

    def add(self, frame: int, name: str, objects: Instances, image: UInt8[Tensor, "3 H W"] | None = None) -> None:
        """Writes the objects of a frame.

        Args:
            frame: Number of the frame.
            name: Name of its files, without suffix.
            objects: The objects, with ids.
            image: The pixels, for drawing.
        """
        if objects.ids is None:
            raise UsageError("the objects have no ids; track them first")
        ids: list[int] = cast("list[int]", objects.ids.tolist())  # pyright: ignore[reportUnknownMemberType] - not typed
        if self.labels is not None:
            own = torch.tensor([self.labels.get(id, 0) for id in ids], dtype=torch.int64)
            objects = replace(objects, labels=own)
        if "masks" in self.kinds:
            write_image(self.folder / "masks" / f"{name}.png", id_map(objects, ids), sync=False)
        if image is not None and {"drawn", "video"} & self.kinds:
            drawn = drawing(objects, image)
            if "drawn" in self.kinds:
                write_image(self.folder / "drawn" / f"{name}.jpg", drawn, sync=False)
            if self._video is not None:
                self._video.add(np.asarray(drawn))
        if "coco" in self.kinds:  # last: after an interruption, the records are of the frames that are listed
            records = objects.to_coco(frame + 1)
            self._results.add([{**record, "track_id": id} for record, id in zip(records, ids, strict=True)])
        height, width = objects.image_size
        self.frames.append({"id": frame + 1, "file_name": name, "height": height, "width": width})
        self.ids |= set(ids)

    def close(self) -> None:
        """Completes the files about all frames."""
        try:
            if self._video is not None:
                self._video.close()
            if "coco" in self.kinds:
                self._results.close()
                categories = [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)]
                write_json(self.folder / "frames.json", {"images": self.frames, "categories": categories}, DataError)
        finally:
            self._lock.release()


def id_map(objects: Instances, ids: Sequence[int]) -> Any:
    """The id of each pixel as a PIL image; where masks overlap, the object with the higher score is on top."""
    from PIL import Image

    large = max(ids, default=0) > 254  # 255 is void in maps of 8 bits
    if max(ids, default=0) > MOST:
        raise DataError(f"maps hold ids of up to {MOST}, got {max(ids)}; leave out the format masks")
    plane = np.zeros(objects.image_size, np.uint16 if large else np.uint8)
    if objects.masks is not None:
        scores = torch.zeros(len(ids)) if objects.scores is None else objects.scores
        order = cast("list[int]", scores.argsort(stable=True).tolist())  # pyright: ignore[reportUnknownMemberType] - not typed
        frames, crops = objects.masks.crops()
        places = cast("list[list[int]]", frames.tolist())  # pyright: ignore[reportUnknownMemberType] - not typed
        for row in order:
            x0, y0, x1, y1 = places[row]
            plane[y0:y1, x0:x1][crops[row].numpy()] = ids[row]
    if large:
        return Image.fromarray(plane)
    image = Image.fromarray(plane)  # indexed: the palette gives each id its colour
    image.putpalette(palette())
    return image


def palette() -> list[int]:
    """The 256 colours of maps of ids in Pascal VOC and DAVIS: the bits of an id, in turn, set those of the channels."""
    number = np.arange(256)
    colours = np.zeros((256, 3), np.int64)
    for step in range(8):
        for channel in range(3):
            colours[:, channel] |= ((number >> (3 * step + channel)) & 1) << (7 - step)
    return [int(v) for v in colours.reshape(-1)]


def drawing(objects: Instances, image: UInt8[Tensor, "3 H W"]) -> Any:
    """The objects drawn over a frame: an object has the same colour in all frames, and its id as the label."""
    assert objects.ids is not None
    numbered = replace(objects, labels=objects.ids)
    return numbered.draw(image, colour_by="class", boxes=objects.masks is None, scores=False)


class _Video:
    """A video that is encoded frame by frame; it appears under its name when it is closed."""

    def __init__(self, path: Path, rate: float):
        try:
            import av
        except ImportError:
            raise MissingExtraError("PyAV, which writes videos,", "video") from None
        self.path, self._av = path, cast(Any, av)
        self._rate = Fraction(rate).limit_denominator(1001)
        self._file = contextlib.ExitStack()
        self._container: Any = None
        self._stream: Any = None

    def add(self, pixels: np.ndarray[Any, Any]) -> None:
        """Encodes a frame (H, W, 3). Sides must be even: a row or column may be repeated at the end."""
        height, width = pixels.shape[:2]
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        try:
            if self._container is None:
                part = self._file.enter_context(atomic_path(self.path, DataError))
                self._container = self._av.open(str(part), "w", format="mp4")
                codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
                self._stream = self._container.add_stream(codec, rate=self._rate)
                self._stream.width, self._stream.height = pixels.shape[1], pixels.shape[0]
                self._stream.pix_fmt = "yuv420p"
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            self._container.mux(self._stream.encode(frame))
        except (self._av.FFmpegError, OSError) as error:
            raise DataError(f"{self.path}: cannot be written ({error})") from None

    def abandon(self) -> None:
        """Drops what was encoded; an earlier video stays."""
        container, self._container = self._container, None
        if container is None:
            return
        with contextlib.suppress(self._av.FFmpegError, OSError):
            container.close()
        abandoned = DataError(f"{self.path}: the video was abandoned")
        self._file.__exit__(DataError, abandoned, None)  # removes the temporary file

    def close(self) -> None:
        """Ends the video."""
        if self._container is None:
            return
        container, self._container = self._container, None
        with self._file:  # renames the file at the end, if nothing fails
            try:
                container.mux(self._stream.encode())
                container.close()
            except (self._av.FFmpegError, OSError) as error:
                raise DataError(f"{self.path}: cannot be written ({error})") from None

"""Objects of a video: a session that starts from prompts or from detections, or detections that a tracker follows."""

# Values of JSON files are unknown until they are checked.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.errors import AnnotationError, DataError, UsageError
from maskwright.inference.frames import Frames
from maskwright.inference.predicting import predict
from maskwright.inference.prompting import Asked, PromptBook, read_prompts
from maskwright.inference.track_output import TrackWriter
from maskwright.inference.tracking import ObjectTracker, track_objects
from maskwright.inference.video import TrackedInstances, VideoSession
from maskwright.structures import Instances, Prompts
from maskwright.systems import System
from maskwright.text import printable

OVERLAP = 0.5  # IoU with a tracked object above which a detection is not a new one


@dataclass
class Start:
    """The classes of the objects of a session.

    Attributes:
        classes: Class names.
        labels: The class of each object by id.
    """

    classes: tuple[str, ...] = ("object",)
    labels: dict[int, int] | None = None


def prompt_from_book(session: VideoSession, frame: int, book: PromptBook, least: float = -math.inf) -> Start:
    """Prompts objects in a frame.

    Args:
        session: The session.
        frame: Number of the frame.
        book: The prompts, as for an image with the name of the frame.
        least: Objects with lower scores are left out.

    Raises:
        UsageError: If there are none.
    """
    _, height, width = session.image(frame).shape
    size, name = (int(height), int(width)), session.frames.frame_name(frame)
    asked = book.of(Path(f"{name}.jpg"), size)
    if asked is None or not len(asked.prompts):
        raise UsageError(book.unused() or f"there are no prompts for frame {frame} ({printable(name)})")
    if asked.scores is not None:
        kept = (asked.scores >= least).nonzero()[:, 0]
        if not len(kept):
            best = float(asked.scores.max())
            raise UsageError(
                f"no detection in frame {frame} ({printable(name)}) scores at least {least:g}; the best scores {best:g}"
            )
        asked = Asked(asked.prompts[kept], None if asked.labels is None else asked.labels[kept], asked.scores[kept])
    return _add(session, frame, asked, book.classes or ("object",))


def prompt_from_file(session: VideoSession, path: str | Path, frame: int) -> Start:
    """Prompts objects from a JSON file of prompts, see `prompting.read_prompts`.

    Args:
        session: The session.
        path: A list of objects, for `frame`; or a mapping from frames, by number or by file name, to such lists. With
            an "id" (an integer), objects of several frames are the same.
        frame: See `path`.

    Raises:
        AnnotationError: If the file has another form, or there is no such frame.
    """
    book = read_prompts(path)
    document: Any = json.loads(Path(path).read_bytes())
    if isinstance(document, list):
        document = {str(frame): document}
        numbers = {str(frame): frame}
    else:
        numbers = {name: _frame_of(name, session.frames, path) for name in document}
    if not any(document.values()):
        raise AnnotationError(f"{path}: contains no prompts")
    start = Start(book.classes or ("object",), {} if book.classes else None)
    for name, number in sorted(numbers.items(), key=lambda pair: pair[1]):
        size = (int(session.image(number).shape[1]), int(session.image(number).shape[2]))
        asked = book.of(Path(name), size)
        assert asked is not None
        ids = [entry.get("id") for entry in document[name]]
        if any(
            id is not None and (not isinstance(id, int) or isinstance(id, bool) or not 0 < id < 1 << 63) for id in ids
        ):
            raise AnnotationError(f"{path}: an id of an object must be a positive integer of less than 2^63")
        free = max([*session.ids, *(id for id in ids if id is not None)], default=0)
        own = [id if id is not None else (free := free + 1) for id in ids]
        if len(set(own)) != len(own):
            raise AnnotationError(f"{path}: two objects of {name} have the same id")
        session.prompt_many(number, asked.prompts, own)
        if start.labels is not None and asked.labels is not None:
            start.labels |= dict(zip(own, asked.labels.tolist(), strict=True))
    return start


def _frame_of(name: str, frames: Frames, path: str | Path) -> int:
    """The number of a frame from a key of the file."""
    stem = Path(name).stem
    length = frames.length
    if length is not None:
        for number in range(length):
            if frames.frame_name(number) == stem:
                return number
    if stem.isdigit() and (length is None or int(stem) < length):
        return int(stem)
    raise AnnotationError(f"{path}: there is no frame {name!r}; frames are given by number, from 0, or by file name")


def _add(session: VideoSession, frame: int, asked: Asked, classes: tuple[str, ...]) -> Start:
    before = list(session.ids)
    session.prompt_many(frame, asked.prompts)
    added = [id for id in session.ids if id not in before]
    labels = None if asked.labels is None else dict(zip(added, asked.labels.tolist(), strict=True))
    return Start(classes, labels)


# ---- detections ------------------------------------------------------------------------------------------------------


class DetectedStart(Start):
    """Objects that an image system finds in a frame, and later new ones.

    Args:
        session: The session.
        detector: The image system.
        score_threshold: Detections with lower scores are left out.
        options: Further options of `predict`.
    """

    def __init__(
        self, session: VideoSession, detector: System, score_threshold: float = 0.5, options: Mapping[str, Any] = {}
    ):
        super().__init__(tuple(detector.classes), {})
        self.session, self.detector = session, detector
        self.score_threshold, self.options = score_threshold, dict(options)

    def detect(self, frame: int, tracked: TrackedInstances | None = None) -> TrackedInstances | None:
        """Prompts with the boxes that are found in a frame, of those that are not tracked yet.

        Args:
            frame: Number of the frame.
            tracked: The objects that are tracked in it.

        Returns:
            All objects of the frame; None if there is no new one.
        """
        image = self.session.image(frame)
        prediction = predict(self.detector, image, score_threshold=self.score_threshold, **self.options)
        found: Instances = prediction.found()
        if tracked is not None and len(tracked) and len(found):
            found = found[~(_overlaps(found, tracked) > OVERLAP).any(1)]
        boxes = found.boxes
        found = found[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        if not len(found):
            return None
        before = set(self.session.ids)
        result = self.session.prompt_many(frame, Prompts.from_boxes(found))
        added = [id for id in self.session.ids if id not in before]
        assert self.labels is not None
        self.labels |= dict(zip(added, found.labels.tolist(), strict=True))
        return result


def _overlaps(found: Instances, tracked: Instances) -> torch.Tensor:
    """IoU of masks, or of boxes for systems without masks."""
    if found.masks is not None and tracked.masks is not None:
        return found.masks.iou(tracked.masks)
    from torchvision.ops import box_iou  # pyright: ignore[reportMissingTypeStubs]

    return box_iou(found.boxes.float(), tracked.boxes.float())


def follow(
    session: VideoSession,
    writer: TrackWriter,
    start: Start,
    first: int,
    *,
    count: int | None = None,
    every: int | None = None,
) -> str | None:
    """Tracks and writes frame by frame.

    Args:
        session: The session, with prompts.
        writer: Where objects are written to.
        start: The classes; a `DetectedStart` finds new objects.
        first: The first frame.
        count: Maximum number of frames.
        every: Look for new objects in every `every`-th frame.

    Returns:
        Why the video ended early; None if it did not. What was written before is complete.
    """
    try:
        for objects in session.run(first, count=count):
            shown: TrackedInstances = objects
            if every and isinstance(start, DetectedStart) and objects.frame > first and objects.frame % every == 0:
                shown = start.detect(objects.frame, objects) or objects
            name = session.frames.frame_name(objects.frame)
            writer.add(objects.frame, name, replace(shown), session.image(objects.frame))
    except DataError as error:
        if not writer.frames:
            raise
        return str(error)
    return session.frames.problem


def follow_detections(
    system: System,
    frames: Frames,
    writer: TrackWriter,
    tracker: ObjectTracker,
    *,
    first: int = 0,
    count: int | None = None,
    **options: Any,
) -> str | None:
    """Detects, tracks and writes frame by frame, without prompts.

    Args:
        system: An image system.
        frames: The frames.
        writer: Where objects are written to.
        tracker: Gives ids to the detections.
        first: The first frame.
        count: Maximum number of frames.
        **options: Options of `track_objects`.

    Returns:
        Why the video ended early; None if it did not. What was written before is complete.

    Raises:
        UsageError: If there is no frame `first`, or an option is invalid.
        ImageError: If the first frame cannot be read.
    """
    broken: list[DataError] = []

    def images() -> Iterator[Tensor]:
        index = first
        try:
            while (count is None or index < first + count) and (image := frames.get(index)) is not None:
                yield image
                index += 1
        except DataError as error:  # frames that were read before are still processed
            broken.append(error)

    index = first
    for prediction in track_objects(system, images(), tracker=tracker, **options):
        writer.add(index, frames.frame_name(index), prediction.found(), prediction.given)
        index += 1
    if index == first:
        if broken:
            raise broken[0]
        raise UsageError(f"{frames.name} has no frame {first}; it has {frames.length or 'no'} frames")
    return str(broken[0]) if broken else frames.problem

"""Objects of one frame in the frames before or after it.

Three ways, by what there is: a system for videos (SAM 2), a promptable system of single images, whose prompt is the box
of the frame before, and a detector, whose objects are matched by the IoU of their masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import UInt8
from torch import Tensor

from maskwright.inference.frames import Frames
from maskwright.inference.video import VideoSession
from maskwright.ops.assignment import best_pairs
from maskwright.structures import Instances, Masks, Prompts
from maskwright.systems.kinds.video import VideoSystem
from maskwright.web.assistant import Assistant
from maskwright.web.sources import Source

SAME = 0.1  # IoU of an object in consecutive frames below which it counts as lost, with a box as the prompt
MATCH = 0.3  # the same for detections
GROWTH = 4.0  # change of area between frames above which an object counts as lost


@dataclass(frozen=True)
class Followed:
    """The objects of a frame.

    Attributes:
        frame: The frame.
        masks: The mask of each object that is in it, by the number of its track.
        scores: Their scores.
    """

    frame: int
    masks: dict[int, Masks]
    scores: dict[int, float]


Known = Callable[[int], Mapping[int, Masks]]  # the masks of a frame that a person has made, by track


def frames_between(index: int, until: int) -> range:
    """Return the frames after `index` up to and including `until`, which may be before it."""
    return range(index + 1, until + 1) if until >= index else range(index - 1, until - 1, -1)


class SourceFrames(Frames):
    """A part of a source as frames for a `VideoSession`."""

    def __init__(self, source: Source, first: int, end: int):
        super().__init__(source.path.name, end - first)
        self._source, self._first = source, first

    def _read(self, index: int) -> UInt8[Tensor, "3 H W"] | None:
        return self._source.read(self._first + index) if index < (self.length or 0) else None


def follow_in_video(
    assistant: Assistant, index: int, until: int, objects: Mapping[int, Masks], known: Known
) -> Iterator[Followed]:
    """Follow objects with a system for videos.

    Args:
        assistant: The system, a `VideoSystem`.
        index: The frame of the objects.
        until: The last frame.
        objects: The mask of each object in `index`, by the number of its track.
        known: Masks that a person has made in other frames; they are prompts too.

    Yields:
        The objects of each frame after `index`.
    """
    source = assistant.source
    first, end = source.sequence(index)
    assert isinstance(assistant.system, VideoSystem)
    session = VideoSession(
        assistant.system, SourceFrames(source, first, end), device=assistant.device, dtype=assistant.dtype
    )
    tracks = list(objects)
    session.prompt_many(index - first, Prompts.from_masks(Masks.join([objects[t] for t in tracks])), tracks)
    later = frames_between(index, until)
    for frame in later:
        for track, mask in known(frame).items():
            if track in objects:
                session.prompt(frame - first, track, mask=mask)
    for found in session.run(index - first, count=len(later) + 1, reverse=until < index):
        if found.frame + first == index:
            continue
        assert found.ids is not None
        assert found.masks is not None
        assert found.scores is not None
        ids = cast("list[int]", cast(Any, found.ids).tolist())
        scores = cast("list[float]", cast(Any, found.scores).tolist())
        masks = {id: found.masks[n : n + 1] for n, id in enumerate(ids)}
        yield Followed(found.frame + first, masks, dict(zip(ids, scores, strict=True)))


def follow_in_images(
    assistant: Assistant, index: int, until: int, objects: Mapping[int, Masks], known: Known
) -> Iterator[Followed]:
    """Follow objects with a promptable system: the box of an object in a frame is the prompt in the next one.

    Of the answers, that which overlaps most with the mask before is taken. Arguments as of `follow_in_video`.
    """
    current = dict(objects)
    for frame in frames_between(index, until):
        if not current:
            return
        embedding = assistant.embedding(frame)
        tracks = list(current)
        before = Masks.join([current[t] for t in tracks])
        prompts = Prompts.from_boxes(before.boxes(), embedding.image_size)
        choices = assistant.system.segment(embedding, prompts, answers=4)
        masks, count = choices.masks.pack(), choices.scores.shape[1]
        found, scores = dict[int, Masks](), dict[int, float]()
        for n, track in enumerate(tracks):
            own = masks[n * count : (n + 1) * count]
            overlap = own.iou(before[n : n + 1])[:, 0]
            best = int((overlap * choices.scores[n].cpu().clamp(0.05, 1)).argmax())
            ratio = (int(own.areas()[best]) + 1) / (int(before.areas()[n]) + 1)
            if float(overlap[best]) >= SAME and 1 / GROWTH < ratio < GROWTH:
                found[track], scores[track] = own[best : best + 1], float(choices.scores[n, best])
        yield Followed(frame, found, scores)
        current = found | {track: mask for track, mask in known(frame).items() if track in objects}


def follow_by_matching(
    find: Callable[[int], Instances], index: int, until: int, objects: Mapping[int, Masks], known: Known
) -> Iterator[Followed]:
    """Follow objects by the detections of each frame, matched by the IoU of masks.

    Args:
        find: Returns the detections of a frame.
        index: See `follow_in_video`, as the other arguments.
        until: See there.
        objects: See there.
        known: See there.
    """
    current = dict(objects)
    for frame in frames_between(index, until):
        if not current:
            return
        detections = find(frame)
        assert detections.masks is not None
        tracks = list(current)
        found, scores = dict[int, Masks](), dict[int, float]()
        if len(detections):
            overlap = Masks.join([current[t] for t in tracks]).iou(detections.masks)
            rows, columns = best_pairs(overlap.double().numpy())
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                if overlap[row, column] >= MATCH:
                    found[tracks[row]] = detections.masks[column : column + 1]
                    scores[tracks[row]] = 1.0 if detections.scores is None else float(detections.scores[column])
        yield Followed(frame, found, scores)
        current = found | {track: mask for track, mask in known(frame).items() if track in objects}


def is_for_videos(assistant: Assistant) -> bool:
    """Return whether a promptable system follows objects itself."""
    return isinstance(assistant.system, VideoSystem)

"""Following objects through a video: a session owns frames, prompts and corrections, and yields objects with ids."""

# Tensor.tolist has no type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, SupportsIndex, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.inference.frames import Frames, PushedFrames, frame_number, open_frames
from maskwright.inference.preparing import prepare
from maskwright.ops.planes import axes, place_planes
from maskwright.structures import Embedding, Instances, Masks, Prompts
from maskwright.systems import System
from maskwright.systems.kinds.video import Corrections, Memory, Remembered, VideoSystem

_SCRATCH = 64 << 20  # bytes, for masks on the grid of the video


@dataclass
class TrackedInstances(Instances):
    """The objects of a session that are in a frame.

    `ids` are those of the session. `scores` are the probabilities that the objects are in the frame. Objects that are
    hidden, or outside of the frame, are absent.

    Attributes:
        frame: Number of the frame.
        presence: For every object that has been tracked in the frame the probability that it is there; also for absent
            ones.
    """

    frame: int = 0
    presence: Mapping[int, float] = field(default_factory=dict[int, float], repr=False)


class VideoSession:
    """Objects of a video, from prompts.

    Prompts are given with `prompt`, on any frame and at any time. `run` then goes through the frames and yields the
    objects of each. A prompt on a frame that has been tracked corrects the object there; run again to pass the
    correction on to other frames::

        session = VideoSession(system, "clip.mp4")
        session.prompt(0, 1, points=[(210, 340)])
        for objects in session.run():
            print(objects.frame, objects.ids, objects.masks)

    For live use there are no frames at first; `push` takes one and returns its objects. Frames are not kept: the size
    of a session does not depend on the length of the video.

    Args:
        system: A system for videos, such as SAM 2.
        frames: What `open_frames` accepts; None: frames are given with `push`.
        device: Where to compute; None: a GPU if there is one, otherwise the CPU.
        dtype: Type of weights and activations, see `prepare`.
        compile: Compile the networks, see `prepare`.
        corrections: "keep": prompts on a frame that was tracked before stay when the frame is tracked again. "once":
            they are replaced then, as in the official predictor by default.
        overlap: Whether masks of different objects may overlap. If not, a pixel belongs to the object with the greatest
            logit.
        fill_holes: Holes in masks of up to this many cells of the low-resolution grid are filled; 0: none.
        history: See `Memory`. Starting again from a frame that is further back than the system reads gives the result
            of a longer history only with a larger value; None keeps everything, and is not bounded.
        length: Number of frames, for a system whose published networks depend on it; None: that of `frames`, if it is
            known.
        budget: Bytes of scratch memory of the system; it limits how many objects are computed at a time.

    Attributes:
        system: The prepared system.
        frames: The frames.
        ids: The objects' ids in the order in which they were added.

    Raises:
        UsageError: If the system is not one for videos, or an option is invalid.
    """

    def __init__(
        self,
        system: System,
        frames: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: str = "float32",
        compile: bool = False,
        corrections: Corrections = "keep",
        overlap: bool = True,
        fill_holes: int = 8,
        history: int | None = 0,
        length: int | None = None,
        budget: int = 1 << 30,
    ):
        if not isinstance(system, VideoSystem):
            name = getattr(system, "name", type(system).__name__)
            raise UsageError(
                f"{name} does not track objects in videos; use a system such as sam2, or give ids to its "
                "detections (`track --tracker iou`, `track_objects`)"
            )
        if corrections not in ("keep", "once"):
            raise UsageError(f"corrections must be 'keep' or 'once', got {corrections!r}")
        whole = (("fill_holes", fill_holes, 0), ("history", history, 0), ("length", length, 1), ("budget", budget, 1))
        for name, value, least in whole:
            if value is not None and not (isinstance(value, int) and value >= least):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UsageError(f"{name} must be an integer of at least {least}, got {value!r}")
        ready = prepare(system, device, dtype, compile)
        assert isinstance(ready, VideoSystem)
        self.system = ready
        self.frames: Frames = PushedFrames() if frames is None else open_frames(frames)
        self.overlap, self.budget = overlap, budget
        self.ids: list[int] = []
        self._memory = Memory(
            length=length if length is not None else self.frames.length,
            corrections=corrections,
            fill_holes=fill_holes,
            history=history,
        )
        self._prompts = dict[tuple[int, int], Prompts]()  # by frame and id
        self._embedded: tuple[int, Embedding] | None = None
        self._image: tuple[int, Tensor] | None = None

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def prompt(
        self,
        frame: SupportsIndex,
        id: SupportsIndex,
        *,
        points: Any = None,
        labels: Any = None,
        box: Any = None,
        mask: Any = None,
        hidden: bool = False,
        add: bool = False,
    ) -> TrackedInstances:
        """Prompts an object in a frame. An unknown id begins a new object.

        Earlier prompts of the object in this frame are replaced.

        Args:
            frame: Number of the frame.
            id: The object's id, a positive integer.
            points: Points x, y (P, 2) in pixels of the frame.
            labels: For each point 1 if it is on the object and 0 if it is not; None: all are on it.
            box: x0, y0, x1, y1, together with points or alone.
            mask: A plane (H, W), or `Masks` of length 1; it is the answer.
            hidden: Whether the object is stated not to be in the frame.
            add: Whether points are added to earlier ones of the object in this frame.

        Returns:
            All objects that are known in this frame.

        Raises:
            UsageError: If the prompt is empty, contradictory or outside of the frame, or there is no such frame.
            ImageError: If the frame cannot be read.
        """
        number, own = frame_number(frame, self.frames.name), _checked_id(id)
        given = [points is not None or box is not None, mask is not None, hidden]
        if sum(given) != 1:
            raise UsageError("a prompt must be points, a box or both, or a mask, or hidden=True")
        size = self._size(number)
        if mask is not None:
            prompts = Prompts.from_masks(_mask(mask, size))
            hidden = not int(prompts.masks.areas()[0]) if prompts.masks is not None else False
        elif hidden:
            prompts = _points(size, None, None)
        else:
            prompts = _points(size, points, labels)
            if box is not None:
                prompts = replace(prompts, boxes=_box(box, size))
        if add:
            prompts = self._added(number, own, prompts)
        return self.prompt_many(number, prompts, [own], hidden=[hidden])

    def prompt_many(
        self,
        frame: SupportsIndex,
        prompts: Prompts,
        ids: Sequence[SupportsIndex] | None = None,
        *,
        hidden: Sequence[bool] = (),
    ) -> TrackedInstances:
        """Prompts several objects in a frame, for instance the detections of another system.

        Args:
            frame: Number of the frame.
            prompts: Row n belongs to the object `ids[n]`.
            ids: The objects' ids; None: new ones.
            hidden: For each row whether the object is stated not to be in the frame.

        Returns:
            All objects that are known in this frame.

        Raises:
            UsageError: See `prompt`; or if the prompts are for frames of another size, or `ids` do not fit them.
        """
        if not isinstance(prompts, Prompts):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not be checked
            raise UsageError(f"prompts must be Prompts, got {type(prompts).__name__}; `prompt` takes lists of points")
        number = frame_number(frame, self.frames.name)
        size = self._size(number)
        if prompts.image_size != size:
            raise UsageError(f"the prompts are for frames of {prompts.image_size}, but those of the video have {size}")
        start = max(self.ids, default=0) + 1
        numbers = [_checked_id(v) for v in (range(start, start + len(prompts)) if ids is None else ids)]
        if len(numbers) != len(prompts) or len(set(numbers)) != len(numbers):
            raise UsageError(f"ids must be {len(prompts)} different integers, one for each prompt, got {numbers[:8]}")
        if len(hidden) not in (0, len(prompts)):
            raise UsageError(f"hidden must have an entry for each of {len(prompts)} prompts, got {len(hidden)}")
        empty = (prompts.point_counts == 0) & ~prompts.has_box & ~prompts.has_mask
        gone = [n for n, flag in enumerate(hidden) if flag]
        without = next((n for n in range(len(prompts)) if empty[n] and n not in gone), None)
        if without is not None:
            raise UsageError(f"the prompt of object {numbers[without]} has neither points nor a box nor a mask")
        known = {id: row for row, id in enumerate(self.ids)}
        added = [id for id in numbers if id not in known]
        # Only the prompted objects are computed. Those that are new follow the others.
        order = sorted(range(len(numbers)), key=lambda n: known.get(numbers[n], len(known) + n))
        rows = [known[numbers[n]] for n in order if numbers[n] in known]
        part = self._memory[rows]
        _, after = self.system.track(
            self._embedding(number), part, prompts[torch.tensor(order, dtype=torch.int64)], index=number,
            hidden=[place for place, n in enumerate(order) if n in gone], budget=self.budget,
        )  # fmt: skip
        memory = self._memory.put([*rows, *range(len(known), len(known) + len(added))], after)
        self._memory = replace(memory, frame=self._memory.frame)
        self.ids += [numbers[n] for n in order if numbers[n] not in known]
        self._prompts |= {(number, id): prompts[n : n + 1] for n, id in enumerate(numbers)}
        return self._result(number, self._logits(number))

    def clear(self, frame: SupportsIndex, id: SupportsIndex) -> TrackedInstances:
        """Removes the prompts of an object in a frame. Its mask there stays until the frame is tracked again.

        Returns:
            All objects that are known in this frame.
        """
        row, number = self._row(id), frame_number(frame, self.frames.name)
        self._memory = self._memory.forget(row, number)
        self._prompts.pop((number, self.ids[row]), None)
        return self._result(number, self._logits(number))

    def remove(self, id: SupportsIndex) -> None:
        """Removes an object."""
        row = self._row(id)
        self._memory = self._memory.without(row)
        gone = self.ids.pop(row)
        self._prompts = {key: prompts for key, prompts in self._prompts.items() if key[1] != gone}

    def reset(self) -> None:
        """Removes all objects."""
        self._memory = replace(self._memory, tracks=(), frame=None)
        self.ids.clear()
        self._prompts.clear()

    # ---- tracking ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[TrackedInstances]:
        return self.run()

    def run(
        self, start: int | None = None, *, count: int | None = None, reverse: bool = False
    ) -> Iterator[TrackedInstances]:
        """Tracks all objects through the frames, one frame at a time.

        Prompts can be given between two frames; those on the current frame or on later ones take effect at once.

        Args:
            start: The first frame; None: the earliest with a prompt.
            count: Maximum number of frames; None: to the end of the video.
            reverse: Whether to go backwards. The source of the frames must be searchable.

        Yields:
            The objects of each frame.

        Raises:
            UsageError: If there are no prompts, or no frame `start`.
            ImageError: If a frame cannot be read; what was yielded before is not affected.
        """
        first, length = self.first, self.frames.length
        if count is not None and not isinstance(count, Integral):
            raise UsageError(f"count must be an integer, got {count!r}")
        if count is not None and count < 0:
            raise UsageError(f"count must be at least 0, got {count}")
        if start is not None and (start < 0 or (length is not None and start > length)):
            raise UsageError(f"start must be a frame of {self.frames.name}, which has {length} frames, got {start}")
        if reverse and not self.frames.searchable:
            raise UsageError(f"{self.frames.name} cannot be read backwards; give a list, a folder or a video file")
        index, done = first if start is None else frame_number(start, self.frames.name), 0
        while index >= 0 and (count is None or done < count):
            if self._image_of(index) is None:
                return
            yield self._step(index, reverse)
            index, done = index + (-1 if reverse else 1), done + 1

    def push(self, image: Any, prompts: Prompts | None = None, ids: Sequence[int] | None = None) -> TrackedInstances:
        """Takes the next frame of a live video and tracks all objects in it.

        Args:
            image: An image as `predict` accepts it.
            prompts: Prompts in this frame; objects can also be prompted in it afterwards.
            ids: Their ids, see `prompt_many`.

        Returns:
            The objects of the frame.
        """
        if not isinstance(self.frames, PushedFrames):
            raise UsageError(f"the session reads its frames from {self.frames.name}; make one without frames to push")
        index = self.frames.push(image)
        if len(self._memory) and self._memory.first is not None:
            found = self._step(index, False)
        else:
            found = self._result(index, {})
        return found if prompts is None else self.prompt_many(index, prompts, ids)

    def image(self, frame: SupportsIndex) -> UInt8[Tensor, "3 H W"]:
        """The pixels of a frame, RGB.

        Raises:
            UsageError: If there is no such frame.
        """
        image = self._image_of(frame)
        if image is None:
            raise UsageError(f"{self.frames.name} has no frame {frame}; it has {self.frames.length or 'no'} frames")
        return image

    def logits(self, frame: SupportsIndex) -> dict[int, Float[Tensor, "h w"]]:
        """The mask logits of each object that is known in a frame, on the low-resolution grid."""
        number = frame_number(frame, self.frames.name)
        return {id: entry.logits for id, entry in self._logits(number).items()}

    @property
    def first(self) -> int:
        """The earliest frame with a prompt.

        Raises:
            UsageError: If there are no prompts.
        """
        first = self._memory.first
        if first is None:
            raise UsageError("there are no prompts yet; give some with `prompt` first")
        return first

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of all objects."""
        return self._memory.nbytes

    # ---- internal ----------------------------------------------------------------------------------------------------

    def _step(self, index: int, reverse: bool) -> TrackedInstances:
        _, self._memory = self.system.track(
            self._embedding(index), self._memory, index=index, reverse=reverse, budget=self.budget
        )
        asked = {id for id, track in zip(self.ids, self._memory.tracks, strict=True) if track.prompted}
        return self._result(index, {id: entry for id, entry in self._logits(index).items() if id in asked})

    def _logits(self, frame: int) -> dict[int, Remembered]:
        """What is known of each object in a frame."""
        found = {id: track.known(frame) for id, track in zip(self.ids, self._memory.tracks, strict=True)}
        return {id: entry for id, entry in found.items() if entry is not None}

    def _result(self, frame: int, known: Mapping[int, Remembered]) -> TrackedInstances:
        """The objects of a frame, on its own grid."""
        size = self._size(frame)
        ids = list(known)
        if not ids:
            none = torch.zeros(0, dtype=torch.int64)
            return TrackedInstances(
                size, torch.zeros(0, 4), none, Masks.empty(size), torch.zeros(0), ids=none, frame=frame
            )
        embedding = self._embedding(frame)
        logits = torch.stack([entry.logits for entry in known.values()])
        chances = torch.stack([entry.present for entry in known.values()]).float().sigmoid().cpu()
        masks = self._masks(logits, embedding)
        kept = masks.areas() > 0
        count = int(kept.sum())
        masks = masks[kept]
        return TrackedInstances(
            size, masks.boxes(), torch.zeros(count, dtype=torch.int64), masks, chances[kept],
            ids=torch.tensor(ids)[kept], frame=frame, presence=dict(zip(ids, chances.tolist(), strict=True)),
        )  # fmt: skip

    def _masks(self, logits: Tensor, embedding: Embedding) -> Masks:
        """Masks on the grid of the frame."""
        if self.overlap or len(logits) < 2:
            return place_planes(
                logits, embedding.placement, embedding.input_size, threshold=0.0, steps=self.system.steps
            ).pack()
        owner = disjoint(logits, embedding, self.system.steps)
        return Masks.join([Masks.from_dense((owner == number)[None]).pack() for number in range(len(logits))])

    def _added(self, frame: int, id: int, prompts: Prompts) -> Prompts:
        """Points in addition to those that were given before."""
        before = self._prompts.get((frame, id))
        if before is None or prompts.masks is not None or before.masks is not None:
            return prompts
        points = torch.cat([before.points, prompts.points.to(before.points)], 1)
        labels = torch.cat([before.point_labels, prompts.point_labels], 1)
        boxes = prompts.boxes if prompts.boxes is not None else before.boxes
        return replace(prompts, points=points, point_labels=labels, boxes=boxes)

    def _row(self, id: SupportsIndex) -> int:
        number = _checked_id(id)
        if number not in self.ids:
            known = ", ".join(map(str, self.ids[:16])) or "none"
            raise UsageError(f"there is no object {number}; known ids are {known}")
        return self.ids.index(number)

    def _size(self, frame: SupportsIndex) -> tuple[int, int]:
        image = self.image(frame)
        return (image.shape[1], image.shape[2])

    def _image_of(self, frame: SupportsIndex) -> Tensor | None:
        """The pixels of a frame; the last one that was read is kept."""
        number = frame_number(frame, self.frames.name)
        if self._image is None or self._image[0] != number:
            image = self.frames.get(number)
            if image is None:
                return None
            self._image = number, image
        return self._image[1]

    def _embedding(self, frame: int) -> Embedding:
        """The encoded frame; the last one is kept, for further prompts on it."""
        if self._embedded is None or self._embedded[0] != frame:
            values, placement = self.system.frame_preprocess.apply(self.image(frame))
            self._embedded = frame, self.system.embed(values[None], [placement])[0]
        return self._embedded[1]


def disjoint(logits: Float[Tensor, "n h w"], embedding: Embedding, steps: int) -> Tensor:
    """The object of each pixel: that with the greatest logit; -1 where no logit is above 0.

    Args:
        logits: Mask logits on the low-resolution grid.
        embedding: The frame that they belong to.
        steps: How logits are resized, see `PromptableSystem`.

    Returns:
        (H, W) on the grid of the frame. A few rows are computed at a time.
    """
    down, across = axes(logits, embedding.placement, embedding.input_size, 1 if steps == 1 else 2)
    height, width = embedding.image_size
    step, bands = max(1, _SCRATCH // (4 * len(logits) * width)), list[Tensor]()
    for first in range(0, height, step):
        values, index = (down[first : first + step] @ logits.float() @ across.T).max(0)
        bands.append(torch.where(values > 0, index, -1))
    return torch.cat(bands)


def _points(size: tuple[int, int], points: Any, labels: Any) -> Prompts:
    """Points of one object; none for a box alone."""
    if points is None:
        return Prompts(size, torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.int64))
    return Prompts.from_points(size, [points], None if labels is None else [labels])


def _box(box: Any, size: tuple[int, int]) -> Tensor | None:
    """A box (1, 4)."""
    try:
        corners = [float(value) for value in box]
    except (TypeError, ValueError):
        corners = []
    if len(corners) != 4:
        raise UsageError(f"a box must be x0, y0, x1, y1, got {str(box)[:80]}")
    return Prompts.from_boxes([corners], size).boxes


def _mask(mask: Any, size: tuple[int, int]) -> Masks:
    """A mask of the frame."""
    if isinstance(mask, Masks):
        masks = mask
    else:
        try:
            plane = torch.as_tensor(mask)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"a mask must be a plane (H, W) or Masks, got {type(mask).__name__}: {error}") from None
        if plane.is_floating_point() and bool(plane.isnan().any()):
            raise UsageError("a mask must not contain NaN")
        if plane.ndim == 3 and len(plane) == 1:
            plane = plane[0]
        if plane.ndim != 2:
            raise UsageError(f"a mask must be a plane (H, W), got shape {tuple(plane.shape)}")
        if plane.is_complex():
            raise UsageError(f"a mask must have real values, got {str(plane.dtype).removeprefix('torch.')}")
        if plane.dtype in (torch.uint16, torch.uint32, torch.uint64):
            plane = plane != 0  # torch does not order these types
        masks = Masks.from_dense(plane[None] > 0)
    if len(masks) != 1 or masks.size != size:
        raise UsageError(
            f"a mask must be one of {size[0]} x {size[1]}, got {len(masks)} of {masks.size[0]} x {masks.size[1]}"
        )
    return masks


def _checked_id(value: Any) -> int:
    whole = isinstance(value, float) and value.is_integer()
    try:
        number = 0 if isinstance(value, bool) else int(value) if whole else operator.index(cast(Any, value))
    except TypeError:
        number = 0
    if number < 1:
        raise UsageError(f"ids of objects must be positive integers, got {value!r}")
    if number >= 1 << 63:
        raise UsageError(f"ids of objects must be less than 2^63, got {number}")
    return number

"""Systems that track the objects of prompts through a video, and the memory that they pass from frame to frame."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.options import OptionGroup
from maskwright.structures import Choices, Embedding, Preprocess, Prompts
from maskwright.systems.kinds.promptable import PromptableSystem
from maskwright.systems.system import Task

Corrections = Literal["keep", "once"]


# ---- which frames are read -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryBank(OptionGroup):
    """Which earlier frames a frame attends to, as options of a system (SAM 2, arXiv 2408.00714, section 4).

    Attributes:
        frames: Number of memories: those of prompted frames count as one, the others are of the frames before.
        stride: Distance of the frames before that are read, except for the one immediately before.
        prompted: Maximum number of prompted frames that are read, at least 2: the nearest before, the nearest after,
            then the closest. None: all.
        pointers: Maximum number of object pointers of the frames before, plus one.
        width: Channels of a memory.
        layers: Layers of the memory attention.
        hidden: Channels inside its MLPs.
        dropout: Dropout in training.
    """

    label: ClassVar[str] = "memory"

    frames: int = 7
    stride: int = 1
    prompted: int | None = None
    pointers: int = 16
    width: int = 64
    layers: int = 4
    hidden: int = 2048
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "stride", "pointers", "width", "layers", "hidden")
        self.check_at_least(2, "frames")
        if self.prompted is not None and self.prompted < 2:
            raise UsageError(f"memory.prompted must be at least 2 or null, got {self.prompted}")
        if self.width % 4:
            raise UsageError(f"memory.width must be a multiple of 4, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"memory.dropout must be at least 0 and less than 1, got {self.dropout}")

    @property
    def window(self) -> int:
        """How many frames before it a frame reads at most, besides those with prompts."""
        memories = 1 if self.frames == 2 else 2 + (self.stride - 1) + (self.frames - 3) * self.stride
        return max(memories, self.pointers - 1)

    def select(
        self, index: int, prompted: Sequence[int], tracked: Iterable[int], *, length: int | None, reverse: bool
    ) -> Attended:
        """Selects what a frame attends to.

        Args:
            index: The frame.
            prompted: Frames with prompts, in the order in which they were given.
            tracked: Other frames that are remembered.
            length: Number of frames of the video; None if it is not known.
            reverse: Whether the video is tracked backwards, so that "before" means later frames.
        """
        near = self._near(index, prompted)
        others = set(tracked) | (set(prompted) - set(near))
        back = -1 if reverse else 1
        memories = [(frame, self.frames - 1) for frame in near]
        for ago in range(self.frames - 1, 0, -1):  # oldest first
            frame = self._before(index, ago, back)
            if frame in others:
                memories.append((frame, ago - 1))
        # The published networks divide by the number of frames of a shorter video.
        most = self.pointers if length is None else min(length, self.pointers)
        pointers = [(frame, back * (index - frame)) for frame in near if back * (index - frame) >= 0]
        for ago in range(1, most):
            frame = index - back * ago
            if frame < 0 or (length is not None and frame >= length):
                break
            if frame in others:
                pointers.append((frame, ago))
        return Attended(tuple(memories), tuple((f, ago / max(1, most - 1)) for f, ago in pointers))

    def _before(self, index: int, ago: int, back: int) -> int:
        """The memory number `ago` before a frame: the one immediately before, then multiples of the stride."""
        if ago == 1:
            return index - back
        step = self.stride
        first = (index - 2) // step * step if back > 0 else -(-(index + 2) // step) * step
        return first - back * (ago - 2) * step

    def _near(self, index: int, prompted: Sequence[int]) -> list[int]:
        """The prompted frames that are read as such."""
        if self.prompted is None or len(prompted) <= self.prompted:
            return list(prompted)
        before = max((f for f in prompted if f < index), default=None)
        after = min((f for f in prompted if f >= index), default=None)
        near = [frame for frame in (before, after) if frame is not None]
        rest = sorted((f for f in prompted if f not in near), key=lambda frame: abs(frame - index))
        return near + rest[: self.prompted - len(near)]


@dataclass(frozen=True)
class Attended:
    """What a frame attends to.

    Attributes:
        memories: Frames whose memories are read, each with its temporal embedding.
        pointers: Frames whose object pointers are read, each with its distance in units of the greatest one.
    """

    memories: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, float], ...]


# ---- the memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Remembered:
    """What is kept of an object in one frame.

    Attributes:
        logits: Mask logits on the low-resolution grid.
        present: Logit of the prediction that the object is in the frame.
        score: Predicted IoU of the mask.
        pointer: The object pointer.
        memory: The encoded mask; None until another frame attends to it.
        frame: Features of the frame, for encoding the mask later; None once that is done.
    """

    logits: Float[Tensor, "h w"]
    present: Float[Tensor, ""]
    score: Float[Tensor, ""]
    pointer: Float[Tensor, " c"]
    memory: Float[Tensor, "d p q"] | None = None
    frame: Float[Tensor, "c p q"] | None = None


@dataclass(frozen=True)
class Passes:
    """Which frames have been tracked, and in which direction they were last: ranges, the newest last.

    The size does not grow with the length of a video, but with the number of passes.
    """

    ranges: tuple[tuple[int, int, bool | None], ...] = ()

    def direction(self, frame: int) -> bool | None:
        """True if the frame was last tracked backwards, False if forwards, None if never."""
        return next((way for first, last, way in reversed(self.ranges) if first <= frame <= last), None)

    def add(self, frame: int, reverse: bool | None) -> Passes:
        """Records that a frame was tracked; None: that it no longer counts as tracked."""
        ranges = list(self.ranges)
        if ranges and ranges[-1][2] == reverse and ranges[-1][0] - 1 <= frame <= ranges[-1][1] + 1:
            first, last, _ = ranges.pop()
            new = (min(first, frame), max(last, frame), reverse)
        else:
            new = (frame, frame, reverse)
        return Passes((*(r for r in ranges if r[0] < new[0] or r[1] > new[1]), new))


@dataclass(frozen=True, eq=False)
class Track:
    """What is kept of one object.

    Attributes:
        prompted: Frames in which it was prompted (conditioning frames). They are kept.
        tracked: Other frames near the current one.
        new: Answers to prompts that no other frame has attended to yet: each with whether it becomes a prompted frame.
        passes: The frames in which it was tracked.
    """

    prompted: Mapping[int, Remembered] = field(default_factory=dict[int, Remembered])
    tracked: Mapping[int, Remembered] = field(default_factory=dict[int, Remembered])
    new: Mapping[int, tuple[Remembered, bool]] = field(default_factory=dict[int, "tuple[Remembered, bool]"])
    passes: Passes = Passes()

    def known(self, frame: int) -> Remembered | None:
        """What is kept of a frame; None: nothing."""
        found = self.new.get(frame)
        return found[0] if found else self.prompted.get(frame) or self.tracked.get(frame)

    @property
    def has_prompts(self) -> bool:
        """Whether there is a prompted frame."""
        return bool(self.prompted) or any(conditions for _, conditions in self.new.values())

    def forget(self, frame: int) -> Track:
        """Removes the prompts of a frame; its answer becomes that of an ordinary tracked frame."""
        new = {f: v for f, v in self.new.items() if f != frame}
        if frame not in self.prompted:
            return replace(self, new=new)
        prompted = {f: v for f, v in self.prompted.items() if f != frame}
        tracked = {**self.tracked, frame: self.prompted[frame]}
        return replace(self, prompted=prompted, tracked=tracked, new=new, passes=self.passes.add(frame, None))


@dataclass(frozen=True, eq=False)
class Memory:
    """What a video system passes from frame to frame. It is never changed, and its size is bounded.

    Attributes:
        tracks: One for each object; row n of prompts and answers belongs to object n.
        frame: The frame that was tracked last; None before the first one.
        length: Number of frames of the video; None for a stream.
        corrections: "keep": prompts on a frame that was tracked before make it a prompted frame, whose answer stays.
            "once": the answer is used until the frame is tracked again.
        fill_holes: Holes in masks of up to this many cells of the low-resolution grid are filled; 0: none.
        history: Frames without prompts are kept for at least this many frames on both sides of the current one, and for
            as many as the system reads; None: all frames are kept, which is not bounded.
    """

    tracks: tuple[Track, ...] = ()
    frame: int | None = None
    length: int | None = None
    corrections: Corrections = "keep"
    fill_holes: int = 8
    history: int | None = 0

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.tracks)

    def __getitem__(self, rows: Sequence[int]) -> Memory:
        """Return the memory of some objects."""
        return replace(self, tracks=tuple(self.tracks[row] for row in rows))

    def put(self, rows: Sequence[int], part: Memory) -> Memory:
        """Return the memory with that of some objects replaced; a row one after the last one is added."""
        tracks = list(self.tracks)
        for row, track in zip(rows, part.tracks, strict=True):
            tracks[row : row + 1] = [track]
        return replace(self, tracks=tuple(tracks), frame=part.frame)

    def without(self, row: int) -> Memory:
        """Return the memory without an object."""
        return replace(self, tracks=tuple(t for n, t in enumerate(self.tracks) if n != row))

    def forget(self, row: int, frame: int) -> Memory:
        """Return the memory without the prompts of an object in a frame."""
        return replace(self, tracks=tuple(t.forget(frame) if n == row else t for n, t in enumerate(self.tracks)))

    @property
    def first(self) -> int | None:
        """The earliest prompted frame of any object; None if there is none."""
        return min(
            (f for t in self.tracks for f in (*t.prompted, *(f for f, (_, c) in t.new.items() if c))), default=None
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Features of a frame that several objects refer to count once."""
        kept = [
            e for t in self.tracks for e in (*t.prompted.values(), *t.tracked.values(), *(e for e, _ in t.new.values()))
        ]
        tensors = {id(v): v for e in kept for v in vars(e).values() if v is not None}
        return sum(v.numel() * v.element_size() for v in tensors.values())


# ---- the kind --------------------------------------------------------------------------------------------------------


class VideoSystem(PromptableSystem):
    """A promptable system that also follows objects through the frames of a video.

    `inference.VideoSession` reads frames, keeps prompts, and calls `track`.
    """

    @property
    def tasks(self) -> frozenset[Task]:
        return frozenset({"instances", "proposals", "prompts", "video"})

    @property
    def frame_preprocess(self) -> Preprocess:
        """From a frame of a video to the network's input, where that differs from single images."""
        return self.preprocess

    @abstractmethod
    def track(
        self,
        frame: Embedding,
        memory: Memory,
        prompts: Prompts | None = None,
        *,
        index: int | None = None,
        reverse: bool = False,
        **options: Any,
    ) -> tuple[Choices, Memory]:
        """Segments objects in a frame. The arguments are not changed.

        Args:
            frame: The frame, preprocessed by `frame_preprocess` and encoded.
            memory: `Memory()` at first, then what the previous call returned.
            prompts: Row n belongs to object n; a row without any point, box or mask stands for an object that is
                tracked. Rows beyond the objects in `memory` are new objects. None: all objects are tracked.
            index: Number of the frame; None: the one after `memory.frame`.
            reverse: Whether the frames are given backwards.
            **options: Options of the system.

        Returns:
            One answer for each object, and the new memory.
        """

"""Clips: sequences of frames in which objects keep their ids."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.dataset import Dataset, Sample
from maskwright.data.images import read_image
from maskwright.errors import ImageError, UsageError
from maskwright.structures import Instances, Masks


class Clip:
    """A sequence of frames of one size, with annotations of some or all of them.

    Subclasses define `image` and `target`. Positions of frames count from 0.

    Args:
        name: Name of the clip, unique in its data set.
        number: Id of the clip in the annotation file.
        size: H, W of every frame.
        frames: Number of frames.
        annotated: Positions of the annotated frames, ascending.
        paths: Image file of each frame; None if the frames have no files.

    Attributes:
        name: As given.
        number: As given.
        size: As given.
        annotated: As given.
        paths: As given.
    """

    def __init__(
        self,
        name: str,
        number: int | str,
        size: tuple[int, int],
        frames: int,
        annotated: Sequence[int],
        paths: Sequence[Path] | None = None,
    ):
        self.name, self.number, self.size = name, number, size
        self.annotated, self.paths = tuple(annotated), None if paths is None else tuple(paths)
        self._frames = frames

    def __len__(self) -> int:
        """Return the number of frames."""
        return self._frames

    def __repr__(self) -> str:
        height, width = self.size
        return f"Clip({self.name!r}, {len(self)} frames of {height} x {width}, {len(self.annotated)} annotated)"

    def image(self, frame: int) -> UInt8[Tensor, "c H W"]:
        """Return the pixels of a frame, uint8 RGB.

        Raises:
            ImageError: If the file cannot be read, or has another size than the clip.
        """
        if self.paths is None:
            raise NotImplementedError
        path = self.paths[frame]
        image = read_image(path)
        if (image.shape[1], image.shape[2]) != self.size:
            raise ImageError(
                f"{path}: is {image.shape[2]} x {image.shape[1]}, but the clip {self.name} is {self.size[1]} x "
                f"{self.size[0]}; all frames of a clip must have one size"
            )
        return image

    def target(self, frame: int) -> Instances:
        """Return the objects of an annotated frame with masks, labels, `crowd` and `ids`.

        An object has the same id in all frames. Objects that are hidden or outside of a frame are absent.
        """
        raise NotImplementedError

    def void(self, frame: int) -> Masks | None:
        """Return the pixels of a frame that are excluded from the evaluation, as one mask; None if there are none."""
        del frame
        return None


class Clips(Dataset):
    """A data set of clips.

    As a `Dataset`, its images are the annotated frames of all clips in order, with ids such as "camel/00012" and
    targets whose `ids` are those of the objects of the clip. It can therefore be trained on and evaluated like any data
    set of images. `clips` gives the clips with all of their frames.

    Args:
        clips: The clips. Their names are unique.
        classes: Class names.
        category_ids: Category id of each class; None: 1, 2, ...
        name: Name of the data set.
        classless: Whether the annotations state no classes, as in DAVIS: there is one class, and the evaluation of
            clips compares objects regardless of their labels.

    Attributes:
        clips: As given.
        classless: As given.

    Raises:
        UsageError: If two clips have the same name.
    """

    has_areas = False

    def __init__(
        self,
        clips: Sequence[Clip],
        classes: Sequence[str],
        category_ids: Sequence[int] | None = None,
        name: str = "clips",
        classless: bool = False,
    ):
        self.clips = tuple(clips)
        self.classes = tuple(classes)
        self.category_ids = tuple(category_ids) if category_ids is not None else tuple(range(1, len(classes) + 1))
        self.name, self.classless = name, classless
        names = [clip.name for clip in self.clips]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"two clips are named {twice!r}; names of clips must be unique")
        self._ends = list(accumulate(len(clip.annotated) for clip in self.clips))

    def __repr__(self) -> str:
        frames = sum(len(clip) for clip in self.clips)
        return f"{self.name}: {len(self.clips)} clips, {frames} frames, {len(self)} annotated"

    def clip(self, name: str) -> Clip:
        """Return the clip of a name.

        Raises:
            UsageError: If there is none.
        """
        for clip in self.clips:
            if clip.name == name:
                return clip
        names = ", ".join(clip.name for clip in self.clips[:8])
        raise UsageError(f"{self.name} has no clip {name!r}; its clips are {names}{' ...' * (len(self.clips) > 8)}")

    def subset(self, names: Sequence[str]) -> Clips:
        """Return a data set of some of the clips, by name."""
        return Clips([self.clip(name) for name in names], self.classes, self.category_ids, self.name, self.classless)

    def locate(self, index: int) -> tuple[Clip, int]:
        """Return the clip and the position in it of the annotated frame `index` of the data set."""
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        clip = self.clips[number]
        return clip, clip.annotated[index - self._ends[number] + len(clip.annotated)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        clip, frame = self.locate(index)
        path = None if clip.paths is None else clip.paths[frame]
        return Sample(clip.image(frame), clip.target(frame), frame_id(clip, frame), path)

    def _located(self) -> Iterator[tuple[Clip, int]]:
        return ((clip, frame) for clip in self.clips for frame in clip.annotated)

    def sizes(self) -> list[tuple[int, int]]:
        return [clip.size for clip, _ in self._located()]

    def image_ids(self) -> list[int | str]:
        return [frame_id(clip, frame) for clip, frame in self._located()]

    def paths(self) -> list[Path | None]:
        return [None if clip.paths is None else clip.paths[frame] for clip, frame in self._located()]

    def targets(self, index: int) -> Instances:
        clip, frame = self.locate(index)
        return clip.target(frame)


def frame_id(clip: Clip, frame: int) -> str:
    """Return the id of a frame as an image: "camel/00012"."""
    return f"{clip.name}/{frame:05d}"

"""Panoptic segmentation: every pixel belongs to one object, to one region, or to no segment."""

# Tensor.tolist has no type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.structures import rle
from maskwright.structures.indexing import Index, selection
from maskwright.structures.instances import Instances
from maskwright.structures.masks import Masks

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_ID = 2**24 - 1  # the largest segment id of a PNG with three 8-bit channels


@dataclass
class Panoptic:
    """The segments of an image: objects (things) and regions (stuff). They are disjoint; pixels may have no segment.

    Attributes:
        segments: Disjoint masks with labels over all classes; with `scores` if predicted, `crowd` and `ids` if
            annotated.
        things: (N,), True for a countable object, False for a region. A prediction has at most one region for each
            stuff class.

    Raises:
        ValueError: If `things` has another length, or the segments have no masks.
    """

    segments: Instances
    things: Bool[Tensor, " n"]

    def __post_init__(self) -> None:
        if len(self.things) != len(self.segments):
            raise ValueError(f"`things` has {len(self.things)} rows, but there are {len(self.segments)} segments")
        if self.segments.masks is None:
            raise ValueError("`segments` must have masks")

    @classmethod
    def empty(cls, image_size: tuple[int, int], device: torch.device | str | None = None) -> Panoptic:
        """Return no segments.

        Args:
            image_size: H, W of the image.
            device: Device of the tensors.
        """
        return cls(Instances.empty(image_size, device), torch.zeros(0, dtype=torch.bool, device=device))

    @classmethod
    def from_map(
        cls,
        plane: Int[Tensor, "h w"],
        labels: Int[Tensor, " n"],
        things: Bool[Tensor, " n"],
        *,
        numbers: Int[Tensor, " n"] | None = None,
        scores: Float[Tensor, " n"] | None = None,
        crowd: Bool[Tensor, " n"] | None = None,
        ids: Int[Tensor, " n"] | None = None,
    ) -> Panoptic:
        """Make segments of a map of numbers. Takes a few arrays of the image's size for any number of segments.

        Args:
            plane: (H, W); segment k is where the value is `numbers[k]`. Other values have no segment.
            labels: (N,), label of each segment.
            things: (N,), whether it is an object.
            numbers: (N,); None: 1 ... N.
            scores: (N,); None for annotations.
            crowd: (N,); None for predictions.
            ids: (N,); None for predictions.

        Returns:
            All N segments; those without pixels have empty masks.
        """
        size = (plane.shape[0], plane.shape[1])
        wanted = np.arange(1, len(labels) + 1) if numbers is None else numbers.cpu().numpy().astype(np.int64)
        masks = Masks.from_rle(_strings(plane.cpu().numpy(), wanted), size)
        boxes = masks.boxes().to(labels.device)
        return cls(Instances(size, boxes, labels, masks, scores, crowd=crowd, ids=ids), things)

    @classmethod
    def from_semantic(cls, plane: Int[Tensor, "h w"]) -> Panoptic:
        """Make one region for each label in a plane (H, W) of labels; negative values have no segment."""
        labels = plane.unique().long()
        labels = labels[labels >= 0]
        return cls.from_map(plane, labels, torch.zeros(len(labels), dtype=torch.bool), numbers=labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """H, W of the image."""
        return self.segments.image_size

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self.segments)

    def __getitem__(self, index: Index) -> Panoptic:
        """Select segments as `Instances` does; pixels of the others have no segment."""
        chosen = selection(index, len(self))
        things = self.things[chosen.to(self.things.device) if isinstance(chosen, Tensor) else chosen]
        return Panoptic(self.segments[chosen], things)

    def to(self, device: torch.device | str) -> Panoptic:
        """Move tensors to `device`; compact masks stay on the host."""
        return Panoptic(self.segments.to(device), self.things.to(device))

    def map(self) -> Int[Tensor, "h w"]:
        """Return a map (H, W), int32, on the host: k + 1 where segment k is, 0 elsewhere.

        Raises:
            ValueError: If segments overlap.
        """
        return self._painted(np.arange(1, len(self) + 1), 0)

    def semantic(self, void: int = -1) -> Int[Tensor, "h w"]:
        """Return the label of each pixel (H, W), int32, on the host; `void` where no segment is.

        Raises:
            ValueError: If segments overlap.
        """
        return self._painted(self.segments.labels.cpu().numpy(), void)

    def instances(self) -> Instances:
        """Return the objects, without the regions."""
        return self.segments[self.things]

    def numbers(self) -> list[int]:
        """Return the segment ids for a file: the `ids` if all are distinct and have 24 bits, otherwise 1 ... N."""
        ids: list[int] = [] if self.segments.ids is None else self.segments.ids.tolist()
        valid = len(ids) == len(self) == len(set(ids)) and all(0 < i <= LARGEST_ID for i in ids)
        return ids if valid else list(range(1, len(self) + 1))

    def to_coco(
        self, image_id: int | str, category_ids: Sequence[int] | None = None, file_name: str | None = None
    ) -> dict[str, Any]:
        """Return COCO's record of one image; `to_png` makes the map that belongs to it.

        Args:
            image_id: Id of the image.
            category_ids: Category id of each label; None: label + 1.
            file_name: Name of the map; None: "{image_id}.png".

        Returns:
            The record; segments without pixels are omitted.
        """
        segments = self.segments
        assert segments.masks is not None
        areas: list[int] = segments.masks.areas().tolist()
        labels: list[int] = segments.labels.tolist()
        boxes = segments.masks.boxes()
        corners: list[list[int]] = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).long().tolist()
        crowd: list[bool] = [False] * len(self) if segments.crowd is None else segments.crowd.tolist()
        scores: list[float] | None = None if segments.scores is None else segments.scores.tolist()
        records: list[dict[str, Any]] = []
        for row, number in enumerate(self.numbers()):
            label = labels[row]
            record: dict[str, Any] = {
                "id": number,
                "category_id": int(category_ids[label]) if category_ids is not None else label + 1,
                "area": areas[row],
                "bbox": corners[row],
                "iscrowd": int(crowd[row]),
            }
            if scores is not None:
                record["score"] = scores[row]
            if areas[row]:
                records.append(record)
        return {"image_id": image_id, "file_name": file_name or f"{image_id}.png", "segments_info": records}

    def to_png(self) -> Image:
        """Return COCO's map of segment ids: red + 256 green + 65536 blue is the id, black is no segment."""
        from PIL import Image as pillow

        return pillow.fromarray(ids_to_colours(self._painted(np.array(self.numbers(), np.int64), 0).numpy()))

    def draw(
        self, image: Tensor | npt.NDArray[np.uint8] | Image, classes: Sequence[str] | None = None, **options: Any
    ) -> Image:
        """Return the image with the segments drawn over it, regions in the colour of their class and without boxes.

        See `structures.drawing.draw` for the options.
        """
        from maskwright.structures.drawing import draw

        return draw(image, self.segments, classes, things=self.things, **options)

    def _painted(self, values: rle.Ints, nothing: int) -> Tensor:
        """A plane with `values[k]` where segment k is, and `nothing` elsewhere."""
        height, width = self.image_size
        assert self.segments.masks is not None
        runs = [rle.runs(code["counts"]) for code in self.segments.masks.rle()]
        first = np.zeros(0, np.int64)
        starts = np.concatenate([first, *(r[0] for r in runs)])
        ends = np.concatenate([first, *(r[1] for r in runs)])
        held = np.repeat(values, [len(r[0]) for r in runs])
        order = np.argsort(starts, kind="stable")
        starts, ends, held = starts[order], ends[order], held[order]
        if (starts[1:] < ends[:-1]).any():
            raise ValueError("segments overlap; the masks of panoptic segments must be disjoint")
        # Alternating gaps and runs, with a gap after the last run.
        edges = np.concatenate([[0], np.stack([starts, ends], 1).ravel(), [height * width]])
        shades = np.append(np.stack([np.full_like(held, nothing), held], 1).ravel(), nothing)
        line = np.repeat(shades.astype(np.int32), np.diff(edges))
        return torch.from_numpy(np.ascontiguousarray(line.reshape(width, height).T))


def ids_to_colours(plane: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """Encode ids (H, W), 0 ... 2^24 - 1, as red + 256 green + 65536 blue: (H, W, 3) uint8."""
    return np.stack([plane & 255, plane >> 8 & 255, plane >> 16 & 255], -1).astype(np.uint8)


def colours_to_ids(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Decode ids (H, W), int32, from colours (H, W, 3 or 4), red + 256 green + 65536 blue."""
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    return red + (green << 8) + (blue << 16)


def _strings(plane: npt.NDArray[Any], numbers: rle.Ints) -> list[bytes]:
    """The run-length string of each number's pixels in a map, in one pass over it."""
    line = plane.T.reshape(-1)
    if not len(numbers):
        return []
    if not len(line):
        raise ValueError(f"a map of {plane.shape[0]} x {plane.shape[1]} pixels has no segments")
    cuts = np.flatnonzero(line[1:] != line[:-1]) + 1
    starts = np.concatenate([[0], cuts])
    ends = np.concatenate([cuts, [len(line)]])
    held = line[starts]
    order = np.argsort(held, kind="stable")  # groups the runs of each number, in ascending order
    starts, ends, held = starts[order], ends[order], held[order]
    first, last = np.searchsorted(held, numbers, "left"), np.searchsorted(held, numbers, "right")
    return [rle.from_runs(starts[a:b], ends[a:b], len(line)) for a, b in zip(first, last, strict=True)]

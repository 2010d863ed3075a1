"""An image divided among segments: every pixel belongs to one object, to one region, or to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.structures import rle
from maskwright.structures.instances import Instances
from maskwright.structures.masks import Masks

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_ID = 2**24 - 1  # what three channels of eight bits can say


@dataclass
class Panoptic:
    """An image divided among segments: objects (things) and regions (stuff). No pixel belongs to two; some may belong
    to none.

    segments  disjoint masks with labels over all classes; `scores` where predicted, `crowd` and `ids` where annotated
    things    (N,) True: a countable object; False: a region, of which a prediction holds one per class at most
    """

    segments: Instances
    things: Bool[Tensor, " n"]

    def __post_init__(self) -> None:
        if len(self.things) != len(self.segments):
            raise ValueError(f"things has {len(self.things)} rows, there are {len(self.segments)} segments")
        if self.segments.masks is None:
            raise ValueError("segments without masks divide no image")

    @classmethod
    def empty(cls, image_size: tuple[int, int], device: torch.device | str | None = None) -> Panoptic:
        """An image that belongs to nothing."""
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
        """Segments from a map of numbers: segment k is where it holds `numbers[k]` (k + 1 unless given).

        Other values of the map are nothing. Segments without a pixel stay, empty. Costs a few arrays of the image's
        size, whatever the number of segments.
        """
        size = (plane.shape[0], plane.shape[1])
        wanted = np.arange(1, len(labels) + 1) if numbers is None else numbers.cpu().numpy().astype(np.int64)
        masks = Masks.from_rle(_strings(plane.cpu().numpy(), wanted), size)
        boxes = masks.boxes().to(labels.device)
        return cls(Instances(size, boxes, labels, masks, scores, crowd=crowd, ids=ids), things)

    @classmethod
    def from_semantic(cls, plane: Int[Tensor, "h w"]) -> Panoptic:
        """One region per label of a plane of labels; below 0 is nothing."""
        labels = plane.unique().long()
        labels = labels[labels >= 0]
        return cls.from_map(plane, labels, torch.zeros(len(labels), dtype=torch.bool), numbers=labels)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.segments.image_size

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Panoptic:
        """Some of the segments; what the others held belongs to nothing."""
        if not isinstance(index, (slice, Tensor)):
            index = torch.as_tensor(list(index), dtype=torch.int64)
        chosen = index.to(self.things.device) if isinstance(index, Tensor) else index
        return Panoptic(self.segments[index], self.things[chosen])

    def to(self, device: torch.device | str) -> Panoptic:
        """Tensors on `device`; compact masks stay on the host."""
        return Panoptic(self.segments.to(device), self.things.to(device))

    def map(self) -> Int[Tensor, "h w"]:
        """int32, on the host: 0 where nothing is, k + 1 where segment k is. ValueError where segments overlap."""
        return self._painted(np.arange(1, len(self) + 1), 0)

    def semantic(self, void: int = -1) -> Int[Tensor, "h w"]:
        """int32, on the host: each pixel's label, `void` where nothing is."""
        return self._painted(self.segments.labels.cpu().numpy(), void)

    def instances(self) -> Instances:
        """The things alone."""
        return self.segments[self.things]

    def numbers(self) -> list[int]:
        """What each segment is called in a file: its own id where all of them have one of their own that 24 bits can
        say, else 1 ... N."""
        ids = [] if self.segments.ids is None else self.segments.ids.tolist()
        good = len(ids) == len(self) == len(set(ids)) and all(0 < i <= LARGEST_ID for i in ids)
        return ids if good else list(range(1, len(self) + 1))

    def to_coco(
        self, image_id: int | str, category_ids: Sequence[int] | None = None, file_name: str | None = None
    ) -> dict[str, Any]:
        """COCO's record of one image, beside the image `to_png` makes; `category_ids[label]` (default: label + 1).

        `file_name` is the PNG's, "{image_id}.png" unless given. Segments without a pixel are left out.
        """
        segments = self.segments
        assert segments.masks is not None
        areas, boxes, labels = segments.masks.areas().tolist(), segments.masks.boxes(), segments.labels.tolist()
        corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).long().tolist()
        crowd = [False] * len(self) if segments.crowd is None else segments.crowd.tolist()
        scores = None if segments.scores is None else segments.scores.tolist()
        records = []
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
        """COCO's image of the segments: red + 256 green + 65536 blue is a segment's number, black is nothing."""
        from PIL import Image as pillow

        return pillow.fromarray(ids_to_colours(self._painted(np.array(self.numbers(), np.int64), 0).numpy()))

    def draw(self, image: Tensor | np.ndarray | Image, classes: Sequence[str] | None = None, **options: Any) -> Image:
        """The image with the segments over it: objects each in a colour of their own, regions in their class's,
        without a box; see `structures.drawing.draw` for the options."""
        from maskwright.structures.drawing import draw

        return draw(image, self.segments, classes, things=self.things, **options)

    def _painted(self, values: np.ndarray, nothing: int) -> Tensor:
        """`values[k]` where segment k is."""
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
            raise ValueError("segments overlap; in an image divided among segments no pixel belongs to two")
        # Nothing, a run, nothing, a run ... and nothing behind the last.
        edges = np.concatenate([[0], np.stack([starts, ends], 1).ravel(), [height * width]])
        shades = np.append(np.stack([np.full_like(held, nothing), held], 1).ravel(), nothing)
        line = np.repeat(shades.astype(np.int32), np.diff(edges))
        return torch.from_numpy(np.ascontiguousarray(line.reshape(width, height).T))


def ids_to_colours(plane: np.ndarray) -> np.ndarray:
    """Numbers (H, W), 0 ... 2^24 - 1, as red + 256 green + 65536 blue: (H, W, 3) uint8."""
    return np.stack([plane & 255, plane >> 8 & 255, plane >> 16 & 255], -1).astype(np.uint8)


def colours_to_ids(image: np.ndarray) -> np.ndarray:
    """The numbers (H, W) int32 that an image (H, W, 3) uint8 holds as red + 256 green + 65536 blue."""
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    return red + (green << 8) + (blue << 16)


def _strings(plane: np.ndarray, numbers: np.ndarray) -> list[bytes]:
    """The run-length string of each number's pixels in a map, all found in one walk over it."""
    line = plane.T.reshape(-1)
    if not len(numbers):
        return []
    if not len(line):
        raise ValueError(f"a map of {plane.shape[0]} x {plane.shape[1]} holds no segments")
    cuts = np.flatnonzero(line[1:] != line[:-1]) + 1
    starts = np.concatenate([[0], cuts])
    ends = np.concatenate([cuts, [len(line)]])
    held = line[starts]
    order = np.argsort(held, kind="stable")  # the runs of each number side by side, in ascending order
    starts, ends, held = starts[order], ends[order], held[order]
    first, last = np.searchsorted(held, numbers, "left"), np.searchsorted(held, numbers, "right")
    return [rle.from_runs(starts[a:b], ends[a:b], len(line)) for a, b in zip(first, last, strict=True)]

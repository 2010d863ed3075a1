"""The objects in an image, annotated or predicted: one type for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.errors import MissingExtraError
from maskwright.structures.masks import Masks
from maskwright.structures.placement import Placement

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# COCO's order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left before right. What a mirrored
# person's keypoints are called is found by this permutation.
PERSON_KEYPOINTS_MIRRORED = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


@dataclass
class Instances:
    """N objects on an image of `image_size` (H, W).

    boxes     (N, 4)     x0, y0, x1, y1, continuous: width = x1 - x0
    labels    (N,)       0 ... K - 1, no background
    masks     N masks of `image_size`; None where a system predicts none
    scores    (N,)       predictions only
    keypoints (N, J, 3)  x, y and visibility (annotated: 0 not labelled, 1 hidden, 2 seen) or score (predicted)
    crowd     (N,)       regions that are neither right nor wrong; annotations only
    ids       (N,)       the annotations' own ids
    """

    image_size: tuple[int, int]
    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, " n"]
    masks: Masks | None = None
    scores: Float[Tensor, " n"] | None = None
    keypoints: Float[Tensor, "n j 3"] | None = None
    crowd: Bool[Tensor, " n"] | None = None
    ids: Int[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        count = len(self.boxes)
        for name in _PER_OBJECT:
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name} has {len(value)} rows, boxes {count}")
        if self.masks is not None and self.masks.size != tuple(self.image_size):
            raise ValueError(f"masks are {self.masks.size}, the image is {tuple(self.image_size)}")

    @classmethod
    def empty(cls, image_size: tuple[int, int], device: torch.device | str | None = None) -> Instances:
        """No objects; masks and scores are there, empty."""
        boxes = torch.zeros(0, 4, device=device)
        labels = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(image_size, boxes, labels, Masks.empty(image_size), boxes.new_zeros(0))

    @classmethod
    def join(cls, parts: Sequence[Instances]) -> Instances:
        """All objects of `parts`, which are of one image. A field that one of them lacks is left out."""
        first = parts[0]
        merged: dict[str, Any] = {}
        for name in _PER_OBJECT:
            values = [getattr(p, name) for p in parts]
            if any(v is None for v in values):
                merged[name] = None
            else:
                merged[name] = Masks.join(values) if isinstance(values[0], Masks) else torch.cat(values)
        return cls(first.image_size, **merged)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Instances:
        if isinstance(index, int):
            index = [range(len(self))[index]]
        if not isinstance(index, (slice, Tensor)):
            index = torch.as_tensor(list(index), dtype=torch.int64)
        return replace(self, **{n: None if (v := getattr(self, n)) is None else v[_on(index, v)] for n in _PER_OBJECT})

    def to(self, device: torch.device | str) -> Instances:
        """Tensors on `device`. Masks in a compact form stay on the host."""
        return replace(self, **{n: None if (v := getattr(self, n)) is None else v.to(device) for n in _PER_OBJECT})

    def place(
        self, placement: Placement, mirrored_keypoints: Sequence[int] | None = PERSON_KEYPOINTS_MIRRORED
    ) -> Instances:
        """The same objects on the network's input: boxes clipped to it, masks cut at it, keypoints outside unlabelled.

        All N stay, also those that left the input: whoever crops drops what has no area left. Where the placement
        mirrors, keypoint j becomes `mirrored_keypoints[j]` if there are as many.
        """
        height, width = placement.size
        boxes = placement.boxes_to_input(self.boxes)
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
        points = self.keypoints
        if points is not None:
            xy = placement.points_to_input(points[..., :2])
            inside = (xy >= 0).all(-1) & (xy <= xy.new_tensor([width, height])).all(-1)
            if self.scores is None:  # annotations: what is not labelled is nowhere, also in a mirror
                inside &= points[..., 2] > 0
            points = torch.cat([xy, points[..., 2:] * inside[..., None]], -1) * inside[..., None]
            if placement.mirrored and mirrored_keypoints is not None and points.shape[1] == len(mirrored_keypoints):
                points = points[:, list(mirrored_keypoints)]
        masks = None if self.masks is None else self.masks.place(placement)
        return replace(self, image_size=placement.size, boxes=boxes, masks=masks, keypoints=points)

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO's result records: `category_ids[label]` (default: label + 1), boxes as x, y, width, height, RLE text.

        COCO's keypoints count pixels, from the centre of the first: 0.5 less than the continuous frame here.
        """
        x0, y0, x1, y1 = self.boxes.detach().cpu().double().unbind(1) if len(self) else [torch.zeros(0)] * 4
        boxes = torch.stack([x0, y0, x1 - x0, y1 - y0], 1).tolist()
        codes = self.masks.rle() if self.masks is not None else None
        records = []
        for number, label in enumerate(self.labels.tolist()):
            record: dict[str, Any] = {
                "image_id": image_id,
                "category_id": int(category_ids[label]) if category_ids is not None else label + 1,
                "bbox": boxes[number],
            }
            if codes is not None:
                record["segmentation"] = {**codes[number], "counts": codes[number]["counts"].decode("ascii")}
            if self.scores is not None:
                record["score"] = float(self.scores[number])
            if self.keypoints is not None:
                keypoints = self.keypoints[number].detach().cpu().double()
                seen = keypoints[:, 2:] > 0 if self.scores is None else torch.ones_like(keypoints[:, 2:])
                keypoints[:, :2] -= 0.5 * seen
                record["keypoints"] = keypoints.flatten().tolist()
            records.append(record)
        return records

    def to_supervision(self) -> Any:
        """As `supervision.Detections`, with masks as bool planes (N * H * W bytes)."""
        try:
            import supervision
        except ImportError:
            raise MissingExtraError("supervision", "viz") from None
        return supervision.Detections(
            xyxy=self.boxes.detach().cpu().numpy(),
            mask=None if self.masks is None else self.masks.dense("cpu").numpy(),
            confidence=None if self.scores is None else self.scores.detach().cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
        )

    def draw(self, image: Tensor | np.ndarray | Image, classes: Sequence[str] | None = None, **options: Any) -> Image:
        """The image with the objects drawn over it; see `structures.drawing.draw` for the options."""
        from maskwright.structures.drawing import draw

        return draw(image, self, classes, **options)


_PER_OBJECT = tuple(f.name for f in fields(Instances) if f.name != "image_size")


def _on(index: slice | Tensor, value: Tensor | Masks) -> slice | Tensor:
    return index.to(value.device) if isinstance(index, Tensor) else index

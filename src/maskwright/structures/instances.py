"""The objects in an image, annotated or predicted: one type for both."""

# Tensor.tolist has no type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.errors import MissingExtraError
from maskwright.structures.indexing import Index, selection
from maskwright.structures.masks import Masks, turned
from maskwright.structures.placement import Placement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

# The permutation of COCO's person keypoints (nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left
# before right) under a left-right flip.
PERSON_KEYPOINTS_MIRRORED = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


@dataclass
class Instances:
    """N objects in an image.

    Attributes:
        image_size: H, W of the image.
        boxes: (N, 4), x0, y0, x1, y1 in the continuous frame: the width is x1 - x0.
        labels: (N,), 0 ... K - 1; there is no background label.
        masks: N masks of `image_size`; None for boxes without masks.
        scores: (N,); predictions only.
        keypoints: (N, J, 3), x, y and, for annotations, visibility (0 unlabelled, 1 hidden, 2 visible) or, for
            predictions, score.
        crowd: (N,), regions that are ignored by the evaluation; annotations only.
        ids: (N,), of annotations, their ids in the data set; of tracked objects and in clips, a number that an object
            keeps through all frames.

    Raises:
        ValueError: If the fields have different lengths, or the masks another size.
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
                raise ValueError(f"`{name}` has {len(value)} rows, but `boxes` has {count}")
        if self.masks is not None and self.masks.size != tuple(self.image_size):
            raise ValueError(f"`masks` have size {self.masks.size}, but the image has {tuple(self.image_size)}")

    @classmethod
    def empty(
        cls,
        image_size: tuple[int, int],
        device: torch.device | str | None = None,
        *,
        masks: bool = True,
        scores: bool = True,
        keypoints: int | None = None,
    ) -> Instances:
        """Return no objects, with the fields that a result with objects would have.

        Args:
            image_size: H, W of the image.
            device: Device of the tensors.
            masks: Whether there are masks; False for systems and data sets with boxes only.
            scores: Whether there are scores; False for annotations.
            keypoints: Number of keypoints of an object; None: no keypoints.

        Returns:
            The empty result.
        """
        boxes = torch.zeros(0, 4, device=device)
        return cls(
            image_size,
            boxes,
            torch.zeros(0, dtype=torch.int64, device=device),
            Masks.empty(image_size) if masks else None,
            boxes.new_zeros(0) if scores else None,
            None if keypoints is None else boxes.new_zeros(0, keypoints, 3),
        )

    @classmethod
    def join(cls, parts: Sequence[Instances]) -> Instances:
        """Return all objects of several parts of one image.

        Args:
            parts: At least one part, all with the same `image_size`.

        Returns:
            The objects in order. A field is kept if all parts with objects have it (if no part has objects: if all
            parts have it), so that an empty part does not remove or add masks or keypoints.

        Raises:
            ValueError: If there are no parts, or they differ in image size or number of keypoints.
        """
        if not parts:
            raise ValueError("there must be at least one part to join")
        sizes = {tuple(part.image_size) for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"parts of images of different sizes cannot be joined: {sorted(sizes)}")
        kept = [part for part in parts if len(part)] or list(parts)
        counts = {part.keypoints.shape[1] for part in kept if part.keypoints is not None}
        if len(counts) > 1:
            raise ValueError(f"parts with different numbers of keypoints cannot be joined: {sorted(counts)}")
        joined: dict[str, Any] = {}
        for name in _PER_OBJECT:
            values: list[Any] = [getattr(part, name) for part in kept]
            if any(value is None for value in values):
                joined[name] = None
            else:
                joined[name] = Masks.join(values) if isinstance(values[0], Masks) else torch.cat(values)
        return cls(parts[0].image_size, **joined)

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.boxes)

    def __getitem__(self, index: Index) -> Instances:
        """Select objects as NumPy does: by position, slice, positions, bools or `...`; always returns `Instances`.

        Raises:
            IndexError: If a position is out of range, the number of bools is wrong, or the index has another type.
        """
        chosen = selection(index, len(self))

        def part(value: Any) -> Any:
            return None if value is None else value[_on_device(chosen, value)]

        return replace(self, **{name: part(getattr(self, name)) for name in _PER_OBJECT})

    def to(self, device: torch.device | str) -> Instances:
        """Move tensors to `device`; masks in a compact form stay on the host."""
        return replace(self, **{n: None if (v := getattr(self, n)) is None else v.to(device) for n in _PER_OBJECT})

    def place(
        self, placement: Placement, mirrored_keypoints: Sequence[int] | None = PERSON_KEYPOINTS_MIRRORED
    ) -> Instances:
        """Map objects from the image to the network's input.

        Args:
            placement: How the image is placed in the input.
            mirrored_keypoints: Permutation of the keypoints under a flip, used if there are as many keypoints; None:
                they are not permuted.

        Returns:
            All N objects. Boxes and masks are clipped to the input, keypoints outside become unlabelled. Objects
            outside the input are kept, with empty boxes and masks.
        """
        height, width = placement.size
        boxes = placement.boxes_to_input(self.boxes)
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
        points = self.keypoints
        if points is not None:
            xy = placement.points_to_input(points[..., :2])
            inside = (xy >= 0).all(-1) & (xy <= xy.new_tensor([width, height])).all(-1)
            if self.scores is None:  # unlabelled annotated keypoints stay at 0, 0, also after a flip
                inside &= points[..., 2] > 0
            points = torch.cat([xy, points[..., 2:] * inside[..., None]], -1) * inside[..., None]
            if placement.mirrored and mirrored_keypoints is not None and points.shape[1] == len(mirrored_keypoints):
                points = points[:, list(mirrored_keypoints)]
        masks = None if self.masks is None else self.masks.place(placement)
        return replace(self, image_size=placement.size, boxes=boxes, masks=masks, keypoints=points)

    def turned(self, quarters: int) -> Instances:
        """Return the objects of the image turned counterclockwise by a number of quarter turns."""
        quarters %= 4
        height, width = size = self.image_size
        x, y = turned(self.boxes[:, 0::2], self.boxes[:, 1::2], size, quarters)
        boxes = torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1) if len(self) else self.boxes
        keypoints = self.keypoints
        if keypoints is not None:
            xy = torch.stack(turned(keypoints[..., 0], keypoints[..., 1], size, quarters), -1)
            if self.scores is None:  # unlabelled annotated keypoints stay at 0, 0
                xy = xy * (keypoints[..., 2:] > 0)
            keypoints = torch.cat([xy, keypoints[..., 2:]], -1)
        return replace(
            self,
            image_size=(width, height) if quarters % 2 else (height, width),
            boxes=boxes,
            masks=None if self.masks is None else self.masks.turned(quarters),
            keypoints=keypoints,
        )

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return COCO result records.

        Args:
            image_id: Id of the image.
            category_ids: Category id of each label; None: label + 1.

        Returns:
            One record for each object: boxes as x, y, width, height, masks as run-length strings, and keypoints in
            COCO's frame, which counts pixels from the center of the first one: 0.5 less than here. Fields that the
            objects do not have are absent. Tracked predictions, which have scores and ids, have a "track_id".
        """
        x0, y0, x1, y1 = self.boxes.detach().cpu().double().unbind(1) if len(self) else [torch.zeros(0)] * 4
        boxes: list[list[float]] = torch.stack([x0, y0, x1 - x0, y1 - y0], 1).tolist()
        labels: list[int] = self.labels.tolist()
        codes = self.masks.rle() if self.masks is not None else None
        records: list[dict[str, Any]] = []
        for number, label in enumerate(labels):
            record: dict[str, Any] = {
                "image_id": image_id,
                "category_id": int(category_ids[label]) if category_ids is not None else label + 1,
                "bbox": boxes[number],
            }
            if codes is not None:
                record["segmentation"] = {**codes[number], "counts": codes[number]["counts"].decode("ascii")}
            if self.scores is not None:
                record["score"] = float(self.scores[number])
            if self.scores is not None and self.ids is not None:
                record["track_id"] = int(self.ids[number])
            if self.keypoints is not None:
                keypoints = self.keypoints[number].detach().cpu().double()
                labelled = keypoints[:, 2:] > 0 if self.scores is None else torch.ones_like(keypoints[:, 2:])
                keypoints[:, :2] -= 0.5 * labelled
                record["keypoints"] = keypoints.flatten().tolist()
            records.append(record)
        return records

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, with masks as bool planes (N * H * W bytes).

        Ids of tracked predictions, which have scores, are its `tracker_id`.

        Raises:
            MissingExtraError: If supervision is not installed.
        """
        try:
            import supervision  # pyright: ignore[reportMissingTypeStubs]
        except ImportError:
            raise MissingExtraError("supervision", "viz") from None
        return supervision.Detections(
            xyxy=self.boxes.detach().cpu().numpy(),
            mask=None if self.masks is None else self.masks.dense("cpu").numpy(),
            confidence=None if self.scores is None else self.scores.detach().cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            tracker_id=None if self.ids is None or self.scores is None else self.ids.cpu().numpy(),
        )

    def draw(
        self, image: Tensor | npt.NDArray[np.uint8] | Image, classes: Sequence[str] | None = None, **options: Any
    ) -> Image:
        """Return the image with the objects drawn over it; see `structures.drawing.draw` for the options."""
        from maskwright.structures.drawing import draw

        return draw(image, self, classes, **options)


_PER_OBJECT = tuple(f.name for f in fields(Instances) if f.name != "image_size")


def _on_device(chosen: slice | Tensor, value: Tensor | Masks) -> slice | Tensor:
    return chosen.to(value.device) if isinstance(chosen, Tensor) else chosen

"""Prompts: what a person (or a detector) says about objects in an image, for systems that segment what is asked for."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskwright.errors import UsageError
from maskwright.structures.choices import Choices
from maskwright.structures.embedding import Embedding
from maskwright.structures.indexing import Index, selection
from maskwright.structures.instances import Instances
from maskwright.structures.masks import Masks
from maskwright.structures.placement import Placement

__all__ = ["Choices", "Embedding", "Prompts"]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts for N objects of one image, on the image's own grid; row n belongs to object n.

    An object can have any combination of points, a box and a mask, also none. Different objects can have different
    kinds: where an object has fewer points than others, the label is -1 and the coordinates are NaN, which is ignored;
    where it has no box, the row of `boxes` is NaN; where it has no mask, the mask is empty or the plane of `logits` is
    NaN. The answer for an object thereby does not depend on the others.

    The label -1 with finite coordinates is the token "not a point" of SAM's code, by which that code pads objects; it
    changes the answer slightly.

    Coordinates are x, y in the continuous frame: pixel (i, j) covers [j, j + 1) x [i, i + 1). Tensors except `logits`
    are on the host.

    Attributes:
        image_size: H, W of the image.
        points: (N, P, 2), x, y.
        point_labels: (N, P), 1 for a point on the object, 0 for one outside of it, -1 for padding, see above.
        boxes: (N, 4), x0, y0, x1, y1; None if no object has a box.
        masks: N masks of `image_size`; None if no object has a mask.
        logits: (N, h, w), mask logits of an earlier answer (`Choices.logits`), on its low-resolution grid; None if no
            object has them.
        text: A phrase for each object, for systems that read text; None without.

    Raises:
        UsageError: If the fields do not fit each other, a label is unknown, a coordinate is not finite or outside of
            the image, or a box ends before it begins.
    """

    image_size: tuple[int, int]
    points: Float[Tensor, "n p 2"]
    point_labels: Int[Tensor, "n p"]
    boxes: Float[Tensor, "n 4"] | None = None
    masks: Masks | None = None
    logits: Float[Tensor, "n h w"] | None = None
    text: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _size(self.image_size))
        object.__setattr__(self, "points", _floating(self.points, "points"))
        object.__setattr__(self, "point_labels", _whole(self.point_labels))
        if self.boxes is not None:
            object.__setattr__(self, "boxes", _floating(self.boxes, "boxes"))
        if self.text is not None:
            object.__setattr__(self, "text", tuple(self.text))
        self._check()

    # ---- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def empty(cls, image_size: tuple[int, int]) -> Prompts:
        """Return prompts for no objects."""
        return cls(image_size, torch.zeros(0, 0, 2), torch.zeros(0, 0, dtype=torch.int64))

    @classmethod
    def from_points(
        cls, image_size: tuple[int, int], points: Tensor | Sequence[Any], labels: Tensor | Sequence[Any] | None = None
    ) -> Prompts:
        """Return prompts of points.

        Args:
            image_size: H, W of the image.
            points: Points x, y of each object: (N, P, 2), or a list with the points (P, 2) of each object, whose
                lengths may differ. A single list of points (P, 2) is one object.
            labels: For each point 1 if it is on the object and 0 if it is outside; None: all are on the object.

        Raises:
            UsageError: If the points and labels do not have this form, or see `Prompts`.
        """
        rows = _rows(points)
        if labels is None:
            marks = [torch.ones(len(row), dtype=torch.int64) for row in rows]
        else:
            try:
                given: Any = labels if isinstance(labels, Tensor) else list(labels)
                flat = len(rows) == 1 and (given.ndim == 1 if isinstance(given, Tensor) else not _nested(given))
                marks = [_whole(row).reshape(-1) for row in ([given] if flat else given)]
            except (TypeError, ValueError, RuntimeError) as error:
                raise UsageError(f"labels must be lists of 1 and 0, got {repr(labels)[:80]}: {error}") from None
        if [len(row) for row in rows] != [len(row) for row in marks]:
            raise UsageError(
                f"labels must have one entry for each point, got {[len(row) for row in marks][:8]} labels for "
                f"{[len(row) for row in rows][:8]} points of each object"
            )
        if not rows:
            return cls.empty(image_size)
        return cls(
            image_size,
            pad_sequence(rows, batch_first=True, padding_value=torch.nan),
            pad_sequence(marks, batch_first=True, padding_value=-1),
        )

    @classmethod
    def from_boxes(
        cls, boxes: Instances | Tensor | Sequence[Any], image_size: tuple[int, int] | None = None
    ) -> Prompts:
        """Return prompts of one box for each object.

        Args:
            boxes: Objects of any data set or system, or boxes (N, 4), x0, y0, x1, y1. Boxes are clipped to the image.
            image_size: H, W of the image; not needed for `Instances`.

        Raises:
            UsageError: If a box is not finite, ends before it begins, or is outside of the image altogether.
        """
        if isinstance(boxes, Instances):
            image_size, values = boxes.image_size, boxes.boxes
        else:
            try:
                values = boxes if isinstance(boxes, Tensor) else torch.tensor(boxes, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UsageError(f"boxes must be lists of x0, y0, x1, y1, got {repr(boxes)[:80]}: {error}") from None
        if image_size is None:
            raise UsageError("boxes without an image need the argument `image_size`, (height, width)")
        image_size = _size(image_size)
        if values.numel() == 0:
            values = values.reshape(0, 4)
        values = _floating(values, "boxes")
        if values.ndim != 2 or values.shape[1] != 4:
            raise UsageError(f"boxes must have shape (N, 4), got {tuple(values.shape)}")
        limit = values.new_tensor([image_size[1], image_size[0]])
        outside = (values[:, :2] > limit).any(1) | (values[:, 2:] < 0).any(1) | ~values.isfinite().all(1)
        if bool(outside.any()):
            raise _outside("box", int(outside.nonzero()[0]), values[outside][0], image_size)
        values = values.clamp(min=0).minimum(limit.repeat(2))
        none = torch.zeros(len(values), 0, 2, dtype=values.dtype)
        return cls(image_size, none, none[..., 0].long(), values)

    @classmethod
    def from_masks(cls, masks: Masks | Instances) -> Prompts:
        """Return prompts of one mask for each object.

        Raises:
            UsageError: If the objects have no masks, or `masks` is of another type.
        """
        if isinstance(masks, Instances):
            if masks.masks is None:
                raise UsageError("the objects have no masks")
            masks = masks.masks
        if not isinstance(masks, Masks):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not be checked
            raise UsageError(
                f"masks must be Masks or Instances, got {type(masks).__name__}; Masks.from_dense makes them of planes "
                "(N, H, W)"
            )
        return cls(
            masks.size, torch.zeros(len(masks), 0, 2), torch.zeros(len(masks), 0, dtype=torch.int64), None, masks
        )

    @classmethod
    def join(cls, parts: Sequence[Prompts]) -> Prompts:
        """Return the prompts of several parts of one image, one after the other.

        Raises:
            UsageError: If there are no parts, or they are of images, or have logits, of different sizes.
        """
        if not parts:
            raise UsageError("there must be at least one part to join")
        sizes = {part.image_size for part in parts}
        if len(sizes) > 1:
            raise UsageError(f"prompts for images of different sizes cannot be joined: {sorted(sizes)}")
        size, most = parts[0].image_size, max(part.points.shape[1] for part in parts)
        points = [_widened(part.points, most, torch.nan) for part in parts]
        labels = [_widened(part.point_labels, most, -1) for part in parts]
        boxes = masks = logits = text = None
        if any(part.boxes is not None for part in parts):
            boxes = torch.cat([torch.full((len(p), 4), torch.nan) if p.boxes is None else p.boxes for p in parts])
        if any(part.masks is not None for part in parts):
            masks = Masks.join([_no_masks(len(p), size) if p.masks is None else p.masks for p in parts])
        planes = [part.logits for part in parts if part.logits is not None]
        if planes:
            if len({tuple(plane.shape[1:]) for plane in planes}) > 1:
                raise UsageError("logits of different sizes cannot be joined")
            logits = torch.cat([_no_logits(len(p), planes[0]) if p.logits is None else p.logits for p in parts])
        if any(part.text is not None for part in parts):
            text = tuple(word for p in parts for word in (p.text or ("",) * len(p)))
        return cls(size, torch.cat(points), torch.cat(labels), boxes, masks, logits, text)

    # ---- use ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.points)

    def __getitem__(self, index: Index) -> Prompts:
        """Select objects as NumPy does: by position, slice, positions or bools; always returns `Prompts`."""
        chosen = selection(index, len(self))
        text = self.text
        if text is not None:
            order: list[int] = torch.arange(len(self))[chosen].tolist()
            text = tuple(text[i] for i in order)
        return replace(
            self,
            points=self.points[chosen],
            point_labels=self.point_labels[chosen],
            boxes=None if self.boxes is None else self.boxes[chosen],
            masks=None if self.masks is None else self.masks[chosen],
            logits=None if self.logits is None else self.logits[chosen],
            text=text,
        )

    def place(self, placement: Placement) -> Prompts:
        """Map prompts from the image to the network's input; `logits` and `text` are unchanged.

        Args:
            placement: How the image is placed in the input.

        Raises:
            UsageError: If the placement is for images of another size, or a prompt is outside of the input.
        """
        if tuple(placement.image_size) != self.image_size:
            raise UsageError(
                f"the prompts are for images of {self.image_size}, the placement of {placement.image_size}"
            )
        return replace(
            self,
            image_size=placement.size,
            points=placement.points_to_input(self.points),
            boxes=None if self.boxes is None else placement.boxes_to_input(self.boxes),
            masks=None if self.masks is None else self.masks.place(placement),
        )

    @property
    def point_counts(self) -> Int[Tensor, " n"]:
        """The number of points of each object."""
        return (self.point_labels >= 0).sum(1)

    @property
    def ignored(self) -> Bool[Tensor, "n p"]:
        """The points that are padding."""
        return (self.point_labels < 0) & self.points.isnan().any(2)

    @property
    def has_box(self) -> Bool[Tensor, " n"]:
        """The objects that have a box."""
        if self.boxes is None:
            return torch.zeros(len(self), dtype=torch.bool)
        return ~self.boxes[:, 0].isnan()

    @property
    def has_mask(self) -> Bool[Tensor, " n"]:
        """The objects that have a mask, or logits of an earlier answer."""
        found = torch.zeros(len(self), dtype=torch.bool)
        if self.masks is not None:
            found = found | (self.masks.areas().cpu() > 0)
        if self.logits is not None and self.logits[0:1].numel():
            found = found | ~self.logits[:, 0, 0].isnan().cpu()
        return found

    # ---- internal ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        height, width = self.image_size
        if height < 1 or width < 1:
            raise UsageError(f"image_size must be a height and a width of at least 1, got {self.image_size}")
        points, labels = self.points, self.point_labels
        if points.ndim != 3 or points.shape[2] != 2:
            raise UsageError(f"points must have shape (N, P, 2), got {tuple(points.shape)}")
        if labels.shape != points.shape[:2]:
            raise UsageError(
                f"point_labels must have shape {tuple(points.shape[:2])} as points, got {tuple(labels.shape)}"
            )
        wrong = (labels < -1) | (labels > 1)
        if bool(wrong.any()):
            raise UsageError(
                "point_labels must be 1 (on the object), 0 (outside of it) or -1 (padding), got "
                f"{int(labels[wrong][0])}"
            )
        inside = (points >= 0).all(2) & (points[..., 0] <= width) & (points[..., 1] <= height)  # false for NaN
        wrong = (labels >= 0) & ~inside
        if bool(wrong.any()):
            raise _outside("point", int(wrong.nonzero()[0, 0]), points[wrong][0], self.image_size)
        if self.boxes is not None:
            self._check_boxes(self.boxes)
        if self.masks is not None and self.masks.size != self.image_size:
            raise UsageError(f"masks have size {self.masks.size}, but the image has {self.image_size}")
        if self.logits is not None and (self.logits.ndim != 3 or not self.logits.is_floating_point()):
            raise UsageError(f"logits must be floating point of shape (N, h, w), got {tuple(self.logits.shape)}")
        if self.logits is not None and bool(self.logits.isinf().any()):
            raise UsageError("logits must be finite numbers (or NaN for an object without them), got infinity")
        for name in ("boxes", "masks", "logits", "text"):
            value = getattr(self, name)
            if value is not None and len(value) != len(points):
                raise UsageError(f"{name} has {len(value)} rows, but points has {len(points)}")

    def _check_boxes(self, boxes: Tensor) -> None:
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise UsageError(f"boxes must have shape (N, 4), got {tuple(boxes.shape)}")
        given = ~boxes.isnan().all(1)
        height, width = self.image_size
        limit = boxes.new_tensor([width, height, width, height])
        wrong = given & ~((boxes >= 0) & (boxes <= limit)).all(1)
        if bool(wrong.any()):
            raise _outside("box", int(wrong.nonzero()[0]), boxes[wrong][0], self.image_size)
        wrong = given & (boxes[:, 2:] < boxes[:, :2]).any(1)
        if bool(wrong.any()):
            raise UsageError(
                f"the box of object {int(wrong.nonzero()[0])} ends before it begins: {_numbers(boxes[wrong][0])}; "
                "boxes are x0, y0, x1, y1"
            )


def _size(value: Any) -> tuple[int, int]:
    """A height and a width as integers."""
    try:
        height, width = (int(side) for side in value)
    except (TypeError, ValueError):
        raise UsageError(f"image_size must be a height and a width, got {value!r}") from None
    return height, width


def _whole(values: Any) -> Tensor:
    """Labels as integers on the host."""
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.is_floating_point() and not bool((tensor == tensor.round()).all()):  # not for NaN either
        raise UsageError(f"point_labels must be integers, got {float(tensor[tensor != tensor.round()][0])}")
    return tensor.long()


def _floating(values: Tensor | Sequence[Any], name: str) -> Tensor:
    """Coordinates on the host, float32 unless they have float64."""
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise UsageError(f"{name} must be numbers, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _rows(points: Tensor | Sequence[Any]) -> list[Tensor]:
    """The points (P, 2) of each object."""
    try:
        given: list[Any] = [] if isinstance(points, Tensor) else list(points)
        if any(hasattr(row, "__len__") and (len(row) == 0 or hasattr(row[0], "__len__")) for row in given):
            rows = [_pairs(_floating(row, "points")) for row in given]  # a list of points for each object
            return [row.double() for row in rows] if any(r.dtype == torch.float64 for r in rows) else rows
        values = _floating(points, "points")
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"points must be lists of x, y, got {repr(points)[:80]}: {error}") from None
    if values.numel() == 0 and values.ndim < 3:
        return []
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or values.shape[2] != 2:
        raise UsageError(f"points must have shape (N, P, 2) or (P, 2), got {tuple(values.shape)}")
    return list(values)


def _pairs(values: Tensor) -> Tensor:
    """The points (P, 2) of an object; (0, 2) for none."""
    if values.numel() and (values.ndim != 2 or values.shape[1] != 2):
        raise ValueError(f"those of an object have shape {tuple(values.shape)} instead of (P, 2)")
    return values.reshape(-1, 2)


def _nested(values: Sequence[Any]) -> bool:
    """Whether an entry of a list is a list (or array) itself."""
    return any(hasattr(value, "__len__") for value in values)


def _widened(values: Tensor, length: int, fill: float) -> Tensor:
    """`values` with axis 1 padded to `length`."""
    missing = length - values.shape[1]
    return torch.cat([values, values.new_full((len(values), missing, *values.shape[2:]), fill)], 1)


def _no_masks(count: int, size: tuple[int, int]) -> Masks:
    """`count` empty masks."""
    return Masks.from_crops([torch.zeros(0, 0, dtype=torch.bool)] * count, torch.zeros(count, 2).long(), size)


def _no_logits(count: int, like: Tensor) -> Tensor:
    """`count` planes without values."""
    return like.new_full((count, *like.shape[1:]), torch.nan)


def _outside(what: str, number: int, values: Tensor, size: tuple[int, int]) -> UsageError:
    """The error about a point or box outside of the image."""
    height, width = size
    return UsageError(
        f"a {what} of object {number} is outside of the image: {_numbers(values)}; coordinates are pixels x, y from "
        f"the upper left corner, at most {width} and {height}"
    )


def _numbers(values: Tensor) -> str:
    numbers: list[float] = values.tolist()
    return ", ".join(f"{v:g}" for v in numbers)

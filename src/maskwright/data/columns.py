"""Annotations as a file has them, one array for each property, before they are judged.

A reader collects `Columns`; `diagnosis.diagnose` corrects what is wrong throughout, and `judging.judge` moves what can
be used into the table. Nothing here depends on the format of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maskwright.data.shapes import Shapes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass
class Columns:
    """N annotations on the images of a table, in the order of the file.

    Attributes:
        image_index: (N,) position in the table of the image.
        labels: (N,).
        ids: (N,) ids of the annotations.
        rows: (N,) positions in the file's list of annotations.
        crowd: (N,).
        boxes: (N, 4) x, y, width, height in pixels, as given; NaN for what is not a number.
        boxed: (N,) whether a box is given, valid or not.
        areas: (N,) as given; NaN for what is not a number.
        sized: (N,) whether an area is given, valid or not.
        shapes: (N,) outlines and run-length codes, as given; an object without any has no ring.
        code_sizes: (N, 2) H, W of the run-length codes; zeros for outlines.
        keypoints: (N, J, 3) continuous coordinates and visibility; None if there are none.
    """

    image_index: Ints
    labels: Ints
    ids: list[int | str]
    rows: Ints
    crowd: Bools
    boxes: Floats
    boxed: Bools
    areas: Floats
    sized: Bools
    shapes: Shapes
    code_sizes: Ints
    keypoints: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Return the number of annotations."""
        return len(self.image_index)

    def take(self, order: Ints) -> Columns:
        """Return the annotations at these positions, in this order."""
        return Columns(
            self.image_index[order],
            self.labels[order],
            [self.ids[i] for i in order.tolist()],
            self.rows[order],
            self.crowd[order],
            self.boxes[order],
            self.boxed[order],
            self.areas[order],
            self.sized[order],
            self.shapes.take(order),
            self.code_sizes[order],
            None if self.keypoints is None else self.keypoints[order],
        )

    def scale(self, chosen: Bools, factors: Floats, *, outlines: bool = True, boxes: bool = True) -> None:
        """Scale the coordinates of some annotations in place.

        Run-length codes are not changed; see `diagnosis_codes.resize_codes`.

        Args:
            chosen: (N,) which annotations.
            factors: (N, 2) or (2,), factors of x and y.
            outlines: Whether outlines and keypoints are scaled.
            boxes: Whether boxes are scaled.
        """
        factors = np.broadcast_to(factors, (len(self), 2))
        if outlines:
            owner = self.shapes.point_owners()
            points = self.shapes.points.copy()
            moved = (owner >= 0) & chosen[owner]
            points[moved] *= factors[owner[moved]]
            self.shapes = self.shapes.with_points(points)
            if self.keypoints is not None:
                self.keypoints[chosen, :, :2] *= factors[chosen, None].astype(np.float32)
        if boxes:
            self.boxes[chosen] *= np.concatenate([factors, factors], 1)[chosen]

    def keys(self) -> list[tuple[object, ...]]:
        """Return for each annotation what it consists of, apart from its ids and its image."""
        points, rings, boxes = self.shapes.points, self.shapes.rings, self.boxes + 0.0  # no negative zeros
        keypoints = None if self.keypoints is None else self.keypoints
        keys: list[tuple[object, ...]] = []
        for index in range(len(self)):
            first, last = self.shapes.spans[index].tolist()
            if self.shapes.coded[index]:
                shape = self.shapes.text[first:last].tobytes()
            elif last > first:
                shape = points[rings[first, 0] : rings[last - 1, 1]].tobytes()
            else:
                shape = b""
            place = b"" if keypoints is None else keypoints[index].tobytes()
            box = boxes[index].tobytes() if not shape else b""
            keys.append((int(self.labels[index]), bool(self.crowd[index]), shape, box, place))
        return keys

    def corners(self) -> Floats:
        """Return the boxes (N, 4) as x0, y0, x1, y1; NaN where width or height is not positive or not finite."""
        with np.errstate(invalid="ignore", over="ignore"):
            boxes = np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], 1)
            boxes[~(every(np.isfinite(boxes)) & every(self.boxes[:, 2:] > 0))] = np.nan
        return boxes


def every(conditions: npt.NDArray[Any]) -> Bools:
    """Return for which rows of (N, K) all conditions hold."""
    return np.asarray(conditions.all(1), np.bool_)


def some(conditions: npt.NDArray[Any]) -> Bools:
    """Return for which rows of (N, K) any condition holds."""
    return np.asarray(conditions.any(1), np.bool_)


def overlaps(one: Floats, two: Floats) -> Floats:
    """Return the intersection over union (N,) of pairs of boxes (N, 4), x0, y0, x1, y1; NaN where one has NaN."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        low, high = np.maximum(one[:, :2], two[:, :2]), np.minimum(one[:, 2:], two[:, 2:])
        both = np.maximum(0, high - low).prod(1)
        union = (one[:, 2:] - one[:, :2]).prod(1) + (two[:, 2:] - two[:, :2]).prod(1) - both
        return both / union


def agree(one: Floats, two: Floats) -> Bools:
    """Return where pairs of boxes (N, 4) describe the same object closely; False where one has NaN."""
    with np.errstate(invalid="ignore"):
        return (np.abs(one - two).max(1) <= 2) | (overlaps(one, two) >= 0.85)


def disagree(one: Floats, two: Floats) -> Bools:
    """Return where pairs of boxes (N, 4) cannot describe the same object; True where one has NaN.

    Annotators differ by a pixel or two, which is much for a small object; another place or size is a mistake.
    """
    with np.errstate(invalid="ignore"):
        return ~((np.abs(one - two).max(1) <= 3) | (overlaps(one, two) >= 0.5))


def clipped(boxes: Floats, sizes: Floats) -> Floats:
    """Return boxes (N, 4) clipped to images of sizes (N, 2), H, W."""
    return np.clip(boxes, 0, np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], 1))

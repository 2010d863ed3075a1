"""The outlines and run-length codes of a whole data set, stored in a few arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maskwright.structures import Masks, rle
from maskwright.structures import polygons as outlines

_FARTHEST = 1e7  # pixels from the corner of the image; larger coordinates cannot be clipped with enough precision


@dataclass(frozen=True)
class Shapes:
    """N objects, each a list of polygon rings or one run-length code.

    Attributes:
        points: (P, 2) float64, the points of all rings.
        rings: (R, 2) int64, first and last + 1 point of each ring.
        text: (T,) uint8, all run-length strings.
        spans: (N, 2) int64, first and last + 1 ring of an object, or byte of its string.
        coded: (N,) bool, True for a run-length code, False for polygons.
        frames: (N, 4) int64, x0, y0, x1, y1 of the codes; zeros for polygons.
    """

    points: np.ndarray
    rings: np.ndarray
    text: np.ndarray
    spans: np.ndarray
    coded: np.ndarray
    frames: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)

    def take(self, order: np.ndarray) -> Shapes:
        """Return the objects at these positions, in this order; outlines are not copied."""
        return replace(self, spans=self.spans[order], coded=self.coded[order], frames=self.frames[order])

    def polygon(self, index: int) -> list[np.ndarray]:
        """Return the rings (P, 2) of one object; empty for a run-length code."""
        if self.coded[index]:
            return []
        first, last = self.spans[index]
        return [self.points[a:b] for a, b in self.rings[first:last]]

    def code(self, index: int) -> bytes:
        """Return the run-length string of one object; it must have one."""
        first, last = self.spans[index]
        return self.text[first:last].tobytes()

    def masks(self, first: int, last: int, size: tuple[int, int]) -> Masks:
        """Return the masks of objects first ... last - 1 of one image.

        Args:
            first: First object.
            last: Last object + 1.
            size: H, W of the image.

        Returns:
            Polygons if all objects are polygons, otherwise run-length codes.
        """
        coded = self.coded[first:last]
        if not len(coded):
            return Masks.empty(size)
        if not coded.any():
            return Masks.from_polygons([self.polygon(i) for i in range(first, last)], size)
        if coded.all():
            return Masks("rle", [self.code(i) for i in range(first, last)], size)
        return Masks.join([self.masks(i, i + 1, size) for i in range(first, last)])

    def extents(self, sizes: np.ndarray) -> np.ndarray:
        """Return boxes (N, 4) around the objects, clipped to their images; `sizes` (N, 2) are H, W of the images."""
        boxes = self.frames.astype(np.float64)
        drawn = np.flatnonzero(~self.coded)
        if len(drawn) and len(self.points):
            low, high = _ring_extents(self.points, self.rings)
            first, last = self.spans[drawn].T
            ends = np.stack([first, last], 1).ravel()
            pad = np.concatenate([low, low[-1:]]), np.concatenate([high, high[-1:]])
            limits = sizes[drawn][:, ::-1]
            boxes[drawn, :2] = np.clip(np.minimum.reduceat(pad[0], ends)[::2], 0, limits)
            boxes[drawn, 2:] = np.clip(np.maximum.reduceat(pad[1], ends)[::2], 0, limits)
        return boxes


class ShapesBuilder:
    """Collects checked segmentations one by one."""

    def __init__(self) -> None:
        self._numbers: list[Any] = []
        self._parts: list[np.ndarray] = []
        self._ring_ends: list[int] = [0]
        self._text: list[bytes] = []
        self._bytes = 0
        self._spans: list[tuple[int, int]] = []
        self._coded: list[bool] = []
        self._frames: list[rle.Frame] = []
        self._notes: list[tuple[int, str]] = []

    def add(self, segmentation: Any, size: tuple[int, int]) -> str | None:
        """Add one object.

        Args:
            segmentation: What the annotation file has: a list of rings, or a run-length code.
            size: H, W of its image.

        Returns:
            What is wrong with it, in which case it is not added; None if nothing is.
        """
        if segmentation is None:
            return "has no segmentation; a mask is required"
        if isinstance(segmentation, dict):
            return self._add_code(segmentation, size)
        if not isinstance(segmentation, list):
            kind = type(segmentation).__name__
            return f"has a segmentation of type {kind}; expected polygons or a run-length code"
        if not segmentation:
            return "has an empty segmentation; a mask is required"
        return self._add_rings(segmentation)

    def _add_rings(self, rings: list[Any]) -> str | None:
        note = None
        if isinstance(rings[0], (int, float)):
            rings, note = [rings], "has a flat list of numbers as its segmentation, which is read as one polygon"
        for number, ring in enumerate(rings):
            if not isinstance(ring, list) or (ring and isinstance(ring[0], (list, dict))):
                return f"has a polygon (number {number}) that is not a flat list x, y, x, y, ..."
            if len(ring) % 2:
                return f"has a polygon of {len(ring)} numbers, an odd count; expected x, y, x, y, ..."
        good = [ring for ring in rings if len(ring) >= 6]
        if not good:
            return f"has a polygon of {len(rings[0]) // 2} points; at least 3 are needed"
        if len(good) < len(rings):
            note = f"has {len(rings) - len(good)} polygons with fewer than 3 points among others; these are skipped"
        if note:
            self._notes.append((len(self._spans), note))
        first = len(self._ring_ends) - 1
        for ring in good:
            self._numbers.extend(ring)
            self._ring_ends.append(self._ring_ends[-1] + len(ring) // 2)
        self._append(first, len(self._ring_ends) - 1, False, (0, 0, 0, 0))
        if len(self._numbers) > 1 << 20:
            self._convert()
        return None

    def _add_code(self, code: dict[str, Any], size: tuple[int, int]) -> str | None:
        own, counts = code.get("size"), code.get("counts")
        if not isinstance(own, list) or len(own) != 2:
            return "has a run-length code without a size [height, width]"
        if own != list(size):
            if own == [size[1], size[0]]:
                return f"has a run-length code of size {own}, that is [width, height]; expected [height, width]"
            return f"has a run-length code of size {own}, but its image is {list(size)} (height, width)"
        total = size[0] * size[1]
        try:
            if isinstance(counts, str):
                text = counts.encode("ascii")
                lengths = rle.decode_counts(text)
            elif isinstance(counts, list):
                lengths = np.array([_run(v) for v in counts], np.int64)
                text = None
            else:
                kind = type(counts).__name__
                return f"has a run-length code with counts of type {kind}; expected a string or a list"
        except (ValueError, TypeError, OverflowError) as error:
            return f"has an invalid run-length code ({error})"
        if not len(lengths) or lengths.min() < 0 or lengths.max() > total or lengths.sum() != total:
            covered = sum(lengths.tolist())
            return f"has a run-length code of {covered} pixels, but its image has {total}"
        if not lengths[1::2].any():
            return "has a run-length code without foreground pixels"
        text = rle.encode_counts(lengths) if text is None else text
        self._text.append(text)
        self._append(self._bytes, self._bytes + len(text), True, rle.frame(text, size[0]))
        self._bytes += len(text)
        return None

    def _append(self, first: int, last: int, coded: bool, frame: rle.Frame) -> None:
        self._spans.append((first, last))
        self._coded.append(coded)
        self._frames.append(frame)

    def _convert(self) -> None:
        try:
            self._parts.append(np.array(self._numbers, np.float64))
        except (ValueError, TypeError, OverflowError):
            self._parts.append(np.array([_coordinate(v) for v in self._numbers], np.float64))
        self._numbers = []

    def finish(self, sizes: np.ndarray | None = None) -> tuple[Shapes, dict[int, str], list[tuple[int, str]]]:
        """Return all objects that were added.

        Args:
            sizes: (N, 2), H, W of the image of each object; None skips the checks that need them.

        Returns:
            The objects; what is wrong with some of them, by position (their coordinates are replaced by harmless
            ones); and notes about others, with their positions.
        """
        self._convert()
        points = np.concatenate(self._parts).reshape(-1, 2)
        ends = np.array(self._ring_ends, np.int64)
        shapes = Shapes(
            points,
            np.stack([ends[:-1], ends[1:]], 1),
            np.frombuffer(b"".join(self._text), np.uint8),
            np.array(self._spans, np.int64).reshape(-1, 2),
            np.array(self._coded, bool),
            np.array(self._frames, np.int64).reshape(-1, 4),
        )
        problems: dict[int, str] = {}
        if len(points) and sizes is not None:
            problems = _check_polygons(shapes, sizes)
        return shapes, problems, [n for n in self._notes if n[0] not in problems]


def _check_polygons(shapes: Shapes, sizes: np.ndarray) -> dict[int, str]:
    """What is wrong with objects made of polygons, by position; their coordinates are set to 0."""
    problems: dict[int, str] = {}
    points, rings = shapes.points, shapes.rings
    owner = np.zeros(len(rings), np.int64)  # the object that each ring belongs to
    drawn = np.flatnonzero(~shapes.coded)
    owner[shapes.spans[drawn, 0]] = 1
    owner = drawn[np.cumsum(owner) - 1]
    finite = np.isfinite(points).all(1)
    if not finite.all():
        broken = np.unique(owner[~np.logical_and.reduceat(finite, rings[:, 0])])
        for index in broken.tolist():
            problems[index] = "has a polygon with a coordinate that is not a finite number"
        points[~finite] = 0
    far = (np.abs(points) > _FARTHEST).any(1)
    if far.any():
        for index in np.unique(owner[np.logical_or.reduceat(far, rings[:, 0])]).tolist():
            problems[index] = f"has a polygon with a coordinate beyond the limit of {_FARTHEST:.0e} pixels"
        points[far] = 0
    limits = sizes[owner][:, ::-1]
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = _ring_extents(points, rings)
        following = np.arange(1, len(points) + 1)
        following[rings[:, 1] - 1] = rings[:, 0]
        x, y = (points - np.repeat(low, rings[:, 1] - rings[:, 0], axis=0)).T
        area = np.abs(np.add.reduceat(x * y[following] - x[following] * y, rings[:, 0])) / 2
        # A ring this wide and inside the image contains the centre of a pixel; the few others are rasterized to check.
        sound = (area > 2 * (high - low).max(1) + 4) & (low >= -0.5).all(1) & (high <= limits + 0.5).all(1)
    unclear = np.setdiff1d(drawn, owner[sound])
    for index in unclear.tolist():
        if index not in problems:
            size = (int(sizes[index, 0]), int(sizes[index, 1]))
            problem = _polygon_problem(shapes.polygon(index), size)
            if problem:
                problems[index] = problem
    return problems


def _polygon_problem(rings: Sequence[np.ndarray], size: tuple[int, int]) -> str | None:
    if all(_is_collinear(ring) for ring in rings):
        return "has a polygon without area: its points are collinear"
    low = np.min([r.min(0) for r in rings], 0)
    high = np.max([r.max(0) for r in rings], 0)
    if (high <= 0).any() or (low >= (size[1], size[0])).any():
        return f"has a polygon outside its image of {size[1]} x {size[0]}"
    if not rle.area(outlines.fill(outlines.validated(rings, size), size, "union")):
        return "has a polygon that covers no pixel of its image"
    return None


def _is_collinear(ring: np.ndarray) -> bool:
    """Whether all points of a ring are collinear."""
    away = ring - ring[0]
    far = away[np.abs(away).sum(1).argmax()]
    reach = float(np.abs(far).max())
    if reach == 0 or not np.isfinite(reach):
        return reach == 0
    unit = away / reach
    across = unit[:, 0] * far[1] / reach - unit[:, 1] * far[0] / reach
    return bool(np.abs(across).max() * reach < 1e-6)


def _ring_extents(points: np.ndarray, rings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum.reduceat(points, rings[:, 0]), np.maximum.reduceat(points, rings[:, 0])


def _coordinate(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return float("nan")


def _run(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(f"{value!r} is not a run length")
    return int(value)

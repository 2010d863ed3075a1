"""The outlines and run-length codes of a whole data set, stored in a few arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from maskwright.data.values import parse_float, parse_length
from maskwright.structures import Masks, rle
from maskwright.structures import polygons as outlines

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_Item = TypeVar("_Item")

_AT_ONCE = 4096  # run-length codes that are decoded at once
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

    points: Floats
    rings: Ints
    text: npt.NDArray[np.uint8]
    spans: Ints
    coded: Bools
    frames: Ints

    def __len__(self) -> int:
        return len(self.spans)

    def take(self, order: Ints) -> Shapes:
        """Return the objects at these positions, in this order; outlines are not copied."""
        return replace(self, spans=self.spans[order], coded=self.coded[order], frames=self.frames[order])

    def polygon(self, index: int) -> list[Floats]:
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

    def present(self) -> Bools:
        """Return which objects (N,) have an outline or a code."""
        return self.spans[:, 1] > self.spans[:, 0]

    def extents(self, sizes: Floats | None = None) -> Floats:
        """Return boxes (N, 4) around the objects, zeros for objects without outline and code.

        Args:
            sizes: (N, 2), H, W of the images that the boxes of outlines are clipped to; None: they are not clipped.
        """
        boxes = self.frames.astype(np.float64)
        drawn = np.flatnonzero(~self.coded & self.present())
        if len(drawn):
            low, high = _ring_extents(self.points, self.rings)
            first, last = self.spans[drawn].T
            ends = np.stack([first, last], 1).ravel()
            boxes[drawn, :2] = np.minimum.reduceat(np.concatenate([low, low[-1:]]), ends)[::2]
            boxes[drawn, 2:] = np.maximum.reduceat(np.concatenate([high, high[-1:]]), ends)[::2]
            if sizes is not None:
                limits = np.concatenate([sizes[drawn][:, ::-1], sizes[drawn][:, ::-1]], 1)
                boxes[drawn] = np.clip(boxes[drawn], 0, limits)
        return boxes

    def pixels(self) -> Floats:
        """Return areas (N,): exact for codes, the sum of the rings' areas for outlines, which may overlap."""
        areas = np.zeros(len(self))
        codes = np.flatnonzero(self.coded)
        if len(codes):
            starts, ends, owner = rle.runs_all([self.code(i) for i in codes.tolist()])
            areas[codes] = np.bincount(owner, ends - starts, minlength=len(codes))
        drawn = np.flatnonzero(~self.coded & self.present())
        if len(drawn):
            sums = np.concatenate([[0.0], np.cumsum(_ring_areas(self.points, self.rings))])
            areas[drawn] = sums[self.spans[drawn, 1]] - sums[self.spans[drawn, 0]]
        return areas

    def ring_owners(self) -> Ints:
        """Return the object of each ring (R,); -1 for rings of none."""
        owner = np.full(len(self.rings), -1, np.int64)
        drawn = np.flatnonzero(~self.coded & self.present())
        first, last = self.spans[drawn].T
        counts = last - first
        owner[np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)] = np.repeat(
            drawn, counts
        )
        return owner

    def point_owners(self) -> Ints:
        """Return the object of each point (P,); -1 for points of none."""
        return np.repeat(self.ring_owners(), self.rings[:, 1] - self.rings[:, 0])

    def with_points(self, points: Floats) -> Shapes:
        """Return the objects with other coordinates (P, 2)."""
        return replace(self, points=points)

    def with_codes(self, codes: dict[int, bytes], frames: dict[int, rle.Frame]) -> Shapes:
        """Return the objects with other run-length strings, and their boxes, for some of them."""
        spans, boxes = self.spans.copy(), self.frames.copy()
        parts, place = [self.text], len(self.text)
        for index, code in codes.items():
            parts.append(np.frombuffer(code, np.uint8))
            spans[index] = place, place + len(code)
            boxes[index] = frames[index]
            place += len(code)
        return replace(self, text=np.concatenate(parts), spans=spans, frames=boxes)


class ShapesBuilder:
    """Collects segmentations one by one.

    Attributes:
        absent: What objects without a segmentation have in its place, by position.
        nested: Positions of objects whose polygons are lists of points, [[x, y], ...], or nested deeper.
        quoted: Number of run-length codes that are Python's notation of bytes, "b'...'".
        notes: Positions of other objects that are read with a remark, and the remarks.
        code_sizes: H, W of each run-length code; zeros for other objects.
    """

    def __init__(self) -> None:
        self._numbers: list[Any] = []
        self._parts: list[Floats] = []
        self._ring_ends: list[int] = [0]
        self._codes: list[tuple[int, bytes]] = []
        self._counts: list[tuple[int, Ints]] = []
        self._spans: list[tuple[int, int]] = []
        self._coded: list[bool] = []
        self.absent: dict[int, str] = {}
        self.nested: list[int] = []
        self.quoted = 0
        self.notes: list[tuple[int, str]] = []
        self.code_sizes: list[tuple[int, int]] = []

    def add(self, segmentation: Any) -> str | None:
        """Add one object.

        Args:
            segmentation: What the annotation file has: a list of rings, or a run-length code. An object that has
                neither is added without.

        Returns:
            What is wrong with it, in which case it is not added; None if nothing is. Run-length codes are decoded by
            `finish`.
        """
        if segmentation is None or segmentation in ([], [[]], {}):
            what = "no segmentation" if segmentation is None else "an empty segmentation"
            self.absent[len(self._spans)] = f"has {what}; a mask is required"
            rings = len(self._ring_ends) - 1
            self._append(rings, rings, False, (0, 0))
            return None
        if isinstance(segmentation, dict):
            return self._add_code(cast(dict[str, Any], segmentation))
        if not isinstance(segmentation, list):
            kind = type(segmentation).__name__
            return f"has a segmentation of type {kind}; expected polygons or a run-length code"
        return self._add_rings(cast(list[Any], segmentation))

    def _add_rings(self, rings: list[Any]) -> str | None:
        note = None
        if isinstance(rings[0], (int, float)):
            rings, note = [rings], "has a flat list of numbers as its segmentation, which is read as one polygon"
        elif (unnested := _flattened(rings)) is not None:
            rings = unnested
            self.nested.append(len(self._spans))
        for number, ring in enumerate(rings):
            if not isinstance(ring, list) or (ring and isinstance(ring[0], (list, dict))):
                return f"has a polygon (number {number}) that is not a flat list x, y, x, y, ..."
            if len(cast(list[Any], ring)) % 2:
                return f"has a polygon of {len(cast(list[Any], ring))} numbers, an odd count; expected x, y, x, y, ..."
        good = [ring for ring in rings if len(ring) >= 6]
        if not good:
            return f"has a polygon of {len(rings[0]) // 2} points; at least 3 are needed"
        if len(good) < len(rings):
            note = f"has {len(rings) - len(good)} polygons with fewer than 3 points among others; these are skipped"
        if note:
            self.notes.append((len(self._spans), note))
        first = len(self._ring_ends) - 1
        for ring in good:
            self._numbers.extend(ring)
            self._ring_ends.append(self._ring_ends[-1] + len(ring) // 2)
        self._append(first, len(self._ring_ends) - 1, False, (0, 0))
        if len(self._numbers) > 1 << 20:
            self._convert()
        return None

    def _add_code(self, code: dict[str, Any]) -> str | None:
        given, counts = code.get("size"), code.get("counts")
        own = cast(list[Any], given) if isinstance(given, list) else []
        height, width = (parse_length(v) for v in own) if len(own) == 2 else (None, None)
        if height is None or width is None:
            return "has a run-length code without a size [height, width]"
        try:
            if isinstance(counts, str):
                if counts.startswith(("b'", 'b"')) and counts.endswith(counts[1]) and len(counts) > 3:
                    counts = counts[2:-1].encode("ascii").decode("unicode_escape")
                    self.quoted += 1
                self._codes.append((len(self._spans), counts.encode("ascii")))
            elif isinstance(counts, list):
                self._counts.append((len(self._spans), _runs(cast(list[Any], counts))))
            else:
                kind = type(counts).__name__
                return f"has a run-length code with counts of type {kind}; expected a string or a list"
        except (ValueError, TypeError, OverflowError) as error:
            return f"has an invalid run-length code ({error})"
        self._append(0, 0, True, (height, width))
        return None

    def _append(self, first: int, last: int, coded: bool, code_size: tuple[int, int]) -> None:
        self._spans.append((first, last))
        self._coded.append(coded)
        self.code_sizes.append(code_size)

    def _convert(self) -> None:
        try:
            self._parts.append(np.array(self._numbers, np.float64))
        except (ValueError, TypeError, OverflowError):
            self._parts.append(np.array([parse_float(v) for v in self._numbers], np.float64))
        self._numbers = []

    def finish(self) -> tuple[Shapes, dict[int, str]]:
        """Return all objects that were added.

        Returns:
            The objects, with NaN for coordinates that are not numbers; and what is wrong with run-length codes, by
            position. The latter have neither an outline nor a code.
        """
        self._convert()
        ends = np.array(self._ring_ends, np.int64)
        texts, problems = self._checked_codes()
        frames = np.zeros((len(self._spans), 4), np.int64)
        by_height: dict[int, list[int]] = {}
        place = 0
        for index, text in texts.items():
            by_height.setdefault(self.code_sizes[index][0], []).append(index)
            self._spans[index] = place, place + len(text)
            place += len(text)
        for height, members in by_height.items():
            for chunk in _chunks(members):
                frames[chunk] = rle.frames([texts[i] for i in chunk], height)
        shapes = Shapes(
            np.concatenate(self._parts).reshape(-1, 2),
            np.stack([ends[:-1], ends[1:]], 1),
            np.frombuffer(b"".join(texts.values()), np.uint8),
            np.array(self._spans, np.int64).reshape(-1, 2),
            np.array(self._coded, bool),
            frames,
        )
        return shapes, problems

    def _checked_codes(self) -> tuple[dict[int, bytes], dict[int, str]]:
        """The strings of all valid codes, by position, and what is wrong with the others. Many are decoded at once."""
        texts: dict[int, bytes] = {}
        problems: dict[int, str] = {}
        for chunk in _chunks(self._codes):
            try:
                values, lengths = rle.decode_all([text for _, text in chunk])
                pieces = np.split(values, np.cumsum(lengths)[:-1])
            except ValueError:
                pieces = [_decoded(text) for _, text in chunk]
            for (index, text), runs in zip(chunk, pieces, strict=True):
                problem = runs if isinstance(runs, str) else self._problem(index, runs)
                if problem:
                    problems[index] = problem
                else:
                    texts[index] = text
        for chunk in _chunks(self._counts):
            valid: list[tuple[int, Ints]] = []
            for index, runs in chunk:
                problem = self._problem(index, runs)
                if problem:
                    problems[index] = problem
                else:
                    valid.append((index, runs))
            encoded = rle.encode_all([runs for _, runs in valid])
            texts.update(zip((index for index, _ in valid), encoded, strict=True))
        return texts, problems

    def _problem(self, index: int, runs: Ints) -> str | None:
        height, width = self.code_sizes[index]
        total = height * width
        if not len(runs) or runs.min() < 0 or runs.max() > total or runs.sum() != total:
            covered = sum(runs.tolist())
            return f"has a run-length code of {covered} pixels, but its image has {total}"
        return None if runs[1::2].any() else "has a run-length code without foreground pixels"


def _decoded(text: bytes) -> Ints | str:
    """The run lengths of a string, or what is wrong with it."""
    try:
        return rle.decode_counts(text)
    except ValueError as error:
        return f"has an invalid run-length code ({error})"


def _chunks(values: list[_Item]) -> Iterator[list[_Item]]:
    for first in range(0, len(values), _AT_ONCE):
        yield values[first : first + _AT_ONCE]


def _flattened(rings: list[Any]) -> list[list[Any]] | None:
    """Polygons as flat lists, if they are lists of points [x, y] or {"x": x, "y": y}, or nested once more."""
    if all(_is_point(part) for part in rings):
        return [_flat(rings)] if len(rings) >= 3 else None
    if all(isinstance(part, list) for part in rings):
        parts = cast(list[list[Any]], rings)
        if not parts[0] or not isinstance(parts[0][0], (list, dict)):
            return None
        if all(part and all(_is_point(point) for point in part) for part in parts):
            return [_flat(part) for part in parts]
        inner = [ring for part in parts for ring in part]
        if inner and all(isinstance(ring, list) for ring in inner):  # one polygon, or one ring and its holes, a list
            nested = cast(list[list[Any]], inner)
            if all(_is_point(point) for ring in nested for point in ring):
                return [_flat(ring) for ring in nested]
            if all(len(ring) >= 6 and not isinstance(ring[0], (list, dict)) for ring in nested):
                return nested
    return None


def _is_point(value: Any) -> bool:
    """Whether a value is [x, y] or {"x": x, "y": y}."""
    if isinstance(value, dict):
        return "x" in value and "y" in value
    if not isinstance(value, list) or len(cast(list[Any], value)) != 2:
        return False
    return all(isinstance(v, (int, float, str)) for v in cast(list[Any], value))


def _flat(points: list[Any]) -> list[Any]:
    flat: list[Any] = []
    for point in points:
        flat += [point["x"], point["y"]] if isinstance(point, dict) else point
    return flat


def check_polygons(shapes: Shapes, sizes: Floats) -> dict[int, str]:
    """Find invalid outlines.

    Args:
        shapes: N objects. Coordinates that are not finite or too large are replaced by zeros.
        sizes: (N, 2), H, W of the image of each object.

    Returns:
        What is wrong with an object, by position.
    """
    problems: dict[int, str] = {}
    points, rings = shapes.points, shapes.rings
    drawn = np.flatnonzero(~shapes.coded & shapes.present())
    if not len(drawn):
        return problems
    owner = shapes.ring_owners()
    finite = np.isfinite(points).all(1)
    if not finite.all():
        broken = np.unique(owner[~np.logical_and.reduceat(finite, rings[:, 0])])
        for index in broken[broken >= 0].tolist():
            problems[index] = "has a polygon with a coordinate that is not a finite number"
        points[~finite] = 0
    far = (np.abs(points) > _FARTHEST).any(1)
    if far.any():
        beyond = np.unique(owner[np.logical_or.reduceat(far, rings[:, 0])])
        for index in beyond[beyond >= 0].tolist():
            problems[index] = f"has a polygon with a coordinate beyond the limit of {_FARTHEST:.0e} pixels"
        points[far] = 0
    limits = sizes[owner][:, ::-1]
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = _ring_extents(points, rings)
        area = _ring_areas(points, rings)
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


def _polygon_problem(rings: Sequence[Floats], size: tuple[int, int]) -> str | None:
    if all(_is_collinear(ring) for ring in rings):
        return "has a polygon without area: its points are collinear"
    low = np.min([r.min(0) for r in rings], 0)
    high = np.max([r.max(0) for r in rings], 0)
    if (high <= 0).any() or (low >= (size[1], size[0])).any():
        return f"has a polygon outside its image of {size[1]} x {size[0]}"
    if not rle.area(outlines.fill(outlines.validated(rings, size), size, "union")):
        return "has a polygon that covers no pixel of its image"
    return None


def _is_collinear(ring: Floats) -> bool:
    """Whether all points of a ring are collinear."""
    away = ring - ring[0]
    far = away[np.abs(away).sum(1).argmax()]
    reach = float(np.abs(far).max())
    if reach == 0 or not np.isfinite(reach):
        return reach == 0
    unit = away / reach
    across = unit[:, 0] * far[1] / reach - unit[:, 1] * far[0] / reach
    return bool(np.abs(across).max() * reach < 1e-6)


def _ring_extents(points: Floats, rings: Ints) -> tuple[Floats, Floats]:
    """Least and greatest coordinates (R, 2) of each ring."""
    return np.minimum.reduceat(points, rings[:, 0]), np.maximum.reduceat(points, rings[:, 0])


def _ring_areas(points: Floats, rings: Ints) -> Floats:
    """Areas (R,) by the shoelace formula, about the corner of each ring for precision."""
    with np.errstate(over="ignore", invalid="ignore"):
        low = np.minimum.reduceat(points, rings[:, 0])
        following = np.arange(1, len(points) + 1)
        following[rings[:, 1] - 1] = rings[:, 0]
        x, y = (points - np.repeat(low, rings[:, 1] - rings[:, 0], axis=0)).T
        return np.abs(np.add.reduceat(x * y[following] - x[following] * y, rings[:, 0])) / 2


def _runs(counts: list[Any]) -> Ints:
    """Run lengths as an array; ValueError if one is not an integer."""
    try:
        lengths = np.array(counts)
    except ValueError:  # lists inside
        lengths = np.zeros(0)
    if (lengths.dtype == np.int64 and lengths.ndim == 1) or not counts:
        return lengths.astype(np.int64)
    return np.array([_run(v) for v in counts], np.int64)


def _run(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(f"{value!r} is not a run length")
    return int(value)

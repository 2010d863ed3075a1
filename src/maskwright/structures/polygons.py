"""Polygons: validating, filling and tracing rings. A ring is (P, 2) float64, x and y; its last point is joined to the
first."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco

from maskwright.structures import rle
from maskwright.structures.placement import Placement

Ring = npt.NDArray[np.float64]
Rings = tuple[Ring, ...]


def validated(rings: Sequence[Any], size: tuple[int, int]) -> Rings:
    """Return rings as (P, 2) float64, clipped to a margin around the image.

    The rasterizer's memory grows with the length of an outline, not with the size of the image.

    Args:
        rings: Each flat `x, y, x, y, ...` or (P, 2).
        size: H, W of the image.

    Returns:
        The rings that have at least three points after clipping.

    Raises:
        ValueError: If a ring is not a list of pairs, has fewer than three points, or a coordinate is not finite.
    """
    result: list[Ring] = []
    for number, ring in enumerate(rings):
        points = np.asarray(ring, np.float64)
        if points.ndim == 1:
            if len(points) % 2:
                raise ValueError(f"polygon {number} has an odd number of coordinates ({len(points)})")
            points = points.reshape(-1, 2)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"polygon {number} is not a list of x, y pairs")
        if len(points) < 3:
            raise ValueError(f"polygon {number} has {len(points)} points; at least 3 are needed")
        if not np.isfinite(points).all():
            raise ValueError(f"polygon {number} has a coordinate that is not finite")
        result.append(_bounded(points, size))
    return tuple(ring for ring in result if len(ring) >= 3)


def place_ring(ring: Ring, placement: Placement) -> Ring:
    """Map a ring from the image to the network's input; a ring outside of it becomes one without area."""
    x = placement.image_size[1] - ring[:, 0] if placement.mirrored else ring[:, 0]
    moved = np.stack(
        [x * placement.scale[0] + placement.offset[0], ring[:, 1] * placement.scale[1] + placement.offset[1]], 1
    )
    moved = _bounded(moved, placement.size)
    return moved if len(moved) >= 3 else np.full((3, 2), -1.0)


def fill(rings: Rings, size: tuple[int, int], rule: str) -> bytes:
    """Return the run-length string of an object.

    Args:
        rings: Rings of the object.
        size: H, W of the image.
        rule: "union", as COCO fills polygons, or "even-odd".
    """
    height, width = size
    if not rings:
        return rle.from_crop(np.zeros((0, 0), bool), 0, 0, size)
    flat = [ring.ravel().tolist() for ring in rings]
    codes = cast(list[Any], coco.frPyObjects(cast(Any, flat), height, width))
    if len(codes) == 1:
        return cast(bytes, codes[0]["counts"])
    if rule == "union":
        return cast(bytes, coco.merge(codes)["counts"])
    edges = np.concatenate([np.concatenate(rle.runs(code["counts"])) for code in codes])
    places, times = np.unique(edges, return_counts=True)  # exclusive or: edges that occur twice cancel
    odd = places[times % 2 == 1]
    return rle.from_runs(odd[0::2], odd[1::2], height * width)


def boxes(objects: Sequence[Rings], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return boxes (N, 4) around the points of objects, clipped to the image; zeros for objects outside of it."""
    result = np.zeros((len(objects), 4))
    for row, rings in zip(result, objects, strict=True):
        if rings:
            points = np.clip(np.concatenate(rings), 0, (size[1], size[0]))
            low, high = points.min(0), points.max(0)
            if (high > low).all():
                row[:2], row[2:] = low, high
    return result


def trace(crop: rle.Bools, x0: int, y0: int, *, joined: bool = False) -> list[Ring]:
    """Trace a mask along its pixel borders.

    Args:
        crop: (h, w) bool.
        x0: x of its upper left corner.
        y0: y of its upper left corner.
        joined: Treat pixels that touch only at a corner as one region, not as two.

    Returns:
        Rings; outer borders are clockwise on the screen, holes counterclockwise.
    """
    height, width = crop.shape
    plane = np.zeros((height + 2, width + 2), np.int8)
    plane[1:-1, 1:-1] = crop
    stride = width + 2
    # Edges with the object on their right: to the right along the top, down along the right side, and so on.
    down = np.diff(plane, axis=0)  # (h + 1, w + 2): horizontal borders
    across = np.diff(plane, axis=1)  # (h + 2, w + 1): vertical borders

    def edges(
        step: npt.NDArray[np.int8], value: int, shift: tuple[int, int], move: int
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Starts and ends of the borders where `step` has a value, as flat positions of grid corners."""
        y, x = np.nonzero(step == value)
        start = (y + shift[0]) * stride + x + shift[1]
        return start, start + move

    right = edges(down, 1, (0, -1), 1)
    left = edges(down, -1, (0, 0), -1)
    downward = edges(across, -1, (-1, 0), stride)
    upward = edges(across, 1, (0, 0), -stride)
    # Directions: 0 right, 1 down, 2 left, 3 up. Where two pixels meet at a corner, right turns separate them and left
    # turns join them.
    turn = {0: 3, 1: 0, 2: 1, 3: 2} if joined else {0: 1, 1: 2, 2: 3, 3: 0}
    out: dict[int, dict[int, int]] = {}
    for direction, (starts, ends) in enumerate([right, downward, left, upward]):
        here: list[int] = starts.tolist()
        there: list[int] = ends.tolist()
        for a, b in zip(here, there, strict=True):
            out.setdefault(a, {})[direction] = b
    rings: list[Ring] = []
    while out:
        start = next(iter(out))
        at, direction = start, next(iter(out[start]))
        corners: list[int] = []
        while True:
            exits = out[at]
            ahead = direction
            if len(exits) == 1:
                direction = next(iter(exits))
            elif turn[direction] in exits:
                direction = turn[direction]
            else:
                direction = next(iter(exits))
            if direction != ahead or not corners:
                corners.append(at)
            following = exits.pop(direction)
            if not exits:
                del out[at]
            at = following
            if at == start:
                break
        points = np.array(corners)
        ring = np.stack([points % stride + x0, points // stride + y0], 1).astype(np.float64)
        rings.append(ring)
    return rings


def _bounded(points: Ring, size: tuple[int, int]) -> Ring:
    """A ring clipped to a margin around the image (Sutherland and Hodgman, 1974)."""
    height, width = size
    margin = 2 * max(height, width) + 16
    low, high = np.array([-margin, -margin], float), np.array([width + margin, height + margin], float)
    if (points >= low).all() and (points <= high).all():
        return points
    points = points.clip(-1e100, 1e100)  # so that differences stay finite
    for axis in (0, 1):
        for limit, sign in ((low[axis], 1.0), (high[axis], -1.0)):
            if not len(points):
                return points
            following = np.roll(points, -1, 0)
            here, there = sign * (points[:, axis] - limit), sign * (following[:, axis] - limit)
            crosses = (here >= 0) != (there >= 0)
            share = np.where(crosses, here / np.where(crosses, here - there, 1), 0)[:, None]
            cut = points + share * (following - points)
            pairs = np.stack([points, cut], 1).reshape(-1, 2)
            points = pairs[np.stack([here >= 0, crosses], 1).ravel()]
    return points

"""Outlines of rectangles, circles and ellipses, and outlines with holes or in several parts as one ring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import spatial  # pyright: ignore[reportMissingTypeStubs] - no types

from maskwright.data.values import parse_float

Ring = npt.NDArray[np.float64]

_DEVIATION = 0.05  # pixels between a circle and the polygon that stands for it


def rectangle(x0: float, y0: float, x1: float, y1: float, degrees: float = 0.0) -> list[float]:
    """Return a rectangle as a flat ring, turned clockwise on the screen around its center."""
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    if degrees:
        corners = _turned(corners, ((x0 + x1) / 2, (y0 + y1) / 2), math.radians(degrees))
    return corners.ravel().tolist()


def ellipse(x: float, y: float, rx: float, ry: float, radians: float = 0.0) -> list[float]:
    """Return an ellipse with center x, y as a flat ring, turned clockwise on the screen around its center."""
    largest = max(abs(rx), abs(ry), 1.0)
    count = int(min(512, max(16, math.ceil(math.pi * math.sqrt(largest / (2 * _DEVIATION))))))
    angles = np.arange(count) * (2 * math.pi / count)
    points = np.stack([x + abs(rx) * np.cos(angles), y + abs(ry) * np.sin(angles)], 1)
    return (_turned(points, (x, y), radians) if radians else points).ravel().tolist()


def _turned(points: Ring, center: tuple[float, float], radians: float) -> Ring:
    cosine, sine = math.cos(radians), math.sin(radians)
    x, y = (points - center).T
    return np.stack([x * cosine - y * sine, x * sine + y * cosine], 1) + np.array(center)


def numbers(values: Sequence[Any]) -> list[float] | None:
    """Return values as finite floats; None if one of them is not a finite number."""
    parsed = [parse_float(value) for value in values]
    return parsed if all(math.isfinite(value) for value in parsed) else None


def joined(rings: Sequence[Ring]) -> Ring:
    """Join rings into one by lines that lead there and back between their nearest points.

    Filled "even-odd", as all common tools fill a polygon, the ring covers exactly what the rings cover: parts stay
    separate and holes stay open, apart from lines without width. Ultralytics writes objects in several parts so.

    Args:
        rings: At least one ring (P, 2).

    Returns:
        One ring (P', 2).
    """
    tree_of: Any = getattr(spatial, "cKDTree")  # noqa: B009 - no types
    ring = np.asarray(rings[0], np.float64)
    rest = [np.asarray(other, np.float64) for other in rings[1:]]
    while rest:
        tree = tree_of(ring)
        nearest: list[tuple[Any, Any]] = [tree.query(other) for other in rest]
        chosen = min(range(len(rest)), key=lambda n: float(np.min(nearest[n][0])))
        distances, places = nearest[chosen]
        there = int(np.argmin(distances))
        here, other = int(places[there]), rest.pop(chosen)
        loop = np.concatenate([other[there:], other[: there + 1]])
        ring = np.concatenate([ring[: here + 1], loop, ring[here:]])
    return ring

"""Outlines as sequences of vertices, for networks that move them: from masks, extreme points, octagons, features.

Points are x, y. Several outlines form one tensor (N, V, 2), of which row n has `lengths[n]` points followed by padding.
Outlines are counter-clockwise on the screen: top, left, bottom, right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.ops.contours import resample
from maskwright.structures import Masks


def outlines_of(masks: Masks) -> tuple[list[np.ndarray], np.ndarray]:
    """Traces the outer outline of every part of every mask; holes are left out.

    Args:
        masks: N masks.

    Returns:
        One array (P, 2) of points per outline, and the index of the mask of each.
    """
    traced = masks if masks.kind == "polygon" and masks.fill == "union" else masks.pack()
    rings = [(number, ring) for number, own in enumerate(traced.polygons()) for ring in own]
    owners = np.array([number for number, _ in rings], np.int64)
    points = [ring for _, ring in rings]
    if traced.kind != "polygon" and points:  # traced: holes have the opposite orientation
        outer = signed_areas(points) > 0
        return [p for p, good in zip(points, outer, strict=True) if good], owners[outer]
    return points, owners


def signed_areas(rings: Sequence[np.ndarray]) -> np.ndarray:
    """Computes the area of each outline, negative if it is counter-clockwise on the screen."""
    flat, owners, _ = _flat(rings)
    following = flat[_following(owners, len(rings))]
    return np.bincount(owners, flat[:, 0] * following[:, 1] - following[:, 0] * flat[:, 1], len(rings)) / 2


def tidy_outlines(
    rings: Sequence[np.ndarray], size: tuple[float, float], smallest: float = 0.0
) -> tuple[Float[Tensor, "n v 2"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Clips outlines to a map, orients them counter-clockwise and removes repeated points. Computed in float64.

    Args:
        rings: Outlines, (P, 2) each.
        size: Height and width of the map.
        smallest: Outlines with an area of no more than this, or with fewer than three points, are dropped.

    Returns:
        Points, the number of points of each outline, and its index in `rings`.
    """
    flat, owners, places = _flat(rings)
    flat = flat.clip(0, (size[1], size[0]))
    count = len(rings)
    following = flat[_following(owners, count)]
    areas = np.bincount(owners, flat[:, 0] * following[:, 1] - following[:, 0] * flat[:, 1], count) / 2
    lengths = np.bincount(owners, minlength=count)
    places = np.where(areas[owners] > 0, lengths[owners] - 1 - places, places)  # clockwise ones are reversed
    order = np.lexsort((places, owners))
    flat, owners, places = flat[order], owners[order], places[order]
    # Of equal points the first is kept.
    alike = np.lexsort((places, flat[:, 1], flat[:, 0], owners))
    same = np.zeros(len(flat), bool)
    ahead, behind = alike[:-1], alike[1:]
    same[behind] = (owners[ahead] == owners[behind]) & (flat[ahead] == flat[behind]).all(1)
    flat, owners = flat[~same], owners[~same]
    lengths = np.bincount(owners, minlength=count)
    good = (np.abs(areas) > smallest) & (lengths >= 3)
    chosen = good[owners]
    flat, owners, kept = flat[chosen], owners[chosen], good.nonzero()[0]
    lengths = lengths[kept]
    row = (np.cumsum(good) - 1)[owners]
    points = np.zeros((len(kept), int(lengths.max(initial=3)), 2))
    points[row, np.arange(len(flat)) - (np.cumsum(lengths) - lengths)[row]] = flat
    return torch.from_numpy(points), torch.from_numpy(lengths), torch.from_numpy(kept)


def bounds(points: Float[Tensor, "n v 2"], lengths: Int[Tensor, " n"]) -> Float[Tensor, "n 4"]:
    """Computes the boxes x0, y0, x1, y1 around the outlines; `lengths` are their numbers of points."""
    outside = (torch.arange(points.shape[1], device=points.device) >= lengths[:, None])[..., None]
    low = points.masked_fill(outside, torch.inf).amin(1)
    return torch.cat([low, points.masked_fill(outside, -torch.inf).amax(1)], 1)


def extreme_points(
    points: Float[Tensor, "n v 2"], lengths: Int[Tensor, " n"], share: float = 0.02
) -> Float[Tensor, "n 4 2"]:
    """Computes the extreme points of each outline (ExtremeNet, arXiv 1901.08043).

    Each is the centre of the run of vertices around the extreme one (the first of equal ones) that are within `share`
    of the height or width of it.

    Args:
        points: Vertices x, y.
        lengths: Number of vertices of each outline.
        share: Tolerance, as a share of the box's height or width.

    Returns:
        x, y of the top, left, bottom and right point.
    """
    box = bounds(points, lengths)
    sides = box[:, 2:] - box[:, :2]
    steps = torch.arange(points.shape[1], device=points.device)
    valid = steps < lengths[:, None]
    result = []
    for axis, sign in ((1, 1.0), (0, 1.0), (1, -1.0), (0, -1.0)):
        value = (points[..., axis] * sign).masked_fill(~valid, torch.inf)
        first = value.argmin(1, keepdim=True)
        best = value.gather(1, first)
        low, high = torch.full_like(best, torch.inf), torch.full_like(best, -torch.inf)
        for direction in (1, -1):
            index = (first + direction * steps) % lengths[:, None]
            close = value.gather(1, index) - best <= share * sides[:, axis, None]
            run = (close & valid).long().cumprod(1) > 0
            across = points[..., 1 - axis].gather(1, index)
            low = low.minimum(across.masked_fill(~run, torch.inf).amin(1, keepdim=True))
            high = high.maximum(across.masked_fill(~run, -torch.inf).amax(1, keepdim=True))
        middle, edge = (low + high) / 2, best * sign
        result.append(torch.cat([middle, edge] if axis == 1 else [edge, middle], 1))
    return torch.stack(result, 1)


def diamonds(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4 2"]:
    """Computes the midpoints of the top, left, bottom and right side of each box."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return torch.stack([torch.stack(p, -1) for p in ((x, y0), (x0, y), (x, y1), (x1, y))], 1)


def octagons(extremes: Float[Tensor, "n 4 2"]) -> Float[Tensor, "n 12 2"]:
    """Computes the octagons of extreme points (ExtremeNet, arXiv 1901.08043).

    Each extreme point is the centre of an edge of a quarter of the width or height, clipped to the box of the four.

    Args:
        extremes: x, y of the top, left, bottom and right point.

    Returns:
        Twelve points: the extreme points and the ends of their edges, from the top point on.
    """
    top, left, bottom, right = extremes.unbind(1)
    x0, x1, y0, y1 = left[:, 0], right[:, 0], top[:, 1], bottom[:, 1]
    w, h = (x1 - x0) / 8, (y1 - y0) / 8
    points = (
        top, ((top[:, 0] - w).maximum(x0), y0), (x0, (left[:, 1] - h).maximum(y0)),
        left, (x0, (left[:, 1] + h).minimum(y1)), ((bottom[:, 0] - w).maximum(x0), y1),
        bottom, ((bottom[:, 0] + w).minimum(x1), y1), (x1, (right[:, 1] + h).minimum(y1)),
        right, (x1, (right[:, 1] - h).maximum(y0)), ((top[:, 0] + w).minimum(x1), y0),
    )  # fmt: skip
    return torch.stack([p if isinstance(p, Tensor) else torch.stack(p, -1) for p in points], 1)


def read_at(
    features: Float[Tensor, "b c h w"],
    points: Float[Tensor, "n p 2"],
    owners: Int[Tensor, " n"],
    *,
    align_corners: bool,
) -> Float[Tensor, "n p c"]:
    """Samples features at points by bilinear interpolation, with zeros outside of the map.

    Args:
        features: Feature maps.
        points: x, y in cells of the map.
        owners: Index of the image of each outline.
        align_corners: Whether x is sampled at x (W - 1) / W, like `grid_sample` with that setting at x / (W / 2) - 1
            (and without the setting before PyTorch 1.3); otherwise at x - 0.5: cell (i, j) covers [j, j + 1) x
            [i, i + 1).

    Returns:
        Features of each point, in the dtype of the maps.
    """
    _, channels, height, width = features.shape
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    x, y = points.unbind(-1)
    x, y = (x * ((width - 1) / width), y * ((height - 1) / height)) if align_corners else (x - 0.5, y - 0.5)
    left, top = x.detach().floor(), y.detach().floor()
    result = table.new_zeros(())
    for column, across in ((left, left + 1 - x), (left + 1, x - left)):
        for row, down in ((top, top + 1 - y), (top + 1, y - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            cell = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            weight = torch.where(inside, across * down, 0)[..., None].to(table)
            result = result + table[cell + owners[:, None] * (height * width)] * weight
    return result


def _flat(rings: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All points, the outline of each, and its position in that outline."""
    lengths = np.array([len(r) for r in rings], np.int64)
    flat = np.concatenate(rings) if len(rings) else np.zeros((0, 2))
    owners = np.repeat(np.arange(len(rings)), lengths)
    return flat.astype(np.float64), owners, np.arange(len(flat)) - (np.cumsum(lengths) - lengths)[owners]


def _following(owners: np.ndarray, count: int) -> np.ndarray:
    """Index of the next point of the same outline, whose points are consecutive; the first follows the last."""
    lengths = np.bincount(owners, minlength=count)
    first = np.cumsum(lengths) - lengths
    following = np.arange(1, len(owners) + 1)
    last = (first + lengths - 1)[lengths > 0]
    following[last] = first[lengths > 0]
    return following


def diamond_lines(boxes: Float[Tensor, "n 4"], count: int) -> Float[Tensor, "n {count} 2"]:
    """The midpoints of a box's sides as a closed contour with `count` points, a quarter of them on each edge."""
    corners = diamonds(boxes)
    part = torch.arange(count // 4, device=boxes.device) / (count // 4)
    edges = (corners.roll(-1, 1) - corners)[:, :, None] * part[:, None]
    return (corners[:, :, None] + edges).flatten(1, 2)


def octagon_lines(extremes: Float[Tensor, "n 4 2"], count: int) -> Float[Tensor, "n {count} 2"]:
    """The octagons of extreme points as closed contours with `count` points."""
    return resample(octagons(extremes), count)


def clipped_to_map(points: Float[Tensor, "*n 2"], feature: Float[Tensor, "b c h w"]) -> Float[Tensor, "*n 2"]:
    """Points x, y moved into the map."""
    x, y = points.unbind(-1)
    return torch.stack([x.clamp(0, feature.shape[3] - 1), y.clamp(0, feature.shape[2] - 1)], -1)

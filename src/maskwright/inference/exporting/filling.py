"""Filled outlines with operators of a graph: tables of crossings, summed along one axis, whose odd entries are inside.

Outlines are of a fixed number of points; sizes of images may be symbols.
"""

# Some functions of torch have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FINE = 5  # steps per pixel of COCO's rasteriser
FAR = 4e4  # coordinates are limited to this, so that float32 has their products exactly enough
BUDGET = 4_000_000  # crossings that are computed together


def fill_coco(points: Float[Tensor, "n p 2"], size: tuple[Any, Any], longest: int) -> Bool[Tensor, "n h w"]:
    """Fills outlines as COCO's rasteriser does, in continuous coordinates.

    Vertices are rounded to fifths of a pixel. Where an edge passes the centre of a column, the mask begins or ends.

    Args:
        points: Vertices x, y.
        size: Height and width of the image.
        longest: About the longest side of an image; it decides how many outlines are filled together.
    """
    step = max(1, BUDGET // (points.shape[1] * longest))
    return torch.cat([_fill_coco(part, size) for part in points.split(step)])


def _fill_coco(points: Tensor, size: tuple[Any, Any]) -> Bool[Tensor, "n h w"]:
    height, width = size
    start = (points.clamp(-FAR / FINE, FAR / FINE) * FINE + 0.5).trunc()
    end = start.roll(-1, 1)
    ahead = (start[..., :1] <= end[..., :1]).expand_as(start)
    flat = (end - start).abs()
    wide = flat[..., 0] >= flat[..., 1]
    # As in the original, a wide edge is followed from its left end, a tall one from its upper end.
    down = (start[..., 1:] <= end[..., 1:]).expand_as(start)
    forward = torch.where(wide[..., None], ahead, down)
    first, last = torch.where(forward, start, end), torch.where(forward, end, start)
    x0, y0 = first[..., 0, None], first[..., 1, None]  # (n, P, 1)
    dx, dy = last[..., 0, None] - x0, last[..., 1, None] - y0
    border = torch.arange(width, dtype=torch.float32) * FINE + 2  # the step before the centre of each column
    low, high = torch.minimum(x0, x0 + dx), torch.maximum(x0, x0 + dx)
    crossed = (low <= border) & (high > border)  # (n, P, W)
    slope = dy / dx.clamp(min=1)
    along = torch.minimum(
        (y0 + slope * (border - x0) + 0.5).trunc(), (y0 + slope * (border + 1 - x0) + 0.5).trunc()
    )  # fmt: skip
    inverse = dx / dy.clamp(min=1)
    safe = torch.where(inverse == 0, 1.0, inverse)
    rising = ((border + 0.5 - x0) / safe).ceil()  # the first step whose rounded column is beyond the border
    falling = ((border + 0.5 - x0) / safe).floor() + 1
    tall = y0 + torch.where(inverse > 0, rising, falling) - 1
    row = torch.where(wide[..., None], along, tall)
    row = ((row + 0.5) / FINE - 0.5).clamp(min=0).ceil().minimum(torch.scalar_tensor(height, dtype=torch.float32))
    column = torch.arange(width).expand(row.shape)
    place = (row.long() * width + column).flatten(1)
    table = torch.zeros(points.shape[0], (height + 1) * width).scatter_add(1, place, crossed.flatten(1).float())
    counts = table.unflatten(1, (height + 1, width))[:, :-1].cumsum(1)
    return (counts % 2) > 0.5


def fill_pixels(points: Float[Tensor, "n p 2"], size: tuple[Any, Any], longest: int) -> Bool[Tensor, "n h w"]:
    """Fills outlines as `ops.outlines.fill_contours` does: vertices are pixels, and outlines belong to the masks.

    Args:
        points: Vertices x, y in pixels from the centre of the first one, inside of the image.
        size: Height and width of the image.
        longest: Upper bound of the sides of an image.
    """
    step = max(1, BUDGET // (points.shape[1] * longest))
    return torch.cat([_fill_pixels(part, size) for part in points.split(step)])


def _fill_pixels(points: Tensor, size: tuple[Any, Any]) -> Bool[Tensor, "n h w"]:
    height, width = size
    start = points.nan_to_num(0.0).trunc()
    end = start.roll(-1, 1)
    x0, y0, x1, y1 = (v[..., None] for v in (start[..., 0], start[..., 1], end[..., 0], end[..., 1]))
    # Crossings of each row; the last row of an edge belongs to the next edge.
    rows = torch.arange(height, dtype=torch.float32)
    crossed = (torch.minimum(y0, y1) <= rows) & (torch.maximum(y0, y1) > rows)  # (n, P, H)
    rise = torch.where(y1 == y0, 1.0, y1 - y0)
    column = (x0 + (x1 - x0) * (rows - y0) / rise).ceil()
    column = torch.where(crossed, column, 0.0).clamp(min=0).minimum(torch.scalar_tensor(width, dtype=torch.float32))
    place = (torch.arange(height).expand(column.shape) * (width + 1) + column.long()).flatten(1)
    count = points.shape[0]
    table = torch.zeros(count, height * (width + 1)).scatter_add(1, place, crossed.flatten(1).float())
    inside = (table.unflatten(1, (height, width + 1)).cumsum(2)[..., :-1] % 2) > 0.5
    # The pixels of the edges, one for each step along the longer axis, from the left end.
    ahead = x0 <= x1
    across, down = torch.where(ahead, x0, x1), torch.where(ahead, y0, y1)
    move_x, move_y = (x1 - x0).abs(), torch.where(ahead, y1 - y0, y0 - y1)
    steep = move_y.abs() > move_x
    major, minor = torch.maximum(move_x, move_y.abs()), torch.minimum(move_x, move_y.abs())
    steps = torch.arange(torch.sym_max(height, width), dtype=torch.float32)
    side = ((2 * minor * steps - major) / (2 * major.clamp(min=1))).ceil()
    x = across + torch.where(steep, side, steps)
    y = down + torch.where(steep, steps, side) * torch.sign(torch.where(move_y == 0, 1.0, move_y))
    real = steps <= major
    place = torch.where(real, y * width + x, 0.0).long().flatten(1)
    edge = torch.zeros(count, height * width).scatter_add(1, place, real.flatten(1).float())
    return inside | (edge.unflatten(1, (height, width)) > 0)

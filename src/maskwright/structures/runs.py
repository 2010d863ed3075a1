"""Masks as runs: how masks of very large images are moved, joined, painted and outlined.

A run is a vertical line of foreground pixels in one column. Pixel (x, y) of an image of height H has the position
``x * (H + 1) + y``; a run is [start, end) in positions. The additional row keeps runs of neighbouring columns apart, so
that the end of a run has an x and a y as its start has. Memory is proportional to the number of runs: except for
`crop`, no function makes an array of the size of an image or of an object's box.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from maskwright.structures import rle
from maskwright.structures.rle import Bools, Frame, Ints


def decoded(texts: Sequence[bytes], height: int) -> tuple[Ints, Ints, Ints]:
    """Decode run-length strings of masks.

    Args:
        texts: The strings.
        height: H of their image.

    Returns:
        Start and end of each run, and the position of its mask in `texts`, all ascending.
    """
    starts, ends, owner = rle.runs_all(texts)
    first, last = starts // height, (ends - 1) // height
    if len(starts) and bool((first != last).any()):  # COCO's runs continue in the next column
        columns = last - first + 1
        each = np.repeat(np.arange(len(starts)), columns)
        column = first[each] + np.arange(len(each)) - np.repeat(np.cumsum(columns) - columns, columns)
        starts = np.maximum(starts[each], column * height)
        ends = np.minimum(ends[each], (column + 1) * height)
        first, last, owner = column, column, owner[each]
    return starts + first, ends + last, owner


def encoded(starts: Sequence[Ints], ends: Sequence[Ints], size: tuple[int, int]) -> list[bytes]:
    """Encode masks as COCO run-length strings.

    Args:
        starts: Starts of the runs of each mask, ascending.
        ends: Their ends.
        size: H, W of the image.
    """
    stride = size[0] + 1
    edges = [np.stack([s - s // stride, e - e // stride], 1).ravel() for s, e in zip(starts, ends, strict=True)]
    return rle.from_edges(edges, size[0] * size[1])


def moved(positions: Ints, height: int, x: int, y: int, new_height: int) -> Ints:
    """Move positions into another image.

    Args:
        positions: Starts or ends of runs.
        height: H of the image that they refer to.
        x: x of the upper left corner of that image in the other one.
        y: y of the upper left corner.
        new_height: H of the other one.
    """
    column, row = np.divmod(positions, height + 1)
    return (column + x) * (new_height + 1) + row + y


def union(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Return the union of runs in any order: ascending runs that neither overlap nor touch."""
    if not len(starts):
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], cast(Ints, np.maximum.accumulate(ends[order]))
    begins = np.ones(len(starts), bool)
    begins[1:] = starts[1:] > ends[:-1]
    return starts[begins], ends[np.append(np.flatnonzero(begins)[1:] - 1, len(ends) - 1)]


def frame(starts: Ints, ends: Ints, height: int) -> Frame:
    """Return the tightest pixel window of a mask, x0, y0, x1, y1; zeros if it is empty."""
    if not len(starts):
        return 0, 0, 0, 0
    stride = height + 1
    return int(starts[0] // stride), int((starts % stride).min()), int(starts[-1] // stride) + 1, int(
        (ends % stride).max()
    )  # fmt: skip


def crop(starts: Ints, ends: Ints, height: int, window: Frame) -> Bools:
    """Return the part of a mask inside a window as a plane.

    Args:
        starts: Starts of its runs, ascending.
        ends: Their ends.
        height: H of the image.
        window: x0, y0, x1, y1 in pixels.

    Returns:
        (y1 - y0, x1 - x0) bool; a view whose columns are consecutive in memory.
    """
    x0, y0, x1, y1 = window
    stride, rows = height + 1, y1 - y0
    low, high = np.searchsorted(starts, [x0 * stride, x1 * stride])
    column, top = np.divmod(starts[low:high], stride)
    bottom = np.clip(ends[low:high] % stride - y0, 0, rows)
    top = np.clip(top - y0, 0, rows)
    line = np.zeros((x1 - x0) * (rows + 1) + 1, np.int8)
    base = (column - x0) * (rows + 1)
    np.add.at(line, base + top, 1)
    np.add.at(line, base + bottom, -1)
    plane = np.cumsum(line[:-1], dtype=np.int8).reshape(x1 - x0, rows + 1)[:, :rows]
    return plane.astype(bool).T


def outlines(starts: Ints, ends: Ints, owner: Ints, count: int, height: int) -> list[list[Ints]]:
    """Trace masks along their pixel borders.

    The corners of an outline are the points where borders of runs in neighbouring columns end. On every vertical and
    on every horizontal grid line, the corners in order are alternately the begin and the end of a piece of an outline.
    Pixels that touch only at a corner belong to different rings.

    Args:
        starts: Starts of runs.
        ends: Their ends.
        owner: The mask of each run, ascending; the runs of a mask are ascending and do not touch.
        count: Number of masks.
        height: H of the image.

    Returns:
        For each mask its rings, (P, 2), x and y. Outer borders are clockwise on the screen, holes counterclockwise;
        every ring starts at its leftmost corner, the upper one of several.
    """
    rings: list[list[Ints]] = [[] for _ in range(count)]
    if not len(starts):
        return rings
    stride = height + 1
    column, top = np.divmod(starts, stride)
    bottom = ends - column * stride
    # Each end of a run is a candidate for a corner on both sides of its column.
    x = np.concatenate([column, column, column + 1, column + 1])
    y = np.concatenate([top, bottom, top, bottom])
    whose = np.concatenate([owner] * 4)
    is_end = np.repeat([False, True, False, True], len(starts))
    on_left = np.repeat([True, False], 2 * len(starts))  # at the left side of its pixels
    # Two of one kind at one point: the border goes straight on.
    order = np.lexsort((is_end, y, x, whose))
    x, y, whose, is_end, on_left = (v[order] for v in (x, y, whose, is_end, on_left))
    same_point = (x[1:] == x[:-1]) & (y[1:] == y[:-1]) & (whose[1:] == whose[:-1])
    straight = same_point & (is_end[1:] == is_end[:-1])
    keep = np.ones(len(x), bool)
    keep[1:] &= ~straight
    keep[:-1] &= ~straight
    x, y, whose, is_end, on_left = (v[keep] for v in (x, y, whose, is_end, on_left))
    total = len(x)
    pinch = np.zeros(total, bool)  # the first of two corners at one point, whose piece of a vertical line ends there
    pinch[:-1] = (x[1:] == x[:-1]) & (y[1:] == y[:-1]) & (whose[1:] == whose[:-1])
    second = np.zeros(total, bool)
    second[1:] = pinch[:-1]
    # The upper left and the lower right pixel are foreground if a run starts there on the right side of the point.
    falling = np.zeros(total, bool)
    starts_right = ~is_end & on_left
    falling[:-1] = pinch[:-1] & (starts_right[:-1] | starts_right[1:])
    falling[1:] |= falling[:-1] & second[1:]
    # On the horizontal line, the left one comes first: the upper one for falling pairs, otherwise the lower one.
    rank = np.where(pinch, ~falling, np.where(second, falling, False)).astype(np.int8)
    number = np.arange(total)
    vertical = number ^ 1  # along x; every line has an even number of corners
    across = np.lexsort((rank, x, y, whose))
    horizontal = np.empty(total, np.int64)
    horizontal[across[0::2]], horizontal[across[1::2]] = across[1::2], across[0::2]
    # A border with foreground on its right side is followed from its upper corner to the right, other ones downwards.
    outer = on_left != is_end
    step_v, step_h = cast("list[int]", vertical.tolist()), horizontal.tolist()
    goes_right, of = cast("list[bool]", outer.tolist()), whose.tolist()
    points = np.stack([x, y], 1)
    visited = bytearray(total)
    for first in range(total):
        if visited[first]:
            continue
        one, other = (step_h, step_v) if goes_right[first] else (step_v, step_h)
        ring: list[int] = []
        at = first
        while True:
            ring.append(at)
            visited[at] = 1
            at = one[at]
            ring.append(at)
            visited[at] = 1
            at = other[at]
            if at == first:
                break
        rings[of[first]].append(points[ring])
    return rings

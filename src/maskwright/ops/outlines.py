"""Outer borders of masks, and filled outlines.

Both are computed on runs of pixels of all objects at once, never on a plane of the size of the image. Coordinates count
pixels from the centre of the first one: pixel (i, j) is the point x = j, y = i, as in OpenCV. A polygon through the
centres of a mask's border pixels is half a pixel smaller than the mask on all sides; `fill_contours` compensates by
filling the pixels of the outline too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.structures import Masks, rle


@dataclass(frozen=True)
class Contours:
    """The outer borders of N masks. Of each mask only the part that encloses the largest area counts; holes do not.

    Mask k has the `counts[k]` border pixels from `starts[k]` on, in no particular order.

    Attributes:
        points: x, y of the border pixels, mask after mask.
        starts: Index of the first border pixel of each mask.
        counts: Number of border pixels of each mask; 0 for an empty one.
        centres: Centroid x, y of the enclosed area in float64, of the border pixels if that area is 0; NaN for an empty
            mask.
    """

    points: Float[Tensor, "t 2"]
    starts: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    centres: Float[Tensor, "n 2"]

    def to(self, device: torch.device | str) -> Contours:
        """Returns a copy on another device."""
        return Contours(*(v.to(device) for v in (self.points, self.starts, self.counts, self.centres)))


def outer_contours(masks: Masks) -> Contours:
    """Finds the outer border of each mask: the pixels that border following (Suzuki and Abe, 1985) visits.

    Args:
        masks: N masks in any form.

    Returns:
        The border of the 8-connected part that encloses the largest area, for each mask.
    """
    count = len(masks)
    runs = _Runs.of(masks)
    solid = runs.solid()
    left, right = solid.touching(1)
    part = _connected(len(solid), left, right)
    twice, moments = _areas(solid, left, right, part)
    largest = _largest(solid, part, twice, count)  # a part's number for each mask, -1 for none
    chosen = np.isin(part, largest[largest >= 0])
    run, y = _border(solid, left, right, chosen)
    owner = solid.owner[run]
    points = np.stack([solid.x[run], y], 1) - 1  # the frame has a margin of one pixel
    counts = np.bincount(owner, minlength=count)

    present = largest >= 0
    area = twice[largest]
    sums = np.stack([np.bincount(owner, points[:, axis], minlength=count) for axis in (0, 1)], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centres = np.where(area[:, None] > 0, moments[largest] / (3.0 * area[:, None]) - 1, sums / counts[:, None])
    return Contours(
        torch.from_numpy(points).float(),
        torch.from_numpy(np.cumsum(counts) - counts),
        torch.from_numpy(counts),
        torch.from_numpy(np.where(present[:, None], centres, np.nan)),
    )


def fill_holes(masks: Masks) -> tuple[Masks, Int[Tensor, " n"]]:
    """Fills the holes of masks.

    Args:
        masks: N masks in any form.

    Returns:
        The filled masks, and the number of 8-connected parts of each.
    """
    solid = _Runs.of(masks).solid()
    part = _connected(len(solid), *solid.touching(1))
    counts = np.bincount(solid.owner[np.unique(part)], minlength=len(masks))
    return solid.masks(masks.size, len(masks)), torch.from_numpy(counts)


def largest_parts(masks: Masks) -> Masks:
    """Keeps the 8-connected part of each mask whose border encloses the largest area, with its holes filled."""
    solid = _Runs.of(masks).solid()
    left, right = solid.touching(1)
    part = _connected(len(solid), left, right)
    largest = _largest(solid, part, _areas(solid, left, right, part)[0], len(masks))
    return solid.masks(masks.size, len(masks), np.isin(part, largest[largest >= 0]))


# ---- runs of pixels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """Vertical runs of pixels of many masks, each mask in a frame of its own with a margin of one pixel.

    The columns of all frames are numbered consecutively (`line`), so that neighbouring columns have neighbouring
    numbers and runs, sorted by line and start, are compared by one number each.
    """

    line: np.ndarray
    start: np.ndarray
    end: np.ndarray  # exclusive
    owner: np.ndarray  # index of the mask
    x: np.ndarray  # column in the image with its margin
    lines: tuple[np.ndarray, np.ndarray]  # owner and column of every line, including lines without a run
    height: int  # of the frame

    def __len__(self) -> int:
        return len(self.line)

    @classmethod
    def of(cls, masks: Masks) -> _Runs:
        height = masks.size[0]
        parts = [rle.runs(code["counts"]) for code in masks.rle()]
        owner = np.repeat(np.arange(len(parts)), [len(s) for s, _ in parts])
        start = np.concatenate([s for s, _ in parts] or [np.zeros(0, np.int64)])
        end = np.concatenate([e for _, e in parts] or [np.zeros(0, np.int64)])
        # A run continues from the bottom of a column to the top of the next one: cut it there.
        first, last = start // height, (end - 1) // height
        which, step = _spread(last - first + 1)
        x = first[which] + step
        top = np.where(step == 0, start[which] - x * height, 0)
        bottom = np.where(x == last[which], end[which] - x * height, height)
        owner = owner[which]
        low, high = np.full(len(parts), 0), np.full(len(parts), -1)
        heads = np.flatnonzero(np.diff(owner, prepend=-1))
        low[owner[heads]] = x[heads]
        tails = np.flatnonzero(np.diff(owner, append=-1))
        high[owner[tails]] = x[tails]
        widths = high - low + 3
        base = np.cumsum(widths) - widths
        line_owner, step = _spread(widths)
        lines = (line_owner, low[line_owner] + step)
        return cls(base[owner] + x - low[owner] + 1, top + 1, bottom + 1, owner, x + 1, lines, height + 2)

    def solid(self) -> _Runs:
        """The same masks with their holes, and whatever lies inside holes, filled."""
        everywhere = np.arange(len(self.lines[0]))
        gaps = self._on(
            np.concatenate([everywhere, self.line]),
            np.concatenate([np.zeros_like(everywhere), self.end]),
            np.concatenate([self.line, everywhere]),
            np.concatenate([self.start, np.full_like(everywhere, self.height)]),
        )
        outside = _connected(len(gaps), *gaps.touching(0)) == 0  # the first gap is the margin, which is connected
        line, start, end = gaps.line[outside], gaps.start[outside], gaps.end[outside]
        inner = np.flatnonzero(line[1:] == line[:-1])
        return self._on(line[inner], end[inner], line[inner], start[inner + 1])

    def masks(self, size: tuple[int, int], count: int, chosen: np.ndarray | None = None) -> Masks:
        """The runs, or the `chosen` ones, as masks of `size`."""
        rows = slice(None) if chosen is None else chosen
        place = (self.x[rows] - 1) * size[0] - 1
        starts, ends, owner = place + self.start[rows], place + self.end[rows], self.owner[rows]
        cuts = np.searchsorted(owner, np.arange(1, count))
        pairs = zip(np.split(starts, cuts), np.split(ends, cuts), strict=True) if count else ()
        return Masks("rle", [rle.from_runs(a, b, size[0] * size[1]) for a, b in pairs], size)

    def _on(self, lines: np.ndarray, starts: np.ndarray, same: np.ndarray, ends: np.ndarray) -> _Runs:
        """Runs from starts and ends, each sorted by its line; empty ones are left out."""
        starts = starts[np.lexsort((starts, lines))]
        order = np.lexsort((ends, same))
        line, ends = same[order], ends[order]
        full = ends > starts
        line = line[full]
        owner, x = self.lines
        return _Runs(line, starts[full], ends[full], owner[line], x[line], self.lines, self.height)

    def touching(self, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of runs in neighbouring lines that share a row (reach 0) or at least touch at a corner (reach 1)."""
        span = self.height + 2
        starts, ends = self.line * span + self.start, self.line * span + self.end
        low = np.searchsorted(ends, starts + span - reach, side="right")
        high = np.searchsorted(starts, ends + span + reach, side="left")
        left, step = _spread(np.maximum(high - low, 0))
        return left, low[left] + step


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts 2, 0, 3: the index of the count for each element, 0 0 2 2 2, and its place within, 0 1 0 1 2."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _connected(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each of `count` nodes the smallest node that it is connected to; each round at least halves what is left."""
    root = np.arange(count)
    while True:
        a, b = root[left], root[right]
        apart = a != b
        if not apart.any():
            return root
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root != (further := root[root])).any():
            root = further


def _areas(solid: _Runs, left: np.ndarray, right: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twice the area that each part's border encloses, and six times its moments in x and y: integers. There is one
    more entry at the end, which is zero.

    The border runs through the centres of pixels. Of the square between four neighbouring centres it encloses all if
    all four pixels belong to the part, half if three do, nothing otherwise. Two neighbouring runs that share L rows
    have L - 1 such squares between them, and a half at either end where one extends beyond the other.
    """
    y0, v0, y1, v1 = solid.start[left], solid.start[right], solid.end[left], solid.end[right]
    low, high, x = np.maximum(y0, v0), np.minimum(y1, v1), solid.x[left]
    shared = high > low
    whole = np.where(shared, high - low - 1, 0)
    head, tail = shared & (y0 != v0), shared & (y1 != v1)
    area = 2 * whole + head + tail
    along = whole * (6 * x + 3) + head * (2 * x + 1 + x + (v0 < y0)) + tail * (2 * x + 1 + x + (v1 > y1))
    down = np.where(shared, 3 * ((high - 1) ** 2 - low**2), 0) + head * (3 * low - 1) + tail * (3 * high - 2)
    sums = [np.bincount(part[left], values, minlength=len(solid) + 1) for values in (area, along, down)]
    return sums[0], np.stack(sums[1:], 1)


def _largest(solid: _Runs, part: np.ndarray, twice: np.ndarray, count: int) -> np.ndarray:
    """The part of the largest area of each mask; of equal ones that whose first pixel, row by row, comes last."""
    result = np.full(count, -1)
    if not len(solid):
        return result
    order = np.lexsort((solid.x, solid.start, part))
    first = order[np.flatnonzero(np.diff(part[order], prepend=-1))]  # the run of each part's first pixel
    ranked = first[np.lexsort((solid.x[first], solid.start[first], twice[part[first]], solid.owner[first]))]
    last = ranked[np.flatnonzero(np.diff(solid.owner[ranked], append=-1))]
    result[solid.owner[last]] = part[last]
    return result


def _border(solid: _Runs, left: np.ndarray, right: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run and row of each pixel of the chosen runs that has a free side, sorted by run and row."""
    low = np.maximum(solid.start[left], solid.start[right])
    high = np.minimum(solid.end[left], solid.end[right])
    shared = (high > low) & chosen[left]
    left, right, low, high = left[shared], right[shared], low[shared], high[shared]
    own = np.flatnonzero(chosen)
    runs, rows = [own, own], [solid.start[own], solid.end[own] - 1]
    for beside in (left, right):  # rows that no run on the other side shares
        where = np.concatenate([own, beside])
        starts = np.concatenate([solid.start[own], high])
        ends = np.concatenate([low, solid.end[own]])
        other = np.concatenate([beside, own])
        a, b = np.lexsort((starts, where)), np.lexsort((ends, other))
        which, step = _spread(ends[b] - starts[a])
        runs.append(where[a][which])
        rows.append(starts[a][which] + step)
    keys = np.unique(np.concatenate(runs) * solid.height + np.concatenate(rows))
    return np.divmod(keys, solid.height)


# ---- filling -----------------------------------------------------------------------------------------------------

_ONE = 1 << 16  # fixed point with 16 fractional bits
_FAR = 1 << 30  # coordinates are limited to this, so that products fit into 64 bits


def fill_contours(points: Float[Tensor, "n p 2"], size: tuple[int, int], *, budget: int = 64 << 20) -> Masks:
    """Fills closed outlines as OpenCV does (`fillPoly`, and `drawContours` with thickness -1; versions 4.12 and 5.0).

    Coordinates are truncated to integers. A mask consists of the pixels between the first and second, third and fourth
    ... crossing of each row (an outline that intersects itself has holes), and of the pixels of the outline itself. An
    edge that leaves the image is clipped first, to integer coordinates, which moves what remains of it slightly, as in
    OpenCV. Runs on the CPU.

    Args:
        points: Vertices x, y of each outline, in pixels from the centre of the first pixel. NaN counts as 0.
        size: Height and width of the image.
        budget: Bytes of temporary memory; a single outline may need 3 bytes per pixel of its box.

    Returns:
        One mask per outline.
    """
    if not len(points):
        return Masks.empty(size)
    height, width = size
    whole = np.nan_to_num(points.detach().cpu().double().numpy()).clip(-_FAR, _FAR).astype(np.int64)
    limit = np.array([width, height])
    corner = whole.min(1).clip(0, limit)
    extent = (whole.max(1) + 1).clip(0, limit) - corner
    areas = ((extent[:, 0] + 1) * extent[:, 1]).clip(0)
    crops: list[np.ndarray] = []
    first = 0
    while first < len(whole):
        last = max(first + 1, int(np.searchsorted(np.cumsum(areas[first:]), budget // 3, side="right")) + first)
        crops += _painted(whole[first:last], corner[first:last], extent[first:last], size)
        first = last
    return Masks.from_crops(crops, torch.from_numpy(corner), size)


def _painted(whole: np.ndarray, corner: np.ndarray, extent: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """The filled box of each outline: each span adds 1 at its first pixel and -1 behind its last one."""
    number = np.repeat(np.arange(len(whole)), whole.shape[1])
    a, b = whole.reshape(-1, 2), np.roll(whole, -1, 1).reshape(-1, 2)
    c, d, visible = _clipped(a, b, size)
    spans = [_between(number, a, b, c, d, size), _along(number[visible], c[visible], d[visible])]
    owner, y, first, last = (np.concatenate(v) for v in zip(*spans, strict=True))
    first = np.maximum(first, corner[owner, 0])
    last = np.minimum(last, corner[owner, 0] + extent[owner, 0] - 1)
    inside = first <= last
    owner, y, first, last = owner[inside], y[inside], first[inside], last[inside]
    wide, high = extent[:, 0] + 1, extent[:, 1]
    begins = np.cumsum(wide * high) - wide * high
    row = begins[owner] + (y - corner[owner, 1]) * wide[owner] - corner[owner, 0]
    line = np.zeros(int((wide * high).sum()), np.int16)
    np.add.at(line, row + first, 1)
    np.add.at(line, row + last + 1, -1)
    covered = np.cumsum(line, dtype=np.int16) > 0
    pieces = np.split(covered, begins[1:])
    return [p.reshape(h, w)[:, :-1] for p, h, w in zip(pieces, high.tolist(), wide.tolist(), strict=True)]


def _clipped(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges from `a` to `b` clipped to the image as OpenCV clips lines, and which of them are visible.

    The Cohen-Sutherland algorithm on integers: first to the rows, then to the columns, where an edge is not yet known
    to be invisible. What is invisible may have been moved by then.
    """
    ends = [a.copy(), b.copy()]
    for axis in (1, 0):
        last = size[1 - axis] - 1
        sides = [_sides(end, size) for end in ends]
        crossing = ((sides[0] & sides[1]) == 0).all(1)
        for k in (0, 1):  # the second end is moved along the line from the moved first one
            end, side = ends[k], sides[k][:, axis]
            moved = crossing & (side > 0)
            goal = np.where(side == 1, 0, last)
            run, rise = (ends[1] - ends[0])[:, 1 - axis], (ends[1] - ends[0])[:, axis]
            step = _divided((goal - end[:, axis]) * run, np.where(rise == 0, 1, rise))
            end[:, 1 - axis] += np.where(moved, step, 0)
            end[:, axis] = np.where(moved, goal, end[:, axis])
    return ends[0], ends[1], (_sides(ends[0], size) + _sides(ends[1], size)).max(1) == 0


def _sides(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """For x and y: 1 before the image, 2 behind it, 0 inside."""
    return (points < 0).astype(np.int64) + 2 * (points >= np.array([size[1], size[0]])).astype(np.int64)


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b rounded towards zero, as integers are divided in C."""
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _between(
    number: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """Spans (object, y, first x, last x) between every other crossing of each row. `c` and `d` are `a` and `b` clipped.

    An edge has the slope of its clipped part, unless that lies in one row; then only the x of its ends are clipped.
    """
    several = (c[:, 1] != d[:, 1])[:, None]
    start, end = (np.where(several, cut, np.stack([cut[:, 0], whole[:, 1]], 1)) for cut, whole in ((c, a), (d, b)))
    down = end[:, 1] - start[:, 1]
    slope = _divided((end[:, 0] - start[:, 0]) * _ONE, np.where(down == 0, 1, down))
    upper = np.where((a[:, 1] < b[:, 1])[:, None], start, end)
    low, high = np.minimum(a[:, 1], b[:, 1]), np.maximum(a[:, 1], b[:, 1])
    top, bottom = low.clip(0, size[0]), high.clip(0, size[0])  # the last row belongs to the next edge
    edge, step = _spread(bottom - top)
    y = top[edge] + step
    x = upper[edge, 0] * _ONE + slope[edge] * (y - upper[edge, 1])
    owner = number[edge]
    order = np.lexsort((x, y, owner))
    x = x[order]
    return owner[order][0::2], y[order][0::2], (x[0::2] + _ONE - 1) >> 16, x[1::2] >> 16


def _along(number: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
    """The pixels of each edge as spans of one pixel (Bresenham): one step along the longer axis per pixel, the other
    coordinate rounded, halves down as seen from the left end."""
    ahead = (a[:, 0] <= b[:, 0])[:, None]
    start, move = np.where(ahead, a, b), np.where(ahead, b - a, a - b)
    steep = np.abs(move[:, 1]) > move[:, 0]
    major, minor = np.abs(np.where(steep[:, None], move[:, ::-1], move)).T
    sign = np.where(move < 0, -1, 1)
    edge, step = _spread(major + 1)
    twice = 2 * np.maximum(major[edge], 1)
    side = -((major[edge] - 2 * minor[edge] * step) // twice)
    tall = steep[edge]
    x = start[edge, 0] + np.where(tall, side, step) * sign[edge, 0]
    y = start[edge, 1] + np.where(tall, step, side) * sign[edge, 1]
    return number[edge], y, x, x

"""Between masks and the closed line of pixels around them: the outer border of a mask, and a polygon filled.

Both work on runs and spans of all objects at once, never on a plane of the image's size. Coordinates count pixels,
from the centre of the first: pixel (i, j) is the point x = j, y = i. That is how OpenCV and whoever uses it see a
contour; a polygon through the centres of a mask's border pixels is half a pixel smaller than the mask all around, which
a rasteriser that paints the border as well makes good.
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
    """The outer borders of N masks, of each mask only the part that encloses the largest area; holes do not count.

    Mask k owns the `counts[k]` border pixels from `starts[k]` on, in no order that means anything. An empty mask has
    none, and its centre is NaN.
    """

    points: Float[Tensor, "t 2"]  # x, y of the border's pixels, mask after mask
    starts: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    centres: Float[Tensor, "n 2"]  # float64: of the area that the border encloses; of its pixels where that is nothing

    def to(self, device: torch.device | str) -> Contours:
        return Contours(*(v.to(device) for v in (self.points, self.starts, self.counts, self.centres)))


def outer_contours(masks: Masks) -> Contours:
    """The outer border of each mask: what following the border of its largest part (8-connected) would visit."""
    count = len(masks)
    pieces = _Pieces.of(masks)
    solid = pieces.solid()
    left, right = solid.touching(1)
    part = _connected(len(solid), left, right)
    twice, moments = _areas(solid, left, right, part)
    largest = _largest(solid, part, twice, count)  # a part's number for each mask, -1 for none
    chosen = np.isin(part, largest[largest >= 0])
    piece, y = _border(solid, left, right, chosen)
    owner = solid.owner[piece]
    points = np.stack([solid.x[piece], y], 1) - 1  # the frame has a margin of one pixel
    counts = np.bincount(owner, minlength=count)

    there = largest >= 0
    area = twice[largest]
    sums = np.stack([np.bincount(owner, points[:, axis], minlength=count) for axis in (0, 1)], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centres = np.where(area[:, None] > 0, moments[largest] / (3.0 * area[:, None]) - 1, sums / counts[:, None])
    return Contours(
        torch.from_numpy(points).float(),
        torch.from_numpy(np.cumsum(counts) - counts),
        torch.from_numpy(counts),
        torch.from_numpy(np.where(there[:, None], centres, np.nan)),
    )


def fill_holes(masks: Masks) -> tuple[Masks, Int[Tensor, " n"]]:
    """The masks with their holes filled, and of how many parts (8-connected) each then consists."""
    solid = _Pieces.of(masks).solid()
    part = _connected(len(solid), *solid.touching(1))
    counts = np.bincount(solid.owner[np.unique(part)], minlength=len(masks))
    return solid.masks(masks.size, len(masks)), torch.from_numpy(counts)


def largest_parts(masks: Masks) -> Masks:
    """Of each mask the part (8-connected) whose border encloses the largest area, its holes filled."""
    solid = _Pieces.of(masks).solid()
    left, right = solid.touching(1)
    part = _connected(len(solid), left, right)
    largest = _largest(solid, part, _areas(solid, left, right, part)[0], len(masks))
    return solid.masks(masks.size, len(masks), np.isin(part, largest[largest >= 0]))


# ---- runs of pixels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pieces:
    """Vertical runs of pixels of many masks, each mask in a frame of its own with a margin around it.

    The columns of all frames are numbered through (`line`), so that neighbouring columns have neighbouring numbers and
    the runs, sorted by line and start, are compared by one number each.
    """

    line: np.ndarray
    start: np.ndarray
    end: np.ndarray  # exclusive
    owner: np.ndarray  # the mask
    x: np.ndarray  # the column, counted in the image with its margin
    lines: tuple[np.ndarray, np.ndarray]  # owner and column of every line, also of those without a run
    height: int  # of the frame

    def __len__(self) -> int:
        return len(self.line)

    @classmethod
    def of(cls, masks: Masks) -> _Pieces:
        height = masks.size[0]
        parts = [rle.runs(code["counts"]) for code in masks.rle()]
        owner = np.repeat(np.arange(len(parts)), [len(s) for s, _ in parts])
        start = np.concatenate([s for s, _ in parts] or [np.zeros(0, np.int64)])
        end = np.concatenate([e for _, e in parts] or [np.zeros(0, np.int64)])
        # Runs go on from the foot of a column to the head of the next one: cut them there.
        first, last = start // height, (end - 1) // height
        which, step = _spread(last - first + 1)
        x = first[which] + step
        top = np.where(step == 0, start[which] - x * height, 0)
        foot = np.where(x == last[which], end[which] - x * height, height)
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
        return cls(base[owner] + x - low[owner] + 1, top + 1, foot + 1, owner, x + 1, lines, height + 2)

    def solid(self) -> _Pieces:
        """The same masks with their holes, and whatever lies in them, filled."""
        everywhere = np.arange(len(self.lines[0]))
        gaps = self._on(
            np.concatenate([everywhere, self.line]),
            np.concatenate([np.zeros_like(everywhere), self.end]),
            np.concatenate([self.line, everywhere]),
            np.concatenate([self.start, np.full_like(everywhere, self.height)]),
        )
        outside = _connected(len(gaps), *gaps.touching(0)) == 0  # the first gap is the margin, which is one for all
        line, start, end = gaps.line[outside], gaps.start[outside], gaps.end[outside]
        inner = np.flatnonzero(line[1:] == line[:-1])
        return self._on(line[inner], end[inner], line[inner], start[inner + 1])

    def masks(self, size: tuple[int, int], count: int, chosen: np.ndarray | None = None) -> Masks:
        """As masks of `size`; `chosen` runs alone, if given."""
        rows = slice(None) if chosen is None else chosen
        place = (self.x[rows] - 1) * size[0] - 1
        starts, ends, owner = place + self.start[rows], place + self.end[rows], self.owner[rows]
        cuts = np.searchsorted(owner, np.arange(1, count))
        pairs = zip(np.split(starts, cuts), np.split(ends, cuts), strict=True) if count else ()
        return Masks("rle", [rle.from_runs(a, b, size[0] * size[1]) for a, b in pairs], size)

    def _on(self, lines: np.ndarray, starts: np.ndarray, same: np.ndarray, ends: np.ndarray) -> _Pieces:
        """Runs from starts and ends, each sorted by its line; empty ones are left out."""
        starts = starts[np.lexsort((starts, lines))]
        order = np.lexsort((ends, same))
        line, ends = same[order], ends[order]
        full = ends > starts
        line = line[full]
        owner, x = self.lines
        return _Pieces(line, starts[full], ends[full], owner[line], x[line], self.lines, self.height)

    def touching(self, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of runs in neighbouring lines that share a row (reach 0) or touch at a corner at least (reach 1)."""
        span = self.height + 2
        starts, ends = self.line * span + self.start, self.line * span + self.end
        low = np.searchsorted(ends, starts + span - reach, side="right")
        high = np.searchsorted(starts, ends + span + reach, side="left")
        left, step = _spread(np.maximum(high - low, 0))
        return left, low[left] + step


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts 2, 0, 3: whose each is, 0 0 2 2 2, and which of its owner's, 0 1 0 1 2."""
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


def _areas(solid: _Pieces, left: np.ndarray, right: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twice the area that each part's border encloses, and six times its moments in x and y: whole numbers. One more
    entry, the last, is zero.

    The border runs through the pixels' centres. Of the square between four neighbouring centres it encloses all where
    all four pixels belong to the part, half where three do, nothing otherwise. Two runs side by side that share L rows
    have L - 1 such squares between them, and a half at either end where one reaches further than the other.
    """
    y0, v0, y1, v1 = solid.start[left], solid.start[right], solid.end[left], solid.end[right]
    low, high, x = np.maximum(y0, v0), np.minimum(y1, v1), solid.x[left]
    shared = high > low
    whole = np.where(shared, high - low - 1, 0)
    head, foot = shared & (y0 != v0), shared & (y1 != v1)
    area = 2 * whole + head + foot
    along = whole * (6 * x + 3) + head * (2 * x + 1 + x + (v0 < y0)) + foot * (2 * x + 1 + x + (v1 > y1))
    down = np.where(shared, 3 * ((high - 1) ** 2 - low**2), 0) + head * (3 * low - 1) + foot * (3 * high - 2)
    sums = [np.bincount(part[left], values, minlength=len(solid) + 1) for values in (area, along, down)]
    return sums[0], np.stack(sums[1:], 1)


def _largest(solid: _Pieces, part: np.ndarray, twice: np.ndarray, count: int) -> np.ndarray:
    """Each mask's part of the largest area; of equal ones the one whose first pixel, row by row, comes last."""
    result = np.full(count, -1)
    if not len(solid):
        return result
    order = np.lexsort((solid.x, solid.start, part))
    first = order[np.flatnonzero(np.diff(part[order], prepend=-1))]  # the run of each part's first pixel
    ranked = first[np.lexsort((solid.x[first], solid.start[first], twice[part[first]], solid.owner[first]))]
    last = ranked[np.flatnonzero(np.diff(solid.owner[ranked], append=-1))]
    result[solid.owner[last]] = part[last]
    return result


def _border(solid: _Pieces, left: np.ndarray, right: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run and row of each pixel of the chosen runs with a side that is free, sorted by run and row."""
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

_ONE = 1 << 16  # fixed point with 16 bits behind the point
_FAR = 1 << 20  # coordinates are cut there, so that nothing overflows


def fill_contours(points: Float[Tensor, "n p 2"], size: tuple[int, int], *, budget: int = 64 << 20) -> Masks:
    """Masks of `size` (H, W) from closed outlines x, y that count pixels, filled as OpenCV fills polygons.

    Points are cut to whole numbers, towards zero. A mask is what lies between the first and second, third and fourth
    ... crossing of each row (a line that crosses itself leaves holes), and the pixels of the line itself. On the host;
    outlines are small wherever they come from.

    budget  bytes of scratch; a single object may take 3 bytes for each pixel of its box
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
    """The box of each outline, filled. Every span adds one where it begins and takes one away behind its end."""
    number = np.repeat(np.arange(len(whole)), whole.shape[1])
    a, b = whole.reshape(-1, 2), np.roll(whole, -1, 1).reshape(-1, 2)
    spans = [_between(number, a, b, size[0]), _along(number, a, b, size)]
    owner, y, first, last = (np.concatenate(v) for v in zip(*spans, strict=True))
    first, last = np.maximum(first, 0), np.minimum(last, size[1] - 1)
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


def _between(number: np.ndarray, a: np.ndarray, b: np.ndarray, height: int) -> tuple[np.ndarray, ...]:
    """Spans (object, y, first x, last x) between every other crossing of each row."""
    upper, lower = np.where((a[:, 1] < b[:, 1])[:, None], a, b), np.where((a[:, 1] < b[:, 1])[:, None], b, a)
    top, foot = upper[:, 1].clip(0, height), lower[:, 1].clip(0, height)  # the lowest row is the next edge's
    edge, step = _spread(foot - top)
    across, down = ((lower - upper) * np.array([_ONE, 1])).T
    slope = across // np.maximum(down, 1)
    y = top[edge] + step
    x = upper[edge, 0] * _ONE + slope[edge] * (y - upper[edge, 1])
    owner = number[edge]
    order = np.lexsort((x, y, owner))
    x, half = x[order], _ONE // 2  # a pixel whose centre lies on neither side of a half belongs to the span
    return owner[order][0::2], y[order][0::2], (x[0::2] + half) >> 16, (x[1::2] + half - 1) >> 16


def _along(number: np.ndarray, a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The pixels of each edge as spans of one: a step along the longer axis each, the other axis rounded, halves down
    as seen from the left end."""
    ahead = (a[:, 0] <= b[:, 0])[:, None]
    start, move = np.where(ahead, a, b), np.where(ahead, b - a, a - b)
    steep = np.abs(move[:, 1]) > move[:, 0]
    major, minor = np.abs(np.where(steep[:, None], move[:, ::-1], move)).T
    sign = np.where(move < 0, -1, 1)
    # Only the steps that lie on the image, by the axis that each step moves on.
    at = np.where(steep, start[:, 1], start[:, 0])
    down = steep & (move[:, 1] < 0)
    limit = np.where(steep, size[0], size[1]) - 1
    begin = np.where(down, at - limit, -at).clip(0)
    end = np.minimum(np.where(down, at, limit - at), major)
    edge, step = _spread((end - begin + 1).clip(0))
    step = step + begin[edge]
    twice = 2 * np.maximum(major[edge], 1)
    side = -((major[edge] - 2 * minor[edge] * step) // twice)
    tall = steep[edge]
    x = start[edge, 0] + np.where(tall, side, step) * sign[edge, 0]
    y = start[edge, 1] + np.where(tall, step, side) * sign[edge, 1]
    there = (y >= 0) & (y < size[0])
    return number[edge][there], y[there], x[there], x[there]

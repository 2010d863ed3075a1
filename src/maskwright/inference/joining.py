"""Which objects of neighbouring tiles are parts of one object; `seams` joins them.

The parts of an object that two tiles show must agree where the tiles overlap; whole masks cannot be compared, because
each tile shows a different part. A part that the border of its tile truncates may agree with several objects of the
neighbouring tile that touch each other. Hence every part gets at most one partner per neighbouring tile, by the
assignment with the largest total agreement, and parts that one tile shows as different objects stay different objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType] - untyped
from torch import Tensor

from maskwright.structures import Instances, Masks, Placement

AGREE = 0.5  # minimum IoU inside the strip for two masks to be the same object
CONTAIN = 0.7  # or minimum share of a mask inside the other one, if the border of its tile truncates it
REMNANT = 0.5  # the same for a truncated mask that the other tile shows completely
WHOLE = 0.9  # an untruncated mask with this share of the union of all parts is used instead of the union
THIN = 4  # strips narrower than this many pixels hold too little of an object; the parts beside them are compared
DEPTH = 6  # distance from the border, in pixels, at which the width of a part is compared with that at the border
NECK = 0.6  # minimum width of an object at the border, relative to its parts on both sides


@dataclass(frozen=True)
class Tile:
    """A window of the image.

    Attributes:
        x: Left edge in pixels.
        y: Top edge in pixels.
        width: Width in pixels.
        height: Height in pixels.
    """

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """Right edge in pixels, exclusive."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """Bottom edge in pixels, exclusive."""
        return self.y + self.height

    def common(self, other: Tile) -> Tile | None:
        """The intersection with another tile; None if it is empty."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        width = min(self.right, other.right) - x
        height = min(self.bottom, other.bottom) - y
        return Tile(x, y, width, height) if width > 0 and height > 0 else None


def is_bridged(a: Tile, b: Tile, tiles: Sequence[Tile]) -> bool:
    """Whether the common border of two tiles with a thin strip lies well inside a third one, which shows more there."""
    x0, x1 = sorted((max(a.x, b.x), min(a.right, b.right)))
    y0, y1 = sorted((max(a.y, b.y), min(a.bottom, b.bottom)))
    thin_x, thin_y = a.x != b.x and x1 - x0 < THIN, a.y != b.y and y1 - y0 < THIN
    if not thin_x and not thin_y:
        return False
    x, y = (THIN if thin else 0 for thin in (thin_x, thin_y))
    return any(t.x <= x0 - x and t.y <= y0 - y and t.right >= x1 + x and t.bottom >= y1 + y for t in tiles)


@dataclass(frozen=True)
class View:
    """The objects of a tile.

    Attributes:
        objects: The objects on the tile's grid.
        tile: The tile.
        boxes: Boxes on the tile's grid: of the masks if there are any, since predicted boxes may differ from them.
        cut: Which borders of the tile truncate the object: left, top, right, bottom; never a border of the image.
        areas: Number of pixels of the masks; areas of the boxes if there are no masks.
    """

    objects: Instances
    tile: Tile
    boxes: Float[Tensor, "n 4"]
    cut: Bool[Tensor, "n 4"]
    areas: Float[Tensor, " n"]

    @classmethod
    def create(cls, objects: Instances, tile: Tile, size: tuple[int, int]) -> View:
        """Compute the boxes and whether they are truncated."""
        boxes = objects.boxes.float() if objects.masks is None else objects.masks.boxes()
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = sides.clamp(min=0).prod(1) if objects.masks is None else objects.masks.areas().float()
        inner = torch.tensor([tile.x > 0, tile.y > 0, tile.right < size[1], tile.bottom < size[0]])
        gap = torch.cat([boxes[:, :2], boxes.new_tensor([tile.width, tile.height]) - boxes[:, 2:]], 1)
        # Predicted masks often end slightly before the border, since heads predict them on a grid of about 28 cells.
        tolerance = (sides / 28).clamp(1.5, 2 * THIN).repeat(1, 2)
        return cls(objects, tile, boxes, (gap < tolerance) & inner, areas)

    def select(self, rows: Tensor) -> View:
        """The same tile with some of its objects."""
        return View(self.objects[rows], self.tile, self.boxes[rows], self.cut[rows], self.areas[rows])

    def within(self, strip: Tile) -> Tensor:
        """Indices of the objects whose boxes intersect the strip."""
        x0, y0, x1, y1 = (self.boxes + torch.tensor([self.tile.x, self.tile.y] * 2)).unbind(1)
        reaches = (x1 > strip.x) & (y1 > strip.y) & (x0 < strip.right) & (y0 < strip.bottom)
        return reaches.nonzero().flatten()

    def border(self, rows: Tensor, side: int, line: int, depth: int) -> Bool[Tensor, "n depth length"]:
        """The pixels of objects in `depth` lines beside a line of the image, from this line into the tile.

        Args:
            rows: Indices of the objects.
            side: The side of the band that the line is on: 0 left, 1 top, 2 right, 3 bottom.
            line: Column or row of the image where the band begins (side 0, 1) or ends (2, 3), exclusive.
            depth: Number of lines.

        Returns:
            The pixels: nearest line first, along the tile's whole side.
        """
        t = self.tile
        first = line if side < 2 else line - depth
        band = Tile(t.x, first, t.width, depth) if side % 2 else Tile(first, t.y, depth, t.height)
        objects = self.objects[rows]
        if objects.masks is None:
            planes = _box_planes(_window_boxes(objects, t, band), (band.height, band.width))
        else:
            planes = cropped(objects.masks, t, band).dense("cpu")
        lines = planes if side % 2 else planes.transpose(1, 2)
        return lines if side < 2 else lines.flip(1)


@dataclass(frozen=True)
class Link:
    """Two parts that show the same object.

    Attributes:
        first: Number of one part.
        second: Number of the other part.
        weight: Agreement; stronger links are applied first.
        duplicate: Position, 0 or 1, of the part that lies inside the other one and is dropped if the two cannot be
            joined.
    """

    first: int
    second: int
    weight: float
    duplicate: int | None = None


def links_between(a: View, b: View) -> list[Link]:
    """The parts of two neighbouring tiles that show the same objects."""
    shifted_x, shifted_y = a.tile.x != b.tile.x, a.tile.y != b.tile.y
    width = min(a.tile.right, b.tile.right) - max(a.tile.x, b.tile.x)
    height = min(a.tile.bottom, b.tile.bottom) - max(a.tile.y, b.tile.y)
    thin_x, thin_y = shifted_x and width < THIN, shifted_y and height < THIN
    if not len(a.objects) or not len(b.objects) or (shifted_x and shifted_y and (thin_x or thin_y)):
        return []
    if thin_x or thin_y:
        return _links_along(a, b, int(thin_y))
    return _links_inside(a, b, Tile(max(a.tile.x, b.tile.x), max(a.tile.y, b.tile.y), width, height))


def _links_inside(a: View, b: View, strip: Tile) -> list[Link]:
    """Links by the parts of objects inside the strip that two tiles have in common."""
    rows, columns = a.within(strip), b.within(strip)
    if not len(rows) or not len(columns):
        return []
    here, there = a.objects[rows], b.objects[columns]
    if here.masks is None or there.masks is None:
        left, right = _window_boxes(here, a.tile, strip), _window_boxes(there, b.tile, strip)
        iou, of_a, of_b = _box_shares(left, right)
        inside_a, inside_b = ((v[:, 2:] - v[:, :2]).clamp(min=0).prod(1) for v in (left, right))
    else:
        left, right = cropped(here.masks, a.tile, strip), cropped(there.masks, b.tile, strip)
        iou = left.iou(right)
        of_a = left.iou(right, torch.ones(len(right), dtype=torch.bool))
        of_b = right.iou(left, torch.ones(len(left), dtype=torch.bool)).T
        inside_a, inside_b = left.areas().float(), right.areas().float()
    one_class = here.labels[:, None] == there.labels[None]
    near = (torch.maximum(of_a, of_b) > 0) & one_class
    share_a, share_b = inside_a / a.areas[rows].clamp(min=1), inside_b / b.areas[columns].clamp(min=1)
    same = (iou >= AGREE) & one_class
    # A truncated part is less reliable, and often only a fragment of what the other tile shows.
    fragment_a = _fragments(a, b, rows, columns, of_a, share_a, near & ~same.any(1, keepdim=True))
    fragment_b = _fragments(b, a, columns, rows, of_b.T, share_b, (near & ~same.any(0, keepdim=True)).T).T
    # A good match must outweigh two poor ones.
    weights = torch.where(same, 1 + iou, torch.maximum(fragment_a, fragment_b))
    links, partner_a, partner_b = _assigned(weights, rows, columns)
    for i in [i for i in range(len(rows)) if i not in partner_a]:
        weight, j = fragment_a[i].max(0)
        if weight > 0:
            inside = share_a[i] * of_a[i, j] >= CONTAIN
            links.append(Link(int(rows[i]), int(columns[j]), float(weight) / 10, 0 if inside else None))
    for j in [j for j in range(len(columns)) if j not in partner_b]:
        weight, i = fragment_b[:, j].max(0)
        if weight > 0:
            inside = share_b[j] * of_b[i, j] >= CONTAIN
            links.append(Link(int(rows[i]), int(columns[j]), float(weight) / 10, 1 if inside else None))
    return links


def _fragments(
    a: View, b: View, rows: Tensor, columns: Tensor, inside: Tensor, share: Tensor, near: Tensor
) -> Float[Tensor, "n m"]:
    """How well objects of `b` continue those of `a` beyond a border of `a` that truncates them.

    Args:
        a: The objects that are truncated.
        b: The objects that continue them.
        rows: Indices of those of `a`, N.
        columns: Indices of those of `b`, M.
        inside: (N, M), share of the common area of each object of `a` that lies inside each of `b`.
        share: (N,), share of each object of `a` that lies in the common area.
        near: (N, M), which pairs to consider.

    Returns:
        (N, M), 0 where there is no agreement, otherwise in (0.25, 0.75].
    """
    result = torch.zeros(len(rows), len(columns))
    enough = near & ((inside >= CONTAIN) | ((inside >= REMNANT) & (share[:, None] > 0.9)))
    t, o = a.tile, b.tile
    reaches = (o.x < t.x, o.y < t.y, o.right > t.right, o.bottom > t.bottom)
    lines = (t.x, t.y, t.right, t.bottom)
    for side in range(4):
        cut = a.cut[rows, side]
        if not reaches[side] or not bool((enough & cut[:, None]).any()):
            continue
        facing = enough & cut[:, None]
        i, j = facing.any(1).nonzero().flatten(), facing.any(0).nonzero().flatten()
        depth = abs((o.x, o.y, o.right, o.bottom)[side] - lines[side])
        ends = a.border(rows[i], side, lines[side], 2 * THIN).any(1)
        goes_on = b.border(columns[j], (side + 2) % 4, lines[side], min(2, depth)).any(1)
        ends, goes_on = _on_one_line(a.tile, ends, b.tile, goes_on, side % 2)
        both, iou = _profile_agreement(ends, goes_on)
        weight = 0.25 + 0.25 * inside[i[:, None], j[None]] + 0.25 * iou
        valid = (both > 0) & (enough & cut[:, None])[i[:, None], j[None]]
        old = result[i[:, None], j[None]]
        result[i[:, None], j[None]] = torch.where(valid, torch.maximum(old, weight), old)
    return result


def _links_along(a: View, b: View, axis: int) -> list[Link]:
    """Links across the border of tiles that have hardly any pixel in common, by the parts on both sides of it.

    Args:
        a: One tile.
        b: The other tile.
        axis: 0: the tiles lie side by side; 1: one lies above the other.
    """
    swapped = (a.tile.x, a.tile.y)[axis] > (b.tile.x, b.tile.y)[axis]
    if swapped:
        a, b = b, a
    # Sides 0 and 1 are left and top, 2 and 3 right and bottom.
    rows, columns = a.cut[:, axis + 2].nonzero().flatten(), b.cut[:, axis].nonzero().flatten()
    if not len(rows) or not len(columns):
        return []
    end_a, width_a, deep_a = _ends(a.border(rows, axis + 2, (a.tile.right, a.tile.bottom)[axis], 4 * THIN))
    end_b, width_b, deep_b = _ends(b.border(columns, axis, (b.tile.x, b.tile.y)[axis], 4 * THIN))
    end_a, end_b = _on_one_line(a.tile, end_a, b.tile, end_b, axis)
    both, iou = _profile_agreement(end_a, end_b)
    # Objects that only touch at the border widen on both sides of it; an object that continues does not.
    narrowest = torch.minimum(deep_a[:, None], deep_b[None])
    width = torch.minimum(torch.minimum(width_a[:, None], width_b[None]), both)
    continues = (both > 0) & (width >= NECK * narrowest)
    smaller = torch.minimum(end_a.sum(1)[:, None], end_b.sum(1)[None]).clamp(min=1)
    inside = (both >= CONTAIN * smaller) & (narrowest == 0)
    one_class = a.objects.labels[rows][:, None] == b.objects.labels[columns][None]
    weights = torch.where(iou >= AGREE, 1 + iou, torch.where(inside, 0.25 + 0.25 * iou, 0.0))
    weights = torch.where(continues & one_class, weights, 0.0)
    links, _, _ = _assigned(weights, rows, columns)
    return [replace(link, first=link.second, second=link.first) for link in links] if swapped else links


def _assigned(weights: Tensor, rows: Tensor, columns: Tensor) -> tuple[list[Link], set[int], set[int]]:
    """The one-to-one assignment with the largest total weight, and the positions that have a partner."""
    assigned = cast(Any, linear_sum_assignment)(weights.numpy(), maximize=True)  # scipy is not typed
    first, second = cast(tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]], assigned)
    pairs = [(int(i), int(j)) for i, j in zip(first, second, strict=True) if weights[i, j] > 0]
    links = [Link(int(rows[i]), int(columns[j]), float(weights[i, j])) for i, j in pairs]
    return links, {i for i, _ in pairs}, {j for _, j in pairs}


def _ends(band: Bool[Tensor, "n depth length"]) -> tuple[Tensor, Tensor, Tensor]:
    """The profile of each object where it begins, its width there, and its width `DEPTH` lines further inside.

    Args:
        band: Lines beside a border, nearest first.

    Returns:
        Profiles of the first two lines (N, length); widths (N,) in pixels, 0 if the object ends before.
    """
    lines = torch.arange(band.shape[1])
    begins = torch.where(band.any(2), lines, band.shape[1]).amin(1, keepdim=True)
    profile = (band & ((lines == begins) | (lines == begins + 1))[:, :, None]).any(1)
    width, deep = ((band & (lines == begins + depth)[:, :, None]).any(1).sum(1).float() for depth in (0, DEPTH))
    return profile, width, deep


def _on_one_line(a: Tile, first: Tensor, b: Tile, second: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Profiles along a border, cut to the pixels that both tiles have; axis 0: the border is vertical."""
    start_a, start_b = (a.x, b.x) if axis else (a.y, b.y)
    start = max(start_a, start_b)
    end = min(start_a + first.shape[1], start_b + second.shape[1])
    return first[:, start - start_a : end - start_a], second[:, start - start_b : end - start_b]


def _profile_agreement(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Common pixels of profiles and their IoU, with a tolerance of two pixels, which slanted outlines need."""

    def widened(profiles: Tensor) -> Tensor:
        return torch.nn.functional.max_pool1d(profiles.float()[:, None], 5, 1, 2)[:, 0]

    both = torch.minimum(first.float() @ widened(second).T, widened(first) @ second.float().T)
    union = first.sum(1)[:, None] + second.sum(1)[None] - both
    return both, both / union.clamp(min=1)


def cropped(masks: Masks, tile: Tile, strip: Tile) -> Masks:
    """Masks of a tile, cropped to the strip."""
    placement = Placement.identity((tile.height, tile.width))
    return masks.place(placement.then_crop(strip.x - tile.x, strip.y - tile.y, (strip.height, strip.width)))


def _window_boxes(objects: Instances, tile: Tile, strip: Tile) -> Float[Tensor, "n 4"]:
    """Boxes of a tile, clipped to the strip."""
    boxes = objects.boxes.float() + torch.tensor([tile.x - strip.x, tile.y - strip.y] * 2)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([strip.width, strip.height] * 2))


def _box_planes(boxes: Tensor, size: tuple[int, int]) -> Bool[Tensor, "n h w"]:
    """The pixels inside boxes."""
    y, x = (torch.arange(side) + 0.5 for side in size)
    x0, y0, x1, y1 = (v[:, None] for v in boxes.unbind(1))
    return ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]


def _box_shares(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection over union, intersection over `a`, intersection over `b`."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    of_a, of_b = ((v[:, 2:] - v[:, :2]).prod(1).clamp(min=1e-9) for v in (a, b))
    return both / (of_a[:, None] + of_b[None] - both).clamp(min=1e-9), both / of_a[:, None], both / of_b[None]

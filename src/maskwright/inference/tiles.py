"""Prediction on large images in overlapping tiles, so that small objects keep the size they had in training.

Neighbouring tiles overlap in a strip. Two masks of one class are joined if they agree inside the strip; whole masks
cannot be compared, because each tile shows a different part of an object. Masks stay run-length encoded on their tile
until they are joined, no array of the image's size is allocated, and tiles are views of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement

AGREE = 0.5  # minimum IoU inside the strip for two masks to be the same object
CONTAIN = 0.7  # or minimum share of a mask inside the other one, if the border of its tile truncates it
WHOLE = 0.9  # an untruncated mask with this share of the union of all parts is used instead of the union


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

    def common(self, other: Tile) -> Tile | None:
        """The intersection with another tile; None if it is empty."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        width = min(self.x + self.width, other.x + other.width) - x
        height = min(self.y + self.height, other.y + other.height) - y
        return Tile(x, y, width, height) if width > 0 and height > 0 else None


def cover(size: tuple[int, int], tile: int, overlap: float) -> list[Tile]:
    """Cover an image with tiles of equal size.

    Args:
        size: Height and width of the image.
        tile: Side of the tiles in pixels. Along a shorter side of the image there is one tile of that length.
        overlap: Minimum overlap of neighbouring tiles as a share of `tile`.

    Returns:
        The tiles, evenly spaced, row by row.
    """

    def along(length: int) -> list[int]:
        if length <= tile:
            return [0]
        step = max(1, math.floor(tile * (1 - overlap)))
        count = math.ceil((length - tile) / step) + 1
        return [number * (length - tile) // (count - 1) for number in range(count)]

    height, width = size
    return [Tile(x, y, min(tile, width), min(tile, height)) for y in along(height) for x in along(width)]


def check_tiles(tile: int | None, overlap: float, task: str) -> None:
    """Check the arguments for tiled prediction.

    Args:
        tile: Side of the tiles in pixels; None for no tiles.
        overlap: Overlap of neighbouring tiles as a share of `tile`.
        task: Name of the task.

    Raises:
        UsageError: If a value is out of range, or the task segments whole images, which tiling does not support.
    """
    if tile is None:
        return
    if tile < 16 or not 0 <= overlap <= 0.9:
        raise UsageError(
            f"`tile` must be at least 16 pixels and `overlap` in [0, 0.9], got tile={tile}, overlap={overlap}"
        )
    if task in ("panoptic", "semantic"):
        raise UsageError(f"tiles are supported for objects only; omit `tile` with task {task!r}")


def tile_words(tile: int, overlap: float) -> str:
    """The tiles in words, for the protocol of an evaluation."""
    return f"tiles of {tile} pixels, overlapping by {100 * overlap:g} %, each: "


def predict_tiled(
    find: Callable[[Sequence[Tensor]], list[Instances]], image: Tensor, tile: int, overlap: float, batch: int = 1
) -> Instances:
    """Predict the objects of a large image tile by tile.

    Args:
        find: Function from a batch of tiles (C, h, w) to their objects, on each tile's grid and on the CPU.
        image: The image (C, H, W).
        tile: Side of the tiles in pixels.
        overlap: Minimum overlap of neighbouring tiles as a share of `tile`.
        batch: Tiles per call of `find`.

    Returns:
        The objects on the image's grid, without duplicates; see `join_tiles`.
    """
    size = (image.shape[1], image.shape[2])
    tiles = cover(size, tile, overlap)
    found: list[Instances] = []
    for start in range(0, len(tiles), batch):
        group = tiles[start : start + batch]
        found += find([image[:, t.y : t.y + t.height, t.x : t.x + t.width] for t in group])
    return join_tiles(found, tiles, size)


def join_tiles(found: Sequence[Instances], tiles: Sequence[Tile], size: tuple[int, int]) -> Instances:
    """Join the objects of tiles.

    Parts of an object are joined into the union of their masks, with the highest of their scores. If a tile shows the
    whole object, the mask and box from that tile are used. Keypoints are those of the largest part.

    Args:
        found: The objects of each tile, on the tile's grid.
        tiles: The tiles.
        size: Height and width of the image.

    Returns:
        The objects on the image's grid, best first.
    """
    if len(tiles) == 1:
        return found[0]
    views = [_View.create(f, t, size) for f, t in zip(found, tiles, strict=True)]
    starts = np.cumsum([0] + [len(f) for f in found])
    links: list[tuple[int, int]] = []
    for a, b in _neighbours(tiles):
        same = _same(views[a], views[b])
        links += [(int(starts[a]) + i, int(starts[b]) + j) for i, j in same.nonzero().tolist()]
    members = [(view, row) for view in views for row in range(len(view.objects))]
    groups = _grouped(len(members), links)
    objects = [_joined([members[m] for m in group], size) for group in groups]
    if not objects:
        first = found[0]
        points = None if first.keypoints is None else first.keypoints.shape[1]
        return Instances.empty(size, masks=first.masks is not None, scores=first.scores is not None, keypoints=points)
    everything = Instances.join(objects)
    if everything.scores is None:
        return everything
    return everything[torch.argsort(everything.scores, descending=True, stable=True)]


def _neighbours(tiles: Sequence[Tile]) -> list[tuple[int, int]]:
    """Pairs of tiles that overlap."""
    table = np.array([(t.x, t.y, t.x + t.width, t.y + t.height) for t in tiles])
    low = np.maximum(table[:, None, :2], table[None, :, :2])
    high = np.minimum(table[:, None, 2:], table[None, :, 2:])
    first, second = np.nonzero(np.triu((high > low).all(-1), 1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


@dataclass(frozen=True)
class _View:
    """The objects of a tile.

    Attributes:
        objects: The objects on the tile's grid.
        tile: The tile.
        boxes: Boxes on the tile's grid: of the masks if there are any, since predicted boxes may differ from them.
        cut: Whether a border of the tile that is not one of the image truncates the object.
    """

    objects: Instances
    tile: Tile
    boxes: Float[Tensor, "n 4"]
    cut: Bool[Tensor, " n"]

    @classmethod
    def create(cls, objects: Instances, tile: Tile, size: tuple[int, int]) -> _View:
        """Compute the boxes and whether they are truncated."""
        boxes = objects.masks.boxes() if objects.masks is not None else objects.boxes.float()
        inner = [tile.x > 0, tile.y > 0, tile.x + tile.width < size[1], tile.y + tile.height < size[0]]
        gap = torch.cat([boxes[:, :2], boxes.new_tensor([tile.width, tile.height]) - boxes[:, 2:]], 1)
        # A tolerance of 1.5 pixels, because predicted masks often end slightly before the border.
        return cls(objects, tile, boxes, ((gap < 1.5) & torch.tensor(inner)).any(1))

    def within(self, strip: Tile) -> Tensor:
        """Indices of the objects whose boxes intersect the strip."""
        x0, y0, x1, y1 = (self.boxes + torch.tensor([self.tile.x, self.tile.y] * 2)).unbind(1)
        reaches = (x1 > strip.x) & (y1 > strip.y) & (x0 < strip.x + strip.width) & (y0 < strip.y + strip.height)
        return reaches.nonzero().flatten()


def _same(a: _View, b: _View) -> Bool[Tensor, "n m"]:
    """Which objects of two tiles are the same, judged by their parts inside the common strip."""
    result = torch.zeros(len(a.objects), len(b.objects), dtype=torch.bool)
    strip = a.tile.common(b.tile)
    if strip is None:
        return result
    rows, columns = a.within(strip), b.within(strip)
    if not len(rows) or not len(columns):
        return result
    here, there = a.objects[rows], b.objects[columns]
    if here.masks is None or there.masks is None:
        iou, of_a, of_b = _box_shares(_window_boxes(here, a.tile, strip), _window_boxes(there, b.tile, strip))
    else:
        left, right = _window(here.masks, a.tile, strip), _window(there.masks, b.tile, strip)
        iou = left.iou(right)
        of_a = left.iou(right, torch.ones(len(right), dtype=torch.bool))
        of_b = right.iou(left, torch.ones(len(left), dtype=torch.bool)).T
    # A truncated part is less reliable and often only a fragment of what the other tile shows.
    rest = ((of_a >= CONTAIN) & a.cut[rows, None]) | ((of_b >= CONTAIN) & b.cut[None, columns])
    result[rows[:, None], columns[None]] = ((iou >= AGREE) | rest) & (here.labels[:, None] == there.labels[None])
    return result


def _window(masks: Masks, tile: Tile, strip: Tile) -> Masks:
    """Masks of a tile, cropped to the strip."""
    placement = Placement.identity((tile.height, tile.width))
    return masks.place(placement.then_crop(strip.x - tile.x, strip.y - tile.y, (strip.height, strip.width)))


def _window_boxes(objects: Instances, tile: Tile, strip: Tile) -> Float[Tensor, "n 4"]:
    """Boxes of a tile, clipped to the strip."""
    boxes = objects.boxes.float() + torch.tensor([tile.x - strip.x, tile.y - strip.y] * 2)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([strip.width, strip.height] * 2))


def _box_shares(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection over union, intersection over `a`, intersection over `b`."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    of_a, of_b = ((v[:, 2:] - v[:, :2]).prod(1).clamp(min=1e-9) for v in (a, b))
    return both / (of_a[:, None] + of_b[None] - both).clamp(min=1e-9), both / of_a[:, None], both / of_b[None]


def _grouped(count: int, links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Members of each connected component, in order."""
    parent = list(range(count))

    def root(member: int) -> int:
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for a, b in links:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for member in range(count):
        groups.setdefault(root(member), []).append(member)
    return list(groups.values())


def _joined(members: Sequence[tuple[_View, int]], size: tuple[int, int]) -> Instances:
    """One object from its parts, each a view and a row."""
    placed = [_on_image(view.objects[row], view.tile, size) for view, row in members]
    if len(placed) == 1:
        return placed[0]
    scores = [0.0 if p.scores is None else float(p.scores[0]) for p in placed]
    best = placed[max(range(len(placed)), key=scores.__getitem__)]
    boxes = torch.cat([p.boxes for p in placed])
    largest = placed[int((boxes[:, 2:] - boxes[:, :2]).prod(1).argmax())]
    box = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])[None]
    masks = None
    if all(p.masks is not None for p in placed):
        masks = Masks.join([p.masks for p in placed if p.masks is not None]).union()
        total = float(masks.areas())
        whole = [number for number, (view, row) in enumerate(members) if not bool(view.cut[row])]
        for number in sorted(whole, key=lambda n: -scores[n]):
            own = placed[number].masks
            if own is not None and float(own.areas()) >= WHOLE * total:
                masks, box = own, placed[number].boxes
                break
    return Instances(size, box, best.labels, masks, best.scores, largest.keypoints)


def _on_image(part: Instances, tile: Tile, size: tuple[int, int]) -> Instances:
    """Objects of a tile on the image's grid."""
    offset = part.boxes.new_tensor([tile.x, tile.y])
    points = part.keypoints
    if points is not None:
        points = torch.cat([points[..., :2] + offset.to(points), points[..., 2:]], -1)
    masks = None
    if part.masks is not None:
        frames, crops = part.masks.crops()
        masks = Masks.from_crops(crops, frames[:, :2] + torch.tensor([tile.x, tile.y]), size)
    return Instances(size, part.boxes + offset.repeat(2), part.labels, masks, part.scores, points)

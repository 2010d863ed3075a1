"""Large images in tiles: small objects stay as large as the network saw them in training.

Neighbouring tiles have a strip in common. What belongs to one object looks the same there from both sides, so two
masks of one class are joined where they agree *inside the strip*; whole masks cannot be compared, as each tile sees a
different part. Masks stay run-length codes of their tile until they are joined; no plane of the image's size is ever
made, and a tile is a view of the image.
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

AGREE = 0.5  # overlap (IoU) inside the strip from which on two masks are one object
CONTAIN = 0.7  # or this share of the smaller one, where it is cut off by its tile's border
WHOLE = 0.9  # a mask that is cut off nowhere and holds this share of all the parts is the object by itself


@dataclass(frozen=True)
class Tile:
    """A window of the image, in whole pixels."""

    x: int
    y: int
    width: int
    height: int

    def common(self, other: Tile) -> Tile | None:
        """The strip that both have; None where there is none."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        width = min(self.x + self.width, other.x + other.width) - x
        height = min(self.y + self.height, other.y + other.height) - y
        return Tile(x, y, width, height) if width > 0 and height > 0 else None


def cover(size: tuple[int, int], tile: int, overlap: float) -> list[Tile]:
    """Tiles of one size, row by row, evenly spread over an image of `size` (H, W); neighbours have at least `overlap`
    of a tile's side in common. A side shorter than a tile has one."""

    def along(length: int) -> list[int]:
        if length <= tile:
            return [0]
        step = max(1, math.floor(tile * (1 - overlap)))
        count = math.ceil((length - tile) / step) + 1
        return [number * (length - tile) // (count - 1) for number in range(count)]

    height, width = size
    return [Tile(x, y, min(tile, width), min(tile, height)) for y in along(height) for x in along(width)]


def check_tiles(tile: int | None, overlap: float, task: str) -> None:
    """UsageError for tiles that cannot be, or that nothing joins: images divided among things and stuff."""
    if tile is None:
        return
    if tile < 16 or not 0 <= overlap <= 0.9:
        raise UsageError(f"tile is {tile}, overlap is {overlap}; a tile is at least 16 pixels, its overlap 0 ... 0.9")
    if task in ("panoptic", "semantic"):
        raise UsageError(f"tiles are joined by their objects; with task {task!r} leave tile out")


def tile_words(tile: int, overlap: float) -> str:
    """For the protocol of a measurement."""
    return f"tiles of {tile} pixels, {100 * overlap:g} % in common, each: "


def predict_tiled(
    find: Callable[[Sequence[Tensor]], list[Instances]], image: Tensor, tile: int, overlap: float, batch: int = 1
) -> Instances:
    """The objects of an image (C, H, W) that `find` finds in its tiles, `batch` tiles at a time, each object once.

    `find` gives objects on each tile's own grid, on the host.
    """
    size = (image.shape[1], image.shape[2])
    tiles = cover(size, tile, overlap)
    found: list[Instances] = []
    for start in range(0, len(tiles), batch):
        group = tiles[start : start + batch]
        found += find([image[:, t.y : t.y + t.height, t.x : t.x + t.width] for t in group])
    return join_tiles(found, tiles, size)


def join_tiles(found: Sequence[Instances], tiles: Sequence[Tile], size: tuple[int, int]) -> Instances:
    """Objects on the tiles' grids -> objects on the image's, best first, parts joined and duplicates removed.

    Parts are joined into the union of their masks with the best of their scores; where one tile sees the whole of an
    object, its mask and box are taken as they are. Keypoints are those of the largest part.
    """
    if len(tiles) == 1:
        return found[0]
    views = [_View.of(f, t, size) for f, t in zip(found, tiles, strict=True)]
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
    """Pairs of tiles that have pixels in common."""
    table = np.array([(t.x, t.y, t.x + t.width, t.y + t.height) for t in tiles])
    low = np.maximum(table[:, None, :2], table[None, :, :2])
    high = np.minimum(table[:, None, 2:], table[None, :, 2:])
    first, second = np.nonzero(np.triu((high > low).all(-1), 1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


@dataclass(frozen=True)
class _View:
    """What was found in a tile. Masks' own boxes are used where there are masks: predicted ones need not agree."""

    objects: Instances
    tile: Tile
    boxes: Float[Tensor, "n 4"]  # on the tile
    cut: Bool[Tensor, " n"]  # cut off by a border of the tile that is none of the image's

    @classmethod
    def of(cls, objects: Instances, tile: Tile, size: tuple[int, int]) -> _View:
        boxes = objects.masks.boxes() if objects.masks is not None else objects.boxes.float()
        inner = [tile.x > 0, tile.y > 0, tile.x + tile.width < size[1], tile.y + tile.height < size[0]]
        gap = torch.cat([boxes[:, :2], boxes.new_tensor([tile.width, tile.height]) - boxes[:, 2:]], 1)
        # A pixel and a half: masks of a network end a little before the border as often as at it.
        return cls(objects, tile, boxes, ((gap < 1.5) & torch.tensor(inner)).any(1))

    def within(self, strip: Tile) -> Tensor:
        """Rows of those whose boxes reach into the strip."""
        x0, y0, x1, y1 = (self.boxes + torch.tensor([self.tile.x, self.tile.y] * 2)).unbind(1)
        reaches = (x1 > strip.x) & (y1 > strip.y) & (x0 < strip.x + strip.width) & (y0 < strip.y + strip.height)
        return reaches.nonzero().flatten()


def _same(a: _View, b: _View) -> Bool[Tensor, "n m"]:
    """Which objects of the one tile are which of the other, by what both say of the strip they have in common."""
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
    # A part cut off by its tile's border is drawn less surely, and is often only a rest of what the other tile saw.
    rest = ((of_a >= CONTAIN) & a.cut[rows, None]) | ((of_b >= CONTAIN) & b.cut[None, columns])
    result[rows[:, None], columns[None]] = ((iou >= AGREE) | rest) & (here.labels[:, None] == there.labels[None])
    return result


def _window(masks: Masks, tile: Tile, strip: Tile) -> Masks:
    placement = Placement.identity((tile.height, tile.width))
    return masks.place(placement.then_crop(strip.x - tile.x, strip.y - tile.y, (strip.height, strip.width)))


def _window_boxes(objects: Instances, tile: Tile, strip: Tile) -> Float[Tensor, "n 4"]:
    boxes = objects.boxes.float() + torch.tensor([tile.x - strip.x, tile.y - strip.y] * 2)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([strip.width, strip.height] * 2))


def _box_shares(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection over union, over a, over b."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    of_a, of_b = ((v[:, 2:] - v[:, :2]).prod(1).clamp(min=1e-9) for v in (a, b))
    return both / (of_a[:, None] + of_b[None] - both).clamp(min=1e-9), both / of_a[:, None], both / of_b[None]


def _grouped(count: int, links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Members of each connected group, in order."""
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
    """One object out of its parts: a view and a row each."""
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
    offset = part.boxes.new_tensor([tile.x, tile.y])
    points = part.keypoints
    if points is not None:
        points = torch.cat([points[..., :2] + offset.to(points), points[..., 2:]], -1)
    masks = None
    if part.masks is not None:
        frames, crops = part.masks.crops()
        masks = Masks.from_crops(crops, frames[:, :2] + torch.tensor([tile.x, tile.y]), size)
    return Instances(size, part.boxes + offset.repeat(2), part.labels, masks, part.scores, points)

"""Large pictures in tiles: small objects stay as large as the network saw them in training.

Neighbouring tiles have a strip in common. What belongs to one object looks the same there from both sides, so two
masks of one class are joined where they agree *inside the strip*; whole masks cannot be compared, as each tile sees a
different part. Masks stay run-length codes of their tile until they are joined; no plane of the picture's size is ever
made, and a tile is a view of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskwright.structures import Instances, Masks, Placement

AGREE = 0.5  # overlap (IoU) inside the strip from which on two masks are one object
CONTAIN = 0.7  # or this share of the smaller one, where it is cut off by its tile's border
WHOLE = 0.9  # a mask that is cut off nowhere and holds this share of all the parts is the object by itself


@dataclass(frozen=True)
class Tile:
    """A window of the picture, in whole pixels."""

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
    """Tiles of one size, row by row, evenly spread over a picture of `size` (H, W); neighbours have at least `overlap`
    of a tile's side in common. A side shorter than a tile has one."""

    def along(length: int) -> list[int]:
        if length <= tile:
            return [0]
        step = max(1, math.floor(tile * (1 - overlap)))
        count = math.ceil((length - tile) / step) + 1
        return [number * (length - tile) // (count - 1) for number in range(count)]

    height, width = size
    return [Tile(x, y, min(tile, width), min(tile, height)) for y in along(height) for x in along(width)]


def predict_tiled(
    find: Callable[[Sequence[Tensor]], list[Instances]], picture: Tensor, tile: int, overlap: float, batch: int = 1
) -> Instances:
    """The objects of a picture (C, H, W) that `find` finds in its tiles, `batch` tiles at a time, each object once.

    `find` gives objects on each tile's own grid, on the host.
    """
    size = (picture.shape[1], picture.shape[2])
    tiles = cover(size, tile, overlap)
    found: list[Instances] = []
    for start in range(0, len(tiles), batch):
        group = tiles[start : start + batch]
        found += find([picture[:, t.y : t.y + t.height, t.x : t.x + t.width] for t in group])
    return join_tiles(found, tiles, size)


def join_tiles(found: Sequence[Instances], tiles: Sequence[Tile], size: tuple[int, int]) -> Instances:
    """Objects on the tiles' grids -> objects on the picture's, best first, parts joined and duplicates removed.

    Parts are joined into the union of their masks with the best of their scores; where one tile sees the whole of an
    object, its mask and box are taken as they are. Joints are those of the largest part.
    """
    if len(tiles) == 1:
        return found[0]
    starts = np.cumsum([0] + [len(f) for f in found])
    links: list[tuple[int, int]] = []
    for a, b in _neighbours(tiles):
        strip = tiles[a].common(tiles[b])
        if strip is not None and len(found[a]) and len(found[b]):
            same = _same(found[a], tiles[a], found[b], tiles[b], strip, size)
            links += [(int(starts[a]) + i, int(starts[b]) + j) for i, j in same.nonzero().tolist()]
    groups = _grouped(int(starts[-1]), links)
    owner = np.repeat(np.arange(len(tiles)), [len(f) for f in found])
    whole = [not c for f, t in zip(found, tiles, strict=True) for c in _cut(f, t, size).tolist()]
    objects = [
        _joined([(found[owner[m]][m - int(starts[owner[m]])], tiles[owner[m]], whole[m]) for m in members], size)
        for members in groups
    ]
    if not objects:
        template = next((f for f in found if f.masks is None), None)
        empty = Instances.empty(size)
        if template is not None:
            empty.masks = None
        return empty
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


def _same(
    a: Instances, tile_a: Tile, b: Instances, tile_b: Tile, strip: Tile, size: tuple[int, int]
) -> Bool[Tensor, "n m"]:
    """Which objects of the one tile are which of the other, by what both say of the strip."""
    result = torch.zeros(len(a), len(b), dtype=torch.bool)
    here, there = _within(a, tile_a, strip), _within(b, tile_b, strip)
    rows, columns = here.nonzero().flatten(), there.nonzero().flatten()
    if not len(rows) or not len(columns):
        return result
    a, b = a[rows], b[columns]
    if a.masks is None or b.masks is None:
        iou, of_a, of_b = _box_shares(_window_boxes(a, tile_a, strip), _window_boxes(b, tile_b, strip))
    else:
        left, right = _window(a.masks, tile_a, strip), _window(b.masks, tile_b, strip)
        every = torch.ones(max(len(left), len(right)), dtype=torch.bool)
        iou = left.iou(right)
        of_a, of_b = left.iou(right, every[: len(right)]), right.iou(left, every[: len(left)]).T
    # A part cut off by its tile's border is drawn less surely, and is often only a rest of what the other tile saw.
    rest = (of_a >= CONTAIN) & _cut(a, tile_a, size)[:, None] | (of_b >= CONTAIN) & _cut(b, tile_b, size)[None]
    same = ((iou >= AGREE) | rest) & (a.labels[:, None] == b.labels[None])
    result[rows[:, None], columns[None]] = same
    return result


def _within(objects: Instances, tile: Tile, strip: Tile) -> Bool[Tensor, " n"]:
    """Whose boxes reach into the strip."""
    boxes = _boxes(objects) + torch.tensor([tile.x, tile.y] * 2)
    x0, y0, x1, y1 = boxes.unbind(1)
    return (x1 > strip.x) & (y1 > strip.y) & (x0 < strip.x + strip.width) & (y0 < strip.y + strip.height)


def _cut(objects: Instances, tile: Tile, size: tuple[int, int]) -> Bool[Tensor, " n"]:
    """Who is cut off by a border of the tile that is none of the picture's (to a pixel and a half)."""
    x0, y0, x1, y1 = _boxes(objects).unbind(1)
    near = torch.zeros(len(objects), dtype=torch.bool)
    if tile.x > 0:
        near |= x0 < 1.5
    if tile.y > 0:
        near |= y0 < 1.5
    if tile.x + tile.width < size[1]:
        near |= x1 > tile.width - 1.5
    if tile.y + tile.height < size[0]:
        near |= y1 > tile.height - 1.5
    return near


def _boxes(objects: Instances) -> Float[Tensor, "n 4"]:
    """The masks' own boxes where there are masks: predicted boxes and masks need not agree."""
    return objects.masks.boxes() if objects.masks is not None else objects.boxes.float()


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


def _joined(members: Sequence[tuple[Instances, Tile, bool]], size: tuple[int, int]) -> Instances:
    """One object out of its parts, each a single object on its tile's grid."""
    placed = [_on_picture(part, tile, size) for part, tile, _ in members]
    if len(placed) == 1:
        return placed[0]
    scores = [0.0 if p.scores is None else float(p.scores[0]) for p in placed]
    best = max(range(len(placed)), key=scores.__getitem__)
    areas = [float((p.boxes[0, 2:] - p.boxes[0, :2]).prod()) for p in placed]
    largest = placed[max(range(len(placed)), key=areas.__getitem__)]
    boxes = torch.cat([p.boxes for p in placed])
    box = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])[None]
    masks = None
    if all(p.masks is not None for p in placed):
        masks = Masks.join([p.masks for p in placed if p.masks is not None]).union()
        total = float(masks.areas())
        whole = [n for n, (_, _, uncut) in enumerate(members) if uncut]
        for number in sorted(whole, key=lambda n: -scores[n]):
            own = placed[number].masks
            if own is not None and float(own.areas()) >= WHOLE * total:
                masks, box = own, placed[number].boxes
                break
    top = placed[best]
    return Instances(size, box, top.labels, masks, top.scores, largest.keypoints)


def _on_picture(part: Instances, tile: Tile, size: tuple[int, int]) -> Instances:
    offset = part.boxes.new_tensor([tile.x, tile.y])
    points = part.keypoints
    if points is not None:
        points = torch.cat([points[..., :2] + offset.to(points), points[..., 2:]], -1)
    masks = None
    if part.masks is not None:
        frames, crops = part.masks.crops()
        masks = Masks.from_crops(crops, frames[:, :2] + torch.tensor([tile.x, tile.y]), size)
    return Instances(size, part.boxes + offset.repeat(2), part.labels, masks, part.scores, points)

"""Objects of an image from those of its tiles, given out as soon as no further tile can change them.

A tile is complete when all tiles that overlap it or share an edge with it have been added; an object is complete when
the tiles of all of its parts are. Memory holds the objects of incomplete tiles, and of complete ones those that belong
to incomplete objects. The result does not depend on when objects become complete: parts are joined within connected
groups, which are independent of each other.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from maskwright.inference.joining import WHOLE, Link, Tile, View, cropped, is_bridged, links_between
from maskwright.structures import Instances, Masks, runs
from maskwright.structures.rle import Ints

Runs = tuple[Ints, Ints]


@dataclass(frozen=True)
class PlacedObjects:
    """Some objects of an image of any size.

    Attributes:
        size: H, W of the image.
        boxes: (N, 4) float32, x0, y0, x1, y1 in the image.
        labels: (N,) int64.
        scores: (N,) float32; None if there are none.
        keypoints: (N, J, 3) in the image; None if there are none.
        masks: For each object the starts and ends of its runs in the image, see `structures.runs`; None for objects
            without masks.
        order: (N,) int64, number of the first part of each object: the order of objects with equal scores.
    """

    size: tuple[int, int]
    boxes: npt.NDArray[np.float32]
    labels: Ints
    scores: npt.NDArray[np.float32] | None
    keypoints: npt.NDArray[np.float32] | None
    masks: list[Runs] | None
    order: Ints

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def join(cls, parts: Sequence[PlacedObjects]) -> PlacedObjects:
        """Return all objects of several parts, at least one, in order."""
        filled = [part for part in parts if len(part)] or list(parts[:1])
        if len(filled) == 1:
            return filled[0]

        def joined(name: str) -> Any:
            values: list[Any] = [getattr(part, name) for part in filled]
            return None if any(value is None for value in values) else np.concatenate(values)

        masks = None
        if all(part.masks is not None for part in filled):
            masks = [mask for part in filled for mask in part.masks or ()]
        return cls(
            filled[0].size,
            joined("boxes"),
            joined("labels"),
            joined("scores"),
            joined("keypoints"),
            masks,
            joined("order"),
        )

    @classmethod
    def of(cls, objects: Instances) -> PlacedObjects:
        """Return objects that are on the image's own grid and on the host."""
        count, (height, width) = len(objects), objects.image_size
        return cls(
            objects.image_size,
            objects.boxes.float().numpy(),
            objects.labels.numpy(),
            None if objects.scores is None else objects.scores.float().numpy(),
            None if objects.keypoints is None else objects.keypoints.float().numpy(),
            None if objects.masks is None else _placed(objects.masks, Tile(0, 0, width, height), height),
            np.arange(count),
        )

    def instances(self) -> Instances:
        """Return the objects on the image's grid, with masks as run-length strings."""
        masks = None
        if self.masks is not None:
            strings = runs.encoded([own[0] for own in self.masks], [own[1] for own in self.masks], self.size)
            masks = Masks("rle", strings, self.size)
        return Instances(
            self.size,
            torch.from_numpy(self.boxes),
            torch.from_numpy(self.labels),
            masks,
            None if self.scores is None else torch.from_numpy(self.scores),
            None if self.keypoints is None else torch.from_numpy(self.keypoints),
        )


@dataclass
class _Component:
    """Parts that are connected by links.

    Attributes:
        parts: Their numbers.
        links: The links, with the numbers of parts; each with its tiles, for the order of equal ones.
        open: How many of the parts are of incomplete tiles.
    """

    parts: list[int]
    links: list[tuple[float, int, int, int, Link]] = field(default_factory=list[tuple[float, int, int, int, Link]])
    open: int = 0


class Joiner:
    """Joins the objects of tiles that are added one after the other.

    Args:
        tiles: All tiles, in the order in which they will be added. Neighbouring ones overlap or share an edge.
        size: H, W of the image.
    """

    def __init__(self, tiles: Sequence[Tile], size: tuple[int, int]):
        self.tiles, self.size = tiles, size
        self._table = np.array([(t.x, t.y, t.right, t.bottom) for t in tiles], np.int64).reshape(-1, 4)
        self._starts: list[int] = [0]  # number of the first part of each tile
        self._views: dict[int, View] = {}
        self._rows: dict[int, Ints] = {}  # of views from which complete objects were removed: the rows that remain
        self._closing: dict[int, list[int]] = {}  # number of a tile -> those that are complete when it has been added
        self._component: dict[int, _Component] = {}  # of each part with links
        self._left: dict[int, int] = {}  # parts of a complete tile that have not been given out

    def add(self, objects: Instances) -> PlacedObjects:
        """Add the objects of the next tile.

        Args:
            objects: The objects, on the tile's grid and on the host.

        Returns:
            The objects of the image that have become complete, in the order of their first parts.
        """
        number = len(self._starts) - 1
        tile = self.tiles[number]
        self._starts.append(self._starts[-1] + len(objects))
        if objects.masks is not None:
            objects = replace(objects, masks=objects.masks.pack())
        view = self._views[number] = View.create(objects, tile, self.size)
        x0, y0, x1, y1 = self._table.T
        low_x, high_x = np.maximum(x0, tile.x), np.minimum(x1, tile.right)
        low_y, high_y = np.maximum(y0, tile.y), np.minimum(y1, tile.bottom)
        touching = (high_x >= low_x) & (high_y >= low_y) & ((high_x > low_x) | (high_y > low_y))
        near = [int(n) for n in np.flatnonzero(touching)]
        around = [self.tiles[n] for n in near]
        for other in near:
            if other < number and not is_bridged(self.tiles[other], tile, around):
                self._connect(other, number, links_between(self._views[other], view))
        self._closing.setdefault(near[-1], []).append(number)
        return self._completed(self._closing.pop(number, []))

    # ---- components --------------------------------------------------------------------------------------------------

    def _connect(self, first: int, second: int, links: Sequence[Link]) -> None:
        """Register the links between two tiles."""
        for place, link in enumerate(links):
            one, other = self._starts[first] + link.first, self._starts[second] + link.second
            a, b = (self._component.get(part) or self._new(part) for part in (one, other))
            if a is not b:
                if len(a.parts) < len(b.parts):
                    a, b = b, a
                a.parts += b.parts
                a.links += b.links
                a.open += b.open
                for part in b.parts:
                    self._component[part] = a
            a.links.append((-link.weight, first, second, place, Link(one, other, link.weight, link.duplicate)))

    def _new(self, part: int) -> _Component:
        component = self._component[part] = _Component([part], open=1)
        return component

    def _completed(self, tiles: Sequence[int]) -> PlacedObjects:
        """The objects that are complete when these tiles are."""
        groups: list[list[int]] = []
        done: list[int] = []
        for number in tiles:
            for part in range(self._starts[number], self._starts[number + 1]):
                component = self._component.get(part)
                if component is None:
                    groups.append([part])
                    done.append(part)
                    continue
                component.open -= 1
                if not component.open:
                    parts = sorted(component.parts)
                    groups += self._grouped(parts, [entry[-1] for entry in sorted(component.links, key=_rank)])
                    done += parts
        found = self._joined(sorted(groups)) if groups else self._nothing()
        for part in done:
            self._component.pop(part, None)
        self._forget(tiles, done)
        return found

    def _nothing(self) -> PlacedObjects:
        """No objects, with the fields of those of the last tile."""
        objects = self._views[len(self._starts) - 2].objects
        return replace(PlacedObjects.of(objects[:0]), size=self.size)

    def _forget(self, tiles: Sequence[int], done: Sequence[int]) -> None:
        """Drop the views of complete tiles, except for the objects that are still needed."""
        for number in tiles:
            self._left[number] = self._starts[number + 1] - self._starts[number]
        for part in done:
            self._left[self._tile_of(part)] -= 1
        for number in {*tiles, *map(self._tile_of, done)}:
            if not self._left[number]:
                del self._left[number], self._views[number]
                self._rows.pop(number, None)
            elif number in tiles:
                first, end = self._starts[number], self._starts[number + 1]
                rows = np.array([part - first for part in range(first, end) if part in self._component], np.int64)
                self._rows[number] = rows
                self._views[number] = self._views[number].select(torch.from_numpy(rows))

    def _tile_of(self, part: int) -> int:
        return bisect_right(self._starts, part) - 1

    def _place(self, part: int) -> tuple[int, int]:
        """The tile of a part, and its row among the objects of the view that are left."""
        number = self._tile_of(part)
        row = part - self._starts[number]
        rows = self._rows.get(number)
        return number, row if rows is None else int(np.searchsorted(rows, row))

    # ---- groups ------------------------------------------------------------------------------------------------------

    def _grouped(self, parts: Sequence[int], links: Sequence[Link]) -> list[list[int]]:
        """The parts of each object of a component, in the order of their first part.

        The strongest links are applied first. A link that would join two parts which one tile shows as different
        objects is not applied.
        """
        group = {part: part for part in parts}
        members = {part: [part] for part in parts}
        dropped: set[int] = set()
        for link in links:
            one, other = group[link.first], group[link.second]
            if one == other:
                continue
            if self._compatible(members[one], members[other]):
                one, other = min(one, other), max(one, other)
                for part in members[other]:
                    group[part] = one
                members[one] += members.pop(other)
            elif link.duplicate is not None:
                dropped.add((link.first, link.second)[link.duplicate])
        return [
            sorted(own) for _, own in sorted(members.items()) if not (len(own) == 1 and own[0] in dropped)
        ]  # fmt: skip

    def _compatible(self, one: Sequence[int], other: Sequence[int]) -> bool:
        """Whether parts can belong to one object.

        Parts of one tile can only if its border truncates both, and they do not touch: they may be connected outside.
        """
        rows: dict[int, list[int]] = {}
        for number, row in map(self._place, one):
            rows.setdefault(number, []).append(row)
        for number, row in map(self._place, other):
            view = self._views[number]
            for before in rows.get(number, ()):
                if not bool(view.cut[row].any()) or not bool(view.cut[before].any()) or _touching(view, row, before):
                    return False
        return True

    def _joined(self, groups: Sequence[Sequence[int]]) -> PlacedObjects:
        """The objects that consist of these parts."""
        parts = [part for group in groups for part in group]
        places = [self._place(part) for part in parts]
        by_tile: dict[int, list[int]] = {}
        for position, (number, _) in enumerate(places):
            by_tile.setdefault(number, []).append(position)
        table = _Parts.create(
            [(self._views[n], [places[p][1] for p in positions], positions) for n, positions in by_tile.items()],
            len(parts),
            self.size,
        )
        at, chosen, boxes, masks, points = 0, list[int](), table.boxes.copy(), list[Runs](), list[int]()
        for group in groups:
            own = slice(at, at + len(group))
            best = at
            if len(group) > 1:
                best = at + int(table.scores[own].argmax())
                mask = table.combined(own, boxes, best)
            else:
                mask = None if table.masks is None else table.masks[at]
            if mask is not None:
                masks.append(mask)
            sides = table.boxes[own, 2:] - table.boxes[own, :2]
            points.append(at + int(sides.prod(1).argmax()))
            chosen.append(best)
            at += len(group)
        return PlacedObjects(
            self.size,
            boxes[chosen],
            table.labels[chosen],
            table.scores[chosen] if table.scored else None,
            None if table.keypoints is None else table.keypoints[points],
            masks if table.masks is not None else None,
            np.array([group[0] for group in groups], np.int64),
        )


@dataclass(frozen=True)
class _Parts:
    """Parts of objects in the image; the fields are those of `PlacedObjects`.

    Attributes:
        cut: (N,), whether a border of its tile truncates the part.
        scored: Whether the objects have scores.
    """

    boxes: npt.NDArray[np.float32]
    labels: Ints
    scores: npt.NDArray[np.float32]
    cut: npt.NDArray[np.bool_]
    masks: list[Runs] | None
    keypoints: npt.NDArray[np.float32] | None
    scored: bool

    @classmethod
    def create(cls, views: Sequence[tuple[View, list[int], list[int]]], count: int, size: tuple[int, int]) -> _Parts:
        """Collect parts from the views of tiles.

        Args:
            views: For each view the rows to take and where they go.
            count: Number of all parts.
            size: H, W of the image.
        """
        boxes, labels = np.zeros((count, 4), np.float32), np.zeros(count, np.int64)
        scores, cut = np.zeros(count, np.float32), np.zeros(count, bool)
        masks: list[Runs] = [(labels[:0], labels[:0])] * count
        keypoints: npt.NDArray[np.float32] | None = None
        with_masks = all(view.objects.masks is not None for view, _, _ in views)
        scored = all(view.objects.scores is not None for view, _, _ in views)
        for view, rows, to in views:
            objects, tile = view.objects[torch.tensor(rows)], view.tile
            boxes[to] = objects.boxes.float().numpy() + np.array([tile.x, tile.y] * 2, np.float32)
            labels[to] = objects.labels.numpy()
            cut[to] = view.cut[rows].any(1).numpy()
            if objects.scores is not None:
                scores[to] = objects.scores.float().numpy()
            if objects.masks is not None and with_masks:
                for position, own in zip(to, _placed(objects.masks, tile, size[0]), strict=True):
                    masks[position] = own
            if objects.keypoints is not None:
                values = objects.keypoints.float().numpy()
                if keypoints is None:
                    keypoints = np.zeros((count, *values.shape[1:]), np.float32)
                keypoints[to] = values + np.array([tile.x, tile.y, 0], np.float32)
        return cls(boxes, labels, scores, cut, masks if with_masks else None, keypoints, scored)

    def combined(self, own: slice, boxes: npt.NDArray[np.float32], best: int) -> Runs | None:
        """The mask of an object of several parts; its box is written to `boxes[best]`."""
        box = np.concatenate([self.boxes[own, :2].min(0), self.boxes[own, 2:].max(0)])
        boxes[best] = box
        if self.masks is None:
            return None
        parts = self.masks[own]
        mask = runs.union(np.concatenate([s for s, _ in parts]), np.concatenate([e for _, e in parts]))
        areas = np.array([int((e - s).sum()) for s, e in parts])
        whole = np.flatnonzero(~self.cut[own] & (areas >= WHOLE * int((mask[1] - mask[0]).sum())))
        if len(whole):
            chosen = int(whole[self.scores[own][whole].argmax()])
            mask = parts[chosen]
            boxes[best] = self.boxes[own.start + chosen]
        return mask


def join_tiles(found: Sequence[Instances], tiles: Sequence[Tile], size: tuple[int, int]) -> Instances:
    """Join the objects of tiles.

    Parts of an object are joined into the union of their masks, with the highest of their scores. If a tile shows the
    whole object, the mask and box from that tile are used. Keypoints are those of the largest part. Objects of
    different classes are never joined, and two objects that a tile shows side by side remain two.

    Args:
        found: The objects of each tile, on the tile's grid.
        tiles: The tiles. Neighbouring ones overlap or share an edge.
        size: Height and width of the image.

    Returns:
        The objects on the image's grid, best first.
    """
    if len(tiles) == 1:
        return found[0]
    joiner = Joiner(tiles, size)
    return collected((joiner.add(objects) for objects in found), size)


def collected(pieces: Iterable[PlacedObjects], size: tuple[int, int]) -> Instances:
    """Return all objects of an image that is given in pieces, at least one.

    Args:
        pieces: The pieces.
        size: H, W of the image.

    Returns:
        The objects on the image's grid, best first; equal ones in the order of their first parts.
    """
    kept: list[PlacedObjects] = []
    first: PlacedObjects | None = None
    for piece in pieces:
        first = first or piece
        if len(piece):
            kept.append(piece)
    assert first is not None
    if not kept:
        points = None if first.keypoints is None else first.keypoints.shape[1]
        return Instances.empty(size, masks=first.masks is not None, scores=first.scores is not None, keypoints=points)
    everything = Instances.join([piece.instances() for piece in kept])
    everything = everything[torch.from_numpy(np.argsort(np.concatenate([piece.order for piece in kept])))]
    if everything.scores is None:
        return everything
    return everything[torch.argsort(everything.scores, descending=True, stable=True)]


def _placed(masks: Masks, tile: Tile, height: int) -> list[Runs]:
    """The runs of masks of a tile in the image."""
    strings = [cast(bytes, code["counts"]) for code in masks.rle()]
    starts, ends, owner = runs.decoded(strings, tile.height)
    starts, ends = (runs.moved(v, tile.height, tile.x, tile.y, height) for v in (starts, ends))
    if not strings:
        return []
    cuts = np.searchsorted(owner, np.arange(1, len(strings)))
    return list(zip(np.split(starts, cuts), np.split(ends, cuts), strict=True))


def _rank(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    """The order in which links are applied: strongest first, then by tiles."""
    return entry[:-1]


def _touching(view: View, first: int, second: int) -> bool:
    """Whether two objects of a tile are at most two pixels apart."""
    a, b = view.boxes[first], view.boxes[second]
    if bool((a[:2] > b[2:] + 2).any()) or bool((b[:2] > a[2:] + 2).any()):
        return False
    masks = view.objects.masks
    if masks is None:
        return True
    low, high = torch.minimum(a[:2], b[:2]).int(), torch.maximum(a[2:], b[2:]).ceil().int()
    x, y, right, bottom = (int(v) for v in (*low, *high))
    window = Tile(x, y, right - x, bottom - y)
    planes = cropped(masks[[first, second]], Tile(0, 0, view.tile.width, view.tile.height), window).dense("cpu")
    return bool((torch.nn.functional.max_pool2d(planes[:1].float(), 5, 1, 2)[0].bool() & planes[1]).any())

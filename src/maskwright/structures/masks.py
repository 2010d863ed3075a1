"""N masks of one size in a compact form."""

# Tensor.tolist has no type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pycocotools import mask as coco
from torch import Tensor

from maskwright.errors import MaskCodeError, UsageError
from maskwright.structures import polygons as outlines
from maskwright.structures import rle
from maskwright.structures.indexing import Index, pick, selection
from maskwright.structures.placement import Placement

Kind = Literal["rle", "polygon", "dense"]
Fill = Literal["union", "even-odd"]


class Masks:
    """N masks of one size (H, W), with one interface for all representations.

    Masks are stored as COCO run-length strings ("rle"), polygons ("polygon") or bool planes ("dense"), which are used
    only where a computation needs them: 100 objects in a 4000 x 3000 image take about 1 MB as "rle" and 1,200 MB as
    "dense". Code that makes planes makes a few at a time and calls `pack`. "rle" and "polygon" are on the host; only
    "dense" has a device. Masks are immutable. They are made by `from_rle`, `from_polygons`, `from_dense`,
    `from_crops`, `empty` and `join`.

    Attributes:
        kind: The representation.
        size: H, W.
        fill: How rings of one polygon object are combined; see `from_polygons`.
    """

    __slots__ = ("_data", "fill", "kind", "size")

    def __init__(self, kind: Kind, data: Any, size: tuple[int, int], fill: Fill = "union"):
        """For internal use: `data` is a list of strings, a list of tuples of rings, or planes, unchecked."""
        self.kind: Kind = kind
        self.size = (int(size[0]), int(size[1]))
        self.fill: Fill = fill
        self._data = data

    # ---- construction -----------------------------------------------------------------------------------------------

    @classmethod
    def empty(cls, size: tuple[int, int]) -> Masks:
        """Return no masks, of size H, W."""
        return cls("rle", [], size)

    @classmethod
    def from_dense(cls, planes: Bool[Tensor, "n h w"] | Int[Tensor, "n h w"]) -> Masks:
        """Make masks of planes, which stay on their device; `pack` makes them compact.

        Args:
            planes: (N, H, W); non-zero values are foreground.

        Returns:
            The masks, of kind "dense". Bool planes are not copied.

        Raises:
            UsageError: If the planes do not have three axes.
        """
        if planes.ndim != 3:
            advice = "; remove the channel axis, for example by planes[:, 0]" if planes.ndim == 4 else ""
            raise UsageError(f"planes must have shape (N, H, W), got {tuple(planes.shape)}{advice}")
        return cls("dense", planes if planes.dtype == torch.bool else planes != 0, (planes.shape[1], planes.shape[2]))

    @classmethod
    def from_rle(cls, codes: Iterable[dict[str, Any] | bytes | str], size: tuple[int, int] | None = None) -> Masks:
        """Make masks of COCO run-length codes.

        Args:
            codes: Dictionaries `{"size": [H, W], "counts": ...}`, compressed or not, or compressed strings.
            size: H, W; None: that of the first dictionary.

        Returns:
            The masks, of kind "rle".

        Raises:
            MaskCodeError: If a code is invalid, has another size, or does not cover H * W pixels (the message gives its
                position); or if no size is known.
        """
        if isinstance(codes, (Mapping, str, bytes)):
            raise MaskCodeError(
                f"codes must be a list of run-length codes of masks, got a single {type(codes).__name__}"
            )
        strings: list[bytes] = []
        for number, code in enumerate(codes):
            counts: Any = code
            if isinstance(code, dict):
                own = _size_in(code, number)
                size = size or own
                if own != tuple(size):
                    raise MaskCodeError(f"mask {number} is {own[0]} x {own[1]}, expected {size[0]} x {size[1]}")
                counts = code.get("counts")
            if size is None:
                raise MaskCodeError("run-length strings without `size` need the argument `size`")
            try:
                if isinstance(counts, (bytes, str)):
                    text = counts.encode("ascii") if isinstance(counts, str) else counts
                    lengths = rle.decode_counts(text)
                else:
                    lengths = _run_lengths(counts)
                    text = None
                    if (lengths < 0).any():
                        raise ValueError("it contains a negative run")
            except (ValueError, TypeError, OverflowError) as error:
                raise MaskCodeError(f"mask {number} is not a valid run-length code: {error}") from None
            # Single runs are checked first, because the sum of very long ones could overflow to the right number.
            if lengths.max(initial=0) > size[0] * size[1] or lengths.sum() != size[0] * size[1]:
                raise MaskCodeError(
                    f"the runs of mask {number} cover {lengths.sum()} pixels, but its image has {size[0] * size[1]}"
                )
            strings.append(text if text is not None else rle.encode_counts(lengths))
        if size is None:
            raise MaskCodeError("without masks, the argument `size` is needed")
        return cls("rle", strings, size)

    @classmethod
    def from_polygons(cls, objects: Iterable[Sequence[Any]], size: tuple[int, int], fill: Fill = "union") -> Masks:
        """Make masks of polygons.

        Args:
            objects: For each object a list of rings; a ring is flat `x, y, x, y, ...` or (P, 2), in continuous
                coordinates.
            size: H, W.
            fill: "union", as in COCO: the rings are parts of the object, holes cannot be expressed. "even-odd": a
                ring inside another is a hole, as in the result of `polygons`.

        Returns:
            The masks, of kind "polygon".

        Raises:
            ValueError: If a ring has fewer than three points, or a coordinate is not finite (the rasterizer of
                pycocotools would crash).
        """
        return cls("polygon", [outlines.validated(rings, size) for rings in objects], size, fill)

    @classmethod
    def from_crops(
        cls, crops: Sequence[Bool[Tensor, "_h _w"] | rle.Bools], corners: Int[Tensor, "n 2"], size: tuple[int, int]
    ) -> Masks:
        """Make masks of small bool arrays, without making planes.

        Args:
            crops: (h, w) for each object.
            corners: (N, 2), x, y of the upper left corner of each crop in the image.
            size: H, W of the image; crops are clipped to it.

        Returns:
            The masks, of kind "rle".
        """
        places: list[list[int]] = corners.tolist()
        arrays = (c.cpu().numpy() if isinstance(c, Tensor) else c for c in crops)
        edges = [rle.edges(c, int(x), int(y), size) for c, (x, y) in zip(arrays, places, strict=True)]
        return cls("rle", rle.from_edges(edges, size[0] * size[1]), size)

    @classmethod
    def join(cls, parts: Sequence[Masks]) -> Masks:
        """Return all masks of several parts in order.

        Args:
            parts: At least one part, all of one size.

        Returns:
            The masks; of kind "rle" if the kinds differ.

        Raises:
            ValueError: If there are no parts, or their sizes differ.
        """
        if not parts:
            raise ValueError("there must be at least one part to join")
        if len({p.size for p in parts}) > 1:
            raise ValueError(f"masks of different sizes cannot be joined: {sorted({p.size for p in parts})}")
        parts = [p for p in parts if len(p)] or list(parts[:1])
        if len(parts) == 1:
            return parts[0]
        kinds = {(p.kind, p.fill) for p in parts}
        if len(kinds) > 1:
            parts = [p.pack() for p in parts]
        first = parts[0]
        if first.kind == "dense":
            return cls("dense", torch.cat([p._data for p in parts]), first.size)
        return cls(first.kind, [item for p in parts for item in p._data], first.size, first.fill)

    # ---- selection --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self._data)

    def __iter__(self) -> Iterator[Masks]:
        """Iterate over the masks, each as `Masks` of length 1."""
        return (self[i : i + 1] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Masks({len(self)} x {self.size[0]} x {self.size[1]}, {self.kind})"

    def __getitem__(self, index: Index) -> Masks:
        """Select masks as NumPy does: by position, slice, positions, bools or `...`. The result is always `Masks`.

        Raises:
            IndexError: If a position is out of range, the number of bools is wrong, or the index has another type.
        """
        chosen = selection(index, len(self))
        if self.kind == "dense":
            planes = self._data
            return Masks("dense", planes[chosen.to(planes.device) if isinstance(chosen, Tensor) else chosen], self.size)
        return Masks(self.kind, pick(self._data, chosen), self.size, self.fill)

    @property
    def device(self) -> torch.device:
        """The device of dense masks; the host for the others."""
        return self._data.device if self.kind == "dense" else torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes, without Python's overhead."""
        if self.kind == "dense":
            return self._data.nbytes
        if self.kind == "rle":
            return sum(len(text) for text in self._data)
        return sum(ring.nbytes for rings in self._data for ring in rings)

    # ---- conversion -------------------------------------------------------------------------------------------------

    def pack(self) -> Masks:
        """Return the masks as "rle", on the host."""
        return self if self.kind == "rle" else Masks("rle", self._strings(), self.size)

    def rle(self) -> list[dict[str, Any]]:
        """Return COCO's dictionaries `{"size": [H, W], "counts": bytes}`."""
        return [{"size": list(self.size), "counts": text} for text in self._strings()]

    def dense(self, device: torch.device | str | None = None) -> Bool[Tensor, "n h w"]:
        """Return bool planes, which take N * H * W bytes; for a few masks or small ones.

        Args:
            device: Device of the planes; None: where the masks are.
        """
        if self.kind != "dense":
            planes = torch.zeros(len(self), *self.size, dtype=torch.bool)
            for plane, ((x0, y0, x1, y1), crop) in zip(planes.numpy(), self._crops(), strict=True):
                plane[y0:y1, x0:x1] = crop
            return planes if device is None else planes.to(device)
        return self._data if device is None else self._data.to(device)

    def polygons(self) -> list[list[rle.Floats]]:
        """Return the outlines of each mask as rings (P, 2) of x, y.

        Polygons are returned unchanged. Other masks are traced exactly along pixel borders, including holes and
        separate parts: filled "even-odd", the rings give the same mask.
        """
        if self.kind == "polygon":
            return [list(rings) for rings in self._data]
        return [outlines.trace(crop, x0, y0) for (x0, y0, _, _), crop in self._crops()]

    def crops(self) -> tuple[Int[Tensor, "n 4"], list[Bool[Tensor, "_h _w"]]]:
        """Return the tightest pixel windows (N, 4), x0, y0, x1, y1 (exclusive), and the mask inside each.

        Empty masks have empty crops.
        """
        pairs = list(self._crops())
        frames = torch.tensor([frame for frame, _ in pairs], dtype=torch.int64).reshape(-1, 4)
        return frames, [torch.from_numpy(np.ascontiguousarray(crop)) for _, crop in pairs]

    # ---- measurement ------------------------------------------------------------------------------------------------

    def areas(self) -> Int[Tensor, " n"]:
        """Return the number of foreground pixels of each mask."""
        if self.kind == "dense":
            return self._data.sum((1, 2))
        starts, ends, owner = rle.runs_all(self._strings())
        areas = np.zeros(len(self), np.int64)
        np.add.at(areas, owner, ends - starts)
        return torch.from_numpy(areas)

    def boxes(self) -> Float[Tensor, "n 4"]:
        """Return the tightest boxes (N, 4), x0, y0, x1, y1; zeros for empty masks.

        Boxes of polygons are those of their points, clipped to the image.
        """
        if self.kind == "polygon":
            return torch.from_numpy(outlines.boxes(self._data, self.size)).float()
        if self.kind == "dense":
            return _dense_boxes(self._data)
        return torch.tensor(rle.frames(self._data, self.size[0]), dtype=torch.float32).reshape(-1, 4)

    def iou(self, others: Masks, crowd: Bool[Tensor, " m"] | None = None) -> Float[Tensor, "n m"]:
        """Return the intersection over union of each mask with each of `others`.

        Args:
            others: M masks of the same size.
            crowd: (M,), crowd regions, for which the intersection is divided by the area of this mask instead (COCO).

        Returns:
            (N, M), on the host.
        """
        if not len(self) or not len(others):
            return torch.zeros(len(self), len(others))
        flags: list[int] = [0] * len(others) if crowd is None else crowd.int().tolist()
        return torch.from_numpy(coco.iou(cast(Any, self.rle()), cast(Any, others.rle()), flags)).float()

    # ---- transformation ---------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Masks:
        """Move planes to `device`; compact masks stay on the host (`dense(device)` makes planes on a device)."""
        return Masks("dense", self._data.to(device), self.size) if self.kind == "dense" else self

    def place(self, placement: Placement) -> Masks:
        """Map masks from the image to the network's input.

        Args:
            placement: How the image is placed in the input.

        Returns:
            Masks of `placement.size`: exact for polygons, nearest-neighbor (of pixel centers) for the others.

        Raises:
            ValueError: If the placement is for images of another size.
        """
        if placement.image_size != self.size:
            raise ValueError(f"masks of size {self.size} do not fit a placement of images of {placement.image_size}")
        if self.kind == "polygon":
            objects = [tuple(outlines.place_ring(ring, placement) for ring in rings) for rings in self._data]
            return Masks("polygon", objects, placement.size, self.fill)
        edges = [_placed_edges(frame, crop, placement) for frame, crop in self._crops()]
        return Masks("rle", rle.from_edges(edges, placement.size[0] * placement.size[1]), placement.size)

    def turned(self, quarters: int) -> Masks:
        """Return the masks turned counterclockwise by a number of quarter turns; exact."""
        quarters %= 4
        height, width = self.size
        size = (width, height) if quarters % 2 else (height, width)
        if self.kind == "dense":
            return Masks("dense", torch.rot90(self._data, quarters, (1, 2)), size)
        if self.kind == "polygon":
            objects = [
                tuple(np.stack(turned(ring[:, 0], ring[:, 1], self.size, quarters), 1) for ring in rings)
                for rings in self._data
            ]
            return Masks("polygon", objects, size, self.fill)
        frames, crops = self.crops()
        corners: list[list[int]] = []
        for x0, y0, x1, y1 in cast(list[list[int]], frames.tolist()):
            (xa, ya), (xb, yb) = turned(x0, y0, self.size, quarters), turned(x1, y1, self.size, quarters)
            corners.append([min(xa, xb), min(ya, yb)])
        places = torch.tensor(corners, dtype=torch.int64).reshape(-1, 2)
        return Masks.from_crops([torch.rot90(crop, quarters, (0, 1)) for crop in crops], places, size)

    def resize(self, size: tuple[int, int]) -> Masks:
        """Return the masks resized to `size` (H, W)."""
        return self if size == self.size else self.place(Placement.resize(self.size, size))

    def union(self) -> Masks:
        """Return the union of all masks, as `Masks` of length 1."""
        merged = coco.merge(cast(Any, self.rle())) if len(self) else None
        return Masks(
            "rle", [merged["counts"]] if merged else [rle.from_crop(np.zeros((0, 0), bool), 0, 0, self.size)], self.size
        )

    # ---- internal ---------------------------------------------------------------------------------------------------

    def _strings(self) -> list[bytes]:
        """Run-length strings."""
        if self.kind == "rle":
            return self._data
        if self.kind == "polygon":
            return [outlines.fill(rings, self.size, self.fill) for rings in self._data]
        if self._data.device.type != "cpu":
            return _dense_strings(self._data)
        edges = [rle.edges(crop, frame[0], frame[1], self.size) for frame, crop in self._crops()]
        return rle.from_edges(edges, self.size[0] * self.size[1])

    def _crops(self) -> Iterator[tuple[rle.Frame, rle.Bools]]:
        """The tightest pixel window of each mask and the mask inside it."""
        if self.kind == "dense":
            planes = self._data.cpu()
            frames: list[list[int]] = _dense_boxes(planes).long().tolist()
            for plane, (x0, y0, x1, y1) in zip(planes, frames, strict=True):
                yield (x0, y0, x1, y1), plane[y0:y1, x0:x1].numpy()
        else:
            yield from rle.to_crops(self._strings(), self.size[0])


def turned(x: Any, y: Any, size: tuple[int, int], quarters: int) -> tuple[Any, Any]:
    """Return points of an image of `size` (H, W) after counterclockwise quarter turns of it, 0 to 3."""
    height, width = size
    return [(x, y), (y, width - x), (width - x, height - y), (height - y, x)][quarters]


def _dense_boxes(planes: Tensor) -> Tensor:
    def extent(hits: Tensor) -> tuple[Tensor, Tensor]:
        """(n, length) -> first and last + 1 hit."""
        length = hits.shape[1]
        steps = torch.arange(length, device=hits.device)
        first = torch.where(hits, steps, length).amin(1)
        return torch.where(hits.any(1), first, 0), torch.where(hits, steps + 1, 0).amax(1)

    if not planes.numel():
        return torch.zeros(len(planes), 4, device=planes.device)
    values = planes.view(torch.uint8)  # `any` of bool planes takes ten times as long on the CPU
    x0, x1 = extent(values.amax(1).bool())
    y0, y1 = extent(values.amax(2).bool())
    return torch.stack([x0, y0, x1, y1], 1).float()


def _dense_strings(planes: Tensor) -> list[bytes]:
    """Run-length strings of planes on an accelerator; only the positions of changes are copied to the host."""
    count, height, width = planes.shape
    if not count:
        return []
    lines = planes.transpose(1, 2).reshape(count, -1)
    edge = lines.new_zeros(count, 1)
    changes = torch.cat([edge, lines], 1) != torch.cat([lines, edge], 1)
    owner, position = changes.nonzero().cpu().numpy().T
    cuts = np.searchsorted(owner, np.arange(1, count))
    return rle.from_edges(np.split(position, cuts), height * width)


def _placed_edges(frame: rle.Frame, crop: rle.Bools, placement: Placement) -> rle.Ints:
    """Starts and ends of the runs of a mask on the network's input, in column order."""
    (height, width), (scale_x, scale_y), (offset_x, offset_y) = placement.size, placement.scale, placement.offset
    x0, y0, x1, y1 = frame
    if placement.mirrored:
        x0, x1, crop = placement.image_size[1] - x1, placement.image_size[1] - x0, crop[:, ::-1]

    def source(low: int, high: int, scale: float, offset: float, limit: int) -> tuple[int, rle.Ints]:
        """First output position on one axis, and the input position of it and those that follow."""
        first = max(0, int(np.floor(low * scale + offset)))
        last = min(limit, int(np.ceil(high * scale + offset)))
        at = np.floor((np.arange(first, max(first, last)) + 0.5 - offset) / scale + 1e-9).astype(np.int64)
        inside = (at >= low) & (at < high)
        first += int(inside.argmax()) if inside.any() else 0
        return first, at[inside] - low

    left, columns = source(x0, x1, scale_x, offset_x, width)
    top, rows = source(y0, y1, scale_y, offset_y, height)
    return rle.edges(crop[rows][:, columns], left, top, (height, width))


def _size_in(code: dict[str, Any], number: int) -> tuple[int, int]:
    """The size in a run-length code; MaskCodeError unless it is a height and a width."""
    sides: Any = code.get("size")
    if isinstance(sides, (list, tuple, np.ndarray)) and len(sides) == 2 and all(map(_is_length, sides)):
        return int(sides[0]), int(sides[1])
    raise MaskCodeError(f"mask {number} has the size {repr(sides)[:60]}, expected [height, width]")


def _run_lengths(counts: Any) -> Any:
    """Uncompressed runs as int64; ValueError unless they are a list of integers."""
    runs = np.asarray(counts)
    whole = runs.dtype.kind in "iu" or (runs.dtype.kind == "f" and bool((runs == np.floor(runs)).all()))
    if runs.ndim != 1 or (len(runs) and not whole) or (runs.dtype.kind == "f" and not (np.abs(runs) < 1 << 53).all()):
        raise ValueError(f"its runs must be a list of integers, got {repr(counts)[:60]}")
    return runs.astype(np.int64)


def _is_length(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    return bool(0 <= value < 1 << 31) and int(value) == value

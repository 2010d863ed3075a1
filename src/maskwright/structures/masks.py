"""N masks of one size, held compactly: the most important type of the library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pycocotools import mask as coco
from torch import Tensor

from maskwright.structures import polygons as outlines
from maskwright.structures import rle
from maskwright.structures.placement import Placement

Kind = Literal["rle", "polygon", "dense"]
Fill = Literal["union", "even-odd"]


class Masks:
    """N masks of one size (H, W) behind one face, whatever they are made of.

    Held as COCO run-length strings ("rle"), polygons ("polygon") or, only where a computation needs it, bool planes
    ("dense"). 100 objects on a 4000 x 3000 image are about 1 MB as "rle" and 1,200 MB as "dense": whoever makes
    planes makes few at a time and calls `pack`. "rle" and "polygon" live on the host; only "dense" has a device.

    Indexing selects (int, slice, index or bool tensor). Nothing changes in place.
    """

    __slots__ = ("_data", "fill", "kind", "size")

    def __init__(self, kind: Kind, data: Any, size: tuple[int, int], fill: Fill = "union"):
        """Not for callers: use `from_rle`, `from_polygons`, `from_dense`, `from_crops`, `empty` or `join`."""
        self.kind: Kind = kind
        self.size = (int(size[0]), int(size[1]))
        self.fill: Fill = fill
        self._data = data

    # ---- making --------------------------------------------------------------------------------------------------

    @classmethod
    def empty(cls, size: tuple[int, int]) -> Masks:
        return cls("rle", [], size)

    @classmethod
    def from_dense(cls, planes: Bool[Tensor, "n h w"] | Int[Tensor, "n h w"]) -> Masks:
        """Planes as they are, on their device; anything non-zero is foreground. `pack` makes them small."""
        return cls("dense", planes if planes.dtype == torch.bool else planes != 0, (planes.shape[1], planes.shape[2]))

    @classmethod
    def from_rle(cls, codes: Iterable[dict[str, Any] | bytes | str], size: tuple[int, int] | None = None) -> Masks:
        """COCO RLE: dictionaries `{"size": [H, W], "counts": ...}` of either kind, or bare compressed strings.

        ValueError names the first entry (by position) that is garbled, of another size, or does not fill H * W.
        """
        strings: list[bytes] = []
        for number, code in enumerate(codes):
            counts: Any = code
            if isinstance(code, dict):
                own = (int(code["size"][0]), int(code["size"][1]))
                size = size or own
                if own != tuple(size):
                    raise ValueError(f"mask {number} is {own[0]} x {own[1]}, expected {size[0]} x {size[1]}")
                counts = code["counts"]
            if size is None:
                raise ValueError("bare run-length strings need a size")
            try:
                if isinstance(counts, (bytes, str)):
                    text = counts.encode("ascii") if isinstance(counts, str) else counts
                    lengths = rle.decode_counts(text)
                else:
                    lengths = np.asarray(counts, np.int64)
                    text = None
                    if (lengths < 0).any():
                        raise ValueError("it holds a negative run")
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"mask {number} is not a run-length code: {error}") from None
            # A single run beyond the image first: a sum of such could wrap round to the right number.
            if lengths.max(initial=0) > size[0] * size[1] or lengths.sum() != size[0] * size[1]:
                raise ValueError(
                    f"the runs of mask {number} cover {lengths.sum()} pixels, its image has {size[0] * size[1]}"
                )
            strings.append(text if text is not None else rle.encode_counts(lengths))
        if size is None:
            raise ValueError("no masks and no size given")
        return cls("rle", strings, size)

    @classmethod
    def from_polygons(cls, objects: Iterable[Sequence[Any]], size: tuple[int, int], fill: Fill = "union") -> Masks:
        """Each object is a list of rings; a ring is flat `x, y, x, y, ...` or (P, 2), in continuous coordinates.

        `fill="union"` is COCO's reading (rings are parts, a hole cannot be said); `"even-odd"` lets a ring inside
        another cut a hole, which is what `polygons()` returns. ValueError for rings of fewer than three points or
        with coordinates that are not finite (the common rasteriser dies on those).
        """
        return cls("polygon", [outlines.checked(rings, size) for rings in objects], size, fill)

    @classmethod
    def from_crops(
        cls, crops: Sequence[Bool[Tensor, "_h _w"] | np.ndarray], corners: Int[Tensor, "n 2"], size: tuple[int, int]
    ) -> Masks:
        """Small bool masks, each with its upper left corner at `corners` (x, y), on planes of `size`, never made.

        What reaches beyond the plane is cut off.
        """
        places = corners.tolist()
        arrays = (c.cpu().numpy() if isinstance(c, Tensor) else c for c in crops)
        edges = [rle.edges(c, int(x), int(y), size) for c, (x, y) in zip(arrays, places, strict=True)]
        return cls("rle", rle.from_edges(edges, size[0] * size[1]), size)

    @classmethod
    def join(cls, parts: Sequence[Masks]) -> Masks:
        """All masks of `parts` in order; they are of one size. Mixed kinds become "rle"."""
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

    # ---- looking -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Masks]:
        return (self[i : i + 1] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Masks({len(self)} x {self.size[0]} x {self.size[1]}, {self.kind})"

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Masks:
        if isinstance(index, int):
            index = [range(len(self))[index]]
        if self.kind == "dense":
            planes = self._data
            return Masks("dense", planes[index.to(planes.device) if isinstance(index, Tensor) else index], self.size)
        if isinstance(index, slice):
            return Masks(self.kind, self._data[index], self.size, self.fill)
        chosen = torch.as_tensor(index)
        if chosen.dtype == torch.bool:
            if len(chosen) != len(self):
                raise IndexError(f"{len(chosen)} flags cannot select among {len(self)} masks")
            chosen = chosen.nonzero().flatten()
        return Masks(self.kind, [self._data[i] for i in chosen.tolist()], self.size, self.fill)

    @property
    def device(self) -> torch.device:
        return self._data.device if self.kind == "dense" else torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Bytes held, without Python's own overhead."""
        if self.kind == "dense":
            return self._data.nbytes
        if self.kind == "rle":
            return sum(map(len, self._data))
        return sum(ring.nbytes for rings in self._data for ring in rings)

    # ---- the three forms -----------------------------------------------------------------------------------------

    def pack(self) -> Masks:
        """The same masks as "rle", on the host."""
        return self if self.kind == "rle" else Masks("rle", self._strings(), self.size)

    def rle(self) -> list[dict[str, Any]]:
        """COCO's dictionaries `{"size": [H, W], "counts": bytes}`."""
        return [{"size": list(self.size), "counts": text} for text in self._strings()]

    def dense(self, device: torch.device | str | None = None) -> Bool[Tensor, "n h w"]:
        """Bool planes: N * H * W bytes. For a few masks, or small ones."""
        if self.kind != "dense":
            planes = torch.zeros(len(self), *self.size, dtype=torch.bool)
            for plane, ((x0, y0, x1, y1), crop) in zip(planes.numpy(), self._crops(), strict=True):
                plane[y0:y1, x0:x1] = crop
            return planes if device is None else planes.to(device)
        return self._data if device is None else self._data.to(device)

    def polygons(self) -> list[list[np.ndarray]]:
        """Outlines as rings (P, 2) of x, y. Polygon masks give their own rings; others are traced along the borders
        of their pixels, exactly: filled "even-odd" they give the same mask, holes and parts included."""
        if self.kind == "polygon":
            return [list(rings) for rings in self._data]
        return [outlines.trace(crop, x0, y0) for (x0, y0, _, _), crop in self._crops()]

    def crops(self) -> tuple[Int[Tensor, "n 4"], list[Bool[Tensor, "_h _w"]]]:
        """The tightest frames x0, y0, x1, y1 (exclusive) and the mask inside each; empty masks have empty crops."""
        pairs = list(self._crops())
        frames = torch.tensor([frame for frame, _ in pairs], dtype=torch.int64).reshape(-1, 4)
        return frames, [torch.from_numpy(np.ascontiguousarray(crop)) for _, crop in pairs]

    # ---- measuring -----------------------------------------------------------------------------------------------

    def areas(self) -> Int[Tensor, " n"]:
        """Foreground pixels of each mask."""
        if self.kind == "dense":
            return self._data.sum((1, 2))
        starts, ends, owner = rle.runs_all(self._strings())
        areas = np.zeros(len(self), np.int64)
        np.add.at(areas, owner, ends - starts)
        return torch.from_numpy(areas)

    def boxes(self) -> Float[Tensor, "n 4"]:
        """The tightest boxes x0, y0, x1, y1; zeros for empty masks. Polygons: of their points inside the image."""
        if self.kind == "polygon":
            return torch.from_numpy(outlines.boxes(self._data, self.size)).float()
        if self.kind == "dense":
            return _dense_boxes(self._data)
        return torch.tensor(rle.frames(self._data, self.size[0]), dtype=torch.float32).reshape(-1, 4)

    def iou(self, others: Masks, crowd: Bool[Tensor, " m"] | None = None) -> Float[Tensor, "n m"]:
        """Overlap of each mask with each of `others`; where `crowd`, over this mask's own area (COCO's rule)."""
        if not len(self) or not len(others):
            return torch.zeros(len(self), len(others))
        flags = [0] * len(others) if crowd is None else crowd.int().tolist()
        return torch.from_numpy(coco.iou(cast(Any, self.rle()), cast(Any, others.rle()), flags)).float()

    # ---- moving --------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Masks:
        """Planes move; compact forms stay on the host (`dense(device)` puts planes where they are needed)."""
        return Masks("dense", self._data.to(device), self.size) if self.kind == "dense" else self

    def place(self, placement: Placement) -> Masks:
        """The same masks on the network's input of `placement.size`: exactly for polygons, at the nearest pixel
        (by pixel centres, without bias) for the others."""
        if placement.image_size != self.size:
            raise ValueError(f"a placement of a {placement.image_size} image cannot lay masks of {self.size}")
        if self.kind == "polygon":
            objects = [tuple(outlines.placed(ring, placement) for ring in rings) for rings in self._data]
            return Masks("polygon", objects, placement.size, self.fill)
        edges = [_placed_edges(frame, crop, placement) for frame, crop in self._crops()]
        return Masks("rle", rle.from_edges(edges, placement.size[0] * placement.size[1]), placement.size)

    def resize(self, size: tuple[int, int]) -> Masks:
        """The same masks on a grid of `size` (H, W)."""
        return self if size == self.size else self.place(Placement.resize(self.size, size))

    def union(self) -> Masks:
        """One mask: all of them together."""
        merged = coco.merge(cast(Any, self.rle())) if len(self) else None
        return Masks(
            "rle", [merged["counts"]] if merged else [rle.from_crop(np.zeros((0, 0), bool), 0, 0, self.size)], self.size
        )

    # ---- inside --------------------------------------------------------------------------------------------------

    def _strings(self) -> list[bytes]:
        if self.kind == "rle":
            return self._data
        if self.kind == "polygon":
            return [outlines.fill(rings, self.size, self.fill) for rings in self._data]
        if self._data.device.type != "cpu":
            return _dense_strings(self._data)
        edges = [rle.edges(crop, frame[0], frame[1], self.size) for frame, crop in self._crops()]
        return rle.from_edges(edges, self.size[0] * self.size[1])

    def _crops(self) -> Iterator[tuple[rle.Frame, np.ndarray]]:
        if self.kind == "dense":
            planes = self._data.cpu()
            frames = _dense_boxes(planes).long().tolist()
            for plane, (x0, y0, x1, y1) in zip(planes, frames, strict=True):
                yield (x0, y0, x1, y1), plane[y0:y1, x0:x1].numpy()
        else:
            yield from rle.to_crops(self._strings(), self.size[0])


def _dense_boxes(planes: Tensor) -> Tensor:
    def extent(hits: Tensor) -> tuple[Tensor, Tensor]:  # (n, length) -> first, last + 1
        length = hits.shape[1]
        steps = torch.arange(length, device=hits.device)
        first = torch.where(hits, steps, length).amin(1)
        return torch.where(hits.any(1), first, 0), torch.where(hits, steps + 1, 0).amax(1)

    if not planes.numel():
        return torch.zeros(len(planes), 4, device=planes.device)
    x0, x1 = extent(planes.any(1))
    y0, y1 = extent(planes.any(2))
    return torch.stack([x0, y0, x1, y1], 1).float()


def _dense_strings(planes: Tensor) -> list[bytes]:
    """Strings of planes on an accelerator: only where the mask changes crosses to the host."""
    count, height, width = planes.shape
    if not count:
        return []
    lines = planes.transpose(1, 2).reshape(count, -1)
    edge = lines.new_zeros(count, 1)
    changes = torch.cat([edge, lines], 1) != torch.cat([lines, edge], 1)
    owner, position = changes.nonzero().cpu().numpy().T
    cuts = np.searchsorted(owner, np.arange(1, count))
    return rle.from_edges(np.split(position, cuts), height * width)


def _placed_edges(frame: rle.Frame, crop: np.ndarray, placement: Placement) -> np.ndarray:
    """Where the runs of a mask begin and end, in column order, on the network's input."""
    (height, width), (scale_x, scale_y), (offset_x, offset_y) = placement.size, placement.scale, placement.offset
    x0, y0, x1, y1 = frame
    if placement.mirrored:
        x0, x1, crop = placement.image_size[1] - x1, placement.image_size[1] - x0, crop[:, ::-1]

    def source(low: int, high: int, scale: float, offset: float, limit: int) -> tuple[int, np.ndarray]:
        first = max(0, int(np.floor(low * scale + offset)))
        last = min(limit, int(np.ceil(high * scale + offset)))
        at = np.floor((np.arange(first, max(first, last)) + 0.5 - offset) / scale + 1e-9).astype(np.int64)
        inside = (at >= low) & (at < high)
        first += int(inside.argmax()) if inside.any() else 0
        return first, at[inside] - low

    left, columns = source(x0, x1, scale_x, offset_x, width)
    top, rows = source(y0, y1, scale_y, offset_y, height)
    return rle.edges(crop[rows][:, columns], left, top, (height, width))

"""Targets of mask heads: the mask of an object cropped to a box and resized to P x P, and related label maps."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.ops.interpolation import weights
from maskwright.ops.pooling import roi_align
from maskwright.structures import Masks

Rule = Literal["binary", "bitmap", "soft", "maskrcnn-benchmark"]


def mask_targets(
    masks: Masks, owners: Int[Tensor, " r"], boxes: Float[Tensor, "r 4"], side: int, *, rule: Rule = "binary"
) -> Float[Tensor, "r side side"]:
    """Crops masks to boxes and resizes them to side x side.

    Args:
        masks: Masks of the objects.
        owners: Index of the mask that each box is cropped from.
        boxes: Boxes in the frame of the masks.
        side: Side of the grid.
        rule: "binary" (detectron2): polygons are rasterised on the small grid itself; other masks are cropped with
            aligned RoIAlign and thresholded at 0.5. "bitmap" (MMDetection): all are cropped like that. "soft"
            (torchvision): RoIAlign that is not aligned, of the raster
            mask, with values between 0 and 1. "maskrcnn-benchmark": as "binary", with boxes of at least one pixel.

    Returns:
        One grid per box, on the device of the boxes.
    """
    if not len(boxes):
        return boxes.new_zeros(0, side, side)
    if masks.kind == "polygon" and rule not in ("soft", "bitmap"):
        least = 0.1 if rule == "binary" else 1.0
        return _rasterised(masks, owners.cpu(), boxes.cpu(), side, least).to(boxes.device)
    result = boxes.new_zeros(len(boxes), side, side)
    chosen, group = owners.unique(return_inverse=True)
    frames, crops = masks[chosen.cpu()].crops()
    for number, (frame, crop) in enumerate(zip(frames.tolist(), crops, strict=True)):
        rows = (group == number).nonzero().flatten()
        plane, corner = _with_margin(crop, frame, masks.size)
        shift = boxes.new_tensor([0.0, corner[0], corner[1], corner[0], corner[1]])
        rois = torch.cat([boxes.new_zeros(len(rows), 1), boxes[rows]], 1) - shift
        values = roi_align(plane.to(boxes)[None, None], rois, side, aligned=rule != "soft")
        result[rows] = values[:, 0]
    return result if rule == "soft" else (result >= 0.5).to(result)


def plane_targets(masks: Masks, grid: tuple[int, int], size: tuple[int, int]) -> Float[Tensor, "n h w"]:
    """Resizes whole masks to a coarse grid, on the CPU.

    Bilinear, by pixel centres and without anti-aliasing: a cell reads the four pixels around its centre.

    Args:
        masks: Masks, which may be smaller than the input; beyond them is background.
        grid: Height and width of the grid, which covers the input.
        size: Height and width of the network's input.
    """
    down, across = (
        ((torch.arange(cells) + 0.5) * (length / cells) - 0.5).clamp(0, length - 1)
        for cells, length in zip(grid, size, strict=True)
    )
    frames, crops = masks.crops()
    planes = torch.zeros(len(masks), *grid)
    for plane, (left, top, _, _), crop in zip(planes, frames.tolist(), crops, strict=True):
        rows, columns = weights(down - top, crop.shape[0]), weights(across - left, crop.shape[1])
        torch.matmul(rows @ crop.float(), columns.T, out=plane)
    return planes


def _with_margin(crop: Tensor, frame: list[int], size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The crop and its corner with three empty cells around it, except at the border of the image, to which sampling
    clamps."""
    x0, y0, x1, y1 = frame
    left, top, right, bottom = min(3, x0), min(3, y0), min(3, size[1] - x1), min(3, size[0] - y1)
    return torch.nn.functional.pad(crop.float(), (left, right, top, bottom)), (x0 - left, y0 - top)


def _rasterised(masks: Masks, owners: Tensor, boxes: Tensor, side: int, least: float) -> Tensor:
    outlines = masks.polygons()
    # The scale is rounded to float32 before it is multiplied, as in detectron2 under NumPy 2: for a polygon through the
    # middle of cells (in a box as high as the image, for example) that rounding decides which cells are covered.
    corners, sides = boxes[:, :2].double().numpy(), (boxes[:, 2:] - boxes[:, :2]).float().numpy()
    scales = (np.float32(side) / np.maximum(sides, np.float32(least))).astype("float64")
    cut = [
        [(ring - corner) * scale for ring in outlines[owner]]
        for owner, corner, scale in zip(owners.tolist(), corners, scales, strict=True)
    ]
    return Masks.from_polygons(cut, (side, side), masks.fill).dense().float()


def share_inside(
    masks: Masks, owners: Int[Tensor, " r"], boxes: Float[Tensor, "r 4"], *, last: float = 0.0,
    whole_area: Literal["raster", "outline", "pixels"] = "raster",
) -> Float[Tensor, " r"]:  # fmt: skip
    """The share of an object that lies inside a box (Mask Scoring R-CNN, arXiv 1903.00241, its published code).

    Polygons are rasterised on canvases of whole pixels that begin at the corner of the box and at the corner of the
    hull of box and object; the areas of an object's parts are added. Other masks are counted in pixels.

    Args:
        masks: Masks of the objects.
        owners: The object of each box.
        boxes: Boxes in the frame of the masks.
        last: What x1 and y1 of a box are less than its extent: 1 if they are its last pixel.
        whole_area: Area of a whole polygon: that of its raster, or that inside of its outline (CenterMask2). "pixels":
            polygons are counted in pixels too, between the corners of the box rounded down (MMDetection).

    Returns:
        One share per box; 1 for an object without area.
    """
    height, width = masks.size
    result = torch.ones(len(boxes))
    outlines = masks.polygons() if masks.kind == "polygon" and whole_area != "pixels" else None
    frames, crops = (None, None) if outlines is not None else masks.crops()
    for number, (owner, box) in enumerate(zip(owners.tolist(), boxes.cpu().double().numpy(), strict=True)):
        if outlines is None:
            assert frames is not None
            assert crops is not None
            x0, y0, _, _ = (int(v) for v in frames[owner])
            left, top, right, bottom = (int(v) for v in (*np.floor(box[:2]), *np.ceil(box[2:] + last)))
            if whole_area == "pixels":
                right, bottom = max(left + 1, int(box[2])), max(top + 1, int(box[3]))
            inside = crops[owner][max(0, top - y0) : max(0, bottom - y0), max(0, left - x0) : max(0, right - x0)]
            part, whole = float(inside.sum()), float(crops[owner].sum())
        else:
            rings = outlines[owner]
            points = np.concatenate(rings).astype("float32")
            low = np.maximum(np.minimum(np.trunc(box[:2]), points.min(0)), 0)
            high = np.minimum(np.maximum(np.trunc(box[2:]) + 1, points.max(0)), [width - 1, height - 1])
            part, whole = _area(rings, box[:2], box[2:]), _area(rings, low, high)
            if whole_area == "outline":
                whole = sum(float(abs(_shoelace(ring))) for ring in rings)
        if whole > 0:
            share = part / whole
            result[number] = min(1.0, share) if whole_area == "outline" else share
    return result.to(boxes.device)


def _shoelace(ring: np.ndarray) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return 0.5 * float(x @ np.roll(y, 1) - y @ np.roll(x, 1))


def _area(rings: list[np.ndarray], low: np.ndarray, high: np.ndarray) -> float:
    """The sum of the areas of rings, rasterised on a canvas from `low` to `high`."""
    width, height = (int(side) for side in high - low)
    if width < 1 or height < 1:
        return 0.0
    return float(Masks.from_polygons([[ring - low] for ring in rings], (height, width)).areas().sum())


def label_target(
    masks: Masks, labels: Int[Tensor, " n"], *, background: int, crowd: Bool[Tensor, " n"] | None = None, void: int = -1
) -> Int[Tensor, "h w"]:
    """Paints masks into a label map, on the CPU. Where masks overlap, the smaller one is on top.

    Args:
        masks: Masks of the objects.
        labels: Label of each object.
        background: Label of pixels that no mask covers.
        crowd: Objects that are crowd regions; they are painted as `void`, below all others.
        void: Label of pixels without a label.
    """
    plane = np.full(masks.size, background, np.int64)
    areas = masks.areas().cpu().double()
    if crowd is not None:
        areas = areas + crowd.cpu() * (1.0 + areas.max() if len(areas) else 1.0)
        labels = labels.masked_fill(crowd.to(labels.device), void)
    order = areas.argsort(descending=True, stable=True)
    frames, crops = masks[order].crops()
    for (x0, y0, x1, y1), crop, label in zip(frames.tolist(), crops, labels.cpu()[order].tolist(), strict=True):
        plane[y0:y1, x0:x1][crop.numpy()] = label
    return torch.from_numpy(plane)


def seen_at(
    masks: Masks | None, places: Float[Tensor, "n 2"], grid: tuple[int, int], cell: int, budget: int = 64 << 20
) -> tuple[Bool[Tensor, "n g"], Bool[Tensor, "g h w"]]:
    """Whether points are on masks, and the masks downsampled to a grid.

    Args:
        masks: Masks of the objects.
        places: x and y of points in pixels.
        grid: Height and width of the grid.
        cell: Side of a cell in pixels, an even number. A cell is covered if one of the four pixels in its middle is:
            repeated bilinear halving reads these.
        budget: Scratch memory in bytes.

    Returns:
        For each point and each object whether the point is on the mask; for each object the covered cells.
    """
    if masks is None or not len(masks):
        return places.new_zeros(len(places), 0, dtype=torch.bool), places.new_zeros(0, *grid, dtype=torch.bool)
    height, width = masks.size
    below, right = cell * grid[0] - height, cell * grid[1] - width
    x, y = places.long().unbind(1)
    middle = slice(cell // 2 - 1, cell // 2 + 1)
    on_mask, cells, step = [], [], max(1, budget // (2 * cell * cell * grid[0] * grid[1]))
    for start in range(0, len(masks), step):
        planes = masks[start : start + step].dense(places.device)
        planes = functional.pad(planes, (0, right, 0, below))  # the extent of the grid
        seen = (y < planes.shape[1]) & (x < planes.shape[2])  # the last points of a coarse level are outside
        chosen = planes[:, y.clamp(max=planes.shape[1] - 1), x.clamp(max=planes.shape[2] - 1)]
        on_mask.append((chosen & seen).T)
        inner = planes.unflatten(2, (-1, cell)).unflatten(1, (-1, cell))[:, :, middle, :, middle]
        cells.append(inner.any(4).any(2))
    return torch.cat(on_mask, 1), torch.cat(cells)

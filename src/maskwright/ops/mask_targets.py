"""What a mask head shall predict inside a box: the object's mask cut out and brought to P x P."""

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

Rule = Literal["binary", "soft"]


def mask_targets(
    masks: Masks, owners: Int[Tensor, " r"], boxes: Float[Tensor, "r 4"], side: int, *, rule: Rule = "binary"
) -> Float[Tensor, "r side side"]:
    """For each of R boxes (in the masks' frame) the mask `owners[r]` inside it, on side x side, on the boxes' device.

    "binary" (detectron2): polygons are rasterised on the small grid itself; other masks are read with aligned RoIAlign
    and thresholded at >= 0.5. "soft" (torchvision): un-aligned RoIAlign of the raster mask, values between 0 and 1.
    """
    if not len(boxes):
        return boxes.new_zeros(0, side, side)
    if masks.kind == "polygon" and rule == "binary":
        return _rasterised(masks, owners.cpu(), boxes.cpu(), side).to(boxes.device)
    result = boxes.new_zeros(len(boxes), side, side)
    chosen, group = owners.unique(return_inverse=True)
    frames, crops = masks[chosen.cpu()].crops()
    for number, (frame, crop) in enumerate(zip(frames.tolist(), crops, strict=True)):
        rows = (group == number).nonzero().flatten()
        plane, corner = _with_margin(crop, frame, masks.size)
        shift = boxes.new_tensor([0.0, corner[0], corner[1], corner[0], corner[1]])
        rois = torch.cat([boxes.new_zeros(len(rows), 1), boxes[rows]], 1) - shift
        values = roi_align(plane.to(boxes)[None, None], rois, side, aligned=rule == "binary")
        result[rows] = values[:, 0]
    return (result >= 0.5).to(result) if rule == "binary" else result


def plane_targets(masks: Masks, grid: tuple[int, int], size: tuple[int, int]) -> Float[Tensor, "n h w"]:
    """Whole masks on a coarse `grid` (h, w) that covers the network's input of `size` (H, W), on the host.

    Bilinear, by pixel centres and without anti-aliasing: a cell reads the four pixels around its centre. Masks may end
    before the input does; beyond them lies background.
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
    """The crop with three empty cells around it, except where the image ends: there sampling clamps to the border,
    and must find it."""
    x0, y0, x1, y1 = frame
    left, top, right, bottom = min(3, x0), min(3, y0), min(3, size[1] - x1), min(3, size[0] - y1)
    return torch.nn.functional.pad(crop.float(), (left, right, top, bottom)), (x0 - left, y0 - top)


def _rasterised(masks: Masks, owners: Tensor, boxes: Tensor, side: int) -> Tensor:
    outlines = masks.polygons()
    # The scale is rounded to float32 before it meets the points, as in detectron2 under NumPy 2: a ring that passes
    # through the middle of cells (a box as high as the image, say) falls to one side or the other by that rounding.
    corners, sides = boxes[:, :2].double().numpy(), (boxes[:, 2:] - boxes[:, :2]).float().numpy()
    scales = (np.float32(side) / np.maximum(sides, np.float32(0.1))).astype("float64")
    cut = [
        [(ring - corner) * scale for ring in outlines[owner]]
        for owner, corner, scale in zip(owners.tolist(), corners, scales, strict=True)
    ]
    return Masks.from_polygons(cut, (side, side), masks.fill).dense().float()


def label_target(
    masks: Masks, labels: Int[Tensor, " n"], *, nothing: int, crowd: Bool[Tensor, " n"] | None = None, void: int = -1
) -> Int[Tensor, "h w"]:
    """The label of each pixel, on the host: `nothing` where no mask is. Where masks overlap the smaller one lies on
    top; crowd regions are `void`, below all others."""
    plane = np.full(masks.size, nothing, np.int64)
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
    """Whether each place (x, y in pixels) lies on each object's mask; and the masks on `grid` cells of `cell` pixels a
    side, an even number: a cell counts if one of the four pixels in its middle does, for that is where halving it again
    and again bilinearly reads. `budget` bytes of planes."""
    if masks is None or not len(masks):
        return places.new_zeros(len(places), 0, dtype=torch.bool), places.new_zeros(0, *grid, dtype=torch.bool)
    height, width = masks.size
    below, right = cell * grid[0] - height, cell * grid[1] - width
    x, y = places.long().unbind(1)
    middle = slice(cell // 2 - 1, cell // 2 + 1)
    on_mask, cells, step = [], [], max(1, budget // (2 * cell * cell * grid[0] * grid[1]))
    for start in range(0, len(masks), step):
        planes = masks[start : start + step].dense(places.device)
        planes = functional.pad(planes, (0, right, 0, below))  # as large as the finest level reaches
        seen = (y < planes.shape[1]) & (x < planes.shape[2])  # a coarse level's last places lie beyond
        chosen = planes[:, y.clamp(max=planes.shape[1] - 1), x.clamp(max=planes.shape[2] - 1)]
        on_mask.append((chosen & seen).T)
        inner = planes.unflatten(2, (-1, cell)).unflatten(1, (-1, cell))[:, :, middle, :, middle]
        cells.append(inner.any(4).any(2))
    return torch.cat(on_mask, 1), torch.cat(cells)

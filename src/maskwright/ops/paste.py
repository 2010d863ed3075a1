"""Pasting of P x P masks predicted inside boxes onto the pixel grid of the image, by each published convention."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskwright.ops.interpolation import weights
from maskwright.structures import Masks

Rule = Literal["continuous", "padded", "corners"]


def paste_masks(
    probabilities: Float[Tensor, "n p q"],
    boxes: Float[Tensor, "n 4"],
    size: tuple[int, int],
    *,
    rule: Rule = "continuous",
    threshold: float = 0.5,
    strict: bool = False,
    budget: int = 64 << 20,
) -> Masks:
    """Converts masks predicted inside boxes to masks of the image.

    Args:
        probabilities: Probabilities on a P x Q grid inside each box.
        boxes: Boxes x0, y0, x1, y1 in pixels of the image.
        size: Height and width of the image.
        rule: The convention. "continuous" (detectron2): bilinear interpolation at the centre of each pixel, zeros
            outside the grid. "padded" (torchvision, maskrcnn-benchmark): the grid is padded with a border of zeros, the
            enlarged box is truncated to integers and includes its last pixel, and the grid is resized to it. "corners"
            (DeepMask): the grid is resized to the integer size of the box, beginning at the pixel of its corner, with
            the outer cells on the outer pixels.
        threshold: A pixel belongs to the mask if its value is at least the threshold.
        strict: The value must exceed the threshold instead.
        budget: Scratch memory in bytes on an accelerator, where whole planes are computed in chunks that fit. On a CPU
            each mask is computed on the pixels of its box only.

    Returns:
        Masks of `size`, in the order of the boxes.
    """
    probabilities, boxes = probabilities.float(), boxes.float()
    if not len(boxes):
        return Masks.empty(size)
    if boxes.device.type == "cpu":
        crops, corners = [], []
        for grid, box in zip(probabilities, boxes, strict=True):
            crop, corner = _crop(grid, box, size, rule, threshold, strict)
            crops.append(crop)
            corners.append(corner)
        return Masks.from_crops(crops, torch.tensor(corners), size)
    step = max(1, budget // (size[0] * size[1] * 5))  # a float32 and a bool plane per object
    parts = []
    for start in range(0, len(boxes), step):
        grids, chosen = probabilities[start : start + step], boxes[start : start + step]
        parts.append(Masks.from_dense(_keep(_planes(grids, chosen, size, rule), threshold, strict)).pack())
    return Masks.join(parts)


def paste_values(
    probabilities: Float[Tensor, "n p q"],
    boxes: Float[Tensor, "n 4"],
    size: tuple[int, int],
    *,
    rule: Rule = "continuous",
) -> Float[Tensor, "n h w"]:
    """Computes what `paste_masks` thresholds, as whole planes of N * H * W * 4 bytes; the arguments are the same."""
    return _planes(probabilities.float(), boxes.float(), size, rule)


def _keep(values: Tensor, threshold: float, strict: bool) -> Bool[Tensor, "*n"]:
    return values > threshold if strict else values >= threshold


def _planes(grids: Tensor, boxes: Tensor, size: tuple[int, int], rule: Rule) -> Tensor:
    rows = torch.arange(size[0], device=boxes.device, dtype=torch.float32)
    columns = torch.arange(size[1], device=boxes.device, dtype=torch.float32)
    across = _axis(boxes[:, 0], boxes[:, 2], columns, grids.shape[2], rule)  # (N, W, Q)
    down = _axis(boxes[:, 1], boxes[:, 3], rows, grids.shape[1], rule)  # (N, H, P)
    return down @ grids @ across.transpose(1, 2)


def _crop(
    grid: Tensor, box: Tensor, size: tuple[int, int], rule: Rule, threshold: float, strict: bool
) -> tuple[Tensor, tuple[int, int]]:
    x0, y0, x1, y1 = box.tolist()
    margin_x, margin_y = (x1 - x0) / grid.shape[1] + 2, (y1 - y0) / grid.shape[0] + 2  # reach of a border cell
    left, right = max(0, int(x0 - margin_x)), min(size[1], int(x1 + margin_x) + 1)
    top, bottom = max(0, int(y0 - margin_y)), min(size[0], int(y1 + margin_y) + 1)
    columns = torch.arange(left, max(left, right), dtype=torch.float32)
    rows = torch.arange(top, max(top, bottom), dtype=torch.float32)
    across = _axis(box[0], box[2], columns, grid.shape[1], rule)
    down = _axis(box[1], box[3], rows, grid.shape[0], rule)
    return _keep(down @ grid @ across.T, threshold, strict), (left, top)


def _axis(low: Tensor, high: Tensor, pixels: Tensor, cells: int, rule: Rule) -> Tensor:
    """Weights (..., pixels, cells) along one axis for boxes from `low` to `high`."""
    low, high = low[..., None], high[..., None]
    if rule == "continuous":
        # An empty box maps pixels to infinity or NaN; both read zeros.
        place = (pixels + 0.5 - low) / (high - low) * cells - 0.5
        return weights(torch.nan_to_num(place, nan=-9.0, posinf=-9.0, neginf=-9.0), cells)
    if rule == "corners":
        # Integers may be off by rounding after a placement was applied to them.
        first, length = torch.floor(low + 1e-3), torch.floor(high - low + 1e-3)
        place = (pixels - first) * ((cells - 1) / (length - 1).clamp(min=1))
        inside = (pixels >= first) & (pixels < first + length)
        return weights(place.clamp(0, cells - 1), cells) * inside[..., None]
    half = (high - low) * 0.5 * ((cells + 2) / cells)
    centre = (high + low) * 0.5
    first, last = torch.trunc(centre - half), torch.trunc(centre + half)
    length = (last - first + 1).clamp(min=1)
    place = (pixels - first + 0.5) * ((cells + 2) / length) - 0.5
    inside = (pixels >= first) & (pixels < first + length)
    # Clamped to the padded grid, whose outer cells are zeros, so their columns can be dropped.
    return weights(place.clamp(0, cells + 1) - 1, cells) * inside[..., None]

"""Cutting a feature map along a box, in the ways that the field's papers compare.

A RoI is (index in the batch, x0, y0, x1, y1) in the picture's pixels; `scale` is 1 / stride.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.ops.interpolation import weights


def roi_align(
    features: Float[Tensor, "b c h w"],
    rois: Float[Tensor, "r 5"],
    side: int,
    scale: float = 1.0,
    samples: int = 0,
    aligned: bool = True,
) -> Float[Tensor, "r c side side"]:
    """Mean of bilinear samples in each of side x side real-valued bins (Mask R-CNN, arXiv 1703.06870).

    samples  points per bin and axis; 0 for as many as the bin has cells, different for each box
    aligned  cell centres lie at half coordinates; without, they lie at whole ones and boxes are at least one cell wide
    """
    from torchvision.ops import roi_align as align

    values = features if features.dtype in (torch.float32, torch.float64) or features.is_cuda else features.float()
    return align(values, rois.to(values.dtype), side, scale, samples, aligned)


def roi_pool(
    features: Float[Tensor, "b c h w"], rois: Float[Tensor, "r 5"], side: int, scale: float = 1.0
) -> Float[Tensor, "r c side side"]:
    """Largest value among the cells of each bin; the box and its bins are rounded to whole cells
    (Fast R-CNN, arXiv 1504.08083)."""
    from torchvision.ops import roi_pool as pool

    values = features if features.dtype in (torch.float32, torch.float64) or features.is_cuda else features.float()
    return pool(values, rois.to(values.dtype), side, scale)


def roi_warp(
    features: Float[Tensor, "b c h w"], rois: Float[Tensor, "r 5"], side: int, scale: float = 1.0
) -> Float[Tensor, "r c side side"]:
    """The box rounded to whole cells, then warped: two bilinear samples per bin and axis, the largest is kept.

    RoIWarp (MNC, arXiv 1512.04412) as section 3 of Mask R-CNN describes it. Unlike its relatives it has a gradient to
    the box; rounding lets it pass unchanged. Costs R * C * (2 side)^2 values.
    """
    batch, channels, height, width = features.shape
    boxes = rois[:, 1:] * scale
    boxes = boxes + (boxes.round() - boxes).detach()
    low, span = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    steps = (torch.arange(2 * side, device=rois.device, dtype=boxes.dtype) + 0.5) / (2 * side)
    down = weights(low[:, 1:] + span[:, 1:] * steps - 0.5, height, "border")  # (R, 2 side, H)
    across = weights(low[:, :1] + span[:, :1] * steps - 0.5, width, "border")  # (R, 2 side, W)
    result = features.new_zeros(len(rois), channels, side, side)
    for index in range(batch):
        mine = (rois[:, 0] == index).nonzero().flatten()
        rows = torch.einsum("rph,chw->rcpw", down[mine].to(features), features[index])
        values = torch.einsum("rcpw,rqw->rcpq", rows, across[mine].to(features))
        result = result.index_put((mine,), torch.nn.functional.max_pool2d(values, 2))
    return result


def as_rois(boxes: list[Float[Tensor, "_n 4"]]) -> Float[Tensor, "r 5"]:
    """Boxes of each picture -> RoIs of the batch, in order."""
    return torch.cat([torch.cat([b.new_full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)])


def levels_of(levels: Int[Tensor, " r"], count: int) -> list[Int[Tensor, " _k"]]:
    """Indices of the RoIs on each of `count` levels."""
    return [(levels == level).nonzero().flatten() for level in range(count)]

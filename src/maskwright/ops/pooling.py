"""Cutting a feature map along a box, in the ways that the field's papers compare.

A RoI is (index in the batch, x0, y0, x1, y1) in the image's pixels; `scale` is 1 / stride.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.ops.interpolation import weights

FEW_CHANNELS = 16  # below, reading whole cells does not pay


def kernel_type(values: Tensor) -> torch.dtype:
    """In which type torchvision's kernels read `values`: they have no bfloat16, and float16 on GPUs alone."""
    known = values.dtype in (torch.float32, torch.float64) or (values.is_cuda and values.dtype == torch.float16)
    return values.dtype if known else torch.float32


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
    if features.device.type == "cpu" and features.shape[1] >= FEW_CHANNELS and not torch.compiler.is_compiling():
        return _roi_align_by_rows(features, rois, side, scale, samples, aligned)
    from torchvision.ops import roi_align as align

    values = features.to(kernel_type(features))
    return align(values, rois.to(values.dtype), side, scale, samples, aligned)


def _roi_align_by_rows(
    features: Tensor, rois: Tensor, side: int, scale: float, samples: int, aligned: bool
) -> Float[Tensor, "r c side side"]:
    """RoIAlign as weighted sums of rows of a table of cells: what the host does fastest.

    The mean of bilinear samples in a bin is separable, so every cell of the bin's small window has one weight, the
    product of one per row and one per column; each cell's C channels, side by side in memory, are then read once, and
    written once in the backward pass. Against a loop over samples and channels this is several times faster forwards
    and more than ten times backwards. Result and features are channels-last.
    """
    _, channels, height, width = features.shape
    boxes = rois[:, 1:].float() * scale - (0.5 if aligned else 0.0)
    low, span = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        span = span.clamp(min=1)
    left, columns, across = _bins(low[:, 0], span[:, 0], side, samples, width)
    top, rows, down = _bins(low[:, 1], span[:, 1], side, samples, height)

    # A bag is one bin: rows x columns cells, beginning at `corner` in the table.
    corner = ((rois[:, :1].long() * height + top) * width)[:, :, None] + left[:, None, :]  # (R, side, side)
    cells = (rows[:, :, None] * columns[:, None, :]).flatten()
    first = cells.cumsum(0) - cells
    bins = torch.arange(len(cells), device=rois.device)
    row_of, column_of = bins // side * down.shape[-1], (bins // side**2 * side + bins % side) * across.shape[-1]
    wide = columns[:, None, :].expand_as(corner).flatten()
    facts = torch.stack([first, wide, corner.flatten(), row_of, column_of], 1)
    first_, wide_, corner_, row_, column_ = facts.repeat_interleave(cells, 0).unbind(1)
    within = torch.arange(len(first_), device=rois.device) - first_
    y = within.div(wide_, rounding_mode="floor")
    x = within - y * wide_
    weight = down.flatten()[row_ + y] * across.flatten()[column_ + x]
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    sums = torch.nn.functional.embedding_bag(
        corner_ + y * width + x, table, first, mode="sum", per_sample_weights=weight.to(table.dtype)
    )
    return sums.view(len(rois), side, side, channels).permute(0, 3, 1, 2)


def _bins(low: Tensor, span: Tensor, side: int, samples: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis of `length` cells: each bin's first cell (R, side), how many it reads, and their weights
    (R, side, most). Samples further than a cell outside count as zeros, nearer ones read the border."""
    width = (span / side)[:, None, None]
    count = torch.full_like(span, samples) if samples else (span / side).ceil().clamp(min=0)
    count = count[:, None, None]  # (R, 1, 1)
    number = torch.arange(max(1, int(count.max())) if len(low) else 1, device=low.device, dtype=low.dtype)
    bins = torch.arange(side, device=low.device, dtype=low.dtype)[:, None]
    # In this order, as the common kernel rounds it.
    place = low[:, None, None] + bins * width + (number + 0.5) * width / count.clamp(min=1)  # (R, side, samples)
    taken = number < count
    share = (taken & (place >= -1) & (place <= length)) / count.clamp(min=1)
    place = place.clamp(0, length - 1)
    cell = place.floor()
    part, after = place - cell, (cell + 1).clamp(max=length - 1)
    start = torch.where(taken, cell, cell[..., :1]).amin(-1, keepdim=True)
    reach = torch.where(taken, after, start).amax(-1, keepdim=True) - start + 1
    weights = low.new_zeros(*start.shape[:2], int(reach.max()) if len(low) else 1)
    for at, mass in ((cell, share * (1 - part)), (after, share * part)):
        weights.scatter_add_(-1, torch.where(taken, at - start, 0).long(), mass)
    return start[..., 0].long(), reach[..., 0].long(), weights


def roi_pool(
    features: Float[Tensor, "b c h w"], rois: Float[Tensor, "r 5"], side: int, scale: float = 1.0
) -> Float[Tensor, "r c side side"]:
    """Largest value among the cells of each bin; the box and its bins are rounded to whole cells
    (Fast R-CNN, arXiv 1504.08083)."""
    from torchvision.ops import roi_pool as pool

    values = features.to(kernel_type(features))
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
    """Boxes of each image -> RoIs of the batch, in order."""
    return torch.cat([torch.cat([b.new_full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)])


def levels_of(levels: Int[Tensor, " r"], count: int) -> list[Int[Tensor, " _k"]]:
    """Indices of the RoIs on each of `count` levels."""
    return [(levels == level).nonzero().flatten() for level in range(count)]

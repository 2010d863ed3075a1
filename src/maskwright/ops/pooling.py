"""Features of boxes cropped from a feature map (RoIs), in the ways that papers compare.

A RoI is (index in the batch, x0, y0, x1, y1) in pixels of the image; `scale` is 1 / stride of the feature map. All
functions return the dtype of the features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.ops.interpolation import weights

Side = int | tuple[int, int]  # of the output grid: one number, or height and width

FEW_CHANNELS = 16  # below this, gathering whole rows of channels is slower than torchvision's kernel


def grid_size(side: Side) -> tuple[int, int]:
    """Height and width of an output grid."""
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))


def kernel_type(values: Tensor) -> torch.dtype:
    """The dtype in which torchvision's kernels can read `values`: no bfloat16, and float16 only on GPUs."""
    known = values.dtype in (torch.float32, torch.float64) or (values.is_cuda and values.dtype == torch.float16)
    return values.dtype if known else torch.float32


def _computed(features: Tensor) -> Tensor:
    """Features in the dtype that RoIs are cropped in: half precision would round coordinates to whole pixels."""
    return features if features.dtype == torch.float64 else features.float()


def roi_align(
    features: Float[Tensor, "b c h w"],
    rois: Float[Tensor, "r 5"],
    side: Side,
    scale: float = 1.0,
    samples: int = 0,
    aligned: bool = True,
) -> Float[Tensor, "r c _h _w"]:
    """Averages bilinear samples in each bin of a grid, without rounding (Mask R-CNN, arXiv 1703.06870, section 3).

    Args:
        features: Feature maps of the images.
        rois: Batch index and box in pixels of the image.
        side: Side of the output grid, or its height and width.
        scale: 1 / stride of the feature map.
        samples: Samples per bin and axis; 0: the number of cells that a bin covers, rounded up, which differs between
            boxes.
        aligned: Whether cell centres are at half coordinates (detectron2). Otherwise they are at integers, and boxes
            are at least one cell wide and high (Detectron, torchvision).

    Returns:
        One grid per RoI.
    """
    size = grid_size(side)
    if features.device.type == "cpu" and features.shape[1] >= FEW_CHANNELS and not torch.compiler.is_compiling():
        return _roi_align_by_rows(features, rois, size, scale, samples, aligned)
    from torchvision.ops import roi_align as align

    values = _computed(features)
    return align(values, rois.to(values.dtype), size, scale, samples, aligned).to(features.dtype)


def _roi_align_by_rows(
    features: Tensor, rois: Tensor, size: tuple[int, int], scale: float, samples: int, aligned: bool
) -> Float[Tensor, "r c _h _w"]:
    """RoIAlign as weighted sums of rows of a table of cells, which is fastest on CPUs.

    The mean of bilinear samples in a bin is separable, so every cell of the bin's small window has one weight, the
    product of one per row and one per column. The C channels of a cell are adjacent in memory and are read once, and
    written once in the backward pass. Compared to a loop over samples and channels this is several times faster
    forwards and more than ten times backwards. Result and features are channels-last.
    """
    _, channels, height, width = features.shape
    boxes = rois[:, 1:].float() * scale - (0.5 if aligned else 0.0)
    low, span = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        span = span.clamp(min=1)
    left, columns, across = _bins(low[:, 0], span[:, 0], size[1], samples, width)
    top, rows, down = _bins(low[:, 1], span[:, 1], size[0], samples, height)

    # A bag is one bin: rows x columns cells, beginning at `corner` in the table.
    corner = ((rois[:, :1].long() * height + top) * width)[:, :, None] + left[:, None, :]  # (R, h, w)
    cells = (rows[:, :, None] * columns[:, None, :]).flatten()
    first = cells.cumsum(0) - cells
    bins = torch.arange(len(cells), device=rois.device)
    roi, column = bins // (size[0] * size[1]), bins % size[1]
    row_of, column_of = bins // size[1] * down.shape[-1], (roi * size[1] + column) * across.shape[-1]
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
    return sums.view(len(rois), *size, channels).permute(0, 3, 1, 2)


def _bins(low: Tensor, span: Tensor, side: int, samples: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis of `length` cells: each bin's first cell (R, side), its number of cells, and their weights
    (R, side, most). Samples further than a cell outside count as zeros, nearer ones read the border."""
    width = (span / side)[:, None, None]
    count = torch.full_like(span, samples) if samples else (span / side).ceil().clamp(min=0)
    count = count[:, None, None]  # (R, 1, 1)
    number = torch.arange(max(1, int(count.max())) if len(low) else 1, device=low.device, dtype=low.dtype)
    bins = torch.arange(side, device=low.device, dtype=low.dtype)[:, None]
    # In this order of operations, because the reference kernel rounds so.
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
    features: Float[Tensor, "b c h w"], rois: Float[Tensor, "r 5"], side: Side, scale: float = 1.0
) -> Float[Tensor, "r c _h _w"]:
    """Takes the maximum over the cells of each bin; the box and its bins are rounded to cells (Fast R-CNN, arXiv
    1504.08083). The arguments are those of `roi_align`."""
    from torchvision.ops import roi_pool as pool

    values = _computed(features)
    return pool(values, rois.to(values.dtype), grid_size(side), scale).to(features.dtype)


def roi_warp(
    features: Float[Tensor, "b c h w"], rois: Float[Tensor, "r 5"], side: Side, scale: float = 1.0
) -> Float[Tensor, "r c _h _w"]:
    """Rounds the box to cells and takes the maximum of two bilinear samples per bin and axis.

    RoIWarp (MNC, arXiv 1512.04412) as section 3 of Mask R-CNN describes it. Unlike RoIPool and RoIAlign it has a
    gradient with respect to the box; rounding passes it on unchanged. Costs R * C * 4 * h * w values. The arguments are
    those of `roi_align`.
    """
    batch, channels, height, width = features.shape
    rows_out, columns_out = grid_size(side)
    boxes = rois[:, 1:] * scale
    boxes = boxes + (boxes.round() - boxes).detach()
    low, span = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    y, x = (
        (torch.arange(2 * count, device=rois.device, dtype=boxes.dtype) + 0.5) / (2 * count)
        for count in (rows_out, columns_out)
    )
    down = weights(low[:, 1:] + span[:, 1:] * y - 0.5, height, "border")  # (R, 2 h, H)
    across = weights(low[:, :1] + span[:, :1] * x - 0.5, width, "border")  # (R, 2 w, W)
    result = features.new_zeros(len(rois), channels, rows_out, columns_out)
    for index in range(batch):
        mine = (rois[:, 0] == index).nonzero().flatten()
        rows = torch.einsum("rph,chw->rcpw", down[mine].to(features), features[index])
        values = torch.einsum("rcpw,rqw->rcpq", rows, across[mine].to(features))
        result = result.index_put((mine,), torch.nn.functional.max_pool2d(values, 2))
    return result


def position_sensitive_pool(
    features: Float[Tensor, "b cgg h w"], rois: Float[Tensor, "r 5"], group: int, side: int, scale: float = 1.0
) -> Float[Tensor, "r c side side"]:
    """Averages the cells of each bin, of the map that belongs to the bin's part of the box (R-FCN, arXiv 1605.06409).

    A box consists of G x G parts, each of which has its own map. The corners of a box are rounded to pixels, and it
    includes its last pixel, as in the published code; a bin without cells is 0. The computation reads the cells that
    the bins cover, as rows of C channels, and writes one row for each bin.

    Args:
        features: Feature maps of the images, C x G x G channels: the parts of an output, row by row, are neighbours.
        rois: Batch index and box x0, y0, x1, y1 in pixels of the image; x1 and y1 are the last pixel.
        group: Parts G of a box along each axis.
        side: Side of the output grid; bin p belongs to part floor(p * G / side).
        scale: 1 / stride of the feature map.

    Returns:
        One grid per RoI.
    """
    height, width = features.shape[-2:]
    values = _computed(features).unflatten(1, (-1, group * group))
    if not len(rois):
        return features.new_zeros(0, values.shape[1], side, side)
    boxes = rois[:, 1:].float()
    boxes = torch.sign(boxes) * torch.floor(boxes.abs() + 0.5)  # halves are rounded away from zero
    left, columns = _covered(boxes[:, 0] * scale, (boxes[:, 2] + 1) * scale, side, width)
    top, rows = _covered(boxes[:, 1] * scale, (boxes[:, 3] + 1) * scale, side, height)

    if torch.compiler.is_exporting():  # no shapes that depend on values
        return _means_by_sums(values, rois[:, 0].long(), (top, rows), (left, columns), group).to(features.dtype)
    # A bag is one bin: rows x columns cells, beginning at `corner`.
    part = torch.arange(side, device=rois.device) * group // side
    part = (part[:, None] * group + part).expand(len(rois), side, side)
    corner = ((rois[:, :1].long() * height + top) * width)[:, :, None] + left[:, None, :]  # (R, s, s)
    cells = (rows[:, :, None] * columns[:, None, :]).flatten()
    first = cells.cumsum(0) - cells
    wide = columns[:, None, :].expand_as(corner)
    facts = torch.stack([first, wide.flatten(), corner.flatten(), part.flatten()], 1)
    first_, wide_, corner_, part_ = facts.repeat_interleave(cells, 0).unbind(1)
    within = torch.arange(len(first_), device=rois.device) - first_
    y = within.div(wide_, rounding_mode="floor")
    index = (corner_ + y * width + within - y * wide_) * group**2 + part_
    table = values.permute(0, 3, 4, 2, 1).reshape(-1, values.shape[1])
    means = torch.nn.functional.embedding_bag(index, table, first, mode="mean")
    return means.view(len(rois), side, side, -1).permute(0, 3, 1, 2).to(features.dtype)


def _means_by_sums(
    values: Tensor, images: Tensor, down: tuple[Tensor, Tensor], across: tuple[Tensor, Tensor], group: int
) -> Tensor:
    """Means of the cells of bins from tables of sums over all cells above and to the left.

    Args:
        values: Maps (B, C, G G, H, W).
        images: Index of each RoI's image.
        down: First row of each bin, and its number of rows.
        across: Likewise for columns.
        group: G.
    """
    height, width, side = values.shape[3], values.shape[4], down[0].shape[1]
    sums = torch.nn.functional.pad(values.double().cumsum(3).cumsum(4), (1, 0, 1, 0))
    table = sums.permute(0, 2, 3, 4, 1).flatten(0, 3)  # rows of C channels
    part = torch.arange(side, device=values.device) * group // side
    first = (images[:, None, None] * group**2 + part[:, None] * group + part) * (height + 1)  # (R, s, s)
    corners = {
        (below, right): table[
            (first + (down[0] + below * down[1])[:, :, None]) * (width + 1)
            + (across[0] + right * across[1])[:, None, :]
        ]
        for below in (0, 1)
        for right in (0, 1)
    }
    total = corners[1, 1] - corners[0, 1] - corners[1, 0] + corners[0, 0]
    count = (down[1][:, :, None] * across[1][:, None, :]).clamp(min=1)
    return (total / count[..., None]).permute(0, 3, 1, 2)


def _covered(low: Tensor, high: Tensor, side: int, length: int) -> tuple[Tensor, Tensor]:
    """First cell and number of cells of each bin (R, side) between `low` and `high` on an axis of `length` cells."""
    width = ((high - low).clamp(min=0.1) / side)[:, None]
    number = torch.arange(side, device=low.device, dtype=low.dtype)
    start = (number * width + low[:, None]).floor().clamp(0, length)
    end = ((number + 1) * width + low[:, None]).ceil().clamp(0, length)
    return start.long(), (end - start).clamp(min=0).long()


def as_rois(boxes: list[Float[Tensor, "_n 4"]]) -> Float[Tensor, "r 5"]:
    """Converts boxes of each image to RoIs of the batch, in the same order."""
    if not boxes:
        return torch.zeros(0, 5)
    return torch.cat([torch.cat([b.new_full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)])


def levels_of(levels: Int[Tensor, " r"], count: int) -> list[Int[Tensor, " _k"]]:
    """Indices of the RoIs on each of `count` levels."""
    return [(levels == level).nonzero().flatten() for level in range(count)]

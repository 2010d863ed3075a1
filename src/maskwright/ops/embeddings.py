"""Masks from distances of pixel embeddings to those of detections (EmbedMask, arXiv 1912.01954)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CELL = 4  # input pixels of a mask's cell: the finest level (stride 8), upsampled by two
OUTSIDE = -10.0  # log-probability outside of a detection's region, where masks are resized as logarithms
# The cells in which a mask is computed: the box's cells and a margin of two cells ("padded") or one ("near").
Region = Literal["padded", "near"]


def mask_windows(
    pixels: Float[Tensor, "d h w"],
    boxes: Float[Tensor, "n 4"],
    embeddings: Float[Tensor, "n d"],
    margins: Float[Tensor, "n m"],
    *,
    region: Region,
    logarithm: bool,
) -> tuple[Float[Tensor, "n r c"], Int[Tensor, "n 2"]]:
    """(Log-)probabilities of each detection in a window of cells around its box.

    Args:
        pixels: Pixel embeddings of the image.
        boxes: Boxes of the detections, in the input's pixels.
        embeddings: Their embeddings.
        margins: Their margins.
        region: The cells that are computed. They are surrounded by at least one cell of `OUTSIDE`, or 0.
        logarithm: Whether to return log-probabilities.

    Returns:
        Windows of one size, and the cell x, y of the map at which each begins.
    """
    height, width = pixels.shape[1:]
    limit, cells = boxes.new_tensor([width, height]), boxes / CELL
    if region == "padded":
        low, high = cells[:, :2].trunc() - 2, cells[:, 2:].trunc() + 2
    else:
        low, high = (cells[:, :2] - 1).ceil(), (cells[:, 2:] + 1).ceil()
    low, high = low.clamp(min=0).long(), high.minimum(limit).long()
    corners = low - 1
    columns, rows = ((high - low).amax(0) + 2).clamp(min=2).tolist()
    x = corners[:, :1] + torch.arange(columns, device=boxes.device)  # (n, c)
    y = corners[:, 1:] + torch.arange(rows, device=boxes.device)  # (n, r)
    across = (x >= low[:, :1]) & (x < high[:, :1])
    inside = across[:, None] & ((y >= low[:, 1:]) & (y < high[:, 1:]))[..., None]  # (n, r, c)
    cell = (y.clamp(0, height - 1) * width)[..., None] + x.clamp(0, width - 1)[:, None]
    apart = pixels.flatten(1).T[cell].sub_(embeddings[:, None, None])  # (n, r, c, D); in place, since memory is slow
    log_p = -apart.square_().mul_(margins[:, None, None]).sum(-1)
    return torch.where(inside, log_p if logarithm else log_p.exp(), OUTSIDE if logarithm else 0.0), corners


def good_locations(
    iou: Float[Tensor, " p"], group: Int[Tensor, " p"], count: int
) -> tuple[Bool[Tensor, " p"], Bool[Tensor, " p"]]:
    """Selects locations whose masks are trained.

    Args:
        iou: IoU of each location's predicted box with its object.
        group: Index of the object.
        count: Number of objects.

    Returns:
        Which locations are good (IoU above 0.5, or the object's best if there is none), and which one is each object's
        best, the first of equal ones.
    """
    peak = iou.new_full((count,), -1.0).scatter_reduce(0, group, iou, "amax")[group]
    good = torch.where(peak > 0.5, iou > 0.5, iou == peak)
    number = torch.arange(len(iou), device=iou.device)
    ranked = torch.where(iou == peak, number, len(iou))
    first = number.new_full((count,), len(iou)).scatter_reduce(0, group, ranked, "amin")
    return good, number == first[group]


def group_means(values: Float[Tensor, "p d"], group: Int[Tensor, " p"], count: int) -> Float[Tensor, "g d"]:
    """The mean of each object's rows; zeros if it has none."""
    total = values.new_zeros(count, values.shape[1]).index_add(0, group, values)
    return total / group.bincount(minlength=count).clamp(min=1)[:, None]


def cells_inside(cells: Float[Tensor, "g 4"], size: Sequence[int], share: float) -> Bool[Tensor, "g h w"]:
    """The cells of boxes enlarged by a share of their sides and one cell, without the map's last row and column."""
    grown = (cells[:, 2:] - cells[:, :2]) * share + 1
    low = (cells[:, :2] - grown).clamp(min=0)
    high = (cells[:, 2:] + grown).minimum(cells.new_tensor([size[1] - 1, size[0] - 1]))
    y, x = (torch.arange(n, device=cells.device) for n in size)
    across = (x >= low[:, :1]) & (x < high[:, :1])
    return across[:, None] & ((y >= low[:, 1:]) & (y < high[:, 1:]))[..., None]

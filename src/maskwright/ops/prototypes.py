"""Masks as weighted sums of prototypes, cropped by boxes (YOLACT, arXiv 1904.02689); boxes as offsets of anchors."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

VARIANCES = (0.1, 0.1, 0.2, 0.2)  # SSD's scale of the box offsets


def decode_boxes(anchors: Float[Tensor, "*n 4"], deltas: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Applies offsets to anchors (centre x, centre y, width, height). Unlike in other systems sides are not bounded."""
    steps = deltas * deltas.new_tensor(VARIANCES)
    return torch.cat(
        [anchors[..., :2] + steps[..., :2] * anchors[..., 2:], anchors[..., 2:] * steps[..., 2:].exp()], -1
    )


def encode(anchors: Float[Tensor, "n 4"], boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Offsets that take anchors (centre x, centre y, width, height) to boxes (x0, y0, x1, y1)."""
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    steps = torch.cat([(centres - anchors[:, :2]) / anchors[:, 2:], torch.log(sides / anchors[:, 2:])], 1)
    return steps / steps.new_tensor(VARIANCES)


def assemble(
    prototypes: Float[Tensor, "k h w"], coefficients: Float[Tensor, "n k"], boxes: Float[Tensor, "n 4"] | None
) -> Float[Tensor, "n h w"]:
    """Assembles masks from prototypes (eq. 1).

    Args:
        prototypes: Prototypes of one image.
        coefficients: One row for each mask.
        boxes: Boxes to crop by, as shares of the sides; None for no crop.

    Returns:
        Probabilities on the prototypes' grid, zero outside of `crop_window`.
    """
    soft = torch.einsum("nk,khw->nhw", coefficients, prototypes).sigmoid()
    return soft if boxes is None else soft * crop_window(boxes, (soft.shape[1], soft.shape[2]))


def crop_window(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Bool[Tensor, "n h w"]:
    """The cells of each box with a margin of one cell: x0 - 1 <= column < x1 + 1, in fractions of cells.

    Args:
        boxes: Boxes as shares of the sides.
        size: Height and width of the grid.
    """
    height, width = size
    x0, y0, x1, y1 = (boxes * boxes.new_tensor([width, height, width, height])).unbind(1)
    columns = torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    rows = torch.arange(height, device=boxes.device, dtype=boxes.dtype)
    across = (columns >= (x0 - 1)[:, None]) & (columns < (x1 + 1)[:, None])
    down = (rows >= (y0 - 1)[:, None]) & (rows < (y1 + 1)[:, None])
    return down[:, :, None] & across[:, None, :]

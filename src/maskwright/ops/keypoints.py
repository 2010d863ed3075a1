"""Keypoints as one-hot maps inside a box (Mask R-CNN, arXiv 1703.06870, section 5)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scoring = Literal["probability", "logit"]


def encode(
    keypoints: Float[Tensor, "r j 3"], boxes: Float[Tensor, "r 4"], side: int
) -> tuple[Int[Tensor, "r j"], Bool[Tensor, "r j"]]:
    """Converts keypoints to cells of a map inside each box.

    Args:
        keypoints: x, y and visibility of the keypoints of each box's object, in the frame of the boxes.
        boxes: Boxes x0, y0, x1, y1.
        side: Side of the map.

    Returns:
        The cell `y * side + x` of each keypoint, and whether it is used: labelled (visibility > 0) and inside the box.
        A keypoint exactly on the right or lower edge belongs to the last cell.
    """
    scale = side / (boxes[:, 2:] - boxes[:, :2])
    place = (keypoints[..., :2] - boxes[:, None, :2]) * scale[:, None]
    cell = place.floor().long()
    cell = torch.where(keypoints[..., :2] == boxes[:, None, 2:], side - 1, cell)
    counts = (cell >= 0).all(-1) & (cell < side).all(-1) & (keypoints[..., 2] > 0)
    return (cell[..., 1] * side + cell[..., 0]) * counts, counts


def decode(
    maps: Float[Tensor, "r j s s"], boxes: Float[Tensor, "r 4"], scoring: Scoring = "probability"
) -> Float[Tensor, "r j 3"]:
    """Finds the peak of each map after bicubic resizing to the size of the box in pixels.

    The sizes differ between boxes, so boxes are processed one at a time; batching would not be exact.

    Args:
        maps: Logits on a grid inside each box.
        boxes: Boxes x0, y0, x1, y1 in pixels.
        scoring: The score. "probability" (detectron2): exp of the peak divided by the sum over the map before resizing,
            which can exceed 1. "logit" (torchvision): the resized logit at the peak.

    Returns:
        x, y and score of each keypoint, in the frame of the boxes.
    """
    maps, boxes = maps.float(), boxes.float()
    result = maps.new_zeros(*maps.shape[:2], 3)
    spans = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    for row, map_, corner, span in zip(result, maps, boxes[:, :2], spans, strict=True):
        width, height = (int(s) for s in span.ceil().tolist())
        large = torch.nn.functional.interpolate(map_[None], size=(height, width), mode="bicubic", align_corners=False)[
            0
        ]
        peak, place = large.flatten(1).max(1)
        cells = torch.stack([place % width, place // width], 1).to(span)
        row[:, :2] = (cells + 0.5) * (span / span.ceil()) + corner
        if scoring == "logit":
            row[:, 2] = peak
        else:
            sums = (map_.flatten(1) - peak[:, None]).exp().sum(1)
            row[:, 2] = 1 / sums
    return result

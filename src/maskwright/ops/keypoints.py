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
    """The cell y * side + x that each keypoint falls in on the box's side x side map, and whether it counts: labelled
    (visibility > 0) and inside the box. A keypoint exactly on the right or lower edge belongs to the last cell."""
    scale = side / (boxes[:, 2:] - boxes[:, :2])
    place = (keypoints[..., :2] - boxes[:, None, :2]) * scale[:, None]
    cell = place.floor().long()
    cell = torch.where(keypoints[..., :2] == boxes[:, None, 2:], side - 1, cell)
    counts = (cell >= 0).all(-1) & (cell < side).all(-1) & (keypoints[..., 2] > 0)
    return (cell[..., 1] * side + cell[..., 0]) * counts, counts


def decode(
    maps: Float[Tensor, "r j s s"], boxes: Float[Tensor, "r 4"], scoring: Scoring = "probability"
) -> Float[Tensor, "r j 3"]:
    """x, y and score of each keypoint: the largest cell of the map after bicubic resizing to the box's size in pixels.

    scoring  "probability" (detectron2): exp of the peak over the sum on the map as predicted, which can exceed 1;
             "logit" (torchvision): the resized logit at the peak
    The sizes differ from box to box, so boxes are taken one at a time; no batching is exact.
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

"""Targets and losses of mask and keypoint heads on foreground boxes (Mask R-CNN, arXiv 1703.06870)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.blocks.box_stage import Foreground
from maskwright.errors import UsageError
from maskwright.ops import keypoints as keypoint_ops
from maskwright.ops import mask_targets
from maskwright.ops.distributed import global_mean_count
from maskwright.structures import Instances


def mask_truth(
    rois: Foreground, targets: Sequence[Instances], side: int, rule: mask_targets.Rule
) -> Float[Tensor, "r side side"]:
    """The mask of each box's object inside the box, see `ops.mask_targets.mask_targets`."""
    return torch.cat(
        [
            mask_targets.mask_targets(target.masks, owners, boxes, side, rule=rule)  # pyright: ignore[reportArgumentType]
            if len(boxes) else boxes.new_zeros(0, side, side)
            for target, owners, boxes in zip(targets, rois.owners, rois.boxes, strict=True)
        ]
    )  # fmt: skip


def mask_loss(logits: Float[Tensor, "r s s"], truth: Float[Tensor, "r s s"]) -> Float[Tensor, ""]:
    """Binary cross entropy of the mask of each box's class, averaged over all pixels (section 3)."""
    count = global_mean_count(truth.new_tensor(float(truth.numel())))
    return functional.binary_cross_entropy_with_logits(logits.float(), truth, reduction="sum") / count


def competing_mask_loss(
    logits: Float[Tensor, "r k s s"], truth: Float[Tensor, "r s s"], labels: Int[Tensor, " r"]
) -> Float[Tensor, ""]:
    """Cross entropy over classes and background (last) at each pixel, averaged over all pixels (table 2b)."""
    logits = logits.float()
    count = global_mean_count(truth.new_tensor(float(truth.numel())))
    goal = torch.where(truth >= 0.5, labels[:, None, None], logits.shape[1] - 1)
    return functional.cross_entropy(logits, goal, reduction="sum") / count + logits.sum() * 0


def mask_iou_loss(
    predicted: Float[Tensor, " r"], logits: Float[Tensor, "r s s"], truth: Float[Tensor, "r s s"],
    shares: Float[Tensor, " r"], above: float = 0.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """Half the squared error of predicted mask IoUs, averaged over the masks that meet their object (Mask Scoring
    R-CNN, arXiv 1903.00241, section 3.3).

    Args:
        predicted: The predicted IoU of each mask.
        logits: The predicted masks.
        truth: Masks of the objects inside the boxes.
        shares: Share of each object that is inside its box, see `ops.mask_targets.share_inside`.
        above: A pixel belongs to a predicted mask if its logit is above it.
    """
    with torch.no_grad():
        masks = (logits > above).to(truth)
        both = (masks * truth).sum((1, 2))
        whole = truth.sum((1, 2)) / shares.clamp(min=1e-10)
        target = both / (masks.sum((1, 2)) + whole - both).clamp(min=1)
        counted = (target > 0).to(truth)
    count = global_mean_count(counted.sum())
    return (0.5 * (predicted.float() - target).square() * counted).sum() / count


def keypoint_rois(
    rois: Foreground, targets: Sequence[Instances], count: int, inside: bool
) -> tuple[Foreground, Float[Tensor, "r j 3"]]:
    """Selects the boxes that keypoints are trained on.

    Args:
        rois: Foreground boxes.
        targets: Objects of each image, with keypoints.
        count: Number of keypoints that the system predicts.
        inside: Only boxes that contain a keypoint are used (detectron2).

    Returns:
        The boxes, and the keypoints of each box's object.

    Raises:
        UsageError: If the objects have another number of keypoints.
    """
    keypoints = []
    for target, owners, boxes in zip(targets, rois.owners, rois.boxes, strict=True):
        own = boxes.new_zeros(0, count, 3) if target.keypoints is None else target.keypoints.to(boxes)
        if own.shape[1] != count:
            raise UsageError(
                f"targets have {own.shape[1]} keypoints, the system predicts {count}; set keypoints.count="
                f"{own.shape[1]}"
            )
        keypoints.append(own[owners])
    if inside:
        rows = [_contains(own, boxes) for own, boxes in zip(keypoints, rois.boxes, strict=True)]
        rois, keypoints = rois.select(rows), [own[kept] for own, kept in zip(keypoints, rows, strict=True)]
    return rois, torch.cat(keypoints)


def keypoint_loss(
    maps: Float[Tensor, "r j s s"], keypoints: Float[Tensor, "r j 3"], boxes: Float[Tensor, "r 4"]
) -> Float[Tensor, ""]:
    """Cross entropy of each labelled keypoint over the cells of its map, averaged over keypoints (section 5)."""
    maps = maps.float()
    place, counts = keypoint_ops.encode(keypoints, boxes, maps.shape[-1])
    chosen = maps.flatten(2)[counts]
    count = global_mean_count(maps.new_tensor(float(len(chosen))))
    total = functional.cross_entropy(chosen, place[counts], reduction="sum") if len(chosen) else maps.sum() * 0
    return total / count + maps.sum() * 0


def _contains(keypoints: Float[Tensor, "n j 3"], boxes: Float[Tensor, "n 4"]) -> Bool[Tensor, " n"]:
    x, y, seen = keypoints.unbind(-1)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    return ((seen >= 1) & (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).any(1)

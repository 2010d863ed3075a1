"""Overlap of masks, and suppression of duplicates as matrix operations without loops, so that it can be exported."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.ops import boxes as box_ops
from maskwright.ops.boxes import pairwise_iou


def mask_iou(masks: Bool[Tensor, "n p"], labels: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n n"]:
    """Intersection over union of every mask with every other.

    Args:
        masks: One row of pixels for each mask.
        labels: If given, only masks of the same class are compared; the others have an IoU of 0. On the host this takes
            one product per class, of those pixels that one of its masks covers; on an accelerator a single product of
            all masks is faster.

    Returns:
        IoU in [0, 1]; 0 if both masks are empty.
    """
    both, areas = _intersections(masks, labels)
    return both / (areas[:, None] + areas - both).clamp(min=1)


def mask_ioa(masks: Bool[Tensor, "n p"], labels: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n n"]:
    """Intersection over area: the share of every mask that lies inside every other.

    Args:
        masks: One row of pixels for each mask.
        labels: If given, only masks of the same class are compared; the others have a share of 0.

    Returns:
        Shares in [0, 1]; [i, j] is that of mask i in mask j, and 0 if mask i is empty.
    """
    both, areas = _intersections(masks, labels)
    return both / areas[:, None].clamp(min=1)


def _intersections(
    masks: Bool[Tensor, "n p"], labels: Int[Tensor, " n"] | None
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Common pixels of every pair of the same class, and the areas."""
    if labels is None or masks.device.type != "cpu":
        flat = masks.float()
        both = flat @ flat.T
        return (both if labels is None else both * (labels[:, None] == labels)), both.diagonal()
    both = torch.zeros(len(masks), len(masks))
    for rows in labels.argsort(stable=True).split(labels.bincount().tolist()):
        own = masks[rows]
        flat = own[:, own.any(0)].float()
        both[rows[:, None], rows] = flat @ flat.T
    return both, both.diagonal()


def matrix_nms(
    iou: Float[Tensor, "n n"],
    scores: Float[Tensor, " n"],
    labels: Int[Tensor, " n"] | None = None,
    kernel: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 2.0,
) -> Float[Tensor, " n"]:
    """Matrix NMS (SOLOv2, arXiv 2003.10152, section 3.3): all scores decay at once.

    The score of an object decays with its IoU with better objects of its class. The decay by a better object is weaker
    if that object itself overlaps with a still better one.

    Args:
        iou: IoU of every object with every other.
        scores: Score of each object, in descending order.
        labels: Class of each object; None if all are of one class.
        kernel: The decay: exp(-sigma * iou ** 2) or 1 - iou.
        sigma: Parameter of the Gaussian kernel.

    Returns:
        The decayed scores, in the order of the objects.
    """
    above = (iou if labels is None else iou * (labels[:, None] == labels)).triu(1)  # [i, j]: i is better than j
    covered = above.amax(0) if len(above) else scores.new_zeros(0)  # largest IoU of each with a better one
    if kernel == "gaussian":
        decay = torch.exp(-sigma * above.square()) / torch.exp(-sigma * covered.square())[:, None]
    else:
        decay = (1 - above) / (1 - covered)[:, None]
        # 0 / 0 occurs for the third of three equal masks because of the second; the first reduces its score to 0.
        decay = torch.where(decay.isnan(), torch.inf, decay)
    return scores * (decay.amin(0) if len(above) else scores.new_ones(0))


def mask_nms(
    iou: Float[Tensor, "n n"], labels: Int[Tensor, " n"] | None = None, threshold: float = 0.5
) -> Bool[Tensor, " n"]:
    """Greedy NMS from an IoU matrix. It is sequential and runs on the host: for a few hundred objects.

    Args:
        iou: IoU of every object with every other, in descending order of scores.
        labels: Class of each object; None if all are of one class.
        threshold: An object is removed if its IoU with a better one that is kept, of its class, is larger.

    Returns:
        Whether each object is kept.
    """
    rivals = iou > threshold
    if labels is not None:
        rivals = rivals & (labels[:, None] == labels)
    rivals = rivals.triu(1).cpu().numpy()
    keep = np.ones(len(rivals), bool)
    for row, others in enumerate(rivals):
        if keep[row]:
            keep &= ~others
    return torch.from_numpy(keep).to(iou.device)


def fast_nms(iou: Float[Tensor, "*k n n"], threshold: float = 0.5) -> Bool[Tensor, "*k n"]:
    """Fast NMS (YOLACT, arXiv 1904.02689, section 3.3): objects that are removed still remove others.

    It keeps at most what greedy NMS keeps.

    Args:
        iou: IoU of every object with every other, in descending order of scores; leading axes are batches.
        threshold: An object is removed if its IoU with any better one is larger.

    Returns:
        Whether each object is kept.
    """
    return iou.triu(1).amax(-2) <= threshold if iou.shape[-1] else iou.new_zeros(iou.shape[:-1], dtype=torch.bool)


def fast_nms_by_class(
    boxes: Float[Tensor, "p 4"],
    scores: Float[Tensor, "c p"],
    candidates: Int[Tensor, " k"],
    threshold: float,
    wanted: int,
    top_k: int = 200,
) -> tuple[Float[Tensor, " d"], Int[Tensor, " d"], Int[Tensor, " d"]]:
    """Fast NMS within each of C classes, of P boxes that they share.

    Each class compares its best `top_k` candidates. Only better ones decide about a box, so that the best of all
    classes are compared first, as many as it takes to find `wanted`, before all are.

    Args:
        boxes: Boxes x0, y0, x1, y1.
        scores: Scores of each class.
        candidates: Indices of the boxes to look at.
        threshold: IoU above which a better box of the class suppresses.
        wanted: Number of results needed.
        top_k: Number of candidates of each class.

    Returns:
        Score, class and box of the remaining ones, at least the best `wanted` if there are as many. Entries with a
        score of -1 are suppressed.
    """
    score, place = scores[:, candidates].topk(min(top_k, len(candidates)), dim=1)  # (C, n)
    box = candidates[place]
    label = torch.arange(len(score), device=score.device)[:, None].expand_as(score)
    ranked, compared = score.flatten().sort(descending=True, stable=True), 2 * wanted
    while compared**2 < score.numel() * score.shape[1] // 4:
        best, order = (v[:compared] for v in ranked)
        own, owner = boxes[box.flatten()[order]], label.flatten()[order]
        kept = fast_nms(pairwise_iou(own, own) * (owner[:, None] == owner), threshold)
        if int(kept.sum()) >= wanted:
            return best[kept], owner[kept], box.flatten()[order][kept]
        compared *= 2
    own = boxes[box]
    kept = fast_nms(pairwise_iou(own, own), threshold)
    return torch.where(kept, score, -1.0).flatten(), label.flatten(), box.flatten()


def greedy_nms_by_class(
    boxes: Float[Tensor, "p 4"], scores: Float[Tensor, "c p"], candidate: float, threshold: float
) -> tuple[Float[Tensor, " d"], Int[Tensor, " d"], Int[Tensor, " d"]]:
    """Score, class and anchor of what greedy NMS leaves among the anchors that score above `candidate` in each class.

    As in the original sides count pixels, x1 - x0 + 1, and an IoU of exactly `threshold` suppresses."""
    row, anchor = (scores > candidate).nonzero().unbind(1)
    below = float(torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)))
    left = box_ops.nms(boxes[anchor], scores[row, anchor], row, below, plus_one=True)
    return scores[row[left], anchor[left]], row[left], anchor[left]

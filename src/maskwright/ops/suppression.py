"""Suppression of duplicates as operations on whole matrices: no loop, no branch on a size, so that it exports."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.ops.boxes import pairwise_iou


def mask_iou(masks: Bool[Tensor, "n p"], labels: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n n"]:
    """Overlap of every mask with every other, masks as rows of pixels; 0 where both are empty.

    labels  only those of one label are compared, others overlap by 0. On the host that is a product per label, of the
            pixels alone that one of its masks has; on an accelerator one product of everything is quicker
    """
    if labels is None or masks.device.type != "cpu":
        iou = _iou_of_rows(masks.float())
        return iou if labels is None else iou * (labels[:, None] == labels)
    iou = torch.zeros(len(masks), len(masks))
    for rows in labels.argsort(stable=True).split(labels.bincount().tolist()):
        own = masks[rows]
        iou[rows[:, None], rows] = _iou_of_rows(own[:, own.any(0)].float())
    return iou


def _iou_of_rows(flat: Float[Tensor, "n p"]) -> Float[Tensor, "n n"]:
    both = flat @ flat.T
    areas = both.diagonal()
    return both / (areas[:, None] + areas - both).clamp(min=1)


def matrix_nms(
    iou: Float[Tensor, "n n"],
    scores: Float[Tensor, " n"],
    labels: Int[Tensor, " n"],
    kernel: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 2.0,
) -> Float[Tensor, " n"]:
    """Scores after Matrix NMS (SOLOv2, arXiv 2003.10152, section 3.3): what overlaps a better object of its class
    decays, all at once. Objects come best first; the order of the result is that of the input.

    An overlap counts the less, the more the better object is itself overlapped by a still better one. Gaussian:
    exp(-sigma iou^2); linear: 1 - iou.
    """
    above = (iou * (labels[:, None] == labels)).triu(1)  # [i, j]: i is better than j
    covered = above.amax(0) if len(above) else scores.new_zeros(0)  # what each is overlapped by at most
    if kernel == "gaussian":
        decay = torch.exp(-sigma * above.square()) / torch.exp(-sigma * covered.square())[:, None]
    else:
        decay = (1 - above) / (1 - covered)[:, None]
        # The third of three equal masks: 0 / 0 by way of the second, which says nothing; the first takes all its score.
        decay = torch.where(decay.isnan(), torch.inf, decay)
    return scores * (decay.amin(0) if len(above) else scores.new_ones(0))


def mask_nms(iou: Float[Tensor, "n n"], labels: Int[Tensor, " n"], threshold: float = 0.5) -> Bool[Tensor, " n"]:
    """Which objects are kept, those best first, when each kept one drops those of its class it overlaps by more than
    `threshold`. One after the other, on the host: for a few hundred objects."""
    rivals = ((iou > threshold) & (labels[:, None] == labels)).triu(1).cpu().numpy()
    keep = np.ones(len(rivals), bool)
    for row, others in enumerate(rivals):
        if keep[row]:
            keep &= ~others
    return torch.from_numpy(keep).to(iou.device)


def fast_nms(iou: Float[Tensor, "*k n n"], threshold: float = 0.5) -> Bool[Tensor, "*k n"]:
    """Which objects Fast NMS keeps (YOLACT, arXiv 1904.02689, section 3.3): those that no better one overlaps by more
    than `threshold`, all at once. Objects come best first; what is dropped still drops others, so that it keeps no more
    than the classical rule."""
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

"""Which prediction answers for which object: matching by overlap, and sampling of the matched."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NEGATIVE, IGNORED = -1, -2


def match(
    iou: Float[Tensor, "m n"], low: float, high: float, rescue: bool = False
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """For each of N boxes: the object of its largest overlap, and the same where the match counts.

    The second is the object's index where the overlap is at least `high`, NEGATIVE below `low`, IGNORED between.
    With `rescue` every box that ties for an object's best overlap counts too (Faster R-CNN, arXiv 1506.01497, 3.1.2);
    it keeps the object of its own largest overlap, as all published code has it.
    """
    count = iou.shape[1]
    if not iou.shape[0]:
        return iou.new_zeros(count, dtype=torch.int64), iou.new_full((count,), NEGATIVE, dtype=torch.int64)
    best, nearest = iou.max(0)
    matched = torch.where(best >= high, nearest, IGNORED)
    matched = torch.where(best < low, NEGATIVE, matched)
    if rescue:
        ties = (iou == iou.amax(1, keepdim=True)).any(0)
        matched = torch.where(ties, nearest, matched)
    return nearest, matched


def sample(
    positive: Bool[Tensor, " n"], negative: Bool[Tensor, " n"], size: int, share: float
) -> tuple[Int[Tensor, " p"], Int[Tensor, " q"]]:
    """Indices of at most `size * share` random positives, and of random negatives that fill up to `size`."""
    candidates, others = positive.nonzero().flatten(), negative.nonzero().flatten()
    take = min(len(candidates), int(size * share))
    rest = min(len(others), size - take)
    chosen = torch.randperm(len(candidates), device=positive.device)[:take]
    filling = torch.randperm(len(others), device=positive.device)[:rest]
    return candidates[chosen], others[filling]

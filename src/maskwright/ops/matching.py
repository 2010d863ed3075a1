"""Which prediction answers for which object: matching by overlap, and sampling of the matched."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.ops.boxes import pairwise_iou

NEGATIVE, IGNORED = -1, -2


def match(
    iou: Float[Tensor, "m n"], low: float, high: float, rescue: bool = False
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """For each of N boxes: the object of its largest overlap, and the same where the match counts.

    The second is the object's index where the overlap is at least `high`, NEGATIVE below `low`, IGNORED between.
    With `rescue` every box that ties for an object's best overlap counts too (Faster R-CNN, arXiv 1506.01497, 3.1.2);
    it keeps the object of its own largest overlap, as all published code has it. An object that no box overlaps rescues
    none, where published code takes all boxes there are.
    """
    count = iou.shape[1]
    if not iou.shape[0]:
        return iou.new_zeros(count, dtype=torch.int64), iou.new_full((count,), NEGATIVE, dtype=torch.int64)
    best, nearest = iou.max(0)
    matched = torch.where(best >= high, nearest, IGNORED)
    matched = torch.where(best < low, NEGATIVE, matched)
    if rescue:
        ties = ((iou == iou.amax(1, keepdim=True)) & (iou > 0)).any(0)
        matched = torch.where(ties, nearest, matched)
    return nearest, matched


def match_each(
    objects: Float[Tensor, "m 4"], boxes: Float[Tensor, "n 4"], low: float, high: float, at_once: int = 64
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """As `match`, of boxes' overlap; and every object gets a box of its own, however little they overlap (SSD, YOLACT).

    Of all pairs of an object and a box that have no partner yet the one of the largest overlap is joined, until every
    object has a box; that box then answers for it alone. Equal overlaps go to the first object, then to the first box.
    at_once  objects compared together: bounds the memory at about 60 N `at_once` bytes
    """
    count, own = len(boxes), min(len(objects), len(boxes))
    best = torch.full((count,), -1.0, device=boxes.device)
    nearest = torch.zeros(count, dtype=torch.int64, device=boxes.device)
    later = torch.arange(count - 1, -1, -1, device=boxes.device)
    values, places = [], []
    for first in range(0, len(objects), at_once):
        iou = pairwise_iou(objects[first : first + at_once], boxes)  # (m, N)
        largest, row = iou.max(0)
        nearest = torch.where(largest > best, row + first, nearest)
        best = torch.maximum(largest, best)
        # No object can need more candidates than there are objects. The bits of a float above 0 sort as it does.
        rank = (iou.float().view(torch.int32).long() << 32) + later
        places.append(rank.topk(own, 1).indices)
        values.append(iou.gather(1, places[-1]))
    matched = torch.where(best >= high, nearest, IGNORED)
    matched = torch.where(best < low, NEGATIVE, matched)
    if not own:
        return nearest, matched
    value, place = torch.cat(values), torch.cat(places)  # (M, own)
    rows = torch.arange(len(objects), device=boxes.device)[:, None]
    for _ in range(own):
        chosen = value.argmax()
        row, box = chosen.div(own, rounding_mode="floor"), place.flatten()[chosen]
        nearest, matched = (v.index_fill(0, box, 0).index_add(0, box[None], row[None]) for v in (nearest, matched))
        value = value.masked_fill((place == box) | (rows == row), -1.0)
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

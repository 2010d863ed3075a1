"""Matching of boxes and objects by overlap, and sampling of the matches."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.ops.boxes import pairwise_iou

NEGATIVE, IGNORED = -1, -2
Rescue = Literal["own"] | bool


def match(
    iou: Float[Tensor, "m n"], low: float, high: float, rescue: Rescue = False, least: float = 0.0
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Matches each of N boxes to the object that it overlaps most (Faster R-CNN, arXiv 1506.01497, section 3.1.2).

    Args:
        iou: Overlap of M objects with N boxes. Either number may be 0.
        low: Boxes whose largest overlap is less are negative.
        high: Boxes whose largest overlap is at least this are positive; those between are ignored.
        rescue: Whether every box that ties for an object's largest overlap is positive too. It is matched to the object
            of its own largest overlap, or with "own" to the object that it is rescued for, the last one of several
            (MMDetection). An object that no box overlaps rescues none, where published code takes all boxes.
        least: An object whose largest overlap is less rescues no box.

    Returns:
        For each box the object of its largest overlap (0 if there are no objects), and the same where the match is
        positive, `NEGATIVE` or `IGNORED` elsewhere.
    """
    count = iou.shape[1]
    if not iou.numel():
        return iou.new_zeros(count, dtype=torch.int64), iou.new_full((count,), NEGATIVE, dtype=torch.int64)
    best, nearest = iou.max(0)
    matched = torch.where(best >= high, nearest, IGNORED)
    matched = torch.where(best < low, NEGATIVE, matched)
    if rescue:
        largest = iou.amax(1, keepdim=True)
        ties = (iou == largest) & (largest > 0) & (largest >= least)
        if rescue == "own":
            last = len(iou) - 1 - ties.flip(0).int().argmax(0)
            nearest = torch.where(ties.any(0), last, nearest)
        matched = torch.where(ties.any(0), nearest, matched)
    return nearest, matched


def match_each(
    objects: Float[Tensor, "m 4"], boxes: Float[Tensor, "n 4"], low: float, high: float, at_once: int = 64
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Matches as `match` does, and every object with a box of its own, however small their overlap (SSD, YOLACT).

    Of all pairs of an object and a box that are both unpaired, the one of the largest overlap is paired, until every
    object has a box; that box is then positive for this object. Ties go to the first object, then to the first box.

    Args:
        objects: M boxes of objects, x0, y0, x1, y1.
        boxes: N boxes to match, in the same frame.
        low: See `match`.
        high: See `match`.
        at_once: Number of objects compared together; bounds the memory to about 60 N `at_once` bytes.

    Returns:
        As `match`.
    """
    count, own = len(boxes), min(len(objects), len(boxes))
    best = torch.full((count,), -1.0, device=boxes.device)
    nearest = torch.zeros(count, dtype=torch.int64, device=boxes.device)
    later = torch.arange(count - 1, -1, -1, device=boxes.device)
    values: list[Tensor] = []
    places: list[Tensor] = []
    for first in range(0, len(objects), at_once):
        iou = pairwise_iou(objects[first : first + at_once], boxes)  # (m, N)
        largest, row = iou.max(0)
        nearest = torch.where(largest > best, row + first, nearest)
        best = torch.maximum(largest, best)
        # No object needs more candidates than there are objects. The bits of a positive float sort as its value does.
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
    """Draws a random sample of positives and negatives.

    Args:
        positive: Which of N boxes are positive.
        negative: Which are negative.
        size: Number of boxes to draw, if there are as many.
        share: Largest share of positives.

    Returns:
        Indices of at most `size * share` positives, and of negatives that fill the sample up to `size`.
    """
    candidates, others = positive.nonzero().flatten(), negative.nonzero().flatten()
    take = min(len(candidates), int(size * share))
    rest = min(len(others), size - take)
    chosen = torch.randperm(len(candidates), device=positive.device)[:take]
    filling = torch.randperm(len(others), device=positive.device)[:rest]
    return candidates[chosen], others[filling]

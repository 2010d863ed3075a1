"""Boxes x0, y0, x1, y1: overlap, coding, pyramid levels, suppression.

Coordinates are continuous, so that a box is x1 - x0 wide. Code bases that descend from Detectron count pixels instead,
x1 - x0 + 1; functions with `plus_one` do so on request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.errors import UsageError

# Upper bound of dw and dh in `decode`: sides grow by a factor of at most 1000 / 16 (Fast R-CNN's code and all since).
LARGEST_LOG_SCALE = math.log(1000 / 16)

LevelRule = Literal["detectron2", "torchvision", "mmdetection", "maskrcnn-benchmark"]


# ---- areas and overlaps ----------------------------------------------------------------------------------------------


def area(boxes: Float[Tensor, "*n 4"], plus_one: bool = False) -> Float[Tensor, "*n"]:
    """Width times height of each box; negative sides are not clamped.

    Args:
        boxes: Boxes x0, y0, x1, y1.
        plus_one: Whether sides are x1 - x0 + 1.
    """
    last = 1 if plus_one else 0
    return (boxes[..., 2] - boxes[..., 0] + last) * (boxes[..., 3] - boxes[..., 1] + last)


def pairwise_iou(
    a: Float[Tensor, "*k n 4"], b: Float[Tensor, "*k m 4"], plus_one: bool = False
) -> Float[Tensor, "*k n m"]:
    """Intersection over union of every box in `a` with every box in `b`.

    Args:
        a: N boxes x0, y0, x1, y1; leading axes are batches.
        b: M boxes.
        plus_one: Whether sides are x1 - x0 + 1.

    Returns:
        IoU in [0, 1]; 0 where the union is empty.
    """
    if plus_one:
        a, b = _with_last_pixel(a), _with_last_pixel(b)
    both = _intersection(a, b)
    union = area(a)[..., :, None] + area(b)[..., None, :] - both
    return torch.where(both > 0, both / union, both.new_zeros(()))


def pairwise_ioa(
    a: Float[Tensor, "*k n 4"], b: Float[Tensor, "*k m 4"], plus_one: bool = False
) -> Float[Tensor, "*k n m"]:
    """Intersection over area: the share of every box in `a` that lies inside every box in `b`.

    This is what COCO and most assigners compare with crowd regions (`b`).

    Args:
        a: N boxes x0, y0, x1, y1, whose areas divide; leading axes are batches.
        b: M boxes.
        plus_one: Whether sides are x1 - x0 + 1.

    Returns:
        Shares in [0, 1]; 0 for boxes of `a` without area.
    """
    if plus_one:
        a, b = _with_last_pixel(a), _with_last_pixel(b)
    both = _intersection(a, b)
    return torch.where(both > 0, both / area(a)[..., :, None], both.new_zeros(()))


def _with_last_pixel(boxes: Tensor) -> Tensor:
    """Boxes that end at their last pixel -> boxes that end behind it."""
    return boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area of the intersection of all pairs."""
    # One axis after the other: rows of M numbers are several times faster than M rows of two.
    across, down = (
        torch.minimum(a[..., :, None, i + 2], b[..., None, :, i + 2])
        - torch.maximum(a[..., :, None, i], b[..., None, :, i])
        for i in (0, 1)
    )
    return across.clamp(min=0) * down.clamp(min=0)


def generalised_iou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*n"]:
    """Generalised IoU of corresponding boxes (arXiv 1902.09630).

    Args:
        a: Boxes x0, y0, x1, y1.
        b: Boxes, broadcast against `a`.

    Returns:
        IoU minus the share of the smallest enclosing box that is in neither, in [-1, 1].
    """
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    union = area(a) + area(b) - both
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    tiny = torch.finfo(union.dtype).tiny
    return both / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


# ---- other forms -----------------------------------------------------------------------------------------------------


def corners(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Converts centre x, centre y, width, height to x0, y0, x1, y1."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def clip(boxes: Float[Tensor, "*n 4"], size: tuple[float, float], plus_one: bool = False) -> Float[Tensor, "*n 4"]:
    """Clips boxes to an image.

    Args:
        boxes: Boxes x0, y0, x1, y1.
        size: Height and width of the image.
        plus_one: Whether x1 and y1 are the last pixel of a box, at most W - 1 and H - 1.
    """
    last = 1 if plus_one else 0
    limit = boxes.new_tensor([size[1] - last, size[0] - last] * 2)
    return boxes.clamp(min=0).minimum(limit)


def around(boxes: Float[Tensor, "n 4"], owners: Int[Tensor, " n"], count: int) -> Float[Tensor, "d 4"]:
    """The smallest box around all boxes of each owner.

    Args:
        boxes: Boxes x0, y0, x1, y1.
        owners: The owner of each box, 0 ... `count` - 1.
        count: Number of owners.

    Returns:
        One box per owner; zeros for an owner without boxes.
    """
    index = owners[:, None].expand(-1, 2)
    low = boxes.new_zeros(count, 2).scatter_reduce(0, index, boxes[:, :2], "amin", include_self=False)
    high = boxes.new_zeros(count, 2).scatter_reduce(0, index, boxes[:, 2:], "amax", include_self=False)
    return torch.cat([low, high], 1)


# ---- coding ----------------------------------------------------------------------------------------------------------


def encode(
    boxes: Float[Tensor, "n 4"],
    targets: Float[Tensor, "n 4"],
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    plus_one: bool = False,
) -> Float[Tensor, "n 4"]:
    """Deltas dx, dy, dw, dh that take `boxes` to `targets` (R-CNN, arXiv 1311.2524, appendix C).

    Args:
        boxes: Anchors or proposals x0, y0, x1, y1.
        targets: The boxes that they should become.
        weights: Factors of dx, dy, dw and dh.
        plus_one: Whether sides are x1 - x0 + 1 (maskrcnn-benchmark, Detectron).
    """
    x, y, w, h = _centres(boxes, plus_one)
    tx, ty, tw, th = _centres(targets, plus_one)
    wx, wy, ww, wh = weights
    return torch.stack([wx * (tx - x) / w, wy * (ty - y) / h, ww * torch.log(tw / w), wh * torch.log(th / h)], -1)


def decode(
    boxes: Float[Tensor, "*n 4"],
    deltas: Float[Tensor, "*n 4"],
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    plus_one: bool = False,
    symmetric: bool = False,
) -> Float[Tensor, "*n 4"]:
    """Applies deltas to boxes: the inverse of `encode`.

    Args:
        boxes: Anchors or proposals x0, y0, x1, y1.
        deltas: dx, dy, dw, dh; dw and dh are bounded from above by `LARGEST_LOG_SCALE`.
        weights: Factors that the deltas were multiplied by.
        plus_one: Whether sides are x1 - x0 + 1.
        symmetric: Whether dw and dh are also bounded from below, by -`LARGEST_LOG_SCALE` (MMDetection).

    Returns:
        Boxes x0, y0, x1, y1 in float32.
    """
    x, y, w, h = _centres(boxes.float(), plus_one)
    dx, dy, dw, dh = (d / k for d, k in zip(deltas.float().unbind(-1), weights, strict=True))
    least = -LARGEST_LOG_SCALE if symmetric else None
    dw, dh = dw.clamp(least, LARGEST_LOG_SCALE), dh.clamp(least, LARGEST_LOG_SCALE)
    cx, cy, half_w, half_h = dx * w + x, dy * h + y, 0.5 * torch.exp(dw) * w, 0.5 * torch.exp(dh) * h
    last = 1.0 if plus_one else 0.0
    return torch.stack([cx - half_w, cy - half_h, cx + half_w - last, cy + half_h - last], -1)


def _centres(boxes: Tensor, plus_one: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, width and height."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    w, h = x1 - x0, y1 - y0
    if plus_one:
        w, h = w + 1, h + 1
    return x0 + 0.5 * w, y0 + 0.5 * h, w, h


def pyramid_level(
    boxes: Float[Tensor, "n 4"], lowest: int = 2, highest: int = 5, rule: LevelRule = "detectron2"
) -> Int[Tensor, " n"]:
    """The pyramid level that each box is pooled from: floor(4 + log2(sqrt(w h) / 224)) (FPN, arXiv 1612.03144, eq. 1).

    Args:
        boxes: Boxes x0, y0, x1, y1 in pixels of the network's input.
        lowest: The finest level.
        highest: The coarsest level.
        rule: How rounding is kept from moving a box of exactly 112, 224, ... pixels down a level: "detectron2" adds
            1e-8 inside the logarithm, "torchvision" 1e-6 outside of it, "mmdetection" 1e-6 inside, where the side is
            divided by that of the finest level, "maskrcnn-benchmark" 1e-6 inside, with sides x1 - x0 + 1.

    Returns:
        Levels between `lowest` and `highest`.
    """
    if rule == "maskrcnn-benchmark":
        level = torch.floor(4 + torch.log2(torch.sqrt(area(boxes, plus_one=True)) / 224 + 1e-6))
    elif rule == "mmdetection":
        level = torch.floor(2 + torch.log2(torch.sqrt(area(boxes)) / 56 + 1e-6))
    elif rule == "torchvision":
        level = torch.floor(4 + torch.log2(torch.sqrt(area(boxes)) / 224) + 1e-6)
    else:
        level = torch.floor(4 + torch.log2(torch.sqrt(area(boxes)) / 224 + 1e-8))
    return level.clamp(lowest, highest).to(torch.int64)


# ---- suppression -----------------------------------------------------------------------------------------------------


def nms(
    boxes: Float[Tensor, "n 4"],
    scores: Float[Tensor, " _s"],
    groups: Int[Tensor, " _g"],
    threshold: float,
    limit: int | None = None,
    plus_one: bool = False,
) -> Int[Tensor, " kept"]:
    """Greedy non-maximum suppression within groups.

    On the CPU each group is processed separately, since the time of the kernel grows with the square of its input. On
    an accelerator all groups are processed at once: each is shifted to a region of its own, in float64, which moves no
    box by as much as a rounding step of float32. Neither synchronises with the host unless there is a limit.

    Args:
        boxes: Boxes x0, y0, x1, y1.
        scores: The score of each box.
        groups: Boxes of different groups, such as classes or levels, do not suppress each other.
        threshold: Boxes whose IoU with a better one is larger are suppressed.
        limit: Number of boxes to keep at most. Only better boxes decide about a box, so that a few times as many are
            processed first, and more if too few of them remain.
        plus_one: Whether sides are x1 - x0 + 1.

    Returns:
        Indices of the remaining boxes, best first.

    Raises:
        UsageError: If there is not one score and one group per box.
    """
    if not len(boxes) == len(scores) == len(groups):
        raise UsageError(
            f"nms: scores and groups must have one entry per box, got {len(scores)} scores and {len(groups)} groups "
            f"for {len(boxes)} boxes"
        )
    if plus_one:
        boxes = _with_last_pixel(boxes)
    if limit == 0:
        return groups.new_zeros(0, dtype=torch.int64)
    if limit is not None and len(scores) > 8 * limit:
        order, first = scores.argsort(descending=True, stable=True), 8 * limit
        while first < len(order):
            best = order[:first]
            kept = best[nms(boxes[best], scores[best], groups[best], threshold)]
            if len(kept) >= limit and scores[kept[limit - 1]] > scores[order[first]]:  # no equal one is left out
                return kept[:limit]
            first *= 4
    from torchvision.ops import nms as suppress

    if boxes.device.type == "cpu":
        order = groups.argsort(stable=True)
        parts = [
            rows[suppress(boxes[rows], scores[rows], threshold)] for rows in order.split(groups.bincount().tolist())
        ]
        kept = torch.cat(parts) if parts else order
    else:
        exact = boxes.double()
        span = exact.amax() - exact.amin().clamp(max=0) + 1 if len(boxes) else exact.new_zeros(())
        kept = suppress(exact + (groups.to(exact) * span)[:, None], scores.double(), threshold)
    return kept[scores[kept].argsort(descending=True, stable=True)][:limit]

"""Boxes x0, y0, x1, y1 in continuous coordinates (width = x1 - x0): overlap, coding, levels, suppression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Decoded sides are at most 1000 / 16 times the anchor's: the bound that Fast R-CNN's code introduced and all kept.
LARGEST_LOG_SCALE = math.log(1000 / 16)

LevelRule = Literal["detectron2", "torchvision", "maskrcnn-benchmark"]


def area(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Width times height; negative sides count as they are."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Float[Tensor, "*k n 4"], b: Float[Tensor, "*k m 4"]) -> Float[Tensor, "*k n m"]:
    """Overlap of every box in `a` with every box in `b`; 0 where the union is empty."""
    # One axis after the other: rows of M numbers are several times faster than M rows of two.
    across, down = (
        torch.minimum(a[..., :, None, i + 2], b[..., None, :, i + 2])
        - torch.maximum(a[..., :, None, i], b[..., None, :, i])
        for i in (0, 1)
    )
    both = across.clamp(min=0) * down.clamp(min=0)
    union = area(a)[..., :, None] + area(b)[..., None, :] - both
    return torch.where(both > 0, both / union, both.new_zeros(()))


def generalised_iou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*n"]:
    """GIoU of boxes with boxes, broadcast (arXiv 1902.09630): the overlap, less the share of the smallest box around
    both that is in neither. -1 ... 1."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    union = area(a) + area(b) - both
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    tiny = torch.finfo(union.dtype).tiny
    return both / union.clamp(min=tiny) - (around - union) / around.clamp(min=tiny)


def corners(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Centre x, y, width, height -> x0, y0, x1, y1."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def clip(boxes: Float[Tensor, "*n 4"], size: tuple[float, float]) -> Float[Tensor, "*n 4"]:
    """Boxes cut at the borders of an image of `size` (H, W)."""
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    return boxes.clamp(min=0).minimum(limit)


def around(boxes: Float[Tensor, "n 4"], owners: Int[Tensor, " n"], count: int) -> Float[Tensor, "d 4"]:
    """The box around all boxes of each of `count` owners; zeros for one that has none."""
    index = owners[:, None].expand(-1, 2)
    low = boxes.new_zeros(count, 2).scatter_reduce(0, index, boxes[:, :2], "amin", include_self=False)
    high = boxes.new_zeros(count, 2).scatter_reduce(0, index, boxes[:, 2:], "amax", include_self=False)
    return torch.cat([low, high], 1)


def encode(
    boxes: Float[Tensor, "n 4"],
    targets: Float[Tensor, "n 4"],
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    plus_one: bool = False,
) -> Float[Tensor, "n 4"]:
    """Deltas dx, dy, dw, dh that take `boxes` to `targets` (R-CNN, arXiv 1311.2524, appendix C).

    `plus_one`: sides are x1 - x0 + 1, as maskrcnn-benchmark and Detectron count pixels.
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
) -> Float[Tensor, "*n 4"]:
    """The boxes that `deltas` make of `boxes`, in float32; dw and dh are bounded from above only."""
    x, y, w, h = _centres(boxes.float(), plus_one)
    dx, dy, dw, dh = (d / k for d, k in zip(deltas.float().unbind(-1), weights, strict=True))
    dw, dh = dw.clamp(max=LARGEST_LOG_SCALE), dh.clamp(max=LARGEST_LOG_SCALE)
    cx, cy, half_w, half_h = dx * w + x, dy * h + y, 0.5 * torch.exp(dw) * w, 0.5 * torch.exp(dh) * h
    last = 1.0 if plus_one else 0.0
    return torch.stack([cx - half_w, cy - half_h, cx + half_w - last, cy + half_h - last], -1)


def _centres(boxes: Tensor, plus_one: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    w, h = x1 - x0, y1 - y0
    if plus_one:
        w, h = w + 1, h + 1
    return x0 + 0.5 * w, y0 + 0.5 * h, w, h


def pyramid_level(
    boxes: Float[Tensor, "n 4"], lowest: int = 2, highest: int = 5, rule: LevelRule = "detectron2"
) -> Int[Tensor, " n"]:
    """The level k = floor(4 + log2(sqrt(w h) / 224)) that a box is read from (FPN, arXiv 1612.03144, eq. 1).

    The three code bases keep a box of exactly 112, 224, ... pixels from falling a level in three ways: detectron2 adds
    1e-8 inside the logarithm, torchvision 1e-6 outside it, maskrcnn-benchmark 1e-6 inside and counts sides + 1.
    """
    if rule == "maskrcnn-benchmark":
        ratio = torch.sqrt((boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)) / 224
        level = torch.floor(4 + torch.log2(ratio + 1e-6))
    elif rule == "torchvision":
        level = torch.floor(4 + torch.log2(torch.sqrt(area(boxes)) / 224) + 1e-6)
    else:
        level = torch.floor(4 + torch.log2(torch.sqrt(area(boxes)) / 224 + 1e-8))
    return level.clamp(lowest, highest).to(torch.int64)


def nms(
    boxes: Float[Tensor, "n 4"],
    scores: Float[Tensor, " n"],
    groups: Int[Tensor, " n"],
    threshold: float,
    limit: int | None = None,
) -> Int[Tensor, " kept"]:
    """Indices of the boxes that survive greedy suppression within each group, best first.

    On the host each group is taken by itself, since the kernel's time grows with the square of what it is given. On an
    accelerator all go at once: each group is shifted into a place of its own, in float64, where that does not move a
    box by as much as a rounding step of float32 would. Neither looks at how many there are, unless there is a limit.

    limit  so many of the survivors are wanted, the best. Only better boxes decide about a box: the best few times as
           many are looked at first, and more only if too few of them survive
    """
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

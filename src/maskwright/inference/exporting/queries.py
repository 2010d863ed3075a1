"""Systems of queries, and those that label each pixel, with a fixed number of objects."""

# Some functions of torch have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maskwright.inference.exporting.fixed import (
    CHUNK,
    Found,
    Limits,
    best,
    clipped,
    mask_boxes,
    padded,
    pasted,
    taken,
)
from maskwright.inference.exporting.placing import Grid
from maskwright.ops import boxes as box_ops


def queries(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """MaskFormer, Mask2Former and EoMT (`kinds.queries`)."""
    probabilities = raw.classes[-1, 0].float().softmax(-1)[:, :-1]
    kinds = probabilities.shape[1]
    score, pair = probabilities.flatten().topk(min(limits.detections, probabilities.shape[0] * kinds))
    query, label = pair.div(kinds, rounding_mode="floor"), pair % kinds
    if system.stuff:
        score = torch.where(system.thing_classes()[label], score, -1.0)
    means, masks = list[Tensor](), list[Tensor]()
    for part in raw.masks_of(0, query).split(CHUNK):
        values = grid.resize(part)
        inside = values > 0
        area = inside.flatten(1).sum(1)
        means.append(torch.where(area > 0, (values.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6), -1.0))
        masks.append(inside)
    quality, bits = torch.cat(means), torch.cat(masks)
    score = torch.where((score > 0) & (quality >= 0), score * quality, -1.0)
    score = torch.where(score >= limits.score_threshold, score, -1.0)
    score, order = best(score, limits.detections)
    bits, label = taken(order, bits, label)
    return Found(mask_boxes(bits), score, label, bits, on_grid=True)


def detr(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """DETR, whose masks are resized by nearest neighbours."""
    score, label = raw.logits[-1, 0].float().softmax(-1)[:, :-1].max(-1)
    score = torch.where(system.thing_classes()[label] & (score >= limits.score_threshold), score, -1.0)
    score, order = best(score, limits.detections)
    boxes, label = taken(order, box_ops.corners(raw.boxes[-1, 0].float()), label)
    boxes = clipped(boxes * grid.valid.flip(0).repeat(2), grid.valid)
    if system.masks is None:
        return Found(boxes, score, label)
    planes = system.masks_of(raw, 0, order.clamp(max=raw.logits.shape[2] - 1))
    parts = list[Tensor]()
    for part in planes.split(CHUNK):
        logits = functional.interpolate(part[:, None], size=raw.size, mode="bilinear", align_corners=False)[:, 0]
        parts.append(grid.nearest(logits > 0))
    return Found(boxes, score, label, torch.cat(parts))


def boxes_of_queries(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """H-DETR."""
    boxes, label, score = (values[0] for values in system.best(raw, limits.detections))
    score = torch.where(score >= limits.score_threshold, score, -1.0)
    boxes, label, score = (padded(values, limits.detections) for values in (boxes, label, score))
    return Found(clipped(boxes * grid.valid.flip(0).repeat(2), grid.valid), score, label)


def masks_of_queries(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """Mask Frozen-DETR: a mask inside of the box of each query."""
    kinds = raw.scores.shape[2]
    score, pair = raw.scores[0].flatten().topk(min(limits.detections, raw.scores.shape[1] * kinds))
    score = torch.where((score >= limits.score_threshold) & (score > 0), score, -1.0)
    row, label = pair.div(kinds, rounding_mode="floor"), pair % kinds
    frames = clipped(raw.boxes[0][row], grid.valid)
    logits, quality = system.masks_of(raw, 0, frames, row)
    score = torch.where(score > 0, score * quality.clamp(0, 1), -1.0)
    score = torch.where(score >= limits.score_threshold, score, -1.0)
    score, order = best(score, limits.detections)
    frames, label, grids = taken(order, frames, label, logits.sigmoid())
    return Found(frames, score, label, pasted(grids, grid.boxes(frames), grid, "continuous", 0.5))


def regions(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """PointRend for semantic segmentation: of each class that is not stuff, all of its pixels."""
    score, areas, labels = labelled(system, raw, grid)
    real = system.thing_classes() & (areas > 0) & (score >= limits.score_threshold)
    values, label = best(torch.where(real, score, -1.0), limits.detections)
    label = label.clamp(max=len(system.classes) - 1)
    masks = labels == label[:, None, None]
    return Found(mask_boxes(masks), values, label, masks, on_grid=True)


def labelled(system: Any, raw: Any, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Mean probability and number of pixels of each class, and the class of each pixel; -1 outside of the image."""
    labels, probability = label_plane(system.refined(raw)[0], grid)
    hits = torch.stack([labels == kind for kind in range(len(system.classes))])
    areas = hits.flatten(1).sum(1)
    sums = torch.where(hits, probability, 0.0).flatten(1).sum(1)
    return sums / areas.clamp(min=1), areas, labels


def label_plane(logits: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The best class of each pixel and its probability; -1 and 0 outside of the image, as `ops.planes.label_plane`."""
    (down, rows), (across, columns) = (grid.labelled(logits.shape[axis + 1], axis) for axis in (0, 1))
    values = down @ logits.float() @ across.T
    largest, index = values.max(0)
    seen = rows[:, None] & columns
    return torch.where(seen, index, -1), torch.where(seen, (largest - values.logsumexp(0)).exp(), 0.0)

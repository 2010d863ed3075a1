"""Systems that predict contours, with a fixed number of objects."""

# Some functions of torch have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskwright.inference.exporting.filling import fill_coco, fill_pixels
from maskwright.inference.exporting.fixed import MOST_CANDIDATES, Found, Limits, best, kept, taken
from maskwright.inference.exporting.placing import Grid
from maskwright.ops.contours import decode_chebyshev, ray_points

MOST_COMPONENTS = 2  # for each row of the result, of objects that are split


def polar(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """PolarMask and FourierNet, and ESE-Seg with their head; see `systems.polarmask.polar_detections`."""
    from maskwright.blocks import fcos
    from maskwright.systems.families.polar import LONGEST, with_last_pixel
    from maskwright.systems.polarmask import Thresholds, extent_of

    code, before = system.code, 1000 if system.name != "ese-seg" else 400
    own = Thresholds.requested(limits.score_threshold, limits.nms_threshold or 0.5, limits.detections, before)
    rows = list[tuple[Tensor, ...]]()
    for level, places in enumerate(fcos.locations(raw.classes)):
        outputs = (raw.classes, raw.centerness, raw.codes, raw.boxes or raw.codes)
        classes, central, values, logs = (levels[level][0].flatten(1).T.float() for levels in outputs)
        classes, central = classes.sigmoid(), central.sigmoid()
        order = (classes * central).amax(1).topk(min(before, classes.shape[0])).indices
        values, logs = values[order], logs[order]
        extent = logs.clamp(max=LONGEST).exp() if raw.boxes else extent_of(code.decode(values))
        rows.append((places[order], classes[order], central[order, 0], values, extent))
    places, classes, central, values, extent = (torch.cat(parts) for parts in zip(*rows, strict=True))
    limit = (grid.valid - 1).flip(0)
    corners = fcos.boxes_from_distances(places, extent).unflatten(1, (2, 2)).clamp(min=0).minimum(limit)
    frames = with_last_pixel(grid.points(corners).flatten(1))
    scores = classes * (central[:, None] + system.rules.offset)
    flat = torch.where((classes > own.score) & (scores >= own.final), scores, -1.0).flatten()
    score, pair = flat.topk(min(MOST_CANDIDATES, flat.shape[0]))
    kinds = classes.shape[1]
    row, label = pair.div(kinds, rounding_mode="floor"), pair % kinds
    keep = kept(frames[row], score, label, kinds, own.nms)
    score, order = best(torch.where(keep, score, -1.0), limits.detections)
    row, label = taken(order, row, label)
    ends = ray_points(places[row], code.decode(values[row])).clamp(min=0).minimum(limit)
    masks = fill_pixels(grid.points(ends), grid.size, max(grid.canvas))
    boxes = frames[row].clamp(min=0).minimum(grid.limit.flip(0).repeat(2))
    return Found(boxes, score, label, masks, on_grid=True)


def chebyshev(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """ESE-Seg."""
    from maskwright.systems.families.polar import PolarRaw

    if isinstance(raw, PolarRaw):
        return polar(system, raw, grid, limits)
    rows = system.rows(raw.shapes)
    boxes, centres = (values[0] for values in system.boxes(raw, rows))
    codes = system.coefficients(rows)[0]
    every = (system.rows(raw.classes).sigmoid() * rows[..., 6 + system.count, None].sigmoid())[0]  # (R, K)
    score, pair = every.flatten().topk(min(400, every.shape[0] * every.shape[1]))
    score = torch.where(score > limits.score_threshold, score, -1.0)
    row, label = pair.div(every.shape[1], rounding_mode="floor"), pair % every.shape[1]
    assert limits.nms_threshold is not None
    keep = kept(boxes[row], score, label, every.shape[1], limits.nms_threshold)
    score, order = best(torch.where(keep, score, -1.0), limits.detections)
    row, label = taken(order, row, label)
    lines = grid.points(decode_chebyshev(codes[row], centres[row], boxes[row]))
    lines = lines.clamp(min=0).minimum(grid.limit.flip(0))
    return Found(boxes[row], score, label, fill_coco(lines, grid.size, max(grid.canvas)))


def snakes(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """Deep Snake. With components, of each image the best of them are outlined, twice as many as there are rows."""
    from maskwright.blocks.snake import CELLS, STRIDE
    from maskwright.ops.centres import find_peaks

    height, width = raw.centres.shape[2:]
    score, label, cell = (values[0] for values in find_peaks(raw.centres, limits.detections))
    sides = raw.sizes[0].float().flatten(1).T[cell]
    middle = torch.stack([cell % width, cell.div(width, rounding_mode="floor")], 1).float()
    last = torch.tensor([width - 1, height - 1], dtype=torch.float32)
    boxes = torch.cat([(middle - sides / 2).clamp(min=0), (middle + sides / 2).minimum(last)], 1)
    score = torch.where(score > limits.score_threshold, score, -1.0)
    overlap = limits.nms_threshold
    if overlap is None and system.components is not None:
        overlap = 0.7
    if overlap is not None:
        score = torch.where(kept(boxes, score, label, len(system.classes), overlap, plus_one=True), score, -1.0)
    score, order = best(score, limits.detections)
    boxes, label = taken(order, boxes, label)
    parts, owners, present = boxes, torch.arange(limits.detections), None
    if system.components is not None:
        whole = torch.isin(label, torch.tensor(system.whole, dtype=torch.int64))
        logits, sizes = system.components(raw.feature, boxes, torch.zeros_like(label))
        values, place = logits.float().sigmoid().flatten(1).topk(min(50, CELLS[0] * CELLS[1]))
        sides = sizes.float().flatten(2).gather(2, place[:, None].expand(-1, 2, -1)).transpose(1, 2)
        inner = torch.stack([place % CELLS[1], place.div(CELLS[1], rounding_mode="floor")], -1).float()
        frames = boxes[:, None]
        middle = inner / torch.tensor([CELLS[1], CELLS[0]]) * (frames[..., 2:] - frames[..., :2]) + frames[..., :2]
        parts = torch.cat([middle - sides / 2, middle + sides / 2], 2).flatten(0, 1)
        owners = torch.arange(limits.detections)[:, None].expand_as(values).flatten()
        values = torch.where((values > 0.25) & ~whole[:, None] & (score > 0)[:, None], values, -1.0).flatten()
        split = kept(parts, values, owners, limits.detections, 0.1, plus_one=True)
        values = torch.cat([torch.where(split, values, -1.0), torch.where(whole & (score > 0), 2.0, -1.0)])
        parts = torch.cat([parts, boxes])
        owners = torch.cat([owners, torch.arange(limits.detections)])
        values, order = best(values, MOST_COMPONENTS * limits.detections)
        parts, owners, present = parts[order], owners[order], values > 0
    lines = system.outlines(raw, parts, torch.zeros_like(owners), at_once=parts.shape[0])
    lines = grid.points(lines.nan_to_num(0.0, 0.0, 0.0) * STRIDE)
    masks = fill_coco(lines, grid.size, max(grid.canvas))
    if present is not None:
        mine = ((owners == torch.arange(limits.detections)[:, None]) & present).float()  # (N, parts)
        masks = (mine @ masks.float().flatten(1)).unflatten(1, (masks.shape[1], masks.shape[2])) > 0
        score = torch.where(mine.any(1), score, -1.0)
    return Found(boxes * STRIDE, score, label, masks)

"""Systems that predict objects at each location, or in each window, with a fixed number of objects."""

# Some functions of torch have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.inference.exporting.fixed import (
    CHUNK,
    MOST_CANDIDATES,
    Found,
    Limits,
    best,
    clipped,
    kept,
    mask_boxes,
    pasted,
    taken,
)
from maskwright.inference.exporting.placing import Grid
from maskwright.inference.exporting.two_stage import among_all
from maskwright.ops import boxes as box_ops
from maskwright.ops.boxes import pairwise_iou
from maskwright.ops.prototypes import assemble
from maskwright.ops.prototypes import decode_boxes as decode_offsets
from maskwright.ops.suppression import fast_nms, matrix_nms
from maskwright.ops.window_tensors import swap_windows

MOST_WINDOWS = 2000  # of sliding windows, before suppression
FINEST_STRIDE, LEAST_WINDOWS = 4, 8  # of TensorMask: its finest level; objects for which each level has room


# ---- locations of a pyramid ------------------------------------------------------------------------------------------


def located(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """FCOS, CenterMask and BlendMask (`families.fcos`), also with a semantic branch."""
    from maskwright.blocks import fcos
    from maskwright.systems.blendmask import BlendMask
    from maskwright.systems.families.fcos import Located, per_image

    blends = isinstance(system, BlendMask)
    score, label, place, first = system.ranked(
        raw, limits.score_threshold, MOST_CANDIDATES, "product" if blends else None
    )
    levels = system.locations(raw)
    rows = zip(levels, system.strides, strict=True)
    strides = torch.cat([torch.full((own.shape[0],), float(stride)) for own, stride in rows])
    points, distances = torch.cat(levels), per_image(raw.distances).float() * strides[:, None]
    score, label, place = score[0], label[0], place[0]
    frames = fcos.boxes_from_distances(points[place], distances[0][place])
    frames = clipped(frames, grid.valid) if system.rules.clip else frames
    usable = score > (limits.score_threshold if limits.score_threshold > first else -0.5)
    if system.rules.solid:
        usable = usable & (frames[:, 2:] > frames[:, :2]).all(1)
    score = torch.where(usable, score, -1.0)
    assert limits.nms_threshold is not None
    keep = kept(frames, score, label, system.head_classes, limits.nms_threshold)
    score, order = best(torch.where(keep, score, -1.0), limits.detections)
    frames, label, place = taken(order, frames, label, place)
    if "masks" not in system.outputs:
        return Found(frames, score, label)
    if blends:
        (probabilities,) = system.read_boxes(raw, [Located(frames, score, label, place)])
    else:
        (probabilities,), (quality,) = system.read_boxes(raw, [frames], [label], [raw.size])
        if not limits.box_scores:
            score = torch.where(score >= 0, (score * quality).clamp(0, 1), -1.0)
            if limits.score_threshold > system.rules.score_threshold:
                score = torch.where(score > limits.score_threshold, score, -1.0)
        score, order = score.topk(limits.detections)
        frames, label, probabilities = frames[order], label[order], probabilities[order]
    masks = pasted(probabilities, grid.boxes(frames), grid, "continuous", limits.mask_threshold)
    return Found(frames, score, among_all(system, label), masks)


def anchored(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """RetinaNet."""
    from maskwright.systems.retinanet import WEIGHTS

    kinds, scores, labels, boxes = len(system.classes), list[Tensor](), list[Tensor](), list[Tensor]()
    anchors = system.anchors(raw.features, raw.size)
    rows = zip(system.per_anchor(raw.logits, kinds), system.per_anchor(raw.deltas, 4), anchors, strict=True)
    for logits, deltas, own in rows:
        probability = logits[0].sigmoid().flatten()
        ranked = torch.where(probability > limits.score_threshold, probability, -1.0)
        values, index = ranked.topk(min(1000, ranked.shape[0]))
        place = index.div(kinds, rounding_mode="floor")
        boxes.append(box_ops.decode(own[place], deltas[0][place], WEIGHTS))
        scores.append(values)
        labels.append(index % kinds)
    score, label, frames = torch.cat(scores), torch.cat(labels), torch.cat(boxes)
    frames = clipped(frames, grid.valid) if system.rules.clip else frames
    assert limits.nms_threshold is not None
    keep = kept(frames, score, label, kinds, limits.nms_threshold)
    score, order = best(torch.where(keep, score, -1.0), limits.detections)
    frames, label = taken(order, frames, label)
    return Found(frames, score, label)


def embedded(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """EmbedMask: masks are the pixels near an object in an embedding; see `ops.embeddings.mask_windows`."""
    from maskwright.blocks import fcos
    from maskwright.ops.embeddings import CELL, OUTSIDE
    from maskwright.systems.embedmask import CANDIDATE

    kinds, candidate = len(system.classes), min(limits.score_threshold, CANDIDATE)
    levels = fcos.locations(raw.logits)
    scores, labels, places, first = list[Tensor](), list[Tensor](), list[Tensor](), 0
    for logits, central in zip(raw.logits, raw.centerness, strict=True):
        probability = logits[0].float().sigmoid().flatten(1)
        ranked = torch.where(probability > candidate, probability * central[0].float().sigmoid().flatten(1), -1.0)
        values, index = ranked.T.flatten().topk(min(1000, ranked.shape[0] * ranked.shape[1]))
        scores.append(values)
        labels.append(index % kinds)
        places.append(index.div(kinds, rounding_mode="floor") + first)
        first += probability.shape[1]
    score, label, place = torch.cat(scores), torch.cat(labels), torch.cat(places)
    rows = zip(levels, fcos.STRIDES, strict=True)
    strides = torch.cat([torch.full((own.shape[0],), float(stride)) for own, stride in rows])
    distances = _locations(raw.distances) * strides[:, None]
    frames = fcos.boxes_from_distances(torch.cat(levels)[place], distances[place])
    frames = clipped(frames, grid.valid, system.inclusive)
    least = limits.score_threshold if limits.score_threshold > CANDIDATE else -0.5
    score = torch.where(score > least, score, -1.0)
    assert limits.nms_threshold is not None
    keep = kept(frames, score, label, kinds, limits.nms_threshold, system.inclusive)
    score, order = best(torch.where(keep, score, -1.0), limits.detections)
    frames, label, place = taken(order, frames, label, place)

    # The probability of each cell, zero (or its logarithm) outside of the region around the box.
    pixels = functional.interpolate(raw.pixels, scale_factor=2.0, mode="bilinear", align_corners=False)[0]
    height, width = pixels.shape[1:]
    embeddings, margins = _locations(raw.embeddings)[place], _locations(raw.margins)[place]
    region, corners = frames / CELL, torch.tensor([width, height], dtype=torch.float32)
    if system.rules.region == "padded":
        low, high = region[:, :2].trunc() - 2, region[:, 2:].trunc() + 2
    else:
        low, high = (region[:, :2] - 1).ceil(), (region[:, 2:] + 1).ceil()
    low, high = low.clamp(min=0), high.minimum(corners)
    x, y = torch.arange(width, dtype=torch.float32), torch.arange(height, dtype=torch.float32)
    inside = ((y >= low[:, 1:]) & (y < high[:, 1:]))[:, :, None] & ((x >= low[:, :1]) & (x < high[:, :1]))[:, None]
    logarithm, threshold = system.rules.logarithm, limits.mask_threshold
    if logarithm:
        threshold = max(math.log(threshold), OUTSIDE + 1e-3) if threshold > 0 else OUTSIDE + 1e-3
    down, across = (_stretching(grid, axis, (height, width)[axis], CELL) for axis in (0, 1))
    masks = list[Tensor]()
    for own, margin, seen in zip(embeddings.split(CHUNK), margins.split(CHUNK), inside.split(CHUNK), strict=True):
        apart = pixels.flatten(1) - own[:, :, None]  # (n, d, h w)
        values = -(apart.square() * margin[:, :, None]).sum(1).unflatten(1, (height, width))
        values = torch.where(seen, values if logarithm else values.exp(), OUTSIDE if logarithm else 0.0)
        masks.append(down @ values @ across.T > threshold)
    boxes = grid.frames(frames) + torch.tensor([0.0, 0.0, system.last, system.last])
    boxes = boxes.clamp(min=0).minimum(grid.limit.flip(0).repeat(2))
    return Found(boxes, score, label, torch.cat(masks), on_grid=True)


def _locations(levels: Any) -> Float[Tensor, "n c"]:
    """One row for each location of the first image, in float32."""
    return torch.cat([level[0].flatten(1) for level in levels], 1).T.float()


def _stretching(grid: Grid, axis: int, cells: int, cell: int) -> Float[Tensor, "_h p"]:
    """The weights of `ops.windows.paste_windows` along one axis."""
    pixels = torch.arange(grid.size[axis], dtype=torch.float32) + 0.5
    length = torch.scalar_tensor(cell * cells, dtype=torch.float32)
    if grid.placed is not None:
        scale = grid.placed.scale[1 - axis]
        length, pixels = (length / scale - 1e-3).ceil(), pixels + grid.placed.offset[1 - axis] / scale
    place = (pixels * (cells / length) - 0.5).clamp(0, cells - 1)
    return (1 - (place[:, None] - torch.arange(cells, dtype=torch.float32)).abs()).clamp(min=0)


# ---- whole planes ----------------------------------------------------------------------------------------------------


def prototypes(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """YOLACT and YOLACT++, with fast NMS."""
    from maskwright.systems.yolact import FARTHEST, FAST_NMS_TOP_K, Detections

    height, width = raw.size
    own = raw.logits[0].float().softmax(-1)[:, :-1]  # (P, K)
    boxes = box_ops.corners(decode_offsets(system.anchors(raw), raw.deltas[0].float())).clamp(-FARTHEST, FARTHEST)
    scores = torch.where((own.amax(1) > 0.05)[:, None], own, -1.0).T
    score, anchor = scores.topk(min(FAST_NMS_TOP_K, scores.shape[1]), dim=1)  # (K, n)
    frames = boxes[anchor]
    keep = fast_nms(pairwise_iou(frames, frames) * (score >= 0).float()[:, :, None], limits.nms_threshold)  # pyright: ignore[reportArgumentType] - a number, as the default
    flat = torch.where(keep & (score >= 0), score, -1.0).flatten()
    values, order = best(flat, limits.detections)
    label = torch.arange(score.shape[0])[:, None].expand(score.shape).flatten()
    anchor, label = taken(order, anchor.flatten(), label)
    chosen, coefficients = boxes[anchor], raw.coefficients[0].float()[anchor]
    planes = raw.prototypes[0].float()
    if system.name == "yolact-plus":
        quality = system.quality(Detections(chosen, values, label, coefficients), planes)
        values, order = torch.where(values >= 0, values * quality, -1.0).topk(limits.detections)
        chosen, label, coefficients = chosen[order], label[order], coefficients[order]
    values = torch.where(values > limits.score_threshold, values, -1.0)
    parts = [
        grid.resize(assemble(planes, c, b), steps=1) > limits.mask_threshold
        for c, b in zip(coefficients.split(CHUNK), chosen.split(CHUNK), strict=True)
    ]
    frames = chosen * torch.tensor([width, height, width, height], dtype=torch.float32)
    return Found(frames, values, label, torch.cat(parts))


def cells(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """SOLO, Decoupled SOLO and SOLOv2, with Matrix NMS."""
    from maskwright.systems.families import solo_grid

    grids = system.cells.grids
    levels = [solo_grid.point_nms(level.float().sigmoid())[0].flatten(1).T for level in raw.classes]  # (cells, K)
    candidate = min(0.1, 2 * limits.score_threshold)
    kinds = levels[0].shape[1]
    scores, labels, areas_needed = list[Tensor](), list[Tensor](), list[Tensor]()
    if system.name == "solov2":
        joined = torch.where(torch.cat(levels) > candidate, torch.cat(levels), -1.0).flatten()
        score, pair = joined.topk(min(500, joined.shape[0]))
        cell, label = pair.div(kinds, rounding_mode="floor"), pair % kinds
        minimum = solo_grid.per_cell(grids, solo_grid.STRIDES, score.device)[cell]
        kernels = solo_grid.flatten_cells(raw.kernels)[0]
        masks = system.mask_logits(raw.feature[0], kernels[cell]).sigmoid()
    else:
        plane, chosen = (raw.size[0] // 4, raw.size[1] // 4), list[Tensor]()
        for own, stride in zip(levels, solo_grid.STRIDES, strict=True):
            flat = torch.where(own > candidate, own, -1.0).flatten()
            values, pair = flat.topk(min(100, flat.shape[0]))
            scores.append(values)
            chosen.append(pair.div(kinds, rounding_mode="floor"))
            labels.append(pair % kinds)
            areas_needed.append(torch.full_like(values, float(stride)))
        soft = list(system.cell_masks(raw, 0, chosen, plane))
        score, label, minimum, masks = (torch.cat(v) for v in (scores, labels, areas_needed, soft))
    inside = (masks > 0.5).float().flatten(1)
    areas = inside.sum(1)
    certainty = (masks.flatten(1) * inside).sum(1) / areas.clamp(min=1)
    score = torch.where((areas > minimum) & (score >= 0), score * certainty, -1.0)
    score, order = score.topk(score.shape[0])
    inside, label, masks, areas = inside[order], label[order], masks[order], areas[order]
    both = inside @ inside.T
    iou = both / (areas[:, None] + areas - both).clamp(min=1) * (score >= 0).float()[:, None]
    decayed = torch.where(score >= 0, matrix_nms(iou, score, label), -1.0)
    decayed = torch.where(decayed >= limits.score_threshold, decayed, -1.0)
    values, rows = best(decayed, limits.detections)
    label, masks = taken(rows, label, masks)
    bits = torch.cat([grid.resize(part) > limits.mask_threshold for part in masks.split(CHUNK)])
    return Found(mask_boxes(bits), values, label, bits, on_grid=True)


# ---- windows ---------------------------------------------------------------------------------------------------------


def tensors(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """TensorMask: a window at each location, with a mask of its own."""
    from maskwright.systems.tensormask import BOX_WEIGHTS

    layout, kinds = system.layout(raw), len(system.classes)
    scores = system.rows(raw.logits, kinds)[0].sigmoid().flatten()
    flat = torch.where(scores > limits.score_threshold, scores, -1.0)
    score, pair = flat.topk(min(MOST_CANDIDATES, flat.shape[0]))
    window, label = pair.div(kinds, rounding_mode="floor"), pair % kinds
    frames, count, first = layout.boxes[window], limits.detections, limits.nms_threshold
    assert first is not None
    if raw.deltas:
        frames = box_ops.decode(frames, system.rows(raw.deltas, 4)[0][window], BOX_WEIGHTS)
    else:
        count, first = 3 * count, 0.7
    score, order = best(torch.where(kept(frames, score, label, kinds, first), score, -1.0), count)
    frames, label, window = taken(order, frames, label, window)
    if not raw.deltas:  # boxes are those of the masks, which a second suppression compares
        own = layout.boxes[window]
        for rows, member, logits in _window_masks(system, raw, layout.places[window]):
            outer = own[rows]
            step = ((outer[:, 2:] - outer[:, :2]) / logits.shape[-1]).repeat(1, 2)
            tight = outer[:, :2].repeat(1, 2) + mask_boxes(logits > 0) * step
            frames = frames.index_put((rows,), torch.where(member[:, None], tight, frames[rows]))
        score = torch.where((frames[:, 2:] > frames[:, :2]).all(1), score, -1.0)
        assert limits.nms_threshold is not None
        again = kept(frames, score, label, kinds, limits.nms_threshold)
        score, order = torch.where(again, score, -1.0).topk(limits.detections)
        frames, label, window = frames[order], label[order], window[order]
    outer = grid.frames(layout.boxes[window])
    masks = torch.zeros((limits.detections, *grid.size), dtype=torch.bool)
    for rows, member, logits in _window_masks(system, raw, layout.places[window]):
        own = pasted(logits.float().sigmoid(), outer[rows], grid, "continuous", limits.mask_threshold)
        masks = masks.index_put((rows,), masks[rows] | (own & member[:, None, None]))
    return Found(frames, score, label, masks)


def _window_masks(system: Any, raw: Any, places: Int[Tensor, "n 4"]) -> Any:
    """For each level and size of windows: rows, the best of this level and size first, whether they are of it, and the
    masks that they have there.

    An image has room for few objects as large as the windows of the coarsest levels, so that only as many are computed.
    """
    count, (height, width) = places.shape[0], raw.size
    for level, maps in enumerate(raw.logits):
        limit = torch.tensor([maps.shape[-2] - 1, maps.shape[-1] - 1])
        for size, tensor in enumerate(system.mask_tensors(raw, level)):
            side = FINEST_STRIDE * 2**level * system.windows[size]
            most = min(count, max(LEAST_WINDOWS, LEAST_WINDOWS * height * width // side**2))
            member = (places[:, 0] == level) & (places[:, 3] == size)
            ranked = torch.where(member, count, 0) - torch.arange(count)
            rows = ranked.topk(most).indices
            own = torch.cat([torch.zeros_like(rows)[:, None], places[rows][:, 1:3].minimum(limit)], 1)
            yield rows, member[rows], system._at(tensor, level, own)


def sliding(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """DeepMask and InstanceFCN (`families.sliding`)."""
    windows = system.windows(raw)
    scores = torch.cat([level[0].flatten().float() for level in raw.scores]).sigmoid()
    near = ((windows.centres - grid.valid.flip(0)) * windows.scales[:, None] < system.stride).all(1)
    scores = torch.where(near & (scores >= limits.score_threshold), scores, -1.0)
    count = MOST_WINDOWS if limits.nms_threshold is not None else limits.detections
    score, rows = scores.topk(min(count, scores.shape[0]))
    values = _sliding_masks(system, raw, windows, rows).float()
    values = values - math.log(limits.mask_threshold / (1 - limits.mask_threshold))
    own = windows.boxes[rows]
    step = (own[:, 2:] - own[:, :2]) / torch.tensor([values.shape[2], values.shape[1]])
    tight = mask_boxes(values > 0)
    frames = own[:, :2].repeat(1, 2) + tight * step.repeat(1, 2)
    score = torch.where((tight[:, 2:] > tight[:, :2]).all(1), score, -1.0)
    if limits.nms_threshold is not None:
        keep = kept(frames, score, torch.zeros_like(rows), 1, limits.nms_threshold)
        score = torch.where(keep, score, -1.0)
    score, order = best(score, limits.detections)
    values, own = taken(order, values, own)
    rule = "corners" if system.name == "deepmask" else "continuous"
    masks = pasted(values, grid.frames(own), grid, rule, 0.0, strict=True)
    return Found(mask_boxes(masks), score, torch.zeros_like(order), masks, on_grid=True)


def _sliding_masks(system: Any, raw: Any, windows: Any, rows: Int[Tensor, " k"]) -> Float[Tensor, "k v v"]:
    """The mask logits of some windows."""
    if system.name == "deepmask":
        return system.mask_logits(torch.cat([level[0].flatten(1) for level in raw.features], 1).T[rows])
    places, found = windows.places[rows], torch.zeros(())
    for level, maps in enumerate(raw.maps):
        limit = torch.tensor([maps.shape[-2] - 1, maps.shape[-1] - 1])
        own = torch.cat([torch.zeros_like(places[:, :1]), places[:, 1:].minimum(limit)], 1)
        tensor, factor = system.mask_tensor(raw, level), system.side / system.parts
        values = swap_windows(tensor, factor, own, mode=system.bins, subsampled=False)
        found = torch.where((places[:, 0] == level)[:, None, None], values, found)
    return found

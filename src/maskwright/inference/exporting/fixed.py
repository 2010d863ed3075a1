"""Decoding with a fixed number of objects, so that a graph can hold it: thresholds set scores to -1 instead of
dropping rows, and suppression marks rows. The results are those of `decode`, as long as no image has more candidates
than `MOST_CANDIDATES`."""

# Neither onnxruntime nor some functions of torch have types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.blocks import rpn
from maskwright.inference.exporting.placing import Grid
from maskwright.ops import boxes as box_ops
from maskwright.ops.boxes import pairwise_iou
from maskwright.ops.paste import paste_values
from maskwright.ops.prototypes import assemble
from maskwright.ops.prototypes import decode_boxes as decode_offsets
from maskwright.ops.suppression import fast_nms, matrix_nms

MOST_CANDIDATES = 1000  # (box, class) pairs before suppression
CHUNK = 20  # masks that are resized together


@dataclass(frozen=True)
class Limits:
    """Options of decoding that are fixed in a graph."""

    score_threshold: float
    nms_threshold: float
    detections: int
    mask_threshold: float


@dataclass(frozen=True)
class Found:
    """Objects in a fixed number of rows, best first; rows without an object have a score of at most 0.

    Attributes:
        boxes: In pixels of the input.
        scores: Scores.
        labels: Class indices.
        masks: Computes their masks on a grid; None for boxes alone.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    masks: Callable[[Grid], Bool[Tensor, "n _h _w"]] | None


# ---- parts -----------------------------------------------------------------------------------------------------------


def clipped(boxes: Tensor, valid: Tensor, plus_one: bool = False) -> Tensor:
    """Boxes clipped to the part of the input that the image fills."""
    return boxes.clamp(min=0).minimum((valid - (1 if plus_one else 0)).flip(0).repeat(2))


def kept(
    boxes: Float[Tensor, "m 4"], scores: Float[Tensor, " m"], groups: Int[Tensor, " m"], kinds: int, threshold: float,
    canvas: tuple[int, int], plus_one: bool = False,
) -> Bool[Tensor, " m"]:  # fmt: skip
    """Greedy suppression within groups: each group is moved to a field of its own of a square board."""
    from torchvision.ops import nms  # pyright: ignore[reportMissingTypeStubs]

    if plus_one:
        boxes = boxes + torch.tensor([0.0, 0.0, 1.0, 1.0])
    side = math.ceil(math.sqrt(kinds))
    rows, columns = groups.div(side, rounding_mode="floor"), groups % side
    shift = torch.stack([columns * (canvas[1] + 2), rows * (canvas[0] + 2)], 1).float().repeat(1, 2)
    moved = torch.where((scores >= 0)[:, None], boxes + shift, 0.0)
    index = nms(moved, scores, threshold)
    return torch.zeros(len(boxes)).index_put((index,), torch.ones(())) > 0


def best(scores: Float[Tensor, " m"], count: int) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """The `count` best scores and their rows; rows beyond the last have the score -1."""
    if scores.shape[0] < count:
        scores = torch.cat([scores, scores.new_full((count - scores.shape[0],), -1.0)])
    values, rows = scores.topk(count)
    return values, rows


def padded(values: Tensor, count: int) -> Tensor:
    """`values` with zeros behind, at least `count` rows."""
    if values.shape[0] >= count:
        return values
    return torch.cat([values, values.new_zeros((count - values.shape[0], *values.shape[1:]))])


def _pasted(
    probabilities: Tensor, boxes: Tensor, rule: Any, threshold: float, strict: bool
) -> Callable[[Grid], Tensor]:
    def masks(grid: Grid) -> Tensor:
        parts = [
            paste_values(own, grid.boxes(frames), grid.size, rule=rule)
            for own, frames in zip(probabilities.split(CHUNK), boxes.split(CHUNK), strict=True)
        ]
        return torch.cat([part > threshold if strict else part >= threshold for part in parts])

    return masks


# ---- systems ---------------------------------------------------------------------------------------------------------


def two_stage(system: Any, raw: Any, valid: Tensor, limits: Limits) -> Found:
    """Faster R-CNN, Mask R-CNN and their descendants (`families.two_stage`)."""
    rules, proposal_rules = system.box_rules, system.proposal_rules
    canvas = raw.size
    boxes, logits, kinds = list[Tensor](), list[Tensor](), len(system.classes)
    anchors = system.anchors(raw.features, canvas)
    rows = zip(rpn._rows(raw.objectness, 1), rpn._rows(raw.deltas, 4), anchors, strict=True)  # pyright: ignore[reportPrivateUsage]
    for objectness, deltas, own in rows:
        values, index = objectness[0, :, 0].topk(min(proposal_rules.before[1], own.shape[0]))
        frames = clipped(
            box_ops.decode(own[index], deltas[0][index], plus_one=proposal_rules.plus_one), valid,
            proposal_rules.plus_one,
        )  # fmt: skip
        sides = frames[:, 2:] - frames[:, :2] + (1 if proposal_rules.plus_one else 0)
        least = proposal_rules.smallest_side
        large = (sides >= least if proposal_rules.inclusive else sides > least).all(1)
        ranked = torch.where(large, values.sigmoid(), -1.0)
        keep = kept(
            frames, ranked, torch.zeros_like(index), 1, proposal_rules.nms_threshold, canvas, proposal_rules.plus_one
        )
        boxes.append(frames)
        # Ranked by the logit, which float32 probabilities would make equal; those that are dropped last.
        logits.append(torch.where(keep & large, values, -1e9))
    every, score = torch.cat(boxes), torch.cat(logits)
    score, index = score.topk(min(proposal_rules.after[1], score.shape[0]))
    proposals, real = every[index], score > -1e8
    scores, refined = system.classify(raw, [proposals], [canvas])
    scores = torch.where(real[:, None] & (scores > limits.score_threshold), scores, -1.0)
    values, pair = scores.flatten().topk(min(MOST_CANDIDATES, scores.shape[0] * scores.shape[1]))
    row, label = pair.div(scores.shape[1], rounding_mode="floor"), pair % scores.shape[1]
    frames = refined[row, label] if refined.shape[1] > 1 else refined[row, 0]
    frames = clipped(frames, valid, rules.plus_one)
    if rules.smallest_side > 0:
        values = torch.where((frames[:, 2:] - frames[:, :2] >= rules.smallest_side).all(1), values, -1.0)
    groups = torch.zeros_like(label) if rules.across_classes else label
    keep = kept(frames, values, groups, kinds, limits.nms_threshold, canvas, rules.plus_one)
    values, order = best(torch.where(keep, values, -1.0), limits.detections)
    frames, label = padded(frames, limits.detections)[order], padded(label, limits.detections)[order]
    if getattr(system, "masks", None) is None:
        return Found(system.extents(frames), values, label, None)
    (probabilities,), _ = system.read_boxes(raw, [frames], [label])
    if system.mask_iou is not None:
        quality = system.mask_iou(system.mask_features(raw, [frames]), probabilities).float()
        quality = quality.gather(1, label[:, None])[:, 0]
        values, order = torch.where(values >= 0, values * quality, -1.0).topk(limits.detections)
        frames, label, probabilities = frames[order], label[order], probabilities[order]
    masks = _pasted(probabilities, frames, system.rules.paste, limits.mask_threshold, system.rules.paste_above)
    if getattr(system, "stuff", ()):  # heads have rows for things only
        things = [row for row, name in enumerate(system.classes) if name not in system.stuff]
        label = torch.tensor(things, device=label.device)[label]
    return Found(system.extents(frames), values, label, masks)


def located(system: Any, raw: Any, valid: Tensor, limits: Limits) -> Found:
    """FCOS, CenterMask and BlendMask (`families.fcos`)."""
    from maskwright.blocks import fcos
    from maskwright.systems.families.fcos import Located, per_image

    ranked_by = "product" if system.name == "blendmask" else None
    score, label, place, first = system.ranked(raw, limits.score_threshold, MOST_CANDIDATES, ranked_by)
    levels = system.locations(raw)
    rows = zip(levels, system.strides, strict=True)
    strides = torch.cat([torch.full((own.shape[0],), float(stride)) for own, stride in rows])
    points, distances = torch.cat(levels), per_image(raw.distances).float() * strides[:, None]
    score, label, place = score[0], label[0], place[0]
    frames = fcos.boxes_from_distances(points[place], distances[0][place])
    frames = clipped(frames, valid) if system.rules.clip else frames
    least = limits.score_threshold if limits.score_threshold > first else -0.5
    usable = score > least
    if system.rules.solid:
        usable = usable & (frames[:, 2:] > frames[:, :2]).all(1)
    score = torch.where(usable, score, -1.0)
    keep = kept(frames, score, label, len(system.classes), limits.nms_threshold, raw.size)
    score, order = best(torch.where(keep, score, -1.0), limits.detections)
    frames, label, place = (padded(v, limits.detections)[order] for v in (frames, label, place))
    if "masks" not in system.outputs:
        return Found(frames, score, label, None)
    if system.name == "blendmask":
        (probabilities,) = system.read_boxes(raw, [Located(frames, score, label, place)])
    else:
        (probabilities,), (quality,) = system.read_boxes(raw, [frames], [label], [raw.size])
        score, order = torch.where(score >= 0, (score * quality).clamp(0, 1), -1.0).topk(limits.detections)
        frames, label, probabilities = frames[order], label[order], probabilities[order]
    return Found(frames, score, label, _pasted(probabilities, frames, "continuous", limits.mask_threshold, False))


def anchored(system: Any, raw: Any, valid: Tensor, limits: Limits) -> Found:
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
    frames = clipped(frames, valid) if system.rules.clip else frames
    keep = kept(frames, score, label, kinds, limits.nms_threshold, raw.size)
    score, order = best(torch.where(keep, score, -1.0), limits.detections)
    return Found(padded(frames, limits.detections)[order], score, padded(label, limits.detections)[order], None)


def prototypes(system: Any, raw: Any, valid: Tensor, limits: Limits) -> Found:
    """YOLACT and YOLACT++, with fast NMS."""
    from maskwright.systems.yolact import FARTHEST, FAST_NMS_TOP_K, Detections

    height, width = raw.size
    own = raw.logits[0].float().softmax(-1)[:, :-1]  # (P, K)
    boxes = box_ops.corners(decode_offsets(system.anchors(raw), raw.deltas[0].float())).clamp(-FARTHEST, FARTHEST)
    scores = torch.where((own.amax(1) > 0.05)[:, None], own, -1.0).T
    score, anchor = scores.topk(min(FAST_NMS_TOP_K, scores.shape[1]), dim=1)  # (K, n)
    frames = boxes[anchor]
    keep = fast_nms(pairwise_iou(frames, frames) * (score >= 0).float()[:, :, None], limits.nms_threshold)
    flat = torch.where(keep & (score >= 0), score, -1.0).flatten()
    values, order = best(flat, limits.detections)
    label = torch.arange(score.shape[0])[:, None].expand(score.shape).flatten()
    anchor, label = padded(anchor.flatten(), limits.detections)[order], padded(label, limits.detections)[order]
    chosen, coefficients = boxes[anchor], raw.coefficients[0].float()[anchor]
    planes = raw.prototypes[0].float()
    if system.name == "yolact-plus":
        quality = system.quality(Detections(chosen, values, label, coefficients), planes)
        values, order = torch.where(values >= 0, values * quality, -1.0).topk(limits.detections)
        chosen, label, coefficients = chosen[order], label[order], coefficients[order]
    values = torch.where(values > limits.score_threshold, values, -1.0)

    def masks(grid: Grid) -> Tensor:
        parts = [
            grid.resize(assemble(planes, c, b), steps=1) > limits.mask_threshold
            for c, b in zip(coefficients.split(CHUNK), chosen.split(CHUNK), strict=True)
        ]
        return torch.cat(parts)

    return Found(chosen * torch.tensor([width, height, width, height], dtype=torch.float32), values, label, masks)


def cells(system: Any, raw: Any, valid: Tensor, limits: Limits) -> Found:
    """SOLO, Decoupled SOLO and SOLOv2, with Matrix NMS."""
    from maskwright.systems.families import solo_grid

    grids = system.cells.grids
    levels = [solo_grid.point_nms(level.float().sigmoid())[0].flatten(1).T for level in raw.classes]  # (cells, K)
    candidate = min(0.1, 2 * limits.score_threshold)
    kinds = levels[0].shape[1]
    scores, labels, areas_needed, soft = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
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
    label, masks = padded(label, limits.detections)[rows], padded(masks, limits.detections)[rows]

    def resized(grid: Grid) -> Tensor:
        return torch.cat([grid.resize(part) > limits.mask_threshold for part in masks.split(CHUNK)])

    full = Grid(raw.size, None, valid, raw.size)
    return Found(mask_boxes(resized(full)), values, label, resized)


def queries(system: Any, raw: Any, valid: Tensor, limits: Limits) -> Found:
    """MaskFormer, Mask2Former and EoMT (`kinds.queries`)."""
    probabilities = raw.classes[-1, 0].float().softmax(-1)[:, :-1]
    kinds = probabilities.shape[1]
    score, pair = probabilities.flatten().topk(min(limits.detections, probabilities.shape[0] * kinds))
    query, label = pair.div(kinds, rounding_mode="floor"), pair % kinds
    if system.stuff:
        score = torch.where(system.thing_classes()[label], score, -1.0)
    planes = raw.masks_of(0, query)
    full = Grid(raw.size, None, valid, raw.size)
    means, boxes = list[Tensor](), list[Tensor]()
    for part in planes.split(CHUNK):
        values = full.resize(part)
        solid = values > 0
        area = solid.flatten(1).sum(1)
        means.append(torch.where(area > 0, (values.sigmoid() * solid).flatten(1).sum(1) / (area + 1e-6), -1.0))
        boxes.append(mask_boxes(solid))
    quality = torch.cat(means)
    score = torch.where((score > 0) & (quality >= 0), score * quality, -1.0)
    score = torch.where(score >= limits.score_threshold, score, -1.0)
    score, order = best(score, limits.detections)
    planes, frames, label = (padded(v, limits.detections)[order] for v in (planes, torch.cat(boxes), label))

    def masks(grid: Grid) -> Tensor:
        return torch.cat([grid.resize(part) > 0 for part in planes.split(CHUNK)])

    return Found(frames, score, label, masks)


def detr(system: Any, raw: Any, valid: Tensor, limits: Limits) -> Found:
    """DETR, whose masks are resized by nearest neighbours."""
    score, label = raw.logits[-1, 0].float().softmax(-1)[:, :-1].max(-1)
    score = torch.where(system.thing_classes()[label] & (score >= limits.score_threshold), score, -1.0)
    score, order = best(score, limits.detections)
    boxes, label = (
        padded(box_ops.corners(raw.boxes[-1, 0].float()), limits.detections),
        padded(label, limits.detections),
    )
    boxes = boxes[order] * valid.flip(0).repeat(2)
    label = label[order]
    if system.masks is None:
        return Found(clipped(boxes, valid), score, label, None)
    rows = order.clamp(max=raw.logits.shape[2] - 1)
    planes = system.masks_of(raw, 0, rows)

    def masks(grid: Grid) -> Tensor:
        parts = list[Tensor]()
        for part in planes.split(CHUNK):
            logits = functional.interpolate(part[:, None], size=raw.size, mode="bilinear", align_corners=False)[:, 0]
            parts.append(grid.nearest(logits > 0))
        return torch.cat(parts)

    return Found(clipped(boxes, valid), score, label, masks)


def mask_boxes(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "n 4"]:
    """The tightest box around each mask; zeros for an empty one."""
    sides = list[Tensor]()
    for axis in (1, 2):
        hit = masks.any(axis)  # over rows: columns
        steps = torch.arange(hit.shape[1])
        first = torch.where(hit, steps, hit.shape[1]).amin(1)
        last = torch.where(hit, steps + 1, 0).amax(1)
        sides += [torch.minimum(first, last), last]
    x0, x1, y0, y1 = sides
    return torch.stack([x0, y0, x1, y1], 1).float()


Decoder = Callable[[Any, Any, Tensor, Limits], Found]

DECODERS: Mapping[str, Decoder] = {
    **dict.fromkeys(
        (
            "faster-rcnn",
            "mask-rcnn",
            "panet",
            "cascade-mask-rcnn",
            "htc",
            "mask-scoring-rcnn",
            "pointrend",
            "panoptic-fpn",
            "cascade-panoptic-fpn",
        ),
        two_stage,
    ),
    **dict.fromkeys(("fcos", "centermask", "blendmask"), located),
    "retinanet": anchored,
    **dict.fromkeys(("yolact", "yolact-plus"), prototypes),
    **dict.fromkeys(("solo", "decoupled-solo", "solov2"), cells),
    **dict.fromkeys(("maskformer", "mask2former", "eomt"), queries),
    "detr": detr,
}

"""Systems that propose boxes and read each of them, with a fixed number of objects: Faster R-CNN and its descendants,
R-FCN and FCIS."""

# Some functions of torch have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.blocks import rpn
from maskwright.inference.exporting.fixed import (
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
from maskwright.ops import boxes as box_ops
from maskwright.ops import keypoints as keypoint_ops
from maskwright.ops.interpolation import weights

VOTERS = 40  # masks of candidates that are pasted together
PEAKS = 3  # of a map of a keypoint, which are searched in pixels
CELLS_AROUND = 1.5  # of each; along sides with fewer pixels than the map has cells, all are searched


def proposed(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], rules: Any, valid: Tensor
) -> tuple[Float[Tensor, "p 4"], Bool[Tensor, " p"]]:
    """The proposals of one image, as `blocks.rpn.propose`, and which of them exist."""
    boxes, logits = list[Tensor](), list[Tensor]()
    rows = zip(rpn._rows(objectness, 1), rpn._rows(deltas, 4), anchors, strict=True)  # pyright: ignore[reportPrivateUsage]
    for level, shifts, own in rows:
        values, index = level[0, :, 0].topk(min(rules.before[1], own.shape[0]))
        frames = box_ops.decode(own[index], shifts[0][index], plus_one=rules.plus_one, symmetric=rules.symmetric)
        frames = clipped(frames, valid, rules.plus_one)
        sides = frames[:, 2:] - frames[:, :2] + (1 if rules.plus_one else 0)
        large = (sides >= rules.smallest_side if rules.inclusive else sides > rules.smallest_side).all(1)
        ranked = torch.where(large, values.sigmoid(), -1.0)
        keep = kept(frames, ranked, torch.zeros_like(index), 1, rules.nms_threshold, rules.plus_one)
        boxes.append(frames)
        # Ranked by the logit, which float32 probabilities would make equal; those that are dropped last.
        logits.append(torch.where(keep & large, values, -1e9))
    every, score = torch.cat(boxes), torch.cat(logits)
    score, index = score.topk(min(rules.after[1], score.shape[0]))
    return every[index], score > -1e8


def detected(
    scores: Float[Tensor, "r k"], boxes: Float[Tensor, "r _k 4"], real: Bool[Tensor, " r"], valid: Tensor, rules: Any,
    limits: Limits,
) -> tuple[Float[Tensor, "n 4"], Float[Tensor, " n"], Int[Tensor, " n"]]:  # fmt: skip
    """Boxes, scores and labels of the best detections, as `blocks.box_stage.detect`."""
    kinds = scores.shape[1]
    scores = torch.where(real[:, None] & (scores > limits.score_threshold), scores, -1.0)
    values, pair = scores.flatten().topk(min(MOST_CANDIDATES, scores.shape[0] * kinds))
    row, label = pair.div(kinds, rounding_mode="floor"), pair % kinds
    frames = clipped(boxes[row, label] if boxes.shape[1] > 1 else boxes[row, 0], valid, rules.plus_one)
    if rules.smallest_side > 0:
        values = torch.where((frames[:, 2:] - frames[:, :2] >= rules.smallest_side).all(1), values, -1.0)
    groups, count = (torch.zeros_like(label), 1) if rules.across_classes else (label, kinds)
    assert limits.nms_threshold is not None
    keep = kept(frames, values, groups, count, limits.nms_threshold, rules.plus_one)
    values, order = best(torch.where(keep, values, -1.0), limits.detections)
    frames, label = taken(order, frames, label)
    return frames, values, label


def two_stage(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """Faster R-CNN, Mask R-CNN and their descendants (`families.two_stage`)."""
    anchors = system.anchors(raw.features, raw.size)
    proposals, real = proposed(raw.objectness, raw.deltas, anchors, system.proposal_rules, grid.valid)
    scores, refined = system.classify(raw, [proposals], [raw.size])
    frames, values, label = detected(scores, refined, real, grid.valid, system.box_rules, limits)
    probabilities = maps = None
    if "masks" in system.outputs or "keypoints" in system.outputs:
        (probabilities,), (maps,) = system.read_boxes(raw, [frames], [label])
    if probabilities is not None and system.mask_iou is not None and not limits.box_scores:
        quality = system.mask_iou(system.mask_features(raw, [frames]), probabilities).float()
        quality = quality.gather(1, label[:, None])[:, 0]
        values = torch.where(values >= 0, (values * quality).clamp(max=1), -1.0)
        if limits.score_threshold > 0.05:
            values = torch.where(values > limits.score_threshold, values, -1.0)
        values, order = values.topk(limits.detections)
        frames, label, probabilities = frames[order], label[order], probabilities[order]
        maps = None if maps is None else maps[order]
    masks = points = None
    if probabilities is not None:
        rules = system.rules
        masks = pasted(probabilities, grid.boxes(frames), grid, rules.paste, limits.mask_threshold, rules.paste_above)
    if maps is not None:
        points = keypoint_peaks(maps, frames, system.rules.keypoints, max(grid.canvas))
    return Found(frames, values, among_all(system, label), masks, points, last=system.last)


def among_all(system: Any, label: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Labels among all classes of a system whose heads have rows for things only."""
    if not getattr(system, "stuff", ()):
        return label
    things = [row for row, name in enumerate(system.classes) if name not in system.stuff]
    return torch.tensor(things, device=label.device)[label]


def keypoint_peaks(
    maps: Float[Tensor, "r j s s"], boxes: Float[Tensor, "r 4"], scoring: keypoint_ops.Scoring, longest: int
) -> Float[Tensor, "r j 3"]:
    """The peaks of maps after bicubic resizing to the pixels of their boxes, as `ops.keypoints.decode`.

    Only pixels around the `PEAKS` largest local maxima of a map are computed, so that the number of values does not
    depend on the box.

    Args:
        maps: Logits inside each box.
        boxes: Boxes in pixels.
        scoring: As for `ops.keypoints.decode`.
        longest: Upper bound of the sides of boxes.
    """
    maps, side = maps.float(), maps.shape[-1]
    spans = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    counts = spans.ceil()[:, None]  # (R, 1, 2): columns and rows
    highest = functional.max_pool2d(maps, 3, 1, 1) == maps
    cells = torch.where(highest, maps, -torch.inf).flatten(2).topk(PEAKS, dim=2).indices  # (R, J, PEAKS)
    reach = max(side // 2 + 1, int(CELLS_AROUND * longest / side + 2))
    steps = torch.arange(2 * reach + 1)
    bordered = functional.pad(maps, (2, 2, 2, 2), mode="replicate")  # torch repeats the outer cells
    top = place_x = place_y = None
    for number in range(PEAKS):
        cell = cells[..., number]
        found: list[tuple[Tensor, Tensor]] = []
        for axis, index in ((0, cell % side), (1, cell.div(side, rounding_mode="floor"))):
            count = counts[..., axis]  # (R, 1)
            middle = ((index + 0.5) * count / side - 0.5).round()
            start = (middle - reach).minimum(count - len(steps)).clamp(min=0)
            pixel = (start[..., None] + steps).minimum(count[..., None] - 1)  # (R, J, n)
            found.append((pixel, _cubic((pixel + 0.5) * (side / count[..., None]) + 1.5, side + 4)))
        (x, across), (y, down) = found
        values = (down @ bordered @ across.mT).flatten(2)  # (R, J, n n)
        peak, place = values.max(2)
        own_x = x.gather(2, (place % len(steps))[..., None])[..., 0]
        own_y = y.gather(2, place.div(len(steps), rounding_mode="floor")[..., None])[..., 0]
        if top is None or place_x is None or place_y is None:
            top, place_x, place_y = peak, own_x, own_y
        else:
            better = peak > top
            place_x, place_y = torch.where(better, own_x, place_x), torch.where(better, own_y, place_y)
            top = torch.maximum(peak, top)
    assert top is not None
    assert place_x is not None
    assert place_y is not None
    places = (torch.stack([place_x, place_y], -1) + 0.5) * (spans / spans.ceil())[:, None] + boxes[:, None, :2]
    score = top if scoring == "logit" else 1 / (maps.flatten(2) - top[..., None]).exp().sum(2)
    return torch.cat([places, score[..., None]], 2)


def _cubic(positions: Float[Tensor, "*n s"], length: int) -> Float[Tensor, "*n s length"]:
    """Weights of the cells of a row for cubic interpolation, as in torch; positions are at least 1 from both ends."""
    apart = (positions[..., None] - torch.arange(length, dtype=torch.float32)).abs()
    near = (1.25 * apart - 2.25) * apart * apart + 1
    far = ((-0.75 * apart + 3.75) * apart - 6) * apart + 3
    return torch.where(apart <= 1, near, torch.where(apart < 2, far, 0.0))


# ---- maps of parts ---------------------------------------------------------------------------------------------------


def rfcn(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """R-FCN."""
    proposals, real = _of_one_level(system, raw, grid)
    read = system.read(raw, _as_rois(proposals))
    boxes = box_ops.decode(proposals, read.deltas, system.box_rules.weights, plus_one=True)
    found = detected(read.logits.softmax(1)[:, :-1], boxes[:, None], real, grid.valid, system.box_rules, limits)
    frames, values, label = found
    return Found(frames, values, label, last=1.0)


def fcis(system: Any, raw: Any, grid: Grid, limits: Limits) -> Found:
    """FCIS, whose masks are voted on by all boxes nearby; see `systems.fcis.vote`."""
    boxes, real = _of_one_level(system, raw, grid)
    rounds = list[tuple[Tensor, Tensor, Tensor]]()
    for last in (False, True):
        read = system.read(raw, _as_rois(boxes))
        scores = read.logits.softmax(1)
        own = read.pairs[torch.arange(scores.shape[0]), scores[:, :-1].argmax(1)]
        rounds.append((boxes, scores[:, :-1], own.softmax(1)[:, 1]))
        if not last:
            boxes = clipped(
                box_ops.decode(boxes, read.deltas, system.box_rules.weights, plus_one=True), grid.valid, True
            )
    boxes, scores, maps = (torch.cat(parts) for parts in zip(*rounds, strict=True))
    good = ((boxes[:, 2:] - boxes[:, :2] + 1) >= system.proposal_rules.smallest_side).all(1) & real.repeat(2)
    return _voted(grid.boxes(boxes, last=1), scores, maps, good, grid, limits)


def _of_one_level(system: Any, raw: Any, grid: Grid) -> tuple[Tensor, Tensor]:
    anchors = system.anchors([raw.objectness], raw.size)
    return proposed([raw.objectness], [raw.deltas], anchors, system.proposal_rules, grid.valid)


def _as_rois(boxes: Tensor) -> Tensor:
    return functional.pad(boxes, (1, 0))


def _voted(
    boxes: Float[Tensor, "m 4"], scores: Float[Tensor, "m k"], maps: Float[Tensor, "m s s"], good: Bool[Tensor, " m"],
    grid: Grid, limits: Limits, merge_threshold: float = 0.5,
) -> Found:  # fmt: skip
    """Objects and their masks from candidates in pixels of the grid, whose last pixels are included."""
    kinds, side, least = scores.shape[1], maps.shape[-1], limits.mask_threshold
    scores = torch.where(good[:, None], scores, -1.0)
    flat = torch.where(scores > limits.score_threshold, scores, -1.0).flatten()
    values, pair = flat.topk(min(MOST_CANDIDATES, flat.shape[0]))
    row, label = pair.div(kinds, rounding_mode="floor"), pair % kinds
    assert limits.nms_threshold is not None
    keep = kept(boxes[row], values, label, kinds, limits.nms_threshold, plus_one=True)
    values, order = best(torch.where(keep, values, -1.0), limits.detections)
    row, label = taken(order, row, label)
    near = box_ops.pairwise_iou(boxes[row], boxes, plus_one=True) >= merge_threshold
    share = torch.where(near & good, scores[:, label].T, 0.0)
    share = share / share.sum(1, keepdim=True).clamp(min=1e-12)
    places = boxes.round()
    plane = torch.zeros(())
    for own, box, part in zip(maps.split(VOTERS), places.split(VOTERS), share.split(VOTERS, 1), strict=True):
        bits = (_stretched(own, box, grid) >= least).float()
        plane = plane + (part @ bits.flatten(1)).unflatten(1, (bits.shape[1], bits.shape[2]))
    around = mask_boxes(plane >= least) - torch.tensor([0.0, 0.0, 1.0, 1.0])
    down, across = (
        weights(_bins(around[:, axis], around[:, axis + 2], side), plane.shape[2 - axis]) for axis in (1, 0)
    )
    final = down @ plane @ across.mT
    masks = _stretched(final, around, grid) >= least
    solid = (around[:, 2:] > around[:, :2]).all(1)
    values = torch.where(solid, values, -1.0)
    return Found(around + torch.tensor([0.0, 0.0, 1.0, 1.0]), values, label, masks, on_grid=True)


def _bins(low: Tensor, high: Tensor, side: int) -> Float[Tensor, "n s"]:
    """Where the cells of a grid of `side` lie between the pixels `low` and `high`, the last one included."""
    length = (high - low + 1)[:, None]
    inner = (torch.arange(side, dtype=torch.float32) + 0.5) * (length / side) - 0.5
    return low[:, None] + inner.clamp(min=0).minimum(length - 1)


def _stretched(maps: Float[Tensor, "n s s"], boxes: Float[Tensor, "n 4"], grid: Grid) -> Float[Tensor, "n h w"]:
    """Maps resized to the pixels of their boxes, the last ones included; -1 outside."""
    side, matrices, inside = maps.shape[-1], list[Tensor](), list[Tensor]()
    for axis in (1, 0):
        pixels = torch.arange(grid.size[1 - axis], dtype=torch.float32)
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        place = (pixels - low + 0.5) * (side / (high - low + 1).clamp(min=1)) - 0.5
        matrices.append(weights(place.clamp(0, side - 1), side))
        inside.append((pixels >= low) & (pixels <= high))
    down, across = matrices
    return torch.where(inside[0][:, :, None] & inside[1][:, None], down @ maps @ across.mT, -1.0)

"""The division of an image among segments with a fixed number of rows, for graphs."""

# Neither onnxruntime nor some functions of torch have types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maskwright.inference.exporting.fixed import CHUNK, Decoder, Limits
from maskwright.inference.exporting.placing import Grid
from maskwright.inference.exporting.queries import label_plane, labelled

ROUNDS = 4  # in which small segments are removed, of DETR
Segmenter = Callable[[Any, Any, Grid], tuple[Tensor, Tensor, Tensor]]


def queries(system: Any, raw: Any, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """MaskFormer, Mask2Former and EoMT by the rule of `ops.queries.select_segments`, with its default thresholds.

    Returns:
        The segment of each pixel, 0 or the row of the segment + 1; the score and the label of each row.
    """
    things = system.thing_classes()
    score, label = raw.classes[-1, 0].float().softmax(-1).max(-1)
    confident = (label < len(things)) & (score > 0.8)
    label = label.clamp(max=len(things) - 1)
    count = score.shape[0]
    planes = raw.masks_of(0, torch.arange(count))
    seen = (grid.axis(1, 0, 1).sum(1) > 0)[:, None] & (grid.axis(1, 1, 1).sum(1) > 0)
    largest = winner = inside = None
    areas = list[Tensor]()
    for first in range(0, count, CHUNK):
        rows = slice(first, first + CHUNK)
        values = grid.resize(planes[rows])
        weighted = torch.where(confident[rows, None, None], score[rows, None, None] * values.sigmoid(), -1.0)
        own, index = weighted.max(0)
        solid = values >= 0
        areas.append((solid & seen).flatten(1).sum(1))
        hit = solid.gather(0, index[None])[0]
        if largest is None or winner is None or inside is None:
            largest, winner, inside = own, index + first, hit
        else:
            better = own > largest
            largest = torch.where(better, own, largest)
            winner, inside = torch.where(better, index + first, winner), torch.where(better, hit, inside)
    assert winner is not None
    assert inside is not None
    whole = torch.cat(areas)
    one = torch.ones_like(winner.flatten(), dtype=torch.float32)
    flat, valid = winner.flatten(), seen.flatten().float()
    won = torch.zeros(count).scatter_add(0, flat, one * valid)
    mine = (inside & seen) if system.inside else seen
    kept = torch.zeros(count).scatter_add(0, flat, mine.flatten().float())
    good = confident & (kept > 0) & (whole > 0) & (won / whole.clamp(min=1) >= 0.8)
    # Stuff of one class is one segment, that of the first query.
    same = (label[:, None] == label) & good & good[:, None] & ~things[label][:, None]
    rows = torch.arange(count)
    leader = torch.where(same.any(1), torch.where(same, rows, count).amin(1), rows)
    joined = torch.where(same, score, 0.0).amax(1)
    score = torch.where(good, torch.maximum(score, joined), 0.0)
    number = torch.where(good, leader + 1, 0)
    segments = torch.where(mine, number[winner], 0).to(torch.int32)
    return segments, score, label


def detr(system: Any, raw: Any, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """DETR: pixels belong to the confident query of the largest logit; small segments are removed."""
    things, smallest = system.thing_classes(), _default(system, "smallest", 4)
    score, label = raw.logits[-1, 0].float().softmax(-1).max(-1)
    active = (label < len(things)) & (score > _default(system, "score_threshold", 0.85))
    label = label.clamp(max=len(things) - 1)
    count = score.shape[0]
    rows = torch.arange(count)
    planes = system.masks_of(raw, 0, rows)
    # Regions of one class are one segment, that of its first query.
    same = (label[:, None] == label) & active & active[:, None] & ~things[label][:, None]
    leader = torch.where(same.any(1), torch.where(same, rows, count).amin(1), rows)
    winner, remaining, alive = rows, active, active.any()
    for number in range(ROUNDS):
        winner = _largest(planes, active, raw.size)
        winner = leader[winner] if number == 0 else winner
        winner = grid.nearest(winner[None])[0]
        areas = torch.zeros(count).scatter_add(0, winner.flatten(), _seen(grid).flatten().float())
        remaining = active & (areas > smallest)
        alive = alive & remaining.any()
        active = torch.where(alive, remaining, active)
    last = remaining & alive
    segments = torch.where(_seen(grid), torch.where(last, rows + 1, 0)[winner], 0).to(torch.int32)
    return segments, torch.where(last, score, 0.0), label


def _largest(planes: Tensor, active: Tensor, size: tuple[int, int]) -> Tensor:
    """The active row with the largest logit at each pixel of the input."""
    largest = winner = None
    for first in range(0, planes.shape[0], CHUNK):
        rows = slice(first, first + CHUNK)
        values = functional.interpolate(planes[rows, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        own, index = torch.where(active[rows, None, None], values, -1e30).max(0)
        if largest is None or winner is None:
            largest, winner = own, index + first
        else:
            winner = torch.where(own > largest, index + first, winner)
            largest = torch.maximum(own, largest)
    assert winner is not None
    return winner


def _seen(grid: Grid) -> Tensor:
    """The pixels that show the image."""
    rows, columns = (grid.labelled(1, axis)[1] for axis in (0, 1))
    return rows[:, None] & columns


def regions(system: Any, raw: Any, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """PointRend for semantic segmentation: a segment for each class."""
    score, areas, labels = labelled(system, raw, grid)
    segments = torch.where(labels < len(system.classes), labels + 1, 0).to(torch.int32)
    return segments, torch.where(areas > 0, score, 0.0), torch.arange(len(system.classes))


def merged_with(decoder: Decoder) -> Segmenter:
    """The rule of Panoptic FPN (`families.semantic_branch`) for the objects of a decoder."""

    def merged(system: Any, raw: Any, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        least = _default(system, "score_threshold", None)
        limits = Limits(
            system.rules.panoptic_score if least is None else least, _default(system, "nms_threshold", 0.5),
            _default(system, "detections", 100), 0.5, box_scores=system.name == "panoptic-centermask",
        )  # fmt: skip
        things = decoder(system, raw, grid, limits)
        assert things.masks is not None
        boxes = grid.boxes(things.boxes)
        real = (things.scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        share, area = 1 - _default(system, "overlap_threshold", 0.5), system.branch.smallest_area
        taken, rows = torch.zeros(grid.size, dtype=torch.int32), list[Tensor]()
        for number in range(limits.detections):  # best first, each on the pixels that are still free
            mask = things.masks[number]
            free = mask & (taken == 0)
            total, left = mask.sum(), free.sum()
            keep = real[number] & (left > 0) & ((total - left) / total.clamp(min=1) <= share)
            taken = torch.where(free & keep, number + 1, taken)
            rows.append(keep)
        kept = torch.stack(rows)
        score = torch.where(kept, things.scores, 0.0)
        stuff = [row for row, name in enumerate(system.classes) if name in system.stuff]
        if not stuff:
            return taken, score, things.labels
        logits = system.semantic_logits(raw).float()
        large = functional.interpolate(logits, size=raw.size, mode="bilinear", align_corners=False)[0]
        labels, probability = label_plane(large, grid)
        outputs = torch.where(taken == 0, labels, 0)
        hits = torch.stack([outputs == kind + 1 for kind in range(len(stuff))])
        areas = hits.flatten(1).sum(1)
        sums = torch.where(hits, probability, 0.0).flatten(1).sum(1)
        good = (areas > 0) & (areas >= area)
        first = limits.detections + 1
        numbers = torch.cat([torch.zeros(1, dtype=torch.int64), torch.where(good, torch.arange(len(stuff)) + first, 0)])
        segments = torch.where(taken == 0, numbers[outputs.clamp(min=0)].to(torch.int32), taken)
        score = torch.cat([score, torch.where(good, sums / areas.clamp(min=1), 0.0)])
        return segments, score, torch.cat([things.labels, torch.tensor(stuff)])

    return merged


def _default(system: Any, name: str, otherwise: Any) -> Any:
    """The default of an option of `decode_panoptic`."""
    known = inspect.signature(system.decode_panoptic).parameters
    return known[name].default if name in known else otherwise

"""Parts of decoding with a fixed number of objects, so that a graph can hold it: thresholds set scores to -1 instead of
dropping rows, and suppression marks rows. The results are those of `decode`, as long as no image has more candidates
than `MOST_CANDIDATES`."""

# Neither onnxruntime nor some functions of torch have types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.inference.exporting.placing import Grid
from maskwright.ops.paste import Rule, paste_values

MOST_CANDIDATES = 1000  # (box, class) pairs before suppression
CHUNK = 20  # masks that are resized together


@dataclass(frozen=True)
class Limits:
    """Options of decoding that are fixed in a graph.

    Attributes:
        score_threshold: Lowest score.
        nms_threshold: Overlap above which the worse of two objects is dropped; None: the system drops none.
        detections: Number of rows.
        mask_threshold: Probability from which on a pixel belongs to a mask.
        box_scores: Objects have the scores of their boxes, where masks have a score of their own.
    """

    score_threshold: float
    nms_threshold: float | None
    detections: int
    mask_threshold: float
    box_scores: bool = False


@dataclass(frozen=True)
class Found:
    """Objects in a fixed number of rows, best first; rows without an object have a score of at most 0.

    Attributes:
        boxes: In pixels of the input, or of the grid.
        scores: Scores.
        labels: Class indices.
        masks: Masks on the grid; None for boxes alone.
        keypoints: x, y in pixels of the input, and the score of each keypoint.
        on_grid: Whether boxes are in pixels of the grid, because they follow from masks or contours there.
        last: What the sides x1 and y1 lack, on the image, because they are those of the last pixel.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    masks: Bool[Tensor, "n _h _w"] | None = None
    keypoints: Float[Tensor, "n j 3"] | None = None
    on_grid: bool = False
    last: float = 0.0


Decoder = Callable[[Any, Any, Grid, Limits], Found]


def clipped(boxes: Float[Tensor, "n 4"], valid: Tensor, plus_one: bool = False) -> Float[Tensor, "n 4"]:
    """Boxes clipped to the part of the input that the image fills."""
    return boxes.clamp(min=0).minimum((valid - (1 if plus_one else 0)).flip(0).repeat(2))


def kept(
    boxes: Float[Tensor, "m 4"], scores: Float[Tensor, " m"], groups: Int[Tensor, " m"], kinds: int, threshold: float,
    plus_one: bool = False,
) -> Bool[Tensor, " m"]:  # fmt: skip
    """Greedy suppression within groups: each group is moved to a field of its own of a square board.

    Args:
        boxes: Boxes.
        scores: Scores; those below 0 take no part.
        groups: Group of each box, 0 ... kinds - 1.
        kinds: Number of groups.
        threshold: IoU above which the worse of two boxes is dropped.
        plus_one: Whether boxes include their last pixel.
    """
    from torchvision.ops import nms  # pyright: ignore[reportMissingTypeStubs]

    if plus_one:
        boxes = boxes + torch.tensor([0.0, 0.0, 1.0, 1.0])
    real = (scores >= 0)[:, None]
    if kinds > 1:
        side = math.ceil(math.sqrt(kinds))
        place = torch.stack([groups % side, groups.div(side, rounding_mode="floor")], 1).float()
        known = torch.where(real, boxes, 0.0)
        boxes = boxes + (place * (known.max() - known.min() + 2)).repeat(1, 2)
    index = nms(torch.where(real, boxes, 0.0), scores, threshold)
    return (torch.zeros(len(boxes)).index_put((index,), torch.ones(())) > 0) & real[:, 0]


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


def taken(rows: Int[Tensor, " n"], *values: Tensor) -> tuple[Tensor, ...]:
    """The rows of several tables, which are made long enough for them."""
    return tuple(padded(value, rows.shape[0])[rows] for value in values)


def pasted(
    probabilities: Float[Tensor, "n p q"], boxes: Float[Tensor, "n 4"], grid: Grid, rule: Rule, threshold: float,
    strict: bool = False,
) -> Bool[Tensor, "n h w"]:  # fmt: skip
    """Masks inside boxes (in pixels of the grid) on the grid; the other arguments as of `ops.paste.paste_masks`."""
    parts = [
        paste_values(own, frames, grid.size, rule=rule)
        for own, frames in zip(probabilities.split(CHUNK), boxes.split(CHUNK), strict=True)
    ]
    return torch.cat([part > threshold if strict else part >= threshold for part in parts])


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

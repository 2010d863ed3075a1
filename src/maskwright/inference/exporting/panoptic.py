"""The division of an image among segments with a fixed number of rows, for graphs."""

# Neither onnxruntime nor some functions of torch have types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from maskwright.inference.exporting.fixed import CHUNK
from maskwright.inference.exporting.placing import Grid

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


SEGMENTERS: Mapping[str, Segmenter] = dict.fromkeys(("maskformer", "mask2former", "eomt"), queries)

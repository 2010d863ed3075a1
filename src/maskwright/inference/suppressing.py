"""Matrix NMS (SOLOv2, arXiv 2003.10152, section 3.3) on finished objects, whatever system found them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from maskwright.errors import UsageError
from maskwright.ops.suppression import matrix_nms
from maskwright.structures import Instances

Suppression = Literal["matrix"]


def checked_suppression(kind: str | None) -> Suppression | None:
    """The kind; UsageError for one that there is not."""
    if kind not in (None, "matrix"):
        raise UsageError(f"suppression is {kind!r}; expected 'matrix', or nothing for the system's own alone")
    return kind


def suppression_words(kind: Suppression | None) -> str:
    """For the protocol of a measurement."""
    return "the system's own" + (", then Matrix NMS on the finished masks" if kind == "matrix" else "")


def suppressed(objects: Instances, kind: Suppression | None, threshold: float | None = None) -> Instances:
    """Objects, best first, whose scores have decayed by how much better ones of their class overlap their masks; sorted
    again, without those that fell below `threshold`. None: as they are."""
    if kind is None:
        return objects
    if objects.masks is None or objects.scores is None:
        raise UsageError("suppression='matrix' compares masks, and this system predicts none; leave it out")
    if not len(objects):
        return objects
    iou = objects.masks.iou(objects.masks).to(objects.scores.device)
    scores, order = matrix_nms(iou, objects.scores, objects.labels).sort(descending=True, stable=True)
    keep = scores >= (threshold or 0.0)
    return replace(objects[order[keep]], scores=scores[keep])

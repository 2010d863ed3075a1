"""Matrix NMS (SOLOv2, arXiv 2003.10152, section 3.3) on the final objects of any system."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from maskwright.errors import UsageError
from maskwright.ops.suppression import matrix_nms
from maskwright.structures import Instances

Suppression = Literal["matrix"]


def checked_suppression(kind: str | None) -> Suppression | None:
    """Returns `kind` if it is valid.

    Args:
        kind: "matrix"; None for the system's own suppression only.

    Raises:
        UsageError: If it is something else.
    """
    if kind not in (None, "matrix"):
        raise UsageError(f"`suppression` must be 'matrix' or None, got {kind!r}")
    return kind


def suppression_words(kind: Suppression | None) -> str:
    """The suppression in words, for the protocol of an evaluation."""
    return "the system's own" + (", then Matrix NMS on the final masks" if kind == "matrix" else "")


def suppressed(objects: Instances, kind: Suppression | None, threshold: float | None = None) -> Instances:
    """Apply Matrix NMS: scores decay with the mask IoU with better objects of the same class.

    Args:
        objects: The objects, best first.
        kind: "matrix"; None returns the objects unchanged.
        threshold: Objects that score less afterwards are removed.

    Returns:
        The objects sorted by their new scores.

    Raises:
        UsageError: If the objects have no masks.
    """
    if kind is None:
        return objects
    if objects.masks is None or objects.scores is None:
        raise UsageError("suppression='matrix' compares masks, but this system does not predict masks; omit it")
    if not len(objects):
        return objects
    iou = objects.masks.iou(objects.masks).to(objects.scores.device)
    scores, order = matrix_nms(iou, objects.scores, objects.labels).sort(descending=True, stable=True)
    keep = scores >= (threshold or 0.0)
    return replace(objects[order[keep]], scores=scores[keep])

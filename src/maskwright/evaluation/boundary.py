"""Boundary AP (Cheng et al., 2021, arXiv 2103.16562) on top of pycocotools, for when vernier is not installed.

Mask IoU is insensitive to the outline of large objects, whose interior dominates it. Boundary IoU compares only pixels
within `BOUNDARY_WIDTH` of the outline, and AP uses the smaller of the two overlaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from maskwright.structures import rle


def boundary(text: bytes, size: tuple[int, int], width: float) -> bytes:
    """The boundary of a mask, as a mask.

    Args:
        text: Compressed run lengths.
        size: Height and width of the image.
        width: Width of the boundary as a share of the image's diagonal; at least one pixel.

    Returns:
        Compressed run lengths of the pixels closer to the outline than that. The image border counts as outline;
        distances are Chebyshev distances, as in the official code, which erodes repeatedly with a 3 x 3 square.
    """
    height, breadth = size
    steps = max(1, round(width * float(np.hypot(height, breadth))))
    (x0, y0, _, _), crop = rle.to_crop(text, height)
    return rle.from_crop(crop & ~_eroded(crop, steps), x0, y0, size)


def _eroded(crop: Bool[np.ndarray, "h w"], steps: int) -> Bool[np.ndarray, "h w"]:
    """Pixels whose square of 2 * steps + 1 is all foreground; beyond the crop there is none."""
    for _ in range(2):  # a square is two lines: along the rows, then, transposed, along the columns
        sums = np.cumsum(np.pad(crop, ((0, 0), (steps + 1, steps))), axis=1, dtype=np.int32)
        crop = (sums[:, 2 * steps + 1 :] - sums[:, : -2 * steps - 1] == 2 * steps + 1).T
    return crop


_Base: Any = COCOeval  # it has no types


class BoundaryEvaluation(_Base):
    """pycocotools' evaluation of masks, with the smaller of mask IoU and boundary IoU as the overlap.

    The outline of a crowd region means nothing: with those, the overlap stays that of the masks.
    """

    def _prepare(self) -> None:
        from maskwright.evaluation.coco import BOUNDARY_WIDTH

        _Base._prepare(self)
        for objects in (*self._gts.values(), *self._dts.values()):
            for one in objects:
                code: Any = one["segmentation"]
                size = (code["size"][0], code["size"][1])
                one["boundary"] = {"size": code["size"], "counts": boundary(code["counts"], size, BOUNDARY_WIDTH)}

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        overlaps: Any = _Base.computeIoU(self, imgId, catId)
        if len(overlaps) == 0:
            return overlaps
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        order = np.argsort([-one["score"] for one in found], kind="mergesort")[: self.params.maxDets[-1]]
        best: Any = [found[i]["boundary"] for i in order]
        lines: Any = [one["boundary"] for one in truth]
        crowd = [int(one["iscrowd"]) for one in truth]
        return np.where(crowd, overlaps, np.minimum(overlaps, coco_mask.iou(best, lines, crowd)))

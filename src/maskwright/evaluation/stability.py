"""Stability through time: how much the objects that an image system finds change from one frame to the next.

Definitions, for each pair of consecutive frames:

With annotations, detections are matched with the annotated objects of each frame (same class, IoU of at least 0.5, at
most one each, with the largest sum of IoU). Objects that are annotated in both frames are counted. An object that is
matched in one of the two frames only *flickers*. For an object that is matched in both frames, the IoU of its two
detected masks is measured as they are, and *aligned*: the first one is displaced by the motion of the object, which is
the displacement of its annotated mask of the first frame that has the largest intersection with that of the second one.
The aligned IoU of the two annotated masks themselves is the value that a perfect system has; it is below 1 where
objects turn, change their size or are covered.

Without annotations, the detections of two frames are matched with each other (same class, IoU above 0.1, at most one
each, with the largest sum of IoU). Detections without a match *flicker*: they appear or disappear. The motion is that
of the detected masks. Objects that really enter and leave count as flicker, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from maskwright.evaluation.track_metrics import EPSILON, Counts, Ints, mask_overlaps
from maskwright.ops.assignment import best_pairs
from maskwright.structures import Instances, Masks

MATCH = 0.5  # IoU of a detection and an annotated object
CONTINUES = 0.1  # IoU of detections in consecutive frames, without annotations
_Crop = tuple[tuple[int, int], npt.NDArray[np.bool_]]  # upper left corner x, y of a mask, and the mask inside its box


@dataclass(frozen=True)
class Stability(Counts):
    """Sums over pairs of consecutive frames.

    Attributes:
        pairs: Objects that could have been found in both frames: annotated objects, or detections that are matched with
            each other, or with none.
        flickers: Those of them that were found in one of the two only.
        both: Those that were found in both.
        overlap: Sum of the IoU of the two detections of objects that were found in both.
        aligned: Sum of their IoU after the motion is compensated.
        truth_overlap: Sum of the IoU of the annotations of the same objects; 0 without annotations.
        truth_aligned: Sum of their IoU after the motion is compensated.
        score_change: Sum of the absolute differences of scores.
    """

    pairs: int = 0
    flickers: int = 0
    both: int = 0
    overlap: float = 0.0
    aligned: float = 0.0
    truth_overlap: float = 0.0
    truth_aligned: float = 0.0
    score_change: float = 0.0

    def summary(self) -> dict[str, float]:
        """Means per object: "IoU", "aligned IoU", "annotated IoU", "annotated aligned IoU", "flicker", "score change".

        -1 where nothing was found in both frames. The annotated values are absent without annotations.
        """

        def mean(value: float) -> float:
            return value / self.both if self.both else -1.0

        values = {"IoU": mean(self.overlap), "aligned IoU": mean(self.aligned)}
        if self.truth_overlap > 0:
            values |= {
                "annotated IoU": mean(self.truth_overlap), "annotated aligned IoU": mean(self.truth_aligned)
            }  # fmt: skip
        flicker = self.flickers / self.pairs if self.pairs else -1.0
        return {**values, "flicker": flicker, "score change": mean(self.score_change)}


def stability(
    found: Sequence[Instances], truth: Sequence[Instances | None] | None = None, *, classes: bool = True
) -> Stability:
    """Measure the stability of detections in consecutive frames.

    Args:
        found: The detections of each frame, with masks. Ids are not used.
        truth: The annotated objects of each frame with masks and ids; None for frames without annotations, which are
            left out. None: measured without annotations.
        classes: Whether only objects of the same class match.

    Returns:
        The sums over all pairs of consecutive frames.
    """
    total = Stability()
    for frame in range(len(found) - 1):
        one, two = found[frame], found[frame + 1]
        if truth is None:
            total = total + _without_truth(one, two, classes)
            continue
        before, after = truth[frame], truth[frame + 1]
        if before is not None and after is not None:
            total = total + _with_truth(one, two, _real(before), _real(after), classes)
    return total


def _real(objects: Instances) -> Instances:
    return objects if objects.crowd is None else objects[~objects.crowd]


def _pairs(one: Instances, two: Instances, lowest: float, classes: bool) -> tuple[Ints, Ints]:
    """Positions of objects that match."""
    assert one.masks is not None
    assert two.masks is not None
    overlaps = mask_overlaps(one.masks, two.masks)
    if classes:
        overlaps = overlaps * (one.labels.cpu().numpy()[:, None] == two.labels.cpu().numpy()[None])
    overlaps = np.where(overlaps < lowest - EPSILON, 0.0, overlaps)
    rows, columns = best_pairs(overlaps)
    good = overlaps[rows, columns] > EPSILON
    return rows[good], columns[good]


def _with_truth(one: Instances, two: Instances, before: Instances, after: Instances, classes: bool) -> Stability:
    """The sums of two annotated frames."""
    assert before.ids is not None
    assert after.ids is not None
    places = [dict(zip(*(side.tolist() for side in _pairs(truth, found, MATCH, classes)), strict=True))
              for truth, found in ((before, one), (after, two))]  # fmt: skip
    later = {int(number): row for row, number in enumerate(after.ids)}
    common = [(row, later[int(number)]) for row, number in enumerate(before.ids) if int(number) in later]
    hits = [(places[0].get(row), places[1].get(column)) for row, column in common]
    both = [
        (row, column, int(first), int(second))
        for (row, column), (first, second) in zip(common, hits, strict=True)
        if first is not None and second is not None
    ]
    rows, columns, firsts, seconds = (list(side) for side in zip(*both, strict=True)) if both else ([], [], [], [])
    truth_overlap, truth_aligned, shifts = _compared(before[rows], after[columns])
    overlap, aligned, _ = _compared(one[firsts], two[seconds], shifts)
    flickers = sum((first is None) != (second is None) for first, second in hits)
    change = _score_change(one[firsts], two[seconds])
    return Stability(len(common), flickers, len(both), overlap, aligned, truth_overlap, truth_aligned, change)


def _without_truth(one: Instances, two: Instances, classes: bool) -> Stability:
    """The sums of two frames without annotations."""
    rows, columns = _pairs(one, two, CONTINUES, classes)
    first, second = one[rows], two[columns]
    overlap, aligned, _ = _compared(first, second)
    single = len(one) + len(two) - 2 * len(rows)
    return Stability(len(rows) + single, single, len(rows), overlap, aligned, score_change=_score_change(first, second))


def _score_change(one: Instances, two: Instances) -> float:
    if one.scores is None or two.scores is None:
        return 0.0
    return float((one.scores - two.scores).abs().double().sum())


def _compared(
    one: Instances, two: Instances, shifts: Sequence[tuple[int, int]] | None = None
) -> tuple[float, float, list[tuple[int, int]]]:
    """Sums of the IoU of pairs as they are and aligned, and the displacements x, y; estimated if `shifts` is None."""
    if not len(one):
        return 0.0, 0.0, []
    assert one.masks is not None
    assert two.masks is not None
    first, second = _crops(one.masks), _crops(two.masks)
    if shifts is None:
        shifts = [displacement(a, b) for a, b in zip(first, second, strict=True)]
    pairs = zip(first, second, shifts, strict=True)
    values = [(_overlap(a, b, (0, 0), one.image_size), _overlap(a, b, shift, one.image_size)) for a, b, shift in pairs]
    plain, aligned = np.array(values).sum(0).tolist()
    return plain, aligned, list(shifts)


def _crops(masks: Masks) -> list[_Crop]:
    frames, crops = masks.crops()
    return [
        ((int(frame[0]), int(frame[1])), crop.numpy()) for frame, crop in zip(frames, crops, strict=True)
    ]  # fmt: skip


def _overlap(one: _Crop, two: _Crop, shift: tuple[int, int], size: tuple[int, int]) -> float:
    """IoU of two masks, the first displaced by x, y; what leaves the image does not count."""
    (x0, y0), mask = one
    corner = torch.tensor([[x0 + shift[0], y0 + shift[1]], list(two[0])])
    masks = Masks.from_crops([mask, two[1]], corner, size)
    return float(mask_overlaps(masks[0], masks[1])[0, 0])


def displacement(one: _Crop, two: _Crop) -> tuple[int, int]:
    """Return the displacement x, y of a mask with the largest intersection with another one.

    Of equal ones, that closest to the displacement of the centres of gravity.

    Args:
        one: Upper left corner x, y of the mask in the image, and the mask inside its box.
        two: The other mask.
    """
    a, b = one[1], two[1]
    if not a.any() or not b.any():
        return 0, 0
    shape = [-(-(a.shape[axis] + b.shape[axis] - 1) // 16) * 16 for axis in (0, 1)]  # fast sizes
    # Entry (y, x), modulo the shape: the intersection if `a` is displaced by y, x within the boxes.
    spectra = [np.fft.rfft2(mask.astype(np.float64), shape) for mask in (a, b)]
    counts = np.round(np.fft.irfft2(np.conj(spectra[0]) * spectra[1], shape))
    rows, columns = np.nonzero(counts == counts.max())
    y = np.where(rows >= b.shape[0], rows - shape[0], rows)
    x = np.where(columns >= b.shape[1], columns - shape[1], columns)
    centers = [np.argwhere(mask).mean(0) for mask in (a, b)]
    best = int(np.argmin((y - (centers[1] - centers[0])[0]) ** 2 + (x - (centers[1] - centers[0])[1]) ** 2))
    return int(x[best]) + two[0][0] - one[0][0], int(y[best]) + two[0][1] - one[0][1]

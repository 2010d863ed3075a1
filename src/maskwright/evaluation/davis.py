"""J&F: region similarity and contour accuracy (Perazzi et al., 2016; DAVIS 2017, Pont-Tuset et al., arXiv 1704.00675).

J is the IoU of an object's mask in a frame, F the F-measure of its contour pixels within a tolerance of 0.8 % of the
image's diagonal. Both are 1 if the object is absent from annotation and prediction. Mean, recall (share of frames above
0.5) and decay (first minus last quarter of the clip) are computed per object and averaged over all objects.

Differences from the official code: the quarters of clips with more than 256 frames are right (it counts frames in 8
bits), and objects that appear after the first frame count in the unsupervised task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from scipy.ndimage import distance_transform_edt  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType] - untyped

from maskwright.errors import UsageError
from maskwright.evaluation.track_metrics import EPSILON, checked_ids
from maskwright.ops.assignment import best_pairs
from maskwright.structures import Instances, rle

Floats = npt.NDArray[np.float64]
Assignment = Literal["J&F", "J"]
Size = tuple[int, int]
Frames = Sequence[Mapping[int, bytes]]  # for each frame the run-length strings of its masks by id

TOLERANCE = 0.008  # of the diagonal


@dataclass(frozen=True)
class ObjectScores:
    """J and F of the annotated objects of a clip.

    Attributes:
        ids: (N,) ids of the objects.
        regions: J of each object in each frame, (N, T).
        contours: F of each object in each frame, (N, T).
    """

    ids: tuple[int, ...]
    regions: Floats
    contours: Floats


def object_scores(
    truth: Sequence[Instances],
    found: Sequence[Instances],
    *,
    semi_supervised: bool = False,
    assignment: Assignment = "J&F",
    clip: str = "the clip",
) -> ObjectScores:
    """Compute J and F of the objects of a clip.

    Args:
        truth: The annotated objects of each annotated frame with masks and ids; crowd regions are left out.
        found: The predictions in the same frames.
        semi_supervised: The objects of the first frame are given: predictions belong to the objects of the same ids,
            objects that appear later do not count, and neither do the first and the last frame. Otherwise predicted
            tracks are assigned to annotated ones such that the mean score is largest.
        assignment: What is maximized: "J&F" as DAVIS does, or "J" as TrackEval does by default.
        clip: Name of the clip, for messages.

    Returns:
        The scores.

    Raises:
        UsageError: If masks or ids are missing or ambiguous, or there are fewer than three frames in the
            semi-supervised task.
    """
    if semi_supervised and len(truth) < 3:
        raise UsageError(f"{clip}: has {len(truth)} annotated frames; without the first and the last one, none is left")
    annotated = [_codes(objects, clip, frame, crowd=False) for frame, objects in enumerate(truth)]
    predicted = [_codes(objects, clip, frame) for frame, objects in enumerate(found)]
    size = truth[0].image_size if truth else (1, 1)
    if semi_supervised:
        ids = tuple(sorted(annotated[0]))
        annotated, predicted = annotated[1:-1], predicted[1:-1]
        tracks: list[int | None] = list(ids)
        pairs = [(row, row) for row in range(len(ids))]
        regions = _regions(ids, tracks, annotated, predicted, size)[np.arange(len(ids)), np.arange(len(ids))]
        return ObjectScores(ids, regions, _contours(ids, tracks, annotated, predicted, pairs, size))
    ids = tuple(sorted({number for frame in annotated for number in frame}))
    # As in the official code, empty tracks are added if there are fewer tracks than objects.
    there = sorted({number for frame in predicted for number in frame})
    tracks = [*there, *[None] * max(0, len(ids) - len(there))]
    regions = _regions(ids, tracks, annotated, predicted, size)
    scores = regions.mean(2)
    every: Floats | None = None
    if assignment == "J&F":
        pairs = list(np.ndindex(len(ids), len(tracks)))
        every = _contours(ids, tracks, annotated, predicted, pairs, size).reshape(regions.shape)
        scores = (scores + every.mean(2)) / 2
    # Tracks are rows, as in the official code, so that equal scores are decided in the same way.
    columns, rows = best_pairs(scores.T)
    rows, columns = rows[np.argsort(rows)], columns[np.argsort(rows)]
    if every is not None:
        return ObjectScores(ids, regions[rows, columns], every[rows, columns])
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    return ObjectScores(ids, regions[rows, columns], _contours(ids, tracks, annotated, predicted, pairs, size))


def _codes(objects: Instances, clip: str, frame: int, crowd: bool = True) -> dict[int, bytes]:
    """Run-length strings of the masks by id; empty masks are absent."""
    ids = checked_ids(objects, clip, frame)
    assert objects.masks is not None
    left_out = np.zeros(len(ids), bool) if crowd or objects.crowd is None else objects.crowd.cpu().numpy()
    codes = (code["counts"] for code in objects.masks.rle())
    areas = objects.masks.areas().cpu().numpy()
    return {
        int(number): code
        for number, code, area, skip in zip(ids, codes, areas, left_out, strict=True)
        if area > 0 and not skip
    }


# ---- regions ---------------------------------------------------------------------------------------------------------


def _regions(
    ids: Sequence[int], tracks: Sequence[int | None], annotated: Frames, predicted: Frames, size: Size
) -> Floats:
    """IoU of each object and each track in each frame, (N, M, T); 1 where both are absent."""
    values = np.zeros((len(ids), len(tracks), len(annotated)))
    for frame, (one, two) in enumerate(zip(annotated, predicted, strict=True)):
        here = np.array([number in one for number in ids], bool)
        there = np.array([number in two for number in tracks], bool)
        values[..., frame] = ~here[:, None] & ~there[None]
        if here.any() and there.any():
            own: Any = [{"size": list(size), "counts": one[number]} for number in ids if number in one]
            codes = [two[number] for number in tracks if number is not None and number in two]
            other: Any = [{"size": list(size), "counts": code} for code in codes]
            overlaps = np.asarray(coco_mask.iou(own, other, [0] * len(other)), np.float64)
            values[np.flatnonzero(here)[:, None], np.flatnonzero(there)[None], frame] = overlaps
    return values


# ---- contours --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contour:
    """The contour pixels of a mask, and all pixels within the tolerance around them in a window."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    top: int
    left: int
    near: npt.NDArray[np.bool_]

    def close_to(self, other: _Contour) -> int:
        """Number of contour pixels within the tolerance of another contour."""
        y, x = self.rows - other.top, self.columns - other.left
        inside = (y >= 0) & (x >= 0) & (y < other.near.shape[0]) & (x < other.near.shape[1])
        return int(np.count_nonzero(other.near[y[inside], x[inside]]))


def _contours(
    ids: Sequence[int],
    tracks: Sequence[int | None],
    annotated: Frames,
    predicted: Frames,
    pairs: Sequence[tuple[int, ...]],
    size: Size,
) -> Floats:
    """F of pairs of positions in `ids` and `tracks` in each frame, (P, T)."""
    reach = int(np.ceil(TOLERANCE * np.linalg.norm(size)))
    values = np.zeros((len(pairs), len(annotated)))
    for frame, (one, two) in enumerate(zip(annotated, predicted, strict=True)):
        own = {number: contour_of(code, size, reach) for number, code in one.items() if number in ids}
        other = {number: contour_of(code, size, reach) for number, code in two.items() if number in tracks}
        for number, (row, column) in enumerate(pairs):
            track = tracks[column]
            values[number, frame] = _measure(own.get(ids[row]), None if track is None else other.get(track))
    return values


def _measure(truth: _Contour | None, found: _Contour | None) -> float:
    """F of an annotated and a predicted contour; None is that of an empty mask."""
    real, guessed = (0 if contour is None else len(contour.rows) for contour in (truth, found))
    if truth is None or found is None or not real or not guessed:
        return float(not real and not guessed)
    precision, recall = found.close_to(truth) / guessed, truth.close_to(found) / real
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def contour_of(code: bytes, size: Size, reach: int) -> _Contour:
    """Return the contour of a mask: pixels that differ from their right, lower or lower right neighbour.

    In the last row and column only neighbours inside of the image count, and the last pixel never does.

    Args:
        code: Run-length string.
        size: H, W.
        reach: Tolerance in pixels; distances are Euclidean.
    """
    (x0, y0, x1, y1), crop = rle.to_crop(code, size[0])
    top, left = max(0, y0 - 1), max(0, x0 - 1)
    # One more row and column: background, or a copy of the last one at the border, where nothing differs.
    window = np.zeros((y1 - top + 1, x1 - left + 1), bool)
    window[y0 - top : -1, x0 - left : -1] = crop
    if y1 == size[0]:
        window[-1] = window[-2]
    if x1 == size[1]:
        window[:, -1] = window[:, -2]
    inner = window[:-1, :-1]
    edge = (inner ^ window[:-1, 1:]) | (inner ^ window[1:, :-1]) | (inner ^ window[1:, 1:])
    rows, columns = np.nonzero(edge)
    if not len(rows):
        return _Contour(rows, columns, top, left, edge)
    near = cast(Floats, distance_transform_edt(~np.pad(edge, reach))) <= reach
    return _Contour(rows + top, columns + left, top - reach, left - reach, near)


# ---- statistics ------------------------------------------------------------------------------------------------------


def statistics(values: Floats) -> tuple[float, float, float]:
    """Return mean, recall and decay of one object's values in all frames of a clip."""
    if not len(values):
        return 0.0, 0.0, 0.0
    cuts = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(np.int64)
    first, last = values[cuts[0] : cuts[1] + 1], values[cuts[3] : cuts[4] + 1]
    return float(values.mean()), float((values > 0.5 + EPSILON).mean()), float(first.mean() - last.mean())


def davis_summary(scores: Sequence[ObjectScores]) -> dict[str, float]:
    """Return J&F and mean, recall and decay of J and F, averaged over all objects of all clips.

    Args:
        scores: The scores of each clip.

    Returns:
        "J&F", "J", "J recall", "J decay", "F", "F recall", "F decay"; empty if there are no objects.
    """
    summary: dict[str, float] = {}
    for name in ("J", "F"):
        rows = [statistics(values) for clip in scores for values in (clip.regions if name == "J" else clip.contours)]
        if not rows:
            return {}
        mean, recall, decay = np.array(rows).mean(0).tolist()
        summary |= {name: mean, f"{name} recall": recall, f"{name} decay": decay}
    return {"J&F": (summary["J"] + summary["F"]) / 2, **summary}

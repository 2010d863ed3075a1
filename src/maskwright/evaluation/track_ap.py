"""AP of tracks as YouTube-VIS defines it (Yang et al., 2019, arXiv 1905.04804, section 4).

It is COCO's AP with tracks in place of objects and clips in place of images. The overlap of two tracks is the sum of
the intersections of their masks over all frames, divided by the sum of the unions. The size of a track is the mean area
of its masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from maskwright.data.youtube_vis import Track, tracks_of
from maskwright.evaluation.track_metrics import EPSILON, Floats, checked_ids
from maskwright.structures import Instances

THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0, 1, 101)
# Mean area in square pixels; the official limits.
SIZES: Mapping[str, tuple[float, float]] = {
    "": (0.0, 1e10), "s": (0.0, 128.0**2), "m": (128.0**2, 256.0**2), "l": (256.0**2, 1e10),
}  # fmt: skip
LIMIT = 100  # tracks of each class and clip, best first
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ClipTracks:
    """The tracks of one class in a clip.

    Attributes:
        areas: Mean area of each annotated track, (N,).
        ignored: Whether an annotated track is a crowd region, (N,).
        scores: Score of each predicted track, descending, (M,).
        found_areas: Mean area of each predicted track, (M,).
        overlaps: IoU of each predicted and each annotated track, (M, N).
    """

    areas: Floats
    ignored: _Bools
    scores: Floats
    found_areas: Floats
    overlaps: Floats


def clip_tracks(
    truth: Sequence[Instances], found: Sequence[Instances], labels: int, clip: str = "the clip"
) -> list[ClipTracks]:
    """Collect the tracks of a clip for each class.

    Args:
        truth: The annotated objects of each frame with masks and ids.
        found: The predictions of each frame. The score of a track is the mean of its scores, and its class the one with
            the largest sum of scores.
        labels: Number of classes.
        clip: Name of the clip, for messages.

    Raises:
        UsageError: If masks or ids are missing, or two objects of a frame have the same id.
    """
    for objects in (truth, found):
        for frame, own in enumerate(objects):
            checked_ids(own, clip, frame)
    annotated, predicted = (list(tracks_of(list(enumerate(part)), len(part)).values()) for part in (truth, found))
    parts: list[ClipTracks] = []
    for label in range(labels):
        own = [track for track in annotated if track.label == label]
        other = sorted((track for track in predicted if track.label == label), key=lambda track: -track.score)[:LIMIT]
        parts.append(
            ClipTracks(
                np.array([_area(track) for track in own], float),
                np.array([track.crowd for track in own], bool),
                np.array([track.score for track in other], float),
                np.array([_area(track) for track in other], float),
                track_overlaps(other, own),
            )
        )
    return parts


def _area(track: Track) -> float:
    areas = [area for area in track.areas if area]
    return sum(areas) / len(areas) if areas else 0.0


def track_overlaps(tracks: Sequence[Track], others: Sequence[Track]) -> Floats:
    """Return the IoU (M, N) of tracks over all frames of a clip."""
    common = np.zeros((len(tracks), len(others)))
    if not common.size:
        return common
    areas, other_areas = (np.array([sum(a or 0 for a in t.areas) for t in part]) for part in (tracks, others))
    for frame in range(len(tracks[0].segmentations)):
        rows = [row for row, track in enumerate(tracks) if track.segmentations[frame] is not None]
        columns = [column for column, track in enumerate(others) if track.segmentations[frame] is not None]
        if rows and columns:
            own, own_areas = _frame(tracks, rows, frame)
            other, frame_areas = _frame(others, columns, frame)
            overlaps = np.asarray(coco_mask.iou(own, other, [0] * len(columns)), np.float64)
            # IoU = common / (sum of areas - common); rounding makes the count exact again.
            sums = own_areas[:, None] + frame_areas[None]
            common[np.array(rows)[:, None], np.array(columns)[None]] += np.round(overlaps * sums / (1 + overlaps))
    union = areas[:, None] + other_areas[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _frame(tracks: Sequence[Track], rows: Sequence[int], frame: int) -> tuple[Any, Floats]:
    """Run-length codes and areas of some tracks in a frame."""
    codes = [cast("dict[str, Any]", tracks[row].segmentations[frame]) for row in rows]
    areas = np.array([tracks[row].areas[frame] or 0 for row in rows], float)
    return [{**code, "counts": code["counts"].encode("ascii")} for code in codes], areas


def track_ap(clips: Sequence[Sequence[ClipTracks]]) -> dict[str, float]:
    """Compute the AP of tracks.

    Args:
        clips: For each clip the tracks of each class.

    Returns:
        "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", averaged over the classes that have annotated tracks;
        -1 where there are none.
    """
    summary: dict[str, float] = {}
    for name, limits in SIZES.items():
        precision, _ = precision_and_recall(clips, limits)
        summary[f"AP{name}"] = _mean(precision)
        if not name:
            summary |= {"AP50": _mean(precision[0:1]), "AP75": _mean(precision[5:6])}
    for limit in (1, 10):
        summary[f"AR{limit}"] = _mean(precision_and_recall(clips, SIZES[""], limit)[1])
    return summary


def _mean(values: Floats) -> float:
    """The mean of all values but those of classes without annotated tracks."""
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def precision_and_recall(
    clips: Sequence[Sequence[ClipTracks]], limits: tuple[float, float], most: int = LIMIT
) -> tuple[Floats, Floats]:
    """Return precision (thresholds, recalls, classes) and recall (thresholds, classes); -1 for classes without tracks.

    Args:
        clips: For each clip the tracks of each class.
        limits: Smallest and largest mean area of the tracks that count.
        most: Largest number of predicted tracks of a class and clip.
    """
    classes = len(clips[0]) if clips else 0
    precision = np.full((len(THRESHOLDS), len(RECALLS), classes), -1.0)
    recall = np.full((len(THRESHOLDS), classes), -1.0)
    for label in range(classes):
        parts = [_matched(clip[label], limits, most) for clip in clips]
        total = sum(count for _, _, _, count in parts)
        if not total:
            continue
        scores = np.concatenate([part[0] for part in parts])
        order = np.argsort(-scores, kind="stable")
        matched, ignored = (np.concatenate([part[side] for part in parts], 1)[:, order] for side in (1, 2))
        hits, errors = (np.cumsum(flags & ~ignored, 1).astype(float) for flags in (matched, ~matched))
        for row in range(len(THRESHOLDS)):
            share = hits[row] / total
            recall[row, label] = share[-1] if len(share) else 0.0
            exact = hits[row] / (errors[row] + hits[row] + np.spacing(1))
            exact = np.maximum.accumulate(exact[::-1])[::-1]
            places = np.searchsorted(share, RECALLS, side="left")
            precision[row, :, label] = np.append(exact, 0.0)[places]
    return precision, recall


def _matched(part: ClipTracks, limits: tuple[float, float], most: int) -> tuple[Floats, _Bools, _Bools, int]:
    """Scores of predicted tracks; whether each is matched and whether it is ignored (thresholds, M); number of tracks.

    Predicted tracks take, best first, the annotated track with the largest overlap that is left, an ignored one only if
    no other is possible.
    """
    low, high = limits
    ignored = part.ignored | (part.areas < low - EPSILON) | (part.areas > high + EPSILON)
    order = np.argsort(ignored, kind="stable")
    outside = (part.found_areas < low - EPSILON) | (part.found_areas > high + EPSILON)
    count = min(most, len(part.scores))
    matched, left_out = (np.zeros((len(THRESHOLDS), count), bool) for _ in range(2))
    for number, threshold in enumerate(THRESHOLDS):
        taken = np.zeros(len(ignored), bool)
        for row in range(count):
            best, choice = min(threshold, 1 - 1e-10), -1
            for column in order:
                if taken[column]:
                    continue
                if choice >= 0 and not ignored[choice] and ignored[column]:
                    break
                if part.overlaps[row, column] >= best - EPSILON:
                    best, choice = part.overlaps[row, column], int(column)
            if choice >= 0:
                taken[choice] = matched[number, row] = True
                left_out[number, row] = ignored[choice]
        left_out[number] |= ~matched[number] & outside[:count]
    return part.scores[:count], matched, left_out, int((~ignored).sum())

"""How certain the figures are: bootstrap over the images of the evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from maskwright.evaluation.coco import Detections, Kind, Truth, coco_ap
from maskwright.evaluation.confusion import grouped


def bootstrap(
    truth: Truth,
    found: Mapping[str, Detections],
    kind: Kind = "segm",
    *,
    samples: int = 200,
    seconds: float = 60.0,
    seed: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:
    """AP of several systems on the same random draws of images with replacement (Efron and Tibshirani, 1993).

    Args:
        truth: Annotated objects.
        found: Predicted objects of each system.
        kind: What AP is measured of.
        samples: Number of draws.
        seconds: Time limit; at least 20 draws are made.
        seed: Seed of the draws.

    Returns:
        AP of every draw, (samples,), by system. Draws without objects are left out.
    """
    rng = np.random.default_rng(seed)
    images = len(truth.sizes)
    ours = {name: grouped(value.owner, images) for name, value in found.items()}
    theirs = grouped(truth.owner, images)
    values: dict[str, list[float]] = {name: [] for name in found}
    until = time.monotonic() + seconds
    for number in range(samples):
        if number >= 20 and time.monotonic() > until:
            break
        draw = rng.integers(images, size=images)
        drawn = _drawn_truth(truth, theirs, draw)
        figures = {
            name: coco_ap(drawn, _drawn(value, ours[name], draw), kind).average()["AP"] for name, value in found.items()
        }
        if min(figures.values()) < 0:
            continue
        for name, figure in figures.items():
            values[name].append(figure)
    return {name: np.array(figures) for name, figures in values.items()}


def interval(values: npt.NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The central interval that holds `level` of the values; NaN if there are none."""
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _rows(
    groups: Sequence[npt.NDArray[np.int64]], draw: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of the objects of the drawn images, and the number of each one's image in the draw."""
    numbers: list[int] = draw.tolist()
    parts = [groups[image] for image in numbers]
    rows = np.concatenate([np.zeros(0, np.int64), *parts])
    return rows, np.repeat(np.arange(len(draw)), [len(part) for part in parts])


def _drawn(found: Detections, groups: Sequence[npt.NDArray[np.int64]], draw: npt.NDArray[np.int64]) -> Detections:
    rows, owner = _rows(groups, draw)
    chosen: list[int] = rows.tolist()
    masks = None if found.masks is None else [found.masks[row] for row in chosen]
    points = None if found.keypoints is None else found.keypoints[rows]
    return Detections(owner, found.labels[rows], found.scores[rows], found.boxes[rows], masks, points)


def _drawn_truth(truth: Truth, groups: Sequence[npt.NDArray[np.int64]], draw: npt.NDArray[np.int64]) -> Truth:
    rows, owner = _rows(groups, draw)
    chosen: list[int] = rows.tolist()
    return replace(
        truth,
        sizes=truth.sizes[draw],
        owner=owner,
        labels=truth.labels[rows],
        boxes=truth.boxes[rows],
        areas=truth.areas[rows],
        crowd=truth.crowd[rows],
        masks=None if truth.masks is None else [truth.masks[row] for row in chosen],
        keypoints=None if truth.keypoints is None else truth.keypoints[rows],
        handle=None,
    )


def calibration(found: Detections, hits: npt.NDArray[np.bool_], bins: int = 10) -> float:
    """Expected calibration error: mean difference of score and precision over bins of equal width (Guo et al., 2017).

    Args:
        found: Predicted objects.
        hits: Whether each prediction matches an object.
        bins: Number of bins.

    Returns:
        0 ... 1, 0 for scores that equal the precision; NaN without predictions.
    """
    if not len(found.scores):
        return float("nan")
    place = np.minimum((found.scores * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    score = np.bincount(place, found.scores, minlength=bins)
    right = np.bincount(place, hits.astype(float), minlength=bins)
    return float(np.abs(score - right).sum() / count.sum())

"""Confusion matrix: predictions matched to annotations at one score threshold and one overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools import mask as coco_mask

from maskwright.evaluation.coco import Detections, Truth


@dataclass
class ImageScore:
    """The outcome for one image.

    Attributes:
        id: The image's id.
        objects: Number of annotated objects.
        found: Number of predictions.
        right: Predictions matched with an object of their class.
        confused: Predictions matched with an object of another class.
        missed: Objects without a prediction.
        spurious: Predictions without an object.
        quality: 0 ... 1, by the formula of panoptic quality: sum of the overlaps of right predictions / (right +
            confused + half of missed and spurious). None if there are neither objects nor predictions.
    """

    id: int | str
    objects: int
    found: int
    right: int
    confused: int
    missed: int
    spurious: int
    quality: float | None


@dataclass
class Confusion:
    """A confusion matrix. Rows are annotated classes, columns predicted ones; the last of each is the background.

    The last column thus counts missed objects, the last row spurious predictions. Predictions inside crowd regions are
    not counted.

    Attributes:
        classes: Class names.
        counts: The matrix (K + 1, K + 1).
        images: Ids of the images behind each cell that is not empty.
        by: Whether masks ("segm") or boxes ("bbox") were compared.
        overlap: IoU threshold.
        score_threshold: Predictions that score less are ignored.
    """

    classes: tuple[str, ...]
    counts: Int[np.ndarray, "k_plus_1 k_plus_1"]
    images: dict[tuple[int, int], list[int | str]] = field(repr=False)
    by: Literal["segm", "bbox"] = "segm"
    overlap: float = 0.5
    score_threshold: float = 0.5

    def to_dict(self) -> dict[str, Any]:
        """The matrix as JSON values."""
        cells = [[row, column, ids] for (row, column), ids in sorted(self.images.items())]
        return {**asdict(self), "classes": list(self.classes), "counts": self.counts.tolist(), "images": cells}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Confusion:
        """The matrix from `to_dict`."""
        values = dict[str, Any](values)
        cells = {(row, column): ids for row, column, ids in values.pop("pictures", None) or values["images"]}
        counts = np.asarray(values["counts"], np.int64)
        known: dict[str, Any] = {**values, "classes": tuple(values["classes"]), "counts": counts, "images": cells}
        return cls(**known)


def confuse(
    truth: Truth,
    found: Detections,
    image_ids: Sequence[int | str],
    classes: Sequence[str],
    *,
    by: Literal["segm", "bbox"] = "segm",
    overlap: float = 0.5,
    score_threshold: float = 0.5,
) -> tuple[Confusion, list[ImageScore]]:
    """The confusion matrix and the score of each image.

    Pairs are formed by descending overlap, among equal classes before unequal ones: a second prediction of another
    class for an object that was also predicted correctly is spurious, not a confusion.

    Args:
        truth: Annotated objects.
        found: Predicted objects.
        image_ids: Ids of the images, in the order of the columns.
        classes: Class names.
        by: Whether masks or boxes are compared.
        overlap: IoU threshold.
        score_threshold: Predictions that score less are ignored.

    Returns:
        The matrix, and the scores in the order of `image_ids`.
    """
    count = len(classes)
    counts = np.zeros((count + 1, count + 1), np.int64)
    cells: dict[tuple[int, int], list[int | str]] = defaultdict(list)
    scores: list[ImageScore] = []
    confident = np.flatnonzero(found.scores >= score_threshold)
    ours = grouped(found.owner[confident], len(image_ids))
    theirs = grouped(truth.owner, len(image_ids))
    for image, image_id in enumerate(image_ids):
        mine, annotated = confident[ours[image]], theirs[image]
        overlaps = overlaps_of(truth, found, annotated, mine, truth.sizes[image].tolist(), by)
        same = found.labels[mine][:, None] == truth.labels[annotated][None]
        crowd = truth.crowd[annotated]
        rows, columns = match(np.where(crowd, 0, overlaps), same, overlap)
        excused = ((overlaps >= overlap) & same & crowd).any(1)
        excused[rows] = False
        spurious = ~excused
        spurious[rows] = False
        missed = ~crowd
        missed[columns] = False

        is_a = np.concatenate([truth.labels[annotated[columns]], truth.labels[annotated[missed]],
                               np.full(spurious.sum(), count)])  # fmt: skip
        taken_for = np.concatenate([found.labels[mine[rows]], np.full(missed.sum(), count),
                                    found.labels[mine[spurious]]])  # fmt: skip
        np.add.at(counts, (is_a, taken_for), 1)
        for cell in {(int(a), int(b)) for a, b in zip(is_a, taken_for, strict=True)}:
            cells[cell].append(image_id)
        right = same[rows, columns]
        scores.append(
            _score(
                image_id, int((~crowd).sum()), int((~excused).sum()), right, overlaps[rows, columns], missed, spurious
            )
        )
    return Confusion(tuple(classes), counts, dict(cells), by, overlap, score_threshold), scores


def match(
    overlaps: Float[np.ndarray, "d g"], same: Bool[np.ndarray, "d g"], least: float
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """Matches predictions with annotations greedily, each at most once.

    In each round, all pairs are formed in which each is the other's best; the result equals going through the sorted
    pairs.

    Args:
        overlaps: IoU of each prediction with each annotation.
        same: Whether the classes are equal; such pairs come first.
        least: Minimum overlap.

    Returns:
        Indices of the predictions and of the annotations of each pair.
    """
    worth = np.where(overlaps >= least, overlaps + same, -1.0)
    rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    while worth.size and worth.max() > 0:
        best = worth.argmax(1)
        mutual = (worth.argmax(0)[best] == np.arange(len(best))) & (worth.max(1) > 0)
        row = np.flatnonzero(mutual)
        rows.append(row)
        columns.append(best[row])
        worth[row] = -1
        worth[:, best[row]] = -1
    return np.concatenate(rows), np.concatenate(columns)


def hits(
    truth: Truth, found: Detections, *, by: Literal["segm", "bbox"] = "segm", overlap: float = 0.5
) -> Bool[np.ndarray, " d"]:
    """Whether each prediction of any score is matched with an object of its class.

    Args:
        truth: Annotated objects.
        found: Predicted objects.
        by: Whether masks or boxes are compared.
        overlap: IoU threshold.

    Returns:
        A flag for each prediction; predictions inside crowd regions are not matched.
    """
    images = len(truth.sizes)
    ours, theirs = grouped(found.owner, images), grouped(truth.owner, images)
    right = np.zeros(len(found.owner), bool)
    for image in range(images):
        annotated = theirs[image][~truth.crowd[theirs[image]]]
        overlaps = overlaps_of(truth, found, annotated, ours[image], truth.sizes[image].tolist(), by)
        same = found.labels[ours[image]][:, None] == truth.labels[annotated][None]
        rows, _ = match(np.where(same, overlaps, 0), same, overlap)
        right[ours[image][rows]] = True
    return right


def _score(
    image_id: int | str,
    objects: int,
    found: int,
    right: np.ndarray,
    overlaps: np.ndarray,
    missed: np.ndarray,
    spurious: np.ndarray,
) -> ImageScore:
    confused, lost, extra = int((~right).sum()), int(missed.sum()), int(spurious.sum())
    # A confused object is both missed in its class and spurious in the predicted one.
    weight = right.sum() + confused + (lost + extra) / 2
    quality = float(overlaps[right].sum() / weight) if weight else None
    return ImageScore(image_id, objects, found, int(right.sum()), confused, lost, extra, quality)


def overlaps_of(
    truth: Truth | Detections, found: Detections, annotated: np.ndarray, mine: np.ndarray, size: list[int], by: str
) -> Float[np.ndarray, "d g"]:
    """Returns the IoU of some predictions with some objects (or other predictions) of an image.

    Args:
        truth: Annotated or predicted objects.
        found: Predicted objects.
        annotated: Positions in `truth`.
        mine: Positions in `found`.
        size: Height and width of the image.
        by: "segm" or "bbox".
    """
    if not len(mine) or not len(annotated):
        return np.zeros((len(mine), len(annotated)))
    crowd = truth.crowd[annotated].astype(int).tolist() if isinstance(truth, Truth) else [0] * len(annotated)
    a: Any
    b: Any
    if by == "segm":
        assert truth.masks is not None
        assert found.masks is not None
        a = [{"size": size, "counts": found.masks[i]} for i in mine]
        b = [{"size": size, "counts": truth.masks[i]} for i in annotated]
    else:
        a, b = found.boxes[mine], truth.boxes[annotated]
    return np.asarray(coco_mask.iou(a, b, crowd))


def grouped(owner: Int[np.ndarray, " n"], count: int) -> list[np.ndarray]:
    """Returns the positions of the objects of each of `count` images, in their order."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.searchsorted(owner[order], np.arange(1, count)))

"""Panoptic quality of images segmented into things and stuff, and IoU of pixel labels.

Segments of a class match if they overlap by more than half (IoU > 0.5), so that each has at most one partner. With TP
matches, FP unmatched predicted and FN unmatched annotated segments, a class has

    PQ = SQ x RQ,  SQ = mean IoU of the matches,  RQ = TP / (TP + FP / 2 + FN / 2)        (Kirillov et al., 2019)

and PQ is the mean over the classes that have any of the three. What is not annotated is treated as in the reference
implementation (panopticapi): unlabelled pixels are excluded from unions; crowd regions match nothing; a prediction of
which more than half lies on unlabelled pixels or on the crowd region of its class is not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.data.dataset import as_dataset
from maskwright.errors import UsageError
from maskwright.evaluation.panoptic_results import read_panoptic_results
from maskwright.evaluation.result import Protocol, Result
from maskwright.structures import Panoptic

MEASURES = ("PQ", "SQ", "RQ")


@dataclass(frozen=True)
class Counts:
    """Matched and unmatched segments per class.

    Attributes:
        iou: Sum of the IoU over the matches.
        tp: Number of matches.
        fp: Number of unmatched predicted segments.
        fn: Number of unmatched annotated segments.
    """

    iou: Float[np.ndarray, " k"]
    tp: Int[np.ndarray, " k"]
    fp: Int[np.ndarray, " k"]
    fn: Int[np.ndarray, " k"]

    @classmethod
    def none(cls, classes: int) -> Counts:
        """Counts of zero."""
        zero = np.zeros(classes, np.int64)
        return cls(np.zeros(classes), zero, zero, zero)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.iou + other.iou, self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    def quality(self, chosen: np.ndarray | None = None) -> dict[str, float]:
        """PQ, SQ and RQ, the mean over those of the chosen classes that have segments; -1 if none has."""
        kept = (self.tp + self.fp + self.fn > 0) & (True if chosen is None else chosen)
        if not kept.any():
            return dict.fromkeys(MEASURES, -1.0)
        iou, tp = self.iou[kept], self.tp[kept]
        half = tp + 0.5 * self.fp[kept] + 0.5 * self.fn[kept]
        return {
            "PQ": float((iou / half).mean()),
            "SQ": float((iou / np.maximum(tp, 1)).mean()),
            "RQ": float((tp / half).mean()),
        }


def panoptic_counts(truth: Panoptic, found: Panoptic, classes: int) -> Counts:
    """Counts the matches in one image.

    Args:
        truth: Annotated segments.
        found: Predicted segments.
        classes: Number of classes; labels are 0 ... classes - 1 in both.

    Raises:
        UsageError: If the two have different sizes.
    """
    if truth.image_size != found.image_size:
        raise UsageError(f"the prediction is on a grid of {found.image_size}, the image is {truth.image_size} (H, W)")
    there, guessed = truth.segments.labels.cpu().numpy(), found.segments.labels.cpu().numpy()
    crowd = np.zeros(len(there), bool) if truth.segments.crowd is None else truth.segments.crowd.cpu().numpy()
    columns = len(guessed) + 1
    pairs = truth.map().numpy().astype(np.int64) * columns + found.map().numpy()
    # (N + 1, M + 1) common pixels; row and column 0 are unlabelled.
    common = np.bincount(pairs.ravel(), minlength=(len(there) + 1) * columns).reshape(-1, columns)
    areas, sizes = common.sum(1), common.sum(0)
    inside = common[1:, 1:]
    union = sizes[None, 1:] + areas[1:, None] - inside - common[0, 1:]
    iou = inside / np.maximum(union, 1)
    match = (iou > 0.5) & (there[:, None] == guessed[None]) & ~crowd[:, None]
    rows, partners = np.nonzero(match)
    alone = ~match.any(0) & (sizes[1:] > 0)
    # The reference keeps one crowd region per class, the last it reads.
    last_crowd = {int(label): row + 1 for row, label in enumerate(there) if crowd[row]}
    on_crowd = np.array(
        [common[last_crowd[k], m + 1] if (k := int(guessed[m])) in last_crowd else 0 for m in range(len(guessed))]
    )
    excused = (common[0, 1:] + on_crowd) / np.maximum(sizes[1:], 1) > 0.5
    missed = ~match.any(1) & ~crowd & (areas[1:] > 0)
    return Counts(
        np.bincount(there[rows], iou[rows, partners], classes).astype(np.float64),  # bincount of no rows gives integers
        np.bincount(there[rows], minlength=classes),
        np.bincount(guessed[alone & ~excused], minlength=classes),
        np.bincount(there[missed], minlength=classes),
    )


class PanopticEvaluator:
    """Collects the segments of images one by one and compares them with the annotations of a data set.

    An image that was not added counts as one without segments. A few numbers per class are kept for each image.

    Args:
        dataset: A data set with stuff.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset = as_dataset(dataset)
        self._position = {image_id: index for index, image_id in enumerate(dataset.image_ids())}
        self._counts: dict[Any, Counts] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, image_id: Any, panoptic: Panoptic) -> None:
        """Adds the predicted segments of an image.

        Args:
            image_id: The image's id in the data set.
            panoptic: Segments with the labels of the data set; those with label -1 are left out.

        Raises:
            UsageError: If the image is unknown or was added before, or a label does not exist.
        """
        if image_id not in self._position:
            raise UsageError(f"the data set has no image {image_id!r}")
        if image_id in self._counts:
            raise UsageError(f"image {image_id!r} was added twice; call reset() before the next evaluation")
        labels = panoptic.segments.labels
        if len(labels) and int(labels.max()) >= len(self.dataset.classes):
            raise UsageError(
                f"a segment of image {image_id!r} has label {int(labels.max())}, the data set has "
                f"{len(self.dataset.classes)} classes; map labels with match_classes first"
            )
        known = labels >= 0
        panoptic = panoptic if bool(known.all()) else panoptic[known]
        truth = self.dataset.panoptic(self._position[image_id])
        self._counts[image_id] = panoptic_counts(truth, panoptic, len(self.dataset.classes))

    def add_at(self, index: int, panoptic: Panoptic) -> None:
        """Adds the segments of the image at a position of the data set, see `add`."""
        self.add(self.dataset.image_ids()[index], panoptic)

    def read(self, path: str | Path) -> None:
        """Adds all images of a COCO panoptic results file; see `read_panoptic_results`."""
        for image_id, panoptic in read_panoptic_results(path, self.dataset):
            self.add(image_id, panoptic)

    def reset(self) -> None:
        """Drops all predictions."""
        self._counts = {}

    def partial(self) -> dict[Any, Counts]:
        """The counts of this process, to be sent to another one and passed to `merge` there."""
        return dict(self._counts)

    def merge(self, partials: Sequence[dict[Any, Counts]]) -> None:
        """Adds the counts of other processes; an image that several have counts once."""
        for partial in partials:
            self._counts = {**partial, **self._counts}

    def result(self, title: str = "") -> Result:
        """Computes the result.

        Its `summary` has "panoptic/PQ", "panoptic/SQ", "panoptic/RQ", and the same for things and stuff as
        "panoptic/PQth", "panoptic/PQst" and so on.

        Args:
            title: Title of the report page.
        """
        classes, count = tuple(self.dataset.classes), len(self.dataset.classes)
        missing = [image_id for image_id in self._position if image_id not in self._counts]
        total = Counts.none(count)
        for image_id, index in self._position.items():
            counts = self._counts.get(image_id)
            if counts is None:
                truth = self.dataset.panoptic(index)
                counts = panoptic_counts(truth, Panoptic.empty(truth.image_size), count)
            total = total + counts
        stuff = np.array([name in self.dataset.stuff for name in classes])
        parts = {"": None, "th": ~stuff, "st": stuff}
        summary = {f"panoptic/{n}{part}": v for part, kept in parts.items() for n, v in total.quality(kept).items()}
        rows: list[dict[str, Any]] = []
        for label, name in enumerate(classes):
            own = total.quality(np.arange(count) == label)
            objects = int(total.tp[label] + total.fn[label])
            found = int(total.tp[label] + total.fp[label])
            about = {"class": name, "category_id": int(self.dataset.category_ids[label]), "stuff": bool(stuff[label])}
            rows.append({**about, "objects": objects, "found": found, **{f"panoptic/{n}": v for n, v in own.items()}})
        note = "crowds and pixels of nothing as panopticapi counts them; segments, things and stuff"
        return Result(
            summary=summary,
            classes=classes,
            protocol=_protocol(self.dataset, "panoptic quality (IoU > 0.5)", note),
            per_class=rows,
            objects={"all": int((total.tp + total.fn).sum())},
            missing=len(missing),
            title=title,
        )


class SemanticEvaluator:
    """Counts pixels by what they are and what they were taken for; pixels of nothing and of crowds do not count, and
    those of an image that was not added were taken for nothing."""

    def __init__(self, dataset: Any):
        self.dataset = dataset = as_dataset(dataset)
        self._position = {image_id: index for index, image_id in enumerate(dataset.image_ids())}
        self._seen: dict[Any, np.ndarray] = {}

    def add(self, image_id: Any, labels: Int[Tensor, "h w"]) -> None:
        """One image's labels on its own grid; -1: none."""
        if image_id not in self._position:
            raise UsageError(f"the data set has no image {image_id!r}")
        if image_id in self._seen:
            raise UsageError(f"image {image_id!r} was added twice; call reset() before the next evaluation")
        truth: Panoptic = self.dataset.panoptic(self._position[image_id])
        if truth.image_size != tuple(labels.shape):
            raise UsageError(f"the prediction is on a grid of {tuple(labels.shape)}, the image is {truth.image_size}")
        if labels.numel() and int(labels.max()) >= len(self.dataset.classes):
            raise UsageError(
                f"a pixel of image {image_id!r} has label {int(labels.max())}, the data set has "
                f"{len(self.dataset.classes)} classes; map labels with match_classes first"
            )
        self._seen[image_id] = self._pixels(truth, labels.cpu().numpy())

    def read(self, path: str | Path) -> None:
        """Adds all images of a COCO panoptic results file; see `read_panoptic_results`."""
        for image_id, panoptic in read_panoptic_results(path, self.dataset):
            known = panoptic.segments.labels >= 0
            self.add(image_id, panoptic[known].semantic())

    def reset(self) -> None:
        """Drops all predictions."""
        self._seen.clear()

    def _pixels(self, truth: Panoptic, labels: np.ndarray) -> Int[np.ndarray, "k k1"]:
        """Pixels of one image by what they are and what they were taken for, the last column being nothing."""
        if truth.segments.crowd is not None:
            truth = truth[~truth.segments.crowd]
        count = len(self.dataset.classes)
        there, guessed = truth.semantic().numpy().ravel(), labels.ravel()
        known = there >= 0
        pairs = there[known].astype(np.int64) * (count + 1) + np.where(guessed < 0, count, guessed)[known]
        return np.bincount(pairs, minlength=count * (count + 1)).reshape(count, count + 1)

    def add_at(self, index: int, labels: Int[Tensor, "h w"]) -> None:
        """Adds the segments of the image at a position of the data set, see `add`."""
        self.add(self.dataset.image_ids()[index], labels)

    def result(self, title: str = "") -> Result:
        """`summary` has "semantic/mIoU", the mean over classes that are there or were seen, and "semantic/accuracy"."""
        classes, count = tuple(self.dataset.classes), len(self.dataset.classes)
        pixels = sum(self._seen.values(), np.zeros((count, count + 1), np.int64))
        missing = [index for image_id, index in self._position.items() if image_id not in self._seen]
        for index in missing:
            truth: Panoptic = self.dataset.panoptic(index)
            pixels = pixels + self._pixels(truth, np.full(truth.image_size, -1))
        right, there, guessed = pixels.diagonal(), pixels.sum(1), pixels[:, :count].sum(0)
        union = there + guessed - right
        iou = np.where(union > 0, right / np.maximum(union, 1), -1.0)
        kept = union > 0
        summary = {
            "semantic/mIoU": float(iou[kept].mean()) if kept.any() else -1.0,
            "semantic/accuracy": float(right.sum() / there.sum()) if there.sum() else -1.0,
        }
        rows = [
            {
                "class": name,
                "category_id": int(self.dataset.category_ids[label]),
                "stuff": name in self.dataset.stuff,
                "objects": int(there[label]),
                "found": int(guessed[label]),
                "semantic/IoU": float(iou[label]),
            }
            for label, name in enumerate(classes)
        ]
        note = "objects are pixels; unlabelled pixels and crowd regions do not count"
        protocol = _protocol(self.dataset, "IoU of labels over all pixels", note)
        return Result(
            summary=summary,
            classes=classes,
            protocol=protocol,
            per_class=rows,
            objects={"all": int(there.sum())},
            missing=len(missing),
            title=title,
        )


def _protocol(dataset: Any, evaluator: str, note: str) -> Protocol:
    name = dataset.name
    return Protocol(images=f"{name}, {len(dataset)} images", evaluator=evaluator, note=note)

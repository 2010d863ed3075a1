"""COCO's average precision, computed by vernier if it is installed and by pycocotools otherwise, with equal results.

This is the only module that imports vernier. By default vernier corrects what it considers mistakes of pycocotools;
since every published figure includes them, its strict parity mode is used. The tests compare both with pycocotools.

Both receive columns rather than files, with ids 1, 2, ... in the order of the data set's ids: image ids may then be
strings or exceed 64 bits, and no annotation has the id 0, which pycocotools treats as "not matched".
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata, util
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from maskwright.errors import MissingExtraError, UsageError
from maskwright.structures import rle

Kind = Literal["segm", "bbox", "keypoints", "boundary"]
Backend = Literal["auto", "vernier", "pycocotools"]

KINDS: tuple[Kind, ...] = ("segm", "bbox", "keypoints", "boundary")
OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
# Square pixels; COCO's own bounds. Objects of these areas count in APs, APm and APl.
SIZES = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
KEYPOINT_SIZES = {name: bounds for name, bounds in SIZES.items() if name != "s"}
# How far annotators disagree about each of COCO's 17 person keypoints, relative to the person's size.
PERSON_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
OTHER_SIGMA = 0.05  # for keypoints without measured sigmas; the protocol of a result says so
BOUNDARY_WIDTH = 0.02  # of the image's diagonal: the paper's (2103.16562) choice for COCO


@dataclass
class Truth:
    """All annotated objects of a data set as columns.

    Attributes:
        sizes: Height and width of each image (M, 2).
        owner: Index of each object's image (G,); images are numbered 0, 1, ... in the order of their ids.
        labels: Labels (G,), 0 ... K - 1.
        boxes: Boxes (G, 4) as x, y, width, height, float64.
        areas: Areas (G,) in square pixels, which decide the size range.
        crowd: Whether each object is a crowd region (G,).
        masks: Compressed run lengths, or None.
        keypoints: Keypoints (G, J, 3) as x, y, visibility, or None.
        classes: Number of classes.
        handle: vernier's copy, made once; it caches boundaries.
    """

    sizes: np.ndarray
    owner: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    masks: list[bytes] | None
    keypoints: np.ndarray | None
    classes: int
    handle: Any = field(default=None, repr=False)


@dataclass
class Detections:
    """All predicted objects as columns, grouped by image in ascending order; within an image in the order given.

    Attributes:
        owner: Index of each object's image (D,).
        labels: Labels (D,).
        scores: Scores (D,), float64.
        boxes: Boxes (D, 4) as x, y, width, height, float64.
        masks: Compressed run lengths, or None.
        keypoints: Keypoints (D, J, 3), or None.
    """

    owner: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: list[bytes] | None
    keypoints: np.ndarray | None


@dataclass
class Curves:
    """Precision at each recall, for T overlaps, R recalls, K classes, A size ranges and M limits of detections.

    Values are -1 where there are no objects.

    Attributes:
        kind: What was measured.
        precision: Precision (T, R, K, A, M).
        recall: Recall (T, K, A, M).
        scores: Score at which each recall is reached (T, R, K, A, M).
        limits: The limits of detections per image.
        overlaps: The IoU (or OKS) thresholds.
        ranges: The size ranges: name to lower and upper area in square pixels.
    """

    kind: Kind
    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray
    limits: tuple[int, ...]
    overlaps: tuple[float, ...] = tuple(OVERLAPS.tolist())
    ranges: Mapping[str, tuple[float, float]] | None = None

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """The names of the size ranges; the empty name is all sizes."""
        return tuple(self.ranges or (KEYPOINT_SIZES if self.kind == "keypoints" else SIZES))

    def average(self, label: int | None = None) -> dict[str, float]:
        """Average precision and recall: AP, AP50, AP75, APs, APm, APl, and AR by limit and size.

        Args:
            label: The class; None for the mean over all classes that have objects.

        Returns:
            Values of 0 ... 1 by name; -1 where there are no objects.
        """
        which = slice(None) if label is None else slice(label, label + 1)
        precision, recall = self.precision[:, :, which], self.recall[:, which]
        values = {"AP": _mean(precision[..., 0, -1])}
        marked = [o for o in (0.5, 0.75) if self._has(o)] or list(self.overlaps)
        values |= {f"AP{round(o * 100)}": _mean(precision[self._at(o), ..., 0, -1]) for o in marked}
        values |= {f"AP{n}": _mean(precision[..., a, -1]) for a, n in enumerate(self.sizes) if n}
        if self.kind == "keypoints":  # its table has one limit, and recall by overlap instead
            values["AR"] = _mean(recall[..., 0, -1])
            values |= {f"AR{round(o * 100)}": _mean(recall[self._at(o), :, 0, -1]) for o in marked}
        else:
            values |= {f"AR{limit}": _mean(recall[..., 0, m]) for m, limit in enumerate(self.limits)}
        values |= {f"AR{n}": _mean(recall[..., a, -1]) for a, n in enumerate(self.sizes) if n}
        return values

    def recalls(self) -> dict[str, float]:
        """Average recall by limit and size, the measure of proposals: AR10, AR10s, AR10m, AR10l, AR100, ..."""
        return {
            f"AR{limit}{name}": _mean(self.recall[..., a, m])
            for m, limit in enumerate(self.limits)
            for a, name in enumerate(self.sizes)
        }

    def precision_at(self, overlap: float) -> list[float]:
        """Mean precision over the classes that have objects, at the recalls 0, 0.01, ... 1; empty if none has objects
        or
        the overlap was not measured."""
        if not self._has(overlap):
            return []
        planes = self.precision[self._at(overlap), :, :, 0, -1]  # (R, K)
        there = planes[0] > -1
        return planes[:, there].mean(1).tolist() if there.any() else []

    def best_thresholds(self, overlap: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
        """The score with the best F1, and that F1, for each class; NaN without objects or detections."""
        precision = self.precision[self._at(overlap), :, :, 0, -1]  # (R, K)
        f1 = 2 * precision * RECALLS[:, None] / np.maximum(precision + RECALLS[:, None], 1e-12)
        best = f1.argmax(0)
        columns = cast(npt.NDArray[np.intp], np.arange(f1.shape[1]))
        value = np.where(precision[0] > -1, f1[best, columns], np.nan)
        scores = self.scores[self._at(overlap), :, :, 0, -1][best, columns]
        return np.where(value > 0, scores, np.nan), value

    def _at(self, overlap: float) -> int:
        return int(np.abs(np.asarray(self.overlaps) - overlap).argmin())

    def _has(self, overlap: float) -> bool:
        return bool(np.isclose(self.overlaps, overlap).any())


def coco_ap(
    truth: Truth,
    found: Detections,
    kind: Kind = "segm",
    *,
    max_detections: int = 100,
    limits: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    backend: Backend = "auto",
    overlaps: Sequence[float] | None = None,
    sizes: Mapping[str, tuple[float, float]] | None = None,
) -> Curves:
    """Precision and recall as defined by COCO.

    The size of a prediction is the area of its mask for "segm" and "boundary" (results without a "bbox" key, in terms
    of pycocotools), of its box for "bbox", and of the extent of its keypoints for "keypoints".

    Args:
        truth: Annotated objects.
        found: Predicted objects.
        kind: "segm", "bbox", "keypoints" or "boundary".
        max_detections: Limit of detections per image and class.
        limits: Numbers of detections to report recall for, instead of those of COCO's table.
        sigmas: Keypoint sigmas (M,), if they are not COCO's 17.
        backend: "auto", "vernier" or "pycocotools".
        overlaps: IoU (or OKS) thresholds, ascending; default: 0.5, 0.55, ... 0.95. Others are computed by pycocotools.
        sizes: Size ranges as name to (lowest, highest) area in square pixels, the first of them "" for all sizes;
            default: COCO's small, medium and large. Others are computed by pycocotools.

    Returns:
        The curves.

    Raises:
        UsageError: If masks or keypoints are missing, or an argument is invalid.
    """
    _require(truth, found, kind)
    check_ranges(overlaps, sizes)
    if overlaps is not None or sizes is not None:
        if backend == "vernier":
            raise UsageError("overlaps and sizes of your own need backend 'pycocotools' or 'auto'")
        backend = "pycocotools"
    limits = tuple(limits or ((max_detections,) if kind == "keypoints" else ladder(max_detections)))
    if kind == "keypoints":
        sigmas = tuple(sigmas or keypoint_sigmas(_keypoints(truth, found)))
        found = _boxed_by_keypoints(found)
    if backend_of(backend) == "vernier":
        precision, recall, scores = _by_vernier(truth, found, kind, limits, sigmas)
    else:
        precision, recall, scores = _by_pycocotools(truth, found, kind, limits, sigmas, overlaps, sizes)
    used = tuple(OVERLAPS.tolist()) if overlaps is None else tuple(float(o) for o in overlaps)
    return Curves(kind, precision, recall, scores, limits, used, sizes)


def backend_of(wish: Backend = "auto") -> Literal["vernier", "pycocotools"]:
    """The backend to use: vernier if it is installed, unless `wish` names the other.

    Raises:
        MissingExtraError: If vernier is asked for and not installed.
    """
    if wish not in ("auto", "vernier", "pycocotools"):
        raise UsageError(f"backend must be one of 'auto', 'vernier', 'pycocotools', got {wish!r}")
    installed = util.find_spec("vernier") is not None
    if wish == "vernier" and not installed:
        raise MissingExtraError("vernier", "eval")
    return "vernier" if installed and wish != "pycocotools" else "pycocotools"


def backend_name(wish: Backend = "auto") -> str:
    """Name, version and mode of the backend, for the protocol of a result."""
    name = backend_of(wish)
    return f"{name} {metadata.version(name)}" + (" (strict parity)" if name == "vernier" else "")


def ladder(max_detections: int) -> tuple[int, ...]:
    """The limits that recall is reported for: 1, 10 and `max_detections`."""
    if max_detections < 1:
        raise UsageError(f"max_detections must be at least 1, got {max_detections}")
    return tuple(sorted({1, 10, max_detections} if max_detections > 10 else {1, max_detections}))


def proposal_limits(max_detections: int) -> tuple[int, ...]:
    """The limits that recall of proposals is reported for: 10, 100 and `max_detections`, 1000 in the papers."""
    ladder(max_detections)
    return tuple(sorted({n for n in (10, 100) if n < max_detections} | {max_detections}))


def keypoint_sigmas(keypoints: int) -> tuple[float, ...]:
    """COCO's sigmas for 17 keypoints, `OTHER_SIGMA` for each of any other number."""
    return PERSON_SIGMAS if keypoints == len(PERSON_SIGMAS) else (OTHER_SIGMA,) * keypoints


# ---- vernier ---------------------------------------------------------------------------------------------------------


def _by_vernier(
    truth: Truth, found: Detections, kind: Kind, limits: tuple[int, ...], sigmas: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from vernier import instance as module

    instance: Any = module  # which exports the functions only at run time
    if truth.handle is None:
        truth.handle = _vernier_truth(truth)
    options: dict[str, Any] = {"parity_mode": "strict", "max_dets_per_image": limits[-1], "use_cats": True}
    predictions = _vernier_found(truth, found, kind)
    if kind == "bbox":
        grid = instance.evaluate_bbox_grid(truth.handle, predictions, dt_area="bbox", **options)
    elif kind == "segm":
        grid = instance.evaluate_segm_grid(truth.handle, predictions, dt_area="mask", **options)
    elif kind == "boundary":
        options["dilation_ratio"] = BOUNDARY_WIDTH
        grid = instance.evaluate_boundary_grid(truth.handle, predictions, dt_area="mask", **options)
    else:
        assert sigmas is not None
        options["sigmas"] = {label + 1: list(sigmas) for label in range(truth.classes)}
        grid = instance.evaluate_keypoints_grid(truth.handle, predictions, dt_area="bbox", **options)
    sums = grid.accumulate(list(limits))
    return np.asarray(sums.precision), np.asarray(sums.recall), np.asarray(sums.scores)


def _vernier_truth(truth: Truth) -> Any:
    from vernier.instance import CocoDataset

    count = len(truth.owner)
    images = {
        "id": np.arange(1, len(truth.sizes) + 1),
        "height": np.ascontiguousarray(truth.sizes[:, 0], np.int64),
        "width": np.ascontiguousarray(truth.sizes[:, 1], np.int64),
    }
    annotations: dict[str, Any] = {
        "id": np.arange(1, count + 1),
        "image_id": truth.owner + 1,
        "category_id": truth.labels + 1,
        "bbox": np.ascontiguousarray(truth.boxes),
        "area": truth.areas,
        "iscrowd": truth.crowd,
    }
    if truth.masks is not None:
        sizes = truth.sizes[truth.owner].tolist()
        annotations["segmentation"] = [_code(text, size) for text, size in zip(truth.masks, sizes, strict=True)]
    if truth.keypoints is not None:
        annotations["keypoints"] = np.ascontiguousarray(truth.keypoints, np.float64)
        annotations["num_keypoints"] = (truth.keypoints[..., 2] > 0).sum(1).astype(np.int64)
    categories = [{"id": label + 1, "name": str(label)} for label in range(truth.classes)]
    return CocoDataset.from_arrays(images, annotations, categories)  # type: ignore[arg-type]


def _vernier_found(truth: Truth, found: Detections, kind: Kind) -> list[Any]:
    images, starts = np.unique(found.owner, return_index=True)
    ends = np.append(starts[1:], len(found.owner))[: len(starts)].tolist()
    batches: list[Any] = []
    for image, start, end in zip(images.tolist(), starts.tolist(), ends, strict=True):
        part = slice(start, end)
        batch: dict[str, Any] = {
            "image_id": image + 1,
            "boxes": np.ascontiguousarray(found.boxes[part]),
            "scores": np.ascontiguousarray(found.scores[part]),
            "labels": np.ascontiguousarray(found.labels[part] + 1),
        }
        if kind in ("segm", "boundary"):
            assert found.masks is not None
            size = truth.sizes[image].tolist()
            batch["rles"] = [_code(text, size) for text in found.masks[part]]
        if kind == "keypoints":
            assert found.keypoints is not None
            batch["keypoints"] = np.ascontiguousarray(found.keypoints[part], np.float64)
        batches.append(batch)
    return batches


def _code(text: bytes, size: Sequence[int]) -> dict[str, Any]:
    return {"size": (int(size[0]), int(size[1])), "counts": text}


# ---- pycocotools -----------------------------------------------------------------------------------------------------


def _by_pycocotools(
    truth: Truth, found: Detections, kind: Kind, limits: tuple[int, ...], sigmas: Sequence[float] | None,
    overlaps: Sequence[float] | None = None, sizes: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    from pycocotools.cocoeval import COCOeval

    if kind == "boundary":
        from maskwright.evaluation.boundary import BoundaryEvaluation as Engine
    else:
        Engine = COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        engine: Any = Engine(
            _index(truth, _truth_records(truth, kind)),
            _index(truth, _found_records(truth, found, kind)),
            "segm" if kind == "boundary" else kind,
        )
        engine.params.maxDets = list(limits)
        if overlaps is not None:
            engine.params.iouThrs = np.asarray(overlaps, np.float64)
        if sizes is not None:
            engine.params.areaRng = [list(bounds) for bounds in sizes.values()]
            engine.params.areaRngLbl = [name or "all" for name in sizes]
        if sigmas is not None:
            engine.params.kpt_oks_sigmas = np.asarray(sigmas)
        engine.evaluate()
        engine.accumulate()
    return engine.eval["precision"], engine.eval["recall"], engine.eval["scores"]


def _index(truth: Truth, records: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    index: Any = COCO()
    sizes = truth.sizes.tolist()
    index.dataset = {
        "images": [{"id": i + 1, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
        "categories": [{"id": label + 1, "name": str(label)} for label in range(truth.classes)],
        "annotations": records,
    }
    index.createIndex()
    return index


def _truth_records(truth: Truth, kind: Kind) -> list[dict[str, Any]]:
    records = _records(truth.owner, truth.labels, truth.boxes, truth.areas)
    for record, crowd in zip(records, truth.crowd.tolist(), strict=True):
        record["iscrowd"] = int(crowd)
    _add_masks(records, truth, truth.masks if kind in ("segm", "boundary") else None)
    if kind == "keypoints":
        for record, keypoints in zip(records, _rows_of(truth.keypoints), strict=True):
            record["keypoints"] = keypoints.ravel().tolist()
            record["num_keypoints"] = int((keypoints[:, 2] > 0).sum())
    return records


def _found_records(truth: Truth, found: Detections, kind: Kind) -> list[dict[str, Any]]:
    areas = found.boxes[:, 2] * found.boxes[:, 3]
    records = _records(found.owner, found.labels, found.boxes, areas)
    for record, score in zip(records, found.scores.tolist(), strict=True):
        record["score"] = score
        record["iscrowd"] = 0
    if kind in ("segm", "boundary"):
        _add_masks(records, truth, found.masks)
        for record, text in zip(records, found.masks or (), strict=True):
            record["area"] = rle.area(text)
    if kind == "keypoints":
        for record, keypoints in zip(records, _rows_of(found.keypoints), strict=True):
            record["keypoints"] = keypoints.ravel().tolist()
    return records


def _records(owner: np.ndarray, labels: np.ndarray, boxes: np.ndarray, areas: np.ndarray) -> list[dict[str, Any]]:
    columns = zip(owner.tolist(), labels.tolist(), boxes.tolist(), areas.tolist(), strict=True)
    return [
        {"id": number, "image_id": image + 1, "category_id": label + 1, "bbox": box, "area": area}
        for number, (image, label, box, area) in enumerate(columns, 1)
    ]


def _rows_of(keypoints: np.ndarray | None) -> list[np.ndarray]:
    """The keypoints of each object; empty if there are no objects."""
    return [] if keypoints is None else list(keypoints)


def _add_masks(records: list[dict[str, Any]], truth: Truth, masks: list[bytes] | None) -> None:
    if masks is not None:
        for record, text in zip(records, masks, strict=True):
            record["segmentation"] = {"size": truth.sizes[record["image_id"] - 1].tolist(), "counts": text}


# ---- shared ----------------------------------------------------------------------------------------------------------


def _require(truth: Truth, found: Detections, kind: Kind) -> None:
    part = {"segm": "masks", "boundary": "masks", "keypoints": "keypoints"}.get(kind)
    if part and len(truth.owner) and getattr(truth, part) is None:
        raise UsageError(f"the annotations have no {part}; leave {kind!r} out of the kinds to evaluate")
    if part and len(found.owner) and getattr(found, part) is None:
        raise UsageError(f"the predictions have no {part}; leave {kind!r} out of the kinds to evaluate")
    if kind == "keypoints" and truth.keypoints is not None and found.keypoints is not None:
        ours, theirs = found.keypoints.shape[1], truth.keypoints.shape[1]
        if len(found.owner) and len(truth.owner) and ours != theirs:
            raise UsageError(
                f"the predictions have {ours} keypoints each, the annotations {theirs}; the numbers must be equal"
            )


def _keypoints(truth: Truth, found: Detections) -> int:
    points = truth.keypoints if truth.keypoints is not None else found.keypoints
    return len(PERSON_SIGMAS) if points is None else points.shape[1]


def _boxed_by_keypoints(found: Detections) -> Detections:
    if found.keypoints is None or not len(found.owner):
        return found
    low, high = found.keypoints[..., :2].min(1), found.keypoints[..., :2].max(1)
    boxes = np.concatenate([low, high - low], 1).astype(np.float64)
    return Detections(found.owner, found.labels, found.scores, boxes, found.masks, found.keypoints)


def check_ranges(overlaps: Sequence[float] | None, sizes: Mapping[str, tuple[float, float]] | None) -> None:
    """Raises a UsageError for invalid overlap thresholds or size ranges, see `coco_ap`."""
    if overlaps is not None:
        values = np.asarray(overlaps, np.float64)
        if not values.size or not ((values > 0) & (values <= 1)).all() or (np.diff(values) <= 0).any():
            raise UsageError(f"overlaps must be ascending numbers above 0 and at most 1, got {list(overlaps)}")
    if sizes is not None:
        if next(iter(sizes), None) != "":
            raise UsageError(f"the first size range must be named '' and hold all sizes, got {list(sizes)}")
        wrong = next((name for name, (low, high) in sizes.items() if not 0 <= low < high), None)
        if wrong is not None:
            raise UsageError(f"size range {wrong!r} must be two areas, the lower first, got {sizes[wrong]}")


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0

"""COCO's average precision, by vernier where it is installed and by pycocotools where not: the same numbers.

This is the only module that imports vernier. Its own interface corrects what it takes for mistakes of pycocotools;
every published number has them, so it is asked for strict parity here. pycocotools is the judge of both in the tests.

Both are given columns rather than files, with ids of our own (1, 2, ... in the order of the data set's ids): image
ids may then be strings or beyond 64 bits, and no annotation has the id 0, which pycocotools takes for "not matched".
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata, util
from typing import Any, Literal

import numpy as np

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
OTHER_SIGMA = 0.05  # for keypoints that nobody has measured; a result says so in its protocol
BOUNDARY_WIDTH = 0.02  # of the image's diagonal: the paper's (2103.16562) choice for COCO


@dataclass
class Truth:
    """Every annotated object of a data set, as columns; images are counted 0, 1, ... in the order of their ids."""

    sizes: np.ndarray  # (M, 2) H, W
    owner: np.ndarray  # (G,) which image
    labels: np.ndarray  # (G,) 0 ... K - 1
    boxes: np.ndarray  # (G, 4) x, y, width, height, float64
    areas: np.ndarray  # (G,) what the size buckets go by
    crowd: np.ndarray  # (G,) bool
    masks: list[bytes] | None  # compressed run lengths
    keypoints: np.ndarray | None  # (G, J, 3)
    classes: int
    handle: Any = field(default=None, repr=False)  # vernier's own copy, made once: it caches boundaries


@dataclass
class Detections:
    """Every predicted object, as columns, grouped by image in ascending order; within one, in the order given."""

    owner: np.ndarray  # (D,)
    labels: np.ndarray  # (D,)
    scores: np.ndarray  # (D,) float64
    boxes: np.ndarray  # (D, 4) x, y, width, height, float64
    masks: list[bytes] | None
    keypoints: np.ndarray | None  # (D, J, 3)


@dataclass
class Curves:
    """What precision was reached at each recall: T overlaps, R recalls, K classes, A sizes, M limits on detections.

    -1 where there is nothing to find. `scores` is the confidence at which that recall is reached.
    """

    kind: Kind
    precision: np.ndarray  # (T, R, K, A, M)
    recall: np.ndarray  # (T, K, A, M)
    scores: np.ndarray  # (T, R, K, A, M)
    limits: tuple[int, ...]

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        return tuple(KEYPOINT_SIZES if self.kind == "keypoints" else SIZES)

    def average(self, label: int | None = None) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl and AR by limit and size, of one class or the mean over all that have objects;
        0 ... 1, and -1 where there is nothing to find."""
        which = slice(None) if label is None else slice(label, label + 1)
        precision, recall = self.precision[:, :, which], self.recall[:, which]
        values = {"AP": _mean(precision[..., 0, -1])}
        values |= {f"AP{int(o * 100)}": _mean(precision[_at(o), ..., 0, -1]) for o in (0.5, 0.75)}
        values |= {f"AP{n}": _mean(precision[..., a, -1]) for a, n in enumerate(self.sizes) if n}
        if self.kind == "keypoints":  # its table has one limit, and recall by overlap instead
            values["AR"] = _mean(recall[..., 0, -1])
            values |= {f"AR{int(o * 100)}": _mean(recall[_at(o), :, 0, -1]) for o in (0.5, 0.75)}
        else:
            values |= {f"AR{limit}": _mean(recall[..., 0, m]) for m, limit in enumerate(self.limits)}
        values |= {f"AR{n}": _mean(recall[..., a, -1]) for a, n in enumerate(self.sizes) if n}
        return values

    def recalls(self) -> dict[str, float]:
        """Average recall by limit and size, as proposals are measured: AR10, AR10s, AR10m, AR10l, AR100, ..."""
        return {
            f"AR{limit}{name}": _mean(self.recall[..., a, m])
            for m, limit in enumerate(self.limits)
            for a, name in enumerate(self.sizes)
        }

    def precision_at(self, overlap: float) -> list[float]:
        """Precision at the recalls 0, 0.01, ... 1, the mean over the classes that have objects; empty if none has."""
        planes = self.precision[_at(overlap), :, :, 0, -1]  # (R, K)
        there = planes[0] > -1
        return planes[:, there].mean(1).tolist() if there.any() else []

    def best_thresholds(self, overlap: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
        """For each class the score at which F1 is best, and that F1; NaN where there is nothing to find or found."""
        precision = self.precision[_at(overlap), :, :, 0, -1]  # (R, K)
        f1 = 2 * precision * RECALLS[:, None] / np.maximum(precision + RECALLS[:, None], 1e-12)
        best = f1.argmax(0)
        columns = np.arange(f1.shape[1])
        value = np.where(precision[0] > -1, f1[best, columns], np.nan)
        scores = self.scores[_at(overlap), :, :, 0, -1][best, columns]
        return np.where(value > 0, scores, np.nan), value


def coco_ap(
    truth: Truth,
    found: Detections,
    kind: Kind = "segm",
    *,
    max_detections: int = 100,
    limits: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    backend: Backend = "auto",
) -> Curves:
    """Precision and recall as COCO counts them, at most `max_detections` per image *and class*, as there.

    `limits`: the numbers of detections that recall is told for, instead of those of COCO's table.

    A prediction's size is that of its mask for "segm" and "boundary" (results without a "bbox" key, in pycocotools'
    terms), of its box for "bbox", and of the extent of its keypoints for "keypoints".
    """
    _require(truth, found, kind)
    limits = tuple(limits or ((max_detections,) if kind == "keypoints" else ladder(max_detections)))
    if kind == "keypoints":
        sigmas = tuple(sigmas or keypoint_sigmas(_keypoints(truth, found)))
        found = _boxed_by_keypoints(found)
    run = _by_vernier if backend_of(backend) == "vernier" else _by_pycocotools
    precision, recall, scores = run(truth, found, kind, limits, sigmas)
    return Curves(kind, precision, recall, scores, limits)


def backend_of(wish: Backend = "auto") -> Literal["vernier", "pycocotools"]:
    """Which of the two counts: vernier if it is installed, unless `wish` says otherwise."""
    if wish not in ("auto", "vernier", "pycocotools"):
        raise UsageError(f"there is no evaluator {wish!r}; choose auto, vernier or pycocotools")
    installed = util.find_spec("vernier") is not None
    if wish == "vernier" and not installed:
        raise MissingExtraError("vernier", "eval")
    return "vernier" if installed and wish != "pycocotools" else "pycocotools"


def backend_name(wish: Backend = "auto") -> str:
    """Name, version and mode of what counts, for a result's protocol."""
    name = backend_of(wish)
    return f"{name} {metadata.version(name)}" + (" (strict parity)" if name == "vernier" else "")


def ladder(max_detections: int) -> tuple[int, ...]:
    """The limits recall is told for: 1, 10 and `max_detections`."""
    if max_detections < 1:
        raise UsageError(f"max_detections is {max_detections}; it must be at least 1")
    return tuple(sorted({1, 10, max_detections} if max_detections > 10 else {1, max_detections}))


def proposal_limits(max_detections: int) -> tuple[int, ...]:
    """The limits recall of proposals is told for: 10, 100 and `max_detections`, which is 1000 in the papers."""
    ladder(max_detections)
    return tuple(sorted({n for n in (10, 100) if n < max_detections} | {max_detections}))


def keypoint_sigmas(keypoints: int) -> tuple[float, ...]:
    """COCO's for 17 keypoints, `OTHER_SIGMA` for each of any other number."""
    return PERSON_SIGMAS if keypoints == len(PERSON_SIGMAS) else (OTHER_SIGMA,) * keypoints


# ---- vernier ---------------------------------------------------------------------------------------------------------


def _by_vernier(
    truth: Truth, found: Detections, kind: Kind, limits: tuple[int, ...], sigmas: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from vernier import instance

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
    batches = []
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
    truth: Truth, found: Detections, kind: Kind, limits: tuple[int, ...], sigmas: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from pycocotools.cocoeval import COCOeval

    if kind == "boundary":
        from maskwright.evaluation.boundary import BoundaryEvaluation as Engine
    else:
        Engine = COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there, unasked
        engine: Any = Engine(
            _index(truth, _truth_records(truth, kind)),
            _index(truth, _found_records(truth, found, kind)),
            "segm" if kind == "boundary" else kind,
        )
        engine.params.maxDets = list(limits)
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
        for record, keypoints in zip(records, truth.keypoints if records else (), strict=True):  # type: ignore[arg-type]
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
        for record, keypoints in zip(records, found.keypoints if records else (), strict=True):  # type: ignore[arg-type]
            record["keypoints"] = keypoints.ravel().tolist()
    return records


def _records(owner: np.ndarray, labels: np.ndarray, boxes: np.ndarray, areas: np.ndarray) -> list[dict[str, Any]]:
    columns = zip(owner.tolist(), labels.tolist(), boxes.tolist(), areas.tolist(), strict=True)
    return [
        {"id": number, "image_id": image + 1, "category_id": label + 1, "bbox": box, "area": area}
        for number, (image, label, box, area) in enumerate(columns, 1)
    ]


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
            raise UsageError(f"the predictions have {ours} keypoints each, the annotations {theirs}; they must agree")


def _keypoints(truth: Truth, found: Detections) -> int:
    points = truth.keypoints if truth.keypoints is not None else found.keypoints
    return len(PERSON_SIGMAS) if points is None else points.shape[1]


def _boxed_by_keypoints(found: Detections) -> Detections:
    if found.keypoints is None or not len(found.owner):
        return found
    low, high = found.keypoints[..., :2].min(1), found.keypoints[..., :2].max(1)
    boxes = np.concatenate([low, high - low], 1).astype(np.float64)
    return Detections(found.owner, found.labels, found.scores, boxes, found.masks, found.keypoints)


def _at(overlap: float) -> int:
    return int(np.abs(OVERLAPS - overlap).argmin())


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0

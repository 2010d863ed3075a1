"""The evaluator of objects: collects predictions image by image and computes a `Result`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, runtime_checkable
from typing import Protocol as Interface

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from maskwright.data.dataset import as_dataset
from maskwright.data.views import OneClass, one_class
from maskwright.errors import UsageError
from maskwright.evaluation import coco
from maskwright.evaluation.coco import Backend, Curves, Detections, Kind, Truth
from maskwright.evaluation.confusion import ImageScore, confuse
from maskwright.evaluation.records import read_results
from maskwright.evaluation.result import Example, Protocol, Result
from maskwright.evaluation.result_ids import folded
from maskwright.files import write_json
from maskwright.structures import Instances, Masks, Placement

Task = Literal["instances", "proposals"]

EXAMPLE_SIDE = 560  # pixels of the longer side, enough for a column of the report; about 40 KB each


@runtime_checkable
class Annotated(Interface):
    """The part of a data set's interface that an evaluator uses; `areas(i)` (N,) and `name` are optional."""

    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def category_ids(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def image_ids(self) -> Sequence[Any]: ...
    def targets(self, index: int, /) -> Instances: ...
    def sizes(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class _Record:
    """The predictions of one image in compact form."""

    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: list[bytes] | None
    keypoints: np.ndarray | None


class Evaluator:
    """Collects predictions image by image and compares them with the annotations of a data set.

    `add` is cheap: it keeps run-length strings, about 100 bytes per small object. All computation happens in `result`,
    which can be called repeatedly; an image that was not added counts as one without predictions. `reset` drops the
    predictions and keeps what was computed from the annotations, for the next epoch.

    Args:
        dataset: The data set.
        kinds: What to measure, of "segm", "bbox", "keypoints".
        boundary: Measure boundary AP too.
        max_detections: Limit per image and class, best first; default: 100, for proposals 1000.
        task: "instances": AP per class. "proposals": average recall of objects regardless of class, at 10, 100 and 1000
            per image, as pycocotools computes it without categories.
        keypoint_detections: The limit for keypoints; COCO's is 20.
        score_threshold: Predictions that score less do not count in the confusion matrix and in the quality of images.
        sigmas: Keypoint sigmas, if they are not COCO's 17.
        backend: "auto", "vernier" or "pycocotools".
        overlaps: IoU (or OKS) thresholds instead of 0.5, 0.55, ... 0.95.
        sizes: Size ranges instead of COCO's, as name to (lowest, highest) area in square pixels; the first is named ""
            and holds all sizes.

    Raises:
        UsageError: If an argument is invalid, or image ids of the data set are not unique.
    """

    def __init__(
        self,
        dataset: Annotated,
        kinds: Sequence[str] = ("segm", "bbox"),
        boundary: bool = False,
        max_detections: int | None = None,
        *,
        task: str = "instances",
        keypoint_detections: int = 20,
        score_threshold: float = 0.5,
        sigmas: Sequence[float] | None = None,
        backend: Backend = "auto",
        overlaps: Sequence[float] | None = None,
        sizes: Mapping[str, tuple[float, float]] | None = None,
    ):
        unknown = [kind for kind in kinds if kind not in coco.KINDS]
        if unknown or not kinds:
            raise UsageError(f"kinds must be one or more of {', '.join(coco.KINDS)}, got {tuple(kinds)}")
        if task not in ("instances", "proposals"):
            raise UsageError(f"task must be 'instances' or 'proposals', got {task!r}")
        if task == "proposals" and "keypoints" in kinds:
            raise UsageError("kinds must be 'segm' and 'bbox' for proposals, which have no keypoints")
        if max_detections is None:
            max_detections = 1000 if task == "proposals" else 100
        coco.backend_of(backend)
        coco.ladder(max_detections)
        coco.ladder(keypoint_detections)
        dataset = as_dataset(dataset)
        self.task = task
        coco.check_ranges(overlaps, sizes)
        self.overlaps, self.ranges = overlaps, sizes
        self.given = dataset  # with its own classes
        self.dataset = OneClass(dataset) if task == "proposals" else dataset
        self.kinds = cast(tuple[Kind, ...], tuple(dict.fromkeys([*kinds, *(["boundary"] if boundary else [])])))
        self.max_detections = max_detections
        self.keypoint_detections = keypoint_detections
        self.score_threshold = score_threshold
        self.sigmas = sigmas
        self.backend: Backend = backend
        ids = list(dataset.image_ids())
        # pycocotools processes images in the order of their ids, and equal scores keep that order.
        self._order = sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))
        self._ids = [ids[i] for i in self._order]
        self._position = {image_id: position for position, image_id in enumerate(self._ids)}
        if len(self._position) < len(ids):
            raise UsageError(f"{len(ids) - len(self._position)} images of the data set have the id of another image")
        shapes = list(dataset.sizes())
        self._sizes = [(int(shapes[i][0]), int(shapes[i][1])) for i in self._order]
        self._records: dict[Any, _Record] = {}
        self._truth: Truth | None = None

    def __len__(self) -> int:
        """The number of images that were added."""
        return len(self._records)

    def add(self, image_id: Any, instances: Instances) -> None:
        """Adds the predictions for an image.

        Args:
            image_id: The image's id in the data set.
            instances: Objects on the image's own grid, with scores, and labels of the data set; objects with label -1
                (a class that it does not have, see `match_classes`) are left out. Proposals may have any labels.

        Raises:
            UsageError: If the image is unknown or was added before, or the predictions do not fit it.
        """
        if image_id not in self._position:
            raise UsageError(
                f"the data set has no image {image_id!r}; its ids are {_some(self._ids)} (use add_at for positions)"
            )
        if image_id in self._records:
            raise UsageError(f"image {image_id!r} was added twice; call reset() before the next evaluation")
        size = self._sizes[self._position[image_id]]
        if tuple(instances.image_size) != size:
            raise UsageError(
                f"predictions for image {image_id!r} are on a grid of {tuple(instances.image_size)}, "
                f"the image is {size} (H, W); decode onto the image's own grid"
            )
        self._records[image_id] = self._compact(image_id, instances)

    def add_at(self, index: int, instances: Instances) -> None:
        """Adds the predictions for the image at a position of the data set, see `add`."""
        self.add(self.dataset.image_ids()[index], instances)

    def reset(self) -> None:
        """Drops all predictions."""
        self._records = {}

    # ---- several processes, files --------------------------------------------------------------------------------

    def partial(self) -> dict[Any, Any]:
        """The predictions added here, to be sent to another process (pickled) and passed to `merge` there."""
        return dict(self._records)

    def merge(self, partials: Sequence[dict[Any, Any]]) -> None:
        """Adds the predictions of other processes.

        An image that several have (samplers repeat some, so that all have the same number) counts once, from the first.
        """
        for partial in partials:
            unknown = [image_id for image_id in partial if image_id not in self._position]
            if unknown:
                raise UsageError(f"a partial result has image {unknown[0]!r}, which the data set does not have")
            self._records = {**partial, **self._records}

    def write(self, path: str | Path) -> Path:
        """Writes all predictions as a COCO results file, with the data set's own ids.

        Records have both "bbox" and "segmentation". To get the same APs, APm and APl for masks from pycocotools, remove
        "bbox" first: otherwise it takes the size of a prediction from its box.

        Returns:
            The path.
        """
        records: list[dict[str, Any]] = []
        for image_id, size in zip(self._ids, self._sizes, strict=True):
            if image_id in self._records:
                instances = _instances(self._records[image_id], size)
                records += instances.to_coco(image_id, self.dataset.category_ids)
        return write_json(path, records)

    def read(self, path: str | Path) -> None:
        """Adds all predictions of a COCO results file.

        The ids of images and categories are matched as `read_results` describes.

        Args:
            path: The file. `pictures.json` in its folder, which `predict` writes, is used if it lists the ids.

        Raises:
            AnnotationError: If a record is damaged, or the file does not belong to the data set.
        """
        paths = self.given.paths()
        found = read_results(
            path,
            dict(zip(self._ids, self._sizes, strict=True)),
            self.given.category_ids,
            classes=self.given.classes,
            paths={image_id: p for image_id, i in zip(self._ids, self._order, strict=True) if (p := paths[i])},
            targets=lambda image_id: self.given.targets(self._order[self._position[image_id]]),
            by_class=self.task != "proposals",
        )
        for image_id, instances in found.items():
            self.add(image_id, instances)

    def columns(self) -> tuple[Truth, Detections]:
        """Returns all annotated and all predicted objects as columns, images in the order of their ids."""
        return self._annotations(), self._predictions()

    # ---- counting ------------------------------------------------------------------------------------------------

    def result(self, examples: int = 6, title: str = "") -> Result:
        """Computes the result.

        Args:
            examples: Number of worst and of best images that are kept, reduced in size, for the report page; with 0 no
                image is read.
            title: Title of the report page.
        """
        truth, found = self._annotations(), self._predictions()
        curves: dict[Kind, Curves] = {kind: self._curves(truth, found, kind) for kind in self.kinds}
        # Without predictions it is the measured kinds that tell whether masks were expected.
        expected = found.masks is not None if len(found.owner) else "segm" in self.kinds
        masked = truth.masks is not None and expected
        confusion, images = confuse(
            truth,
            found,
            self._ids,
            self.dataset.classes,
            by="segm" if masked else "bbox",
            score_threshold=self.score_threshold,
        )
        values = {k: c.recalls() if self.task == "proposals" else c.average() for k, c in curves.items()}
        return Result(
            summary={f"{kind}/{name}": value for kind in curves for name, value in values[kind].items()},
            classes=tuple(self.dataset.classes),
            protocol=self._protocol(truth, found),
            per_class=self._per_class(truth, found, curves),
            objects=_sizes_of(truth, self.ranges or coco.SIZES),
            curves=self._precisions(curves),
            confusion=confusion,
            images=images,
            examples=self._examples(images, examples),
            missing=len(self._ids) - len(self._records),
            title=title,
        )

    def _curves(self, truth: Truth, found: Detections, kind: Kind) -> Curves:
        limit = self.keypoint_detections if kind == "keypoints" else self.max_detections
        limits = coco.proposal_limits(limit) if self.task == "proposals" else None
        return coco.coco_ap(
            truth, found, kind, max_detections=limit, limits=limits, sigmas=self.sigmas, backend=self.backend,
            overlaps=self.overlaps, sizes=self.ranges,
        )  # fmt: skip

    def _precisions(self, curves: dict[Kind, Curves]) -> dict[str, list[float]]:
        if self.task == "proposals":  # precision is not defined: further proposals are not errors
            return {}
        return {
            f"{k}/{round(o * 100)}": c for k, own in curves.items() for o in own.overlaps if (c := own.precision_at(o))
        }

    def _protocol(self, truth: Truth, found: Detections) -> Protocol:
        name = self.dataset.name
        notes: list[str] = []
        if "keypoints" in self.kinds:
            notes.append(f"keypoints: maxDets {self.keypoint_detections}")
            points = truth.keypoints if truth.keypoints is not None else found.keypoints
            keypoints = len(coco.PERSON_SIGMAS) if points is None else points.shape[1]
            if self.sigmas is not None:
                notes.append("OKS with custom sigmas")
            elif keypoints != len(coco.PERSON_SIGMAS):
                notes.append(f"OKS with sigma {coco.OTHER_SIGMA} for each of {keypoints} keypoints")
        if self.task == "proposals":
            notes.append("average recall of objects regardless of class (useCats 0)")
        if not self.dataset.has_areas:
            notes.append("sizes of objects are the areas of their masks")
        if self.overlaps is not None:
            notes.append(f"overlap thresholds {', '.join(f'{o:g}' for o in self.overlaps)}")
        if self.ranges is not None:
            notes.append(
                "size ranges "
                + ", ".join(f"{n or 'all'} {low:g} to {high:g}" for n, (low, high) in self.ranges.items())
            )
        return Protocol(
            images=f"{name}, {len(self._ids)} images",
            evaluator=coco.backend_name("pycocotools" if self.overlaps or self.ranges else self.backend),
            max_detections=self.max_detections,
            note="; ".join(notes),
        )

    def _per_class(self, truth: Truth, found: Detections, curves: dict[Kind, Curves]) -> list[dict[str, Any]]:
        if self.task == "proposals":
            return []
        count = len(self.dataset.classes)
        real = ~truth.crowd
        objects = np.bincount(truth.labels[real], minlength=count).tolist()
        seen = np.unique(np.stack([truth.labels[real], truth.owner[real]]), axis=1)[0]
        images = np.bincount(seen, minlength=count).tolist()
        guesses = np.bincount(found.labels, minlength=count).tolist()
        thresholds, scores = (v.tolist() for v in curves[self.kinds[0]].best_thresholds())
        return [
            {
                "class": name,
                "category_id": int(self.dataset.category_ids[label]),
                "objects": objects[label],
                "images": images[label],
                "found": guesses[label],
                **{f"{k}/{n}": v for k, curve in curves.items() for n, v in curve.average(label).items()},
                "threshold": _number(thresholds[label]),
                "F1": _number(scores[label]),
            }
            for label, name in enumerate(self.dataset.classes)
        ]

    def _examples(self, images: list[ImageScore], count: int) -> list[Example]:
        ranked = sorted((p for p in images if p.quality is not None), key=lambda p: cast(float, p.quality))
        half = min(count, (len(ranked) + 1) // 2)
        chosen = [("worst", p) for p in ranked[:half]]
        chosen += [("best", p) for p in ranked[half:][::-1][:half]]
        return [self._example(rank, score) for rank, score in chosen]

    def _example(self, rank: str, score: ImageScore) -> Example:
        from PIL import Image

        position = self._position[score.id]
        sample = self.dataset[self._order[position]]
        height, width = self._sizes[position]
        shrink = min(1.0, EXAMPLE_SIDE / max(height, width))
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        pixels = sample.image[:3] if len(sample.image) >= 3 else sample.image[:1].expand(3, -1, -1)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((size[1], size[0]), Image.Resampling.BOX)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85)
        record = self._records.get(score.id)
        found = Instances.empty((height, width), masks=False) if record is None else _instances(record, (height, width))
        assert found.scores is not None
        found = found[found.scores >= self.score_threshold]
        placement = Placement.resize((height, width), size)
        truth = self.dataset.targets(self._order[position])
        name = sample.path.name if sample.path else ""
        return Example(rank, score, jpeg.getvalue(), size, truth.place(placement), found.place(placement), name)

    # ---- columns -------------------------------------------------------------------------------------------------

    def _compact(self, image_id: Any, instances: Instances) -> _Record:
        if instances.scores is None:
            raise UsageError(f"predictions for image {image_id!r} have no scores, which AP needs")
        instances = one_class(instances.to("cpu")) if self.task == "proposals" else instances.to("cpu")
        known = instances.labels >= 0
        if not bool(known.all()):
            instances = instances[known]
        labels = instances.labels.numpy().astype(np.int64)
        if len(labels) and labels.max() >= len(self.dataset.classes):
            raise UsageError(
                f"a prediction for image {image_id!r} has label {labels.max()}, the data set has "
                f"{len(self.dataset.classes)} classes; map labels with match_classes first"
            )
        assert instances.scores is not None
        scores = instances.scores.detach().double().numpy()
        boxes = instances.boxes.detach().double().numpy()
        if not np.isfinite(scores).all() or not np.isfinite(boxes).all():
            raise UsageError(f"predictions for image {image_id!r} have a score or box that is not finite")
        wants = {"segm", "boundary"} & set(self.kinds)
        if wants and len(labels) and instances.masks is None:
            others = "keypoints" if instances.keypoints is not None else "bbox"
            raise UsageError(f"predictions for image {image_id!r} have no masks; evaluate kinds=({others!r},) instead")
        if "keypoints" in self.kinds and len(labels) and instances.keypoints is None:
            raise UsageError(f"predictions for image {image_id!r} have no keypoints; leave 'keypoints' out of kinds")
        masks = None if instances.masks is None else _texts(instances.masks)
        points = None if instances.keypoints is None else instances.keypoints.detach().double().numpy().copy()
        return _Record(labels, scores.copy(), boxes.copy(), masks, points)

    def _annotations(self) -> Truth:
        if self._truth is None:
            targets = [self.dataset.targets(i) for i in self._order]
            self._truth = _truth(targets, self._sizes, len(self.dataset.classes))
            if self.dataset.has_areas:
                given = [np.asarray(self.dataset.areas(i), np.float64).reshape(-1) for i in self._order]
                self._truth.areas = np.concatenate([np.zeros(0), *given])
        return self._truth

    def _predictions(self) -> Detections:
        pairs = [(i, r) for i, d in enumerate(self._ids) if (r := self._records.get(d)) is not None and len(r.labels)]
        records = [r for _, r in pairs]
        masked = bool(records) and all(r.masks is not None for r in records)
        with_points = bool(records) and all(r.keypoints is not None for r in records)
        boxes = np.concatenate([np.zeros((0, 4)), *(r.boxes for r in records)])
        return Detections(
            owner=np.repeat([i for i, _ in pairs], [len(r.labels) for r in records]).astype(np.int64),
            labels=np.concatenate([np.zeros(0, np.int64), *(r.labels for r in records)]),
            scores=np.concatenate([np.zeros(0), *(r.scores for r in records)]),
            boxes=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1),
            masks=[text for r in records for text in r.masks or ()] if masked else None,
            keypoints=np.concatenate([cast(np.ndarray, r.keypoints) for r in records]) if with_points else None,
        )


def match_classes(ours: Sequence[str], theirs: Sequence[str]) -> Int[Tensor, " k"]:
    """Matches class names.

    Names are compared exactly, then without regard to case, spaces, hyphens and underscores. Of equal names in `theirs`
    the first counts.

    Args:
        ours: Names to look up.
        theirs: Names to look in.

    Returns:
        For each of `ours` its position in `theirs`; -1 if there is none.

    Raises:
        UsageError: If no name is in both: all results would be zero.
    """
    exact = {name: label for label, name in reversed(list(enumerate(theirs)))}
    loose = {folded(name): label for label, name in reversed(list(enumerate(theirs)))}
    found = [exact.get(name, loose.get(folded(name), -1)) for name in ours]
    if ours and theirs and max(found) < 0:
        raise UsageError(
            f"no class of the system ({_some(ours)}) is a class of the data set ({_some(theirs)}); "
            "train or fine-tune on these classes, or rename them in the annotation file"
        )
    return torch.tensor(found, dtype=torch.int64)


# ---- inside ----------------------------------------------------------------------------------------------------------


def _truth(targets: list[Instances], sizes: list[tuple[int, int]], classes: int) -> Truth:
    counts = [len(t) for t in targets]
    there = [t for t in targets if len(t)]
    boxes = torch.cat([torch.zeros(0, 4), *(t.boxes for t in there)]).double().numpy()
    masks = [text for t in there for text in _texts(t.masks)] if all(t.masks is not None for t in there) else None
    keypoints = next((t.keypoints.shape[1] for t in there if t.keypoints is not None), None)
    points = None
    if keypoints is not None:
        points = np.concatenate([_points(t, keypoints) for t in there]).astype(np.float64)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    areas = [t.masks.areas().double().numpy() for t in there if t.masks is not None] if masks is not None else []
    return Truth(
        sizes=np.asarray(sizes, np.int64).reshape(-1, 2),
        owner=np.repeat(np.arange(len(targets)), counts).astype(np.int64),
        labels=torch.cat([torch.zeros(0, dtype=torch.int64), *(t.labels for t in there)]).numpy(),
        boxes=xywh,
        areas=np.concatenate([np.zeros(0), *areas]) if masks is not None else xywh[:, 2] * xywh[:, 3],
        crowd=np.concatenate([np.zeros(0, bool), *(_crowd(t) for t in there)]),
        masks=masks,
        keypoints=points,
        classes=classes,
    )


def _texts(masks: Masks | None) -> list[bytes]:
    return [] if masks is None else [code["counts"] for code in masks.rle()]


def _crowd(target: Instances) -> np.ndarray:
    return np.zeros(len(target), bool) if target.crowd is None else target.crowd.numpy()


def _points(target: Instances, keypoints: int) -> np.ndarray:
    return np.zeros((len(target), keypoints, 3)) if target.keypoints is None else target.keypoints.double().numpy()


def _instances(record: _Record, size: tuple[int, int]) -> Instances:
    return Instances(
        size,
        torch.as_tensor(record.boxes).float(),
        torch.as_tensor(record.labels),
        None if record.masks is None else Masks.from_rle(record.masks, size),
        torch.as_tensor(record.scores).float(),
        None if record.keypoints is None else torch.as_tensor(record.keypoints).float(),
    )


def _sizes_of(truth: Truth, ranges: Mapping[str, tuple[float, float]]) -> dict[str, int]:
    areas = truth.areas[~truth.crowd]
    within = {name: int(((areas >= low) & (areas <= high)).sum()) for name, (low, high) in ranges.items() if name}
    return {"all": len(areas), **within, "crowd": int(truth.crowd.sum())}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _some(values: Sequence[Any]) -> str:
    return ", ".join(str(v) for v in values[:5]) + (f", ... ({len(values)} in all)" if len(values) > 5 else "")

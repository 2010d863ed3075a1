"""A system measured on a data set: AP, speed, memory."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.data import DataWarning, OneClass, as_dataset, evenly_spaced, open_dataset, things_only
from maskwright.errors import ImageError, UsageError
from maskwright.evaluation import Evaluator, PanopticEvaluator, Result, SemanticEvaluator, Speed, match_classes
from maskwright.inference.predicting import ahead
from maskwright.inference.preparing import chosen_device, precision, prepare, run_network
from maskwright.inference.suppressing import Suppression, checked_suppression, suppressed, suppression_words
from maskwright.inference.tasks import Measured, checked_thresholds, default_of, on_host, verb_of
from maskwright.inference.tiles import check_tiles, predict_tiled, tile_words
from maskwright.structures import Batch, Instances, Panoptic, Placement
from maskwright.systems import ProposalSystem, System


def evaluate(
    system: System,
    data: str | Path | Any,
    split: str = "val",
    *,
    task: Measured = "instances",
    batch: int = 1,
    tile: int | None = None,
    overlap: float = 0.2,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    compile: bool = False,
    score_threshold: float | None = None,
    detections: int | None = None,
    limit: int | None = None,
    kinds: Sequence[str] | None = None,
    boundary: bool = False,
    examples: int = 6,
    workers: int = 2,
    title: str = "",
    suppression: Suppression | None = None,
    **thresholds: Any,
) -> Result:
    """AP of a system on a data set, its panoptic quality, or recall of its proposals, with the speed and memory.

    data             a folder, a COCO file, "scenes...", or a `Dataset`; classes are matched by name
    task             "instances": AP; "panoptic": PQ, of images divided among things and stuff; "semantic": IoU of
                     labels over all pixels, both of systems and sets that have stuff (without it, AP is of things
                     alone); "proposals": average recall of objects whatever their class, of any system
    batch            images (or tiles) per forward pass
    tile, overlap    measure what `predict` finds with tiles of this side, each object once; `detections` are then per
                     tile too
    device, dtype, compile  see `prepare`
    score_threshold  None: the system's own, 0.05 for most (of proposals: 0); higher ones lower AP
    detections       per image, and as many per class are counted; None: 100, of proposals 1000
    limit            at most so many images, evenly spread over the set
    kinds            of "segm", "bbox", "keypoints"; None: all that the system predicts and the set has
    boundary         boundary AP too
    examples         images kept for the report page
    workers          threads that read and resize images while the network works
    suppression      "matrix": Matrix NMS on the finished masks, see `predict`

    Where torch.distributed runs, every process takes its share and all get the whole result. An image that cannot be
    read counts as one without predictions, with a warning; it is an error where the data set is strict.
    `Result.speed` is of the network and the decoding up to full-size masks, reading apart.
    """
    if detections is None:
        detections = 1000 if task == "proposals" else 100
    if score_threshold is None and task == "proposals":
        score_threshold = 0.0
    if batch < 1 or workers < 1 or detections < 1:
        raise UsageError(f"batch is {batch}, workers is {workers}, detections is {detections}; all are at least 1")
    check_tiles(tile, overlap, task)
    divided = task in ("panoptic", "semantic")
    verb = verb_of(system, task)
    given = {**thresholds, **({} if score_threshold is None else {"score_threshold": score_threshold})}
    if not divided:
        given["detections"] = detections
    elif suppression is not None or kinds is not None or boundary:
        raise UsageError(f"suppression, kinds and boundary are for objects; with task {task!r} leave them out")
    options = checked_thresholds(verb, system.name, given)
    lowest = default_of(verb, "score_threshold") if score_threshold is None else score_threshold
    after = functools.partial(suppressed, kind=checked_suppression(suppression), threshold=lowest)
    place, kind = chosen_device(device), precision(dtype)
    dataset = open_dataset(data, split, panoptic=divided) if isinstance(data, (str, Path)) else as_dataset(data)
    if not divided:
        dataset = things_only(dataset)
    elif not getattr(dataset, "stuff", ()):
        raise UsageError(f"task {task!r} needs a set whose images are divided among things and stuff (COCO panoptic)")
    if limit is not None:
        dataset = _spread(dataset, limit)
    if not len(dataset):
        raise UsageError("there are no images in this data set; nothing can be measured")
    if isinstance(system, ProposalSystem):
        dataset = OneClass(dataset, system.classes[0])
    # Whatever classes proposals have, the evaluator forgets them.
    rename = torch.arange(len(system.classes))
    if task != "proposals":
        rename = match_classes(system.classes, dataset.classes)
    ready = prepare(system, place, dtype, compile)
    rank, world = _ranks()
    watch = _Watch(place)
    pairs: list[tuple[int, Any]] = []
    mine = range(rank, len(dataset), world)
    find = functools.partial(_found, ready, task, place, kind, options, watch)
    if tile:
        find_tiled = functools.partial(predict_tiled, tile=tile, overlap=overlap, batch=batch)
        stream = _run_tiled(ready, dataset, mine, find, find_tiled, workers, watch)
    else:
        stream = _run(ready, dataset, mine, batch, find, workers)
    for index, found in stream:
        objects = after(found) if isinstance(found, Instances) else found
        watch.saw(objects)
        pairs.append((index, _renamed(objects, rename)))
    parts = _gathered((pairs, watch.outputs), world)
    everything = [pair for own, _ in parts for pair in own]
    if divided:
        result = _divided_result(task, dataset, everything, title)
    else:
        outputs = set().union(*(names for _, names in parts))
        evaluator = Evaluator(
            dataset,
            kinds=_kinds(kinds, outputs - {"keypoints"} if task == "proposals" else outputs, dataset),
            boundary=boundary and "segm" in outputs,
            max_detections=detections,
            task="proposals" if task == "proposals" else "instances",
        )
        for index, objects in everything:
            evaluator.add_at(index, objects)
        result = evaluator.result(examples=examples, title=title)
    preprocess = ready.preprocess
    result.protocol = replace(
        result.protocol,
        threshold=lowest,
        input_size=(tile_words(tile, overlap) if tile else "") + preprocess.description,
        precision=dtype,
        device=_device_name(place),
        batch=batch,
        decoding_timed=True,
        suppression=None if divided else suppression_words(suppression),
    )
    result.speed = watch.speed(sum(p.numel() for p in system.parameters()))
    return result


def _renamed(found: Any, rename: Tensor) -> Any:
    """With the data set's labels; what it has no class for is left out."""
    objects = found.segments if isinstance(found, Panoptic) else found
    labels = rename[objects.labels]
    known = labels >= 0
    objects = replace(objects, labels=labels)[known]
    return Panoptic(objects, found.things[known]) if isinstance(found, Panoptic) else objects


def _divided_result(task: Measured, dataset: Any, pairs: Sequence[tuple[int, Panoptic]], title: str) -> Result:
    if task == "panoptic":
        quality = PanopticEvaluator(dataset)
        for index, found in pairs:
            quality.add_at(index, found)
        return quality.result(title)
    labels = SemanticEvaluator(dataset)
    for index, found in pairs:
        labels.add_at(index, found.semantic())
    return labels.result(title)


def _found(
    system: System,
    task: Measured,
    place: torch.device,
    kind: torch.dtype,
    options: dict[str, Any],
    watch: _Watch,
    laid: Sequence[tuple[Tensor, Placement]],
) -> list[Any]:
    """What is in each image of a batch, on the host, with the time it took."""
    images = Batch.collate([v for v, _ in laid], [p for _, p in laid], multiple=system.preprocess.multiple)
    with torch.no_grad():
        watch.start()
        raw = run_network(system, images, place, kind)
        watch.network()
        found = [on_host(each) for each in verb_of(system, task)(raw, images.placements, **options)]
        watch.decoded(len(laid))
    return found


def _read(dataset: Any, indices: Sequence[int], prepared: Callable[[Tensor], Any], workers: int, depth: int) -> Any:
    """Index and prepared image, one after the other; None for one that cannot be read where the set is not strict."""

    def load(index: int) -> tuple[int, Any]:
        try:
            return index, prepared(dataset[index].image)
        except ImageError as error:
            return index, error

    for index, ready in ahead(load, indices, workers, depth):
        if not isinstance(ready, ImageError):
            yield index, ready
        elif getattr(dataset, "strict", False):
            raise ready
        else:
            warnings.warn(f"{ready} (it counts as an image without predictions)", DataWarning, stacklevel=4)
            yield index, None


def _run(
    system: System,
    dataset: Any,
    indices: Sequence[int],
    batch: int,
    find: Callable[[Sequence[tuple[Tensor, Placement]]], list[Any]],
    workers: int,
) -> Any:
    group: list[tuple[int, tuple[Tensor, Placement]]] = []
    left = len(indices)
    for index, laid in _read(dataset, indices, system.preprocess.apply, workers, batch + workers):
        left -= 1
        if laid is not None:
            group.append((index, laid))
        if group and (len(group) == batch or not left):
            found = find([laid for _, laid in group])
            yield from zip([number for number, _ in group], found, strict=True)
            group = []


def _run_tiled(
    system: System,
    dataset: Any,
    indices: Sequence[int],
    find: Callable[[Sequence[tuple[Tensor, Placement]]], list[Instances]],
    find_tiled: Callable[..., Instances],
    workers: int,
    watch: _Watch,
) -> Any:
    for index, image in _read(dataset, indices, lambda image: image, workers, workers):
        if image is not None:
            with watch.one_image():
                objects = find_tiled(lambda crops: find([system.preprocess.apply(c) for c in crops]), image)
            yield index, objects


@dataclass
class _Watch:
    """Measures the network and the decoding, batch by batch."""

    device: torch.device
    networks: list[float] = field(default_factory=list)  # seconds per image
    decodings: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)  # what the system predicts: "segm", "bbox", "keypoints"
    marks: list[float] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.marks = [self._now()]

    def network(self) -> None:
        self.marks.append(self._now())

    def decoded(self, images: int) -> None:
        begin, middle = self.marks
        self.networks.append((middle - begin) / images)
        self.decodings.append((self._now() - middle) / images)
        self.images.append(images)

    @contextlib.contextmanager
    def one_image(self) -> Iterator[None]:
        """The batches within are tiles of one image, and count as one; joining them is a part of decoding."""
        before, begin = len(self.images), self._now()
        yield
        sums = [float(np.dot(v[before:], self.images[before:])) for v in (self.networks, self.decodings)]
        laying = self._now() - begin - sum(sums)
        self.networks[before:], self.decodings[before:] = [sums[0]], [sums[1] + laying]
        self.images[before:] = [1]

    def saw(self, objects: Instances | Panoptic) -> None:
        if isinstance(objects, Panoptic):
            return
        self.outputs.add("bbox")
        if objects.masks is not None:
            self.outputs.add("segm")
        if objects.keypoints is not None:
            self.outputs.add("keypoints")

    def speed(self, parameters: int) -> Speed:
        """The first batch warms up caches and compiles; it is left out where there are others."""
        if not self.images:
            return Speed(parameters=parameters)
        skip = 1 if len(self.images) > 1 else 0
        network, decoding = (1000 * np.array(v[skip:]) for v in (self.networks, self.decodings))
        counts = np.array(self.images[skip:])
        each = np.repeat(network + decoding, counts)
        return Speed(
            milliseconds=float(np.median(each)),
            milliseconds_p90=float(np.quantile(each, 0.9)),
            images_per_second=float(sum(self.images) / (time.perf_counter() - self.begun)),
            stages={
                "network": float(np.average(network, weights=counts)),
                "decoding": float(np.average(decoding, weights=counts)),
            },
            peak_memory=_peak(self.device),
            parameters=parameters,
        )


def _peak(device: torch.device) -> int | None:
    """Bytes: of the GPU, or of this process since it began; None where nobody keeps count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kinds(asked: Sequence[str] | None, outputs: set[str], dataset: Any) -> tuple[str, ...]:
    if asked is not None:
        missing = [kind for kind in asked if kind not in outputs | {"bbox"}]
        if missing and outputs:
            raise UsageError(
                f"kinds holds {missing[0]!r}, which this system does not predict; it gives {', '.join(sorted(outputs))}"
            )
        return tuple(asked)
    there = [k for k in ("segm", "bbox", "keypoints") if k in outputs]
    if not getattr(dataset, "keypoint_names", None) and "keypoints" in there:
        there.remove("keypoints")
    return tuple(there) or ("bbox",)


def _spread(dataset: Any, limit: int) -> Any:
    if limit < 1:
        raise UsageError(f"limit is {limit}; at least one image is needed")
    return evenly_spaced(dataset, limit)


def _ranks() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _gathered(own: Any, world: int) -> list[Any]:
    """What every process has, in order of rank."""
    if world == 1:
        return [own]
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, own)
    return parts


def _device_name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"CPU, {torch.get_num_threads()} threads" if place.type == "cpu" else str(place)

"""Evaluation of a system on a data set: average precision or panoptic quality, speed, memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from maskwright.data import Dataset, DataWarning, Renamed, as_dataset, evenly_spaced, open_dataset
from maskwright.data.classes import counted, label_counts, similar_words, without_match
from maskwright.data.findings import first_few
from maskwright.data.images import reading
from maskwright.errors import ImageError, UsageError
from maskwright.evaluation import Result
from maskwright.evaluation.measuring import Measurement, answers, measure
from maskwright.evaluation.speed import Stopwatch
from maskwright.evaluation.tasks import TaskName, checked_options, default_of, task_called
from maskwright.inference.predicting import padded_shape, window_of
from maskwright.inference.preparing import chosen_device, chosen_dtype, precision, prepare
from maskwright.inference.reading_ahead import ahead
from maskwright.inference.selecting import class_labels
from maskwright.inference.suppressing import Suppression, checked_suppression, suppressed, suppression_words
from maskwright.inference.tiles import check_tiles, predict_tiled, tile_words
from maskwright.structures import Batch, Instances, Placement, Preprocess
from maskwright.structures.batching import streamed_batches
from maskwright.systems import System


def evaluate(
    system: System,
    data: str | Path | Any,
    split: str = "val",
    *,
    task: TaskName = "instances",
    batch: int = 1,
    tile: int | None = None,
    overlap: float = 0.2,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    compile: bool | Literal["frozen"] = False,
    classes: Sequence[str] | None = None,
    score_threshold: float | None = None,
    detections: int | None = None,
    limit: int | None = None,
    kinds: Sequence[str] | None = None,
    boundary: bool = False,
    examples: int = 6,
    workers: int = 2,
    title: str = "",
    suppression: Suppression | None = None,
    out: str | Path | None = None,
    **thresholds: Any,
) -> Result:
    """Evaluates a system on a data set with annotations.

    If torch.distributed is initialised, every process takes its share of the images and all get the whole result. An
    unreadable image counts as one without predictions, with a warning; it is an error if the data set is strict.
    `Result.speed` measures the networks and the arithmetic between and after them, up to masks at the images' own size,
    without reading.

    Args:
        system: The system. Its classes are matched with the data set's by name.
        data: A folder, a COCO file, "scenes...", or a data set.
        split: The part of `data` to use.
        task: "instances": AP. "panoptic": PQ of images segmented into things and stuff. "semantic": IoU of labels over
            all pixels. "proposals": average recall of objects regardless of their class, for every system.
        batch: Images (or tiles) per forward pass.
        tile: Side of the tiles that larger images are cut into, in pixels; each object counts once, `detections` is
            then per tile too.
        overlap: Share of a tile that it has in common with the next.
        device: Where to compute; None: a GPU if there is one, otherwise the CPU.
        dtype: Type of weights and activations: "float32", "bfloat16", "float16" or "auto", see `prepare`.
        compile: Compile the networks with `torch.compile`.
        classes: Names of the classes to evaluate; objects of the others are left out on both sides. None: all.
        score_threshold: Objects that score less are left out. None: the system's own, 0.05 for most systems (0 for
            proposals); higher values lower AP. Note that the command `maskwright predict` has a default of 0.5.
        detections: Objects per image; as many per class are counted. None: 100, for proposals 1000.
        limit: At most this many images, evenly spaced over the data set.
        kinds: What to measure, of "segm", "bbox", "keypoints"; None: all that the system predicts and the data set has.
        boundary: Measure boundary AP too, of systems that predict masks.
        examples: Number of images to keep for the report page.
        workers: Threads that read and resize images while the network computes.
        title: Title of the report page.
        suppression: "matrix" applies Matrix NMS to the finished masks, see `predict`.
        out: Folder that the predictions are written to, with the data set's own image and category ids: results.json
            and pictures.json, or panoptic.json and the folder panoptic. None: they are not written.
        **thresholds: Further options of the system's decoding.

    Returns:
        The measured figures and the protocol that they were measured with.

    Raises:
        UsageError: If an option is invalid, the system does not support the task, or the two share no class.
    """
    asked = task_called(task)
    if batch < 1 or workers < 1 or (detections is not None and detections < 1):
        raise UsageError(
            f"batch, workers and detections must be at least 1, got {batch}, {workers} and "
            f"{asked.detections if detections is None else detections}"
        )
    check_tiles(tile, overlap, task)
    if asked.segments and (suppression is not None or kinds is not None or boundary):
        raise UsageError(f"suppression, kinds and boundary do not apply to task {task!r}")
    verb = asked.of(system)
    threshold = asked.score_threshold if score_threshold is None else score_threshold
    limits = {} if asked.segments else {"detections": detections or asked.detections}
    scores = {} if threshold is None else {"score_threshold": threshold}
    options = checked_options(verb, system.name, {**thresholds, **scores, **limits})
    lowest = default_of(verb, "score_threshold") if threshold is None else threshold
    place = chosen_device(device, system)
    dtype = chosen_dtype(dtype, place, system)
    kind = precision(dtype)
    opened = open_dataset(data, split, panoptic=asked.segments or None) if isinstance(data, (str, Path)) else data
    dataset = asked.view(as_dataset(opened), system)
    if classes is not None:
        labels = class_labels(classes, dataset.classes)
        if asked.segments or "proposals" in system.tasks or not labels:
            raise UsageError("`classes` must name at least one class, and needs a system and a task with classes")
        dataset = Renamed(dataset, [dataset.classes[label] for label in sorted(set(labels))])
    if limit is not None:
        if limit < 1:
            raise UsageError(f"limit must be at least 1, got {limit}")
        dataset = evenly_spaced(dataset, limit)
    if not len(dataset):
        raise UsageError("the data set has no images")

    if "proposals" in (task, *system.tasks):
        unmatched = None if task == "proposals" else f"every object counts as {system.classes[0]!r}"
    else:
        unmatched = _unmatched_classes(system, dataset)
    ready = prepare(system, place, dtype, compile)
    matrix = functools.partial(suppressed, kind=checked_suppression(suppression), threshold=lowest)
    measurement = Measurement(asked, ready, dataset, options, process=None if suppression is None else matrix)
    rank, world = _ranks()
    watch = Stopwatch(place)
    mine = range(rank, len(dataset), world)
    if tile:
        _measure_tiles(measurement, mine, tile, overlap, batch, workers, place, kind, watch)
    else:
        measure(_batches(ready, dataset, mine, batch, workers), [measurement], device=place, dtype=kind, watch=watch)
    if world > 1:
        measurement.gather(functools.partial(_gathered, world=world))
    with reading(ready.preprocess):  # examples show the images
        result = measurement.result(kinds, boundary, limits.get("detections"), examples, title)
    if out is not None and rank == 0:
        measurement.write(Path(out))
    result.protocol = replace(
        result.protocol,
        threshold=lowest,
        input_size=(tile_words(tile, overlap) if tile else "") + ready.preprocess.description,
        precision=dtype,
        device=_device_name(place),
        batch=batch,
        decoding_timed=True,
        suppression=None if asked.segments else suppression_words(suppression),
        classes=unmatched,
    )
    result.speed = watch.speed(sum(p.numel() for p in system.parameters()))
    return result


def _unmatched_classes(system: System, dataset: Dataset) -> str | None:
    """What the protocol states about classes without a counterpart; a warning if objects cannot be predicted."""
    unknown = without_match(dataset.classes, system.classes)
    unused = without_match(system.classes, dataset.classes)
    parts: list[str] = []
    if unknown:
        counts = label_counts(dataset)
        what = f"{len(unknown)} of {len(dataset.classes)} classes of the data set are not classes of the system: "
        parts.append(f"{what}{counted(unknown, counts)}")
        if any(counts[name] for name in unknown) and len(unknown) < len(dataset.classes):
            words = f"{parts[0]}; none of their objects can be found, which lowers the averages"
            hint = similar_words(unknown, unused)
            warnings.warn(f"{dataset.name}: {words}{hint}", DataWarning, stacklevel=3)
    if unused:
        what = (
            f"{len(unused)} of {len(system.classes)} classes of the system are not in the data set, whose predictions"
        )
        parts.append(f"{what} are left out: {first_few(unused, 8)}")
    return "; ".join(parts) or None


def _read(
    dataset: Dataset, indices: Sequence[int], preprocess: Preprocess, prepared: Callable[[Tensor], Any], workers: int,
    depth: int,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Index and prepared image, in order; None for an unreadable one if the data set is not strict."""

    def load(index: int) -> tuple[int, Any]:
        try:
            with reading(preprocess):
                return index, prepared(dataset[index].image)
        except ImageError as error:
            return index, error

    for index, ready in ahead(load, indices, workers, depth):
        if not isinstance(ready, ImageError):
            yield index, ready
        elif dataset.strict:
            raise ready
        else:
            warnings.warn(f"{ready} (counted as an image without predictions)", DataWarning, stacklevel=4)
            yield index, None


def _batches(
    system: System, dataset: Dataset, indices: Sequence[int], batch: int, workers: int
) -> Iterator[tuple[list[int], Batch]]:
    read = _read(dataset, indices, system.preprocess, system.preprocess.apply, workers, batch + workers)
    images = ((index, laid) for index, laid in read if laid is not None)
    shape = functools.partial(_padded_shape, multiple=system.preprocess.multiple)
    for group in streamed_batches(images, lambda pair: shape(pair[1]), batch, window_of(batch)):
        yield [index for _, (index, _) in group], _collated(system, [laid for _, (_, laid) in group])


def _padded_shape(laid: tuple[Tensor, Placement], multiple: int) -> tuple[int, int]:
    return padded_shape(laid[0], multiple)


def _collated(system: System, laid: Sequence[tuple[Tensor, Placement]]) -> Batch:
    return Batch.collate([v for v, _ in laid], [p for _, p in laid], multiple=system.preprocess.multiple)


def _measure_tiles(
    measurement: Measurement, indices: Sequence[int], tile: int, overlap: float, batch: int, workers: int,
    device: torch.device, dtype: torch.dtype, watch: Stopwatch,
) -> None:  # fmt: skip
    """`measure` for images that are cut into tiles."""
    system = measurement.system

    def find(crops: Sequence[Tensor]) -> list[Instances]:
        laid = _collated(system, [system.preprocess.apply(crop) for crop in crops])
        ((_, found),) = answers(laid, [measurement], device=device, dtype=dtype, watch=watch)
        return [each for each in found if isinstance(each, Instances)]

    with torch.no_grad(), watch.watching(system):
        for index, image in _read(
            measurement.dataset, indices, system.preprocess, lambda image: image, workers, workers
        ):
            if image is not None:
                with watch.batch(1):
                    objects = predict_tiled(find, image, tile, overlap, batch)
                measurement.add(index, objects)


def _ranks() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _gathered(own: Any, world: int) -> list[Any]:
    """The objects of all processes, in order of rank."""
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, own)
    return parts


def _device_name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"CPU, {torch.get_num_threads()} threads" if place.type == "cpu" else str(place)

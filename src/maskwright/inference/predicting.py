"""From images to objects: one image, many, or a stream of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from maskwright.errors import ImageError, UsageError
from maskwright.inference.preparing import chosen_device, precision, prepare, run_network
from maskwright.inference.sources import Item, for_eyes, is_single, items, read
from maskwright.inference.suppressing import Suppression, checked_suppression, suppressed
from maskwright.inference.tasks import Task, checked_thresholds, default_of, on_host, verb_of
from maskwright.inference.tiles import check_tiles, predict_tiled
from maskwright.structures import Batch, Instances, Panoptic, Placement
from maskwright.systems import System

if TYPE_CHECKING:
    from PIL.Image import Image

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    path       where it came from; None for images in memory
    instances  the objects, best first, on the image's own grid, on the host; None where `error` says why
    panoptic   what the image is divided among, where that was asked for (`task`); `instances` are its things then
    size       H, W; None where the image could not be read
    error      one sentence, where the image was skipped
    seconds    network and decoding, this image's share of its batch
    """

    path: Path | None
    instances: Instances | None
    size: tuple[int, int] | None
    error: str | None = None
    seconds: float = 0.0
    classes: tuple[str, ...] = field(default=(), repr=False)
    given: Any = field(default=None, repr=False, compare=False)  # the image, where it came from memory
    panoptic: Panoptic | None = None
    stuff: tuple[str, ...] = field(default=(), repr=False)

    def found(self) -> Instances:
        """The objects; ImageError where the image was skipped."""
        if self.instances is None:
            raise ImageError(self.error or "this image was skipped")
        return self.instances

    def draw(self, **options: Any) -> Image:
        """The image with what was found drawn over it (an image from a file is read again); see `Instances.draw`."""
        found = self.panoptic if self.panoptic is not None else self.found()
        return found.draw(for_eyes(Item(self.path, self.given)), self.classes, **options)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Writes one file, by its suffix: .json COCO records, .npz run-length masks with boxes, labels and scores,
        any image's suffix the drawn image (`options` as for `draw`). Written beside and renamed. The .json of a
        divided image is COCO panoptic, and its map a .png of the same name."""
        from maskwright.inference.outputs import save_objects, save_panoptic, write_image

        path = Path(path)
        if self.panoptic is not None and path.suffix.lower() == ".json":
            return save_panoptic(self.panoptic, path, self.classes, self.stuff, self.path)
        if self.panoptic is not None and path.suffix.lower() == ".npz":
            return save_objects(self.panoptic.segments, path, self.classes, self.path)
        if path.suffix.lower() in (".json", ".npz"):
            return save_objects(self.found(), path, self.classes, self.path)
        return write_image(path, self.draw(**options))


class Predictions:
    """Predictions one by one as they are made, in the order of the images; can be gone through once.

    An image that cannot be read is skipped: its prediction has an `error`, and it is listed in `skipped`.
    """

    def __init__(self, stream: Iterator[Prediction]):
        self.skipped: list[Prediction] = []
        self._stream = stream

    def __iter__(self) -> Iterator[Prediction]:
        return self

    def __next__(self) -> Prediction:
        prediction = next(self._stream)
        if prediction.error is not None:
            self.skipped.append(prediction)
        return prediction


class CountedPredictions(Predictions):
    """Predictions whose number is known beforehand: `len`."""

    def __init__(self, stream: Iterator[Prediction], total: int):
        super().__init__(stream)
        self._total = total

    def __len__(self) -> int:
        return self._total


def predict(
    system: System,
    source: Any,
    *,
    batch: int = 1,
    tile: int | None = None,
    overlap: float = 0.2,
    recursive: bool = False,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    compile: bool = False,
    workers: int = 2,
    suppression: Suppression | None = None,
    task: Task = "instances",
    **thresholds: Any,
) -> Any:
    """The objects in one image (a `Prediction`) or in many (`Predictions`, an iterator of them).

    source      one image: a path, a PIL image, an array (H, W, 3) uint8 RGB, a tensor (3, H, W) uint8 RGB.
                Many: a folder, a glob, a list, a batch (4 dimensions), a generator of any of these
    batch       images (or tiles) per forward pass; images of different sizes are padded to the largest
    tile        side, in the image's pixels, of the tiles that larger images are cut into; `overlap` is the share a
                tile has in common with the next. Objects are joined across seams, see `inference.tiles`
    recursive   search sub-folders too
    device, dtype, compile  see `prepare`. Call that yourself to pay for it once, not with every call
    workers     threads that read and resize images while the network works
    suppression "matrix": Matrix NMS on the finished masks, after what the system does itself: scores decay by how much
                better objects of the class overlap. `nms_threshold=1` turns most systems' own off
    task        "panoptic": the image divided among things and stuff, "semantic": a label for every pixel (as
                regions), both as `Prediction.panoptic`, of systems that can
    thresholds  of the system's `decode` (`decode_panoptic`, ...): score_threshold, nms_threshold, detections (per
                image; per tile), ...

    Among many, an image that cannot be read is skipped, see `Prediction.error`; one alone raises ImageError.
    """
    if batch < 1 or workers < 1:
        raise UsageError(f"batch is {batch}, workers is {workers}; both are at least 1")
    check_tiles(tile, overlap, task)
    verb = verb_of(system, task)
    if task != "instances" and suppression is not None:
        raise UsageError(f"suppression is for objects; with task {task!r} leave it out")
    options = checked_thresholds(verb, system.name, thresholds)
    place, kind = chosen_device(device), precision(dtype)
    wanted = items(source, recursive)
    ready = prepare(system, place, dtype, compile)
    run = _Runner(ready, place, kind, options, checked_suppression(suppression), task)
    stream = _tiles(run, wanted, batch, tile, overlap) if tile else _batches(run, wanted, batch, workers)
    if is_single(source):
        prediction = next(stream)
        if prediction.error is not None:
            raise ImageError(prediction.error)
        return prediction
    return CountedPredictions(stream, len(wanted)) if isinstance(wanted, list) else Predictions(stream)


def ahead(function: Callable[[A], B], inputs: Iterable[A], workers: int, depth: int) -> Iterator[B]:
    """`function` of each input, in order, computed by threads up to `depth` inputs ahead of the one asked for."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="maskwright-read")
    waiting: deque[Future[B]] = deque()
    try:
        for value in inputs:
            waiting.append(pool.submit(function, value))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Runner:
    """A prepared system with everything a call needs."""

    system: System
    device: torch.device
    dtype: torch.dtype
    thresholds: dict[str, Any]
    suppression: Suppression | None = None
    task: Task = "instances"

    @property
    def score_threshold(self) -> float | None:
        return self.thresholds.get("score_threshold", default_of(self.system.decode, "score_threshold"))

    def __call__(self, laid: Sequence[tuple[Tensor, Placement]]) -> list[Any]:
        """Objects of each image (or the image divided), on the host, masks packed."""
        batch = Batch.collate([v for v, _ in laid], [p for _, p in laid], multiple=self.system.preprocess.multiple)
        with torch.no_grad():  # not inference mode: results may be changed in place by whoever gets them
            raw = run_network(self.system, batch, self.device, self.dtype)
            found = verb_of(self.system, self.task)(raw, batch.placements, **self.thresholds)
        return [on_host(objects) for objects in found]

    def prediction(self, item: Item, found: Instances | Panoptic, seconds: float) -> Prediction:
        classes = tuple(self.system.classes)
        if isinstance(found, Panoptic):
            stuff = classes if self.task == "semantic" else tuple(getattr(self.system, "stuff", ()))
            things, size = found.instances(), found.image_size
            return Prediction(item.path, things, size, None, seconds, classes, item.given, found, stuff)
        objects = suppressed(found, self.suppression, self.score_threshold)
        return Prediction(item.path, objects, objects.image_size, None, seconds, classes, item.given)


def _batches(run: _Runner, wanted: Iterable[Item], batch: int, workers: int) -> Iterator[Prediction]:
    def lay(item: Item) -> tuple[Item, tuple[Tensor, Placement] | ImageError]:
        try:
            return item, run.system.preprocess.apply(read(item, run.system.preprocess))
        except ImageError as error:
            return item, error

    group: list[tuple[Item, Any]] = []
    for item, laid in ahead(lay, wanted, workers, batch + workers):
        group.append((item, laid))
        if sum(not isinstance(entry, ImageError) for _, entry in group) == batch:
            yield from _flush(run, group)
            group = []
    yield from _flush(run, group)


def _flush(run: _Runner, group: list[tuple[Item, Any]]) -> Iterator[Prediction]:
    good = [laid for _, laid in group if not isinstance(laid, ImageError)]
    start = time.perf_counter()
    found = iter(run(good) if good else ())
    seconds = (time.perf_counter() - start) / max(1, len(good))
    for item, laid in group:
        if isinstance(laid, ImageError):
            yield Prediction(item.path, None, None, str(laid), classes=tuple(run.system.classes), given=item.given)
        else:
            yield run.prediction(item, next(found), seconds)


def _tiles(run: _Runner, wanted: Iterable[Item], batch: int, tile: int, overlap: float) -> Iterator[Prediction]:
    def load(item: Item) -> tuple[Item, Tensor | ImageError]:
        try:
            return item, read(item, run.system.preprocess)
        except ImageError as error:
            return item, error

    for item, image in ahead(load, wanted, 1, 1):
        if isinstance(image, ImageError):
            yield Prediction(item.path, None, None, str(image), classes=tuple(run.system.classes), given=item.given)
            continue
        start = time.perf_counter()
        objects = predict_tiled(
            lambda crops: run([run.system.preprocess.apply(c) for c in crops]), image, tile, overlap, batch
        )
        yield run.prediction(item, objects, time.perf_counter() - start)

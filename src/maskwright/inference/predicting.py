"""Prediction: from one image, many, or a stream of them to objects."""

from __future__ import annotations

import os
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from maskwright.data.findings import DataWarning
from maskwright.data.images import Reading, reading
from maskwright.data.slides import open_windows, read_in_windows
from maskwright.data.windows import WindowSource
from maskwright.errors import ImageError, UsageError
from maskwright.evaluation.measuring import run_network
from maskwright.evaluation.tasks import checked_options, default_of, on_host, task_called
from maskwright.inference.journal import digest, identity
from maskwright.inference.large import Find, ObjectStream
from maskwright.inference.preparing import chosen_device, chosen_dtype, precision, prepare
from maskwright.inference.prompting import PromptBook, PromptsLike, answered, prompt_book, promptable
from maskwright.inference.reading_ahead import ahead
from maskwright.inference.selecting import ClassFilter
from maskwright.inference.sources import Item, displayed, is_single, items, read, reading_of
from maskwright.inference.suppressing import Suppression, checked_suppression, suppressed
from maskwright.inference.tiles import check_tiles, predict_tiled
from maskwright.structures import Batch, Instances, Panoptic, Placement
from maskwright.structures.batching import in_order, streamed_batches
from maskwright.systems import System, stuff_of
from maskwright.systems.kinds.everything import Crop, find_everywhere
from maskwright.systems.kinds.promptable import Features

if TYPE_CHECKING:
    from PIL.Image import Image

Task = Literal["instances", "panoptic", "semantic"]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: The image file; None for images in memory.
        instances: The objects, best first, on the image's own grid, on the host; None if the image was skipped.
        size: Height and width of the image; None if it could not be read.
        error: Why the image was skipped; None if it was not.
        seconds: Time of networks and decoding, this image's share of its batch.
        classes: Class names; label k is `classes[k]`.
        given: The image, if it came from memory.
        panoptic: The segments of the image, if a task asked for them; `instances` are its things then.
        stuff: Those of `classes` that are regions.
        reading: How the image was read, if it has other than 8-bit RGB values.
        stream: The objects of a large image in pieces, in place of `instances`, with ``predict(..., stream=True)``.
    """

    path: Path | None
    instances: Instances | None
    size: tuple[int, int] | None
    error: str | None = None
    seconds: float = 0.0
    classes: tuple[str, ...] = field(default=(), repr=False)
    given: Any = field(default=None, repr=False, compare=False)
    panoptic: Panoptic | None = None
    stuff: tuple[str, ...] = field(default=(), repr=False)
    reading: Reading = field(default_factory=Reading, repr=False, compare=False)
    stream: ObjectStream | None = field(default=None, repr=False, compare=False)

    def found(self) -> Instances:
        """The objects; those of a stream are computed and collected.

        Raises:
            ImageError: If the image was skipped.
        """
        if self.stream is not None:
            return self.stream.instances()
        if self.instances is None:
            raise ImageError(self.error or "this image was skipped")
        return self.instances

    def draw(self, **options: Any) -> Image:
        """Draws the prediction over the image; an image from a file is read again.

        Args:
            **options: See `Instances.draw`.
        """
        found = self.panoptic if self.panoptic is not None else self.found()
        return found.draw(displayed(Item(self.path, self.given, self.reading)), self.classes, **options)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Writes one file, atomically.

        Args:
            path: The suffix decides the format: ".json" COCO records (COCO panoptic, with a map as PNG of the same
                name, for segments), ".npz" run-length masks with boxes, labels and scores, an image suffix the drawn
                image.
            **options: For a drawn image, see `draw`.

        Returns:
            The path.
        """
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
    """An iterator over predictions, in the order of the images, computed as they are asked for.

    An unreadable image is skipped: its prediction has an `error`.

    Attributes:
        skipped: The predictions of skipped images so far.
    """

    def __init__(self, stream: Iterator[Prediction]):
        self.skipped: list[Prediction] = []
        self._stream = stream

    def __getitem__(self, index: Any) -> Prediction:
        raise TypeError("predictions are computed one after the other; list(predictions) has them all and is indexed")

    def __iter__(self) -> Iterator[Prediction]:
        return self

    def __next__(self) -> Prediction:
        prediction = next(self._stream)
        if prediction.error is not None:
            self.skipped.append(prediction)
        return prediction


class CountedPredictions(Predictions):
    """`Predictions` of a known number of images: `len`."""

    def __init__(self, stream: Iterator[Prediction], total: int):
        super().__init__(stream)
        self._total = total

    def __len__(self) -> int:
        return self._total


@overload
def predict(system: System, source: Image, **options: Any) -> Prediction: ...


@overload
def predict(system: System, source: str | Path | np.ndarray | Tensor, **options: Any) -> Any: ...


@overload
def predict(system: System, source: Sequence[Any], **options: Any) -> CountedPredictions: ...


@overload
def predict(system: System, source: Iterable[Any], **options: Any) -> Predictions: ...


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
    compile: bool | Literal["frozen"] = False,
    workers: int = 2,
    suppression: Suppression | None = None,
    task: Task = "instances",
    classes: Sequence[str] | None = None,
    threshold: float | Mapping[str, float] | None = None,
    stream: bool = False,
    journals: str | Path | None = None,
    prompts: PromptsLike | None = None,
    **thresholds: Any,
) -> Any:
    """Predicts the objects in one image or in many.

    Args:
        system: The system.
        source: One image: a path, a PIL image, an array (H, W, 3) or (H, W), a tensor (3, H, W) or (H, W), RGB, or an
            encoded file as bytes or file object. Many: a folder, a glob, a list, a batch (4 dimensions), or a generator
            of any of these. Values of more than 8 bits and float values are scaled to 8 bits, see
            `data.pixel_values`.
        batch: Images (or tiles) per forward pass. Images of equal padded size are batched, so that the result is that
            of each image alone, up to rounding; up to four batches of images wait for others of their size.
        tile: Side of the tiles that larger images are cut into, in pixels. Objects are joined across seams, see
            `inference.tiles`.
        overlap: Share of a tile that it has in common with the next.
        recursive: Search sub-folders too.
        device: Where to compute; None: a GPU if there is one, otherwise the CPU.
        dtype: Type of weights and activations, see `prepare`.
        compile: Compile the networks, see `prepare`. Call `prepare` yourself to pay for it once.
        workers: Threads that read and resize images while the network computes.
        suppression: "matrix" applies Matrix NMS to the finished masks, after the system's own suppression: scores decay
            with the overlap with better objects of the class. `nms_threshold=1` turns most systems' own off.
        task: "instances"; "panoptic": the image segmented into things and stuff; "semantic": a label for every pixel
            (as regions). The last two give `Prediction.panoptic` and need a system that supports them.
        classes: Names of the classes to keep, before `detections` limits the number of objects; None: all.
        threshold: Score thresholds of classes by name; the others keep `score_threshold`. A number is the same as
            `score_threshold`, which may be such a mapping too.
        stream: With `tile`: predictions of images that are read in windows have a `stream` of objects in place of
            `instances`, so that memory does not depend on the size of the image or the number of its objects.
        journals: With `stream`: folder that records the objects of tiles, from which a killed run continues when it is
            repeated with the same image, weights and options.
        prompts: What to segment, for systems that read prompts: `Prompts` of the image, a JSON file (see
            `inference.prompting`), or a `PromptBook`. There is one object for each prompt, in their order. None: such
            systems segment everything.
        **thresholds: Options of the system's decoding: score_threshold, nms_threshold, detections (per image; per
            tile), ... The defaults are the system's: objects that score at least 0.05 for most systems. The command
            `maskwright predict` has a default score threshold of 0.5, for drawing.

    Returns:
        A `Prediction` for one image, an iterator of them (`Predictions`) for many.

    Raises:
        UsageError: If an option is invalid, the system does not support the task, or there are no images.
        ImageError: If a single image cannot be read. Among many, such an image is skipped, see `Prediction.error`.
    """
    if batch < 1 or workers < 1:
        raise UsageError(f"batch and workers must be at least 1, got {batch} and {workers}")
    check_tiles(tile, overlap, task)
    if stream and tile is None:
        raise UsageError("`stream` requires `tile`, the side of the tiles in pixels")
    asked = task_called(task)
    book = None if prompts is None else _checked_book(system, prompts, tile, task, thresholds)
    verb = asked.of(system)
    if asked.segments and suppression is not None:
        raise UsageError(f"suppression does not apply to task {task!r}")
    if asked.segments and threshold is not None:
        raise UsageError(f"threshold does not apply to task {task!r}")
    if threshold is None and isinstance(thresholds.get("score_threshold"), Mapping):
        threshold = thresholds.pop("score_threshold")
    keep = ClassFilter.create(system.classes, verb, checked_options(verb, system.name, thresholds), classes, threshold)
    options = checked_options(verb, system.name, keep.options)
    place = chosen_device(device, system)
    dtype = chosen_dtype(dtype, place, system)
    kind = precision(dtype)
    wanted = items(source, recursive)
    ready = prepare(system, place, dtype, compile)
    rules = reading_of(wanted, ready.preprocess)
    run = _Runner(ready, place, kind, options, checked_suppression(suppression), task, rules, keep, book)
    if tile:
        streams = _Streams(stream, None if journals is None else Path(journals), dtype)
        found = _tiles(run, wanted, _Tiling(batch, tile, overlap), streams)
    elif options.get("crop_n_layers"):
        found = _crops(run, wanted, workers)
    else:
        found = _batches(run, wanted, batch, workers)
    if is_single(source):
        prediction = next(found)
        if prediction.error is not None:
            raise ImageError(prediction.error)
        if book is not None:
            _mention_unused(book)
        return prediction
    if book is not None:
        found = _mentioning_unused(found, book)
    return CountedPredictions(found, len(wanted)) if isinstance(wanted, list) else Predictions(found)


def _mentioning_unused(found: Iterator[Prediction], book: PromptBook) -> Iterator[Prediction]:
    """`found`, and a warning at the end if no prompt belongs to any of the images."""
    yield from found
    _mention_unused(book)


def _mention_unused(book: PromptBook) -> None:
    if words := book.unused():
        warnings.warn(words, DataWarning, stacklevel=3)


@dataclass(frozen=True)
class _Runner:
    """A prepared system with the options of one call of `predict`."""

    system: System
    device: torch.device
    dtype: torch.dtype
    thresholds: dict[str, Any]
    suppression: Suppression | None = None
    task: Task = "instances"
    reading: Reading = field(default_factory=Reading)
    keep: ClassFilter = field(default_factory=ClassFilter)
    book: PromptBook | None = None

    def read(self, item: Item) -> Tensor:
        return read(replace(item, reading=self.reading), self.system.preprocess)

    def skipped(self, item: Item, error: ImageError) -> Prediction:
        return Prediction(item.path, None, None, str(error), classes=tuple(self.system.classes), given=item.given)

    @property
    def score_threshold(self) -> float | None:
        return self.thresholds.get("score_threshold", default_of(self.system.decode, "score_threshold"))

    def __call__(
        self, laid: Sequence[tuple[Tensor, Placement]], paths: Sequence[Path | None] | None = None
    ) -> list[Any]:
        """Objects (or segments) of each image, on the host, masks packed; `paths` find the prompts for each."""
        batch = Batch.collate([v for v, _ in laid], [p for _, p in laid], multiple=self.system.preprocess.multiple)
        with torch.no_grad():  # not inference mode: the caller may change results in place
            raw = run_network(self.system, batch, self.device, self.dtype)
            if self.book is not None:
                system = promptable(self.system)
                embeddings = system.embeddings(raw, batch.placements)
                asked = [self.book.of(p, e.image_size) for p, e in zip(paths or (), embeddings, strict=True)]
                return [answered(system, e, a) for e, a in zip(embeddings, asked, strict=True)]
            found = task_called(self.task).of(self.system)(raw, batch.placements, **self.thresholds)
        moved: list[Any] = [on_host(objects) for objects in found]
        return [self.keep(objects) for objects in moved]

    def prediction(self, item: Item, found: Instances | Panoptic, seconds: float) -> Prediction:
        classes = tuple(self.system.classes)
        if self.book is not None:
            assert isinstance(found, Instances)
            classes = self.book.classes or classes
            return Prediction(
                item.path, found, found.image_size, None, seconds, classes, item.given, reading=self.reading
            )
        if isinstance(found, Panoptic):
            stuff = classes if self.task == "semantic" else stuff_of(self.system)
            things, size = found.instances(), found.image_size
            return Prediction(
                item.path, things, size, None, seconds, classes, item.given, found, stuff, reading=self.reading
            )
        objects = self.keep(suppressed(found, self.suppression, self.score_threshold), limit=False)
        return Prediction(
            item.path, objects, objects.image_size, None, seconds, classes, item.given, reading=self.reading
        )


def padded_shape(image: Tensor, multiple: int) -> tuple[int, int]:
    """Return the size of the input for a preprocessed image (C, h, w) alone."""
    height, width = (-(-side // multiple) * multiple for side in image.shape[1:])
    return height, width


def window_of(batch: int) -> int:
    """Return how many preprocessed images wait for others of their size, at most."""
    return 4 * batch if batch > 1 else 1


Laid = tuple[Item, tuple[Tensor, Placement] | ImageError]


def _batches(run: _Runner, wanted: Iterable[Item], batch: int, workers: int) -> Iterator[Prediction]:
    preprocess = run.system.preprocess

    def lay(item: Item) -> Laid:
        try:
            return item, preprocess.apply(run.read(item))
        except ImageError as error:
            return item, error

    def shape(laid: Laid) -> tuple[int, int] | None:
        return None if isinstance(laid[1], ImageError) else padded_shape(laid[1][0], preprocess.multiple)

    stream = ahead(lay, wanted, workers, batch + workers)
    groups = streamed_batches(stream, shape, batch, window_of(batch))
    yield from in_order(_computed(run, group) for group in groups)


def _computed(run: _Runner, group: list[tuple[int, Laid]]) -> list[tuple[int, Prediction]]:
    """The numbered predictions of a batch."""
    good = [laid for _, (_, laid) in group if not isinstance(laid, ImageError)]
    paths = [item.path for _, (item, laid) in group if not isinstance(laid, ImageError)]
    start = time.perf_counter()
    found = iter(run(good, paths) if good else ())
    seconds = (time.perf_counter() - start) / max(1, len(good))
    return [
        (
            number,
            run.skipped(item, laid) if isinstance(laid, ImageError) else run.prediction(item, next(found), seconds),
        )
        for number, (item, laid) in group
    ]


def _checked_book(
    system: System, prompts: PromptsLike, tile: int | None, task: str, thresholds: Mapping[str, Any]
) -> PromptBook:
    """The prompts; UsageError if another option excludes them."""
    promptable(system)
    if tile is not None or task != "instances":
        raise UsageError("prompts need whole images and task 'instances'; omit `tile` and `task`")
    other = [name for name, value in thresholds.items() if value is not None]
    if other:
        raise UsageError(f"{other[0]} is an option of segmenting everything; it does not apply to prompts")
    return prompt_book(prompts)


def _crops(run: _Runner, wanted: Iterable[Item], workers: int) -> Iterator[Prediction]:
    """Segments everything in each image and its crops."""
    system, preprocess = promptable(run.system), run.system.preprocess
    options = system.everything_options(**{k: v for k, v in run.thresholds.items() if k != "detections"})

    def load(item: Item) -> tuple[Item, Tensor | ImageError]:
        try:
            return item, preprocess.match_channels(run.read(item))
        except ImageError as error:
            return item, error

    for item, image in ahead(load, wanted, workers, workers):
        if isinstance(image, ImageError):
            yield run.skipped(item, image)
            continue
        pixels = image
        start = time.perf_counter()

        def encode(box: Crop, pixels: Tensor = pixels) -> tuple[Features, Placement]:
            part, placement = preprocess.apply(pixels[:, box[1] : box[3], box[0] : box[2]])
            batch = Batch.collate([part], [placement], multiple=preprocess.multiple)
            return run_network(system, batch, run.device, run.dtype), placement

        with torch.no_grad():
            found = find_everywhere(system, (pixels.shape[1], pixels.shape[2]), options, encode)
        objects = run.keep(found.instances(run.thresholds.get("detections")))
        yield run.prediction(item, objects, time.perf_counter() - start)


@dataclass(frozen=True)
class _Tiling:
    """Tiles per forward pass, their side in pixels, and their overlap."""

    batch: int
    tile: int
    overlap: float


@dataclass(frozen=True)
class _Streams:
    """Whether large images are given out in pieces, the folder for journals, and the precision, for their headers."""

    wanted: bool
    journals: Path | None
    dtype: str


def _tiles(run: _Runner, wanted: Iterable[Item], tiling: _Tiling, streams: _Streams) -> Iterator[Prediction]:
    def load(item: Item) -> tuple[Item, Tensor | WindowSource | ImageError]:
        try:
            if item.path is not None and read_in_windows(item.path):
                return item, open_windows(item.path)
            return item, run.read(item)
        except ImageError as error:
            return item, error

    def find(crops: Sequence[Tensor]) -> list[Instances]:
        preprocess = run.system.preprocess
        return run([preprocess.apply(preprocess.match_channels(crop)) for crop in crops])

    for item, image in ahead(load, wanted, 1, 1):
        if isinstance(image, ImageError):
            yield run.skipped(item, image)
            continue
        start = time.perf_counter()
        if streams.wanted and not isinstance(image, Tensor):
            yield _streamed(run, item, image, find, tiling, streams)
            continue
        try:
            with reading(run.reading):
                objects = predict_tiled(find, image, tiling.tile, tiling.overlap, tiling.batch)
        except ImageError as error:  # of a window
            yield run.skipped(item, error)
            continue
        yield run.prediction(item, objects, time.perf_counter() - start)


def _streamed(
    run: _Runner, item: Item, image: WindowSource, find: Find, tiling: _Tiling, streams: _Streams
) -> Prediction:
    """The prediction of a large image in pieces."""
    if run.suppression is not None:
        raise UsageError("`suppression` compares all objects of an image, which a stream does not have; omit it")
    stream = ObjectStream(image, find, tiling.tile, tiling.overlap, tiling.batch, run.reading)
    if streams.journals is not None:
        name = f"{image.path.stem[:64]}-{zlib.crc32(os.fsencode(image.path.absolute())):08x}.tiles"
        stream.journal = streams.journals / name
        stream.about = {
            **identity(image.path),
            "weights": digest(run.system),
            "classes": run.system.classes,
            "options": repr(sorted(run.thresholds.items())),
            "keep": repr(run.keep),
            "resize": repr(run.system.preprocess),
            "device": run.device.type,
            "dtype": streams.dtype,
        }
    return Prediction(
        item.path, None, image.size, classes=tuple(run.system.classes), reading=run.reading, stream=stream
    )

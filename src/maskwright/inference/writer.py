"""Output folder of a run: drawn images, COCO results, and label images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maskwright.data.georeference import read_georeference
from maskwright.data.images import Reading
from maskwright.data.images import reading as as_specified
from maskwright.data.slides import is_slide, open_windows
from maskwright.data.windows import is_huge
from maskwright.errors import DataError, ImageError, interruption
from maskwright.evaluation.tasks import TASKS, Task
from maskwright.files import AtomicFile, json_bytes, remove_stale_parts, write_json
from maskwright.inference.geojson import GeoJsonStream
from maskwright.inference.label_image import LabelImage
from maskwright.inference.large import ObjectStream
from maskwright.inference.naming import FOLDERS, MARKED, RECORDS, OutputNames, has_mark, has_records, name_key
from maskwright.inference.outputs import RecordStream, coco_records, label_plane, write_image
from maskwright.inference.overview import PIXELS as OVERVIEW
from maskwright.inference.overview import Overview
from maskwright.inference.own_ids import DatasetIds
from maskwright.inference.seams import PlacedObjects
from maskwright.inference.sources import Item, displayed
from maskwright.locks import FolderLock
from maskwright.structures import Instances, Panoptic, Placement

Kind = Literal["drawn", "coco", "masks", "geojson", "labels"]

_File = GeoJsonStream | LabelImage
Progress = Callable[[ObjectStream, str], Iterable[PlacedObjects]]


def _without_progress(stream: ObjectStream, _: str) -> Iterable[PlacedObjects]:
    return stream


class PredictionWriter:
    """Writes the predictions of a run to a folder, one image at a time.

    Files for objects, by kind:

    - "drawn": ``drawn/NAME.jpg``, the image with its objects drawn over it;
    - "coco": ``results.json``, COCO results with image_id 1, 2, ... in the order of the images and
      category_id = label + 1, or the data set's own ids; ``pictures.json``, the "images" and "categories" that they
      refer to;
    - "masks": ``masks/NAME.png``, 16 bits: 0 background, k the k-th best object; the better one where two overlap;
    - "labels": ``labels/NAME.tif``, the same as a tiled BigTIFF with 32 bits, for images of any size;
    - "geojson": ``geojson/NAME.geojson``, outlines for QuPath and geographic information systems, see `GeoJsonStream`.

    Objects of a stream (large images) are in the order in which they became complete, and "masks" are written as
    "labels". In ``results.json``, the masks of images of 2^32 pixels and more are those of a crop: the record has its
    "window", x, y, width and height.

    Files for tasks that segment whole images:

    - "drawn": as for objects;
    - "coco": ``panoptic.json``, a COCO panoptic document; ``panoptic/NAME.png``, its maps (red + 256 green + 65536 blue
      is the id of a segment);
    - "masks": ``masks/NAME.png``, 16 bits: 0 no segment, k the k-th segment; label + 1 for task "semantic".

    NAME is the image's path relative to the source that it was found in, with its suffix or a number where another
    image has that name, see `OutputNames`. All files are written atomically, and one writer at a time has the folder.

    The files about all images replace earlier ones in `close`. If the run ends before, those of its images are written
    with names that end in ".partial.json", and earlier ones stay as they are. As a context manager, a writer calls
    `close` or `stop` at the end of the block::

        with PredictionWriter(folder, ("coco",), system.classes) as writer:
            for prediction in predict(system, images):
                writer.add(prediction.path, prediction.instances, prediction.error)

    Args:
        folder: The output folder; created if missing.
        kinds: What to write.
        classes: The class names.
        sources: The files, folders and globs that the images come from.
        stuff: Those of the classes that are stuff.
        task: What was predicted.
        ids: Image and category ids of the data set that the images belong to, in place of 1, 2, ... and label + 1.
        total: Number of images, for the message if the run is interrupted.

    Attributes:
        images: COCO entries of the images written so far.
        skipped: Path and reason of each image without a prediction.
        objects: Number of objects or segments so far.

    Raises:
        DataError: By all methods, if a file cannot be written, or would replace an image that is none of an earlier
            run, such as a mask of a data set.
        UsageError: If another process writes predictions into the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        kinds: Collection[Kind],
        classes: Sequence[str],
        sources: Iterable[str | Path] = (),
        stuff: Sequence[str] = (),
        task: Task = TASKS["instances"],
        ids: DatasetIds | None = None,
        total: int | None = None,
    ):
        self.folder, self.kinds, self.classes = Path(folder), frozenset(kinds), tuple(classes)
        self.names = OutputNames(sources)
        self.stuff, self.task, self.ids = tuple(stuff), task, ids
        self.segments: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.results = RecordStream(self.folder / TASKS["instances"].results)
        self.skipped: list[tuple[str, str]] = []
        self.objects = 0
        self.total = total
        self._journals: list[Path] = []
        self._written: set[str] = set()
        self._replaceable = has_records(self.folder)
        self._lock = FolderLock(self.folder, "predict", "another process writes predictions here", DataError)
        remove_stale_parts(self.folder)
        for name in FOLDERS:
            for parent, _, _ in os.walk(self.folder / name):
                remove_stale_parts(parent)

    def add(
        self, path: str | Path, found: Instances | Panoptic | None, error: Any = None, reading: Reading | None = None
    ) -> None:
        """Write the prediction of one image.

        Args:
            path: The image's file.
            found: Its objects or segments; None if it was skipped.
            error: Why it was skipped.
            reading: How the image was read (`Prediction.reading`), for drawing over it.
        """
        if error is not None or found is None:
            self.skipped.append((str(path), str(error)))
            return
        name = self.names.add(Path(path))
        number = len(self.images) + 1 if self.ids is None else self.ids.image_id(Path(path))
        height, width = found.image_size
        if "drawn" in self.kinds:
            self._draw(Path(path), found, self._file("drawn", f"{name}.jpg"), reading)
        if isinstance(found, Panoptic):
            self._add_segments(found, name, number)
        else:
            if "masks" in self.kinds:
                _write_plane(label_plane(found), self._file("masks", f"{name}.png"))
            if self.kinds & {"geojson", "labels"}:
                placed = PlacedObjects.of(found)
                for file in self._files(Path(path), name, found.image_size):
                    file.add(placed)
                    file.close()
            if "coco" in self.kinds:
                self.results.add(found.to_coco(number, self._category_ids()))
        # Last, so that an interrupted run does not list an image that is incomplete.
        self.images.append({"id": number, "file_name": str(path), "height": height, "width": width})
        self.objects += len(found)

    def add_stream(self, path: str | Path, stream: ObjectStream, progress: Progress = _without_progress) -> None:
        """Compute and write the prediction of a large image, piece by piece.

        An image of which a part cannot be read is skipped; nothing of it is written.

        Args:
            path: The image's file.
            stream: Its objects (`Prediction.stream`).
            progress: Wraps the pieces, with their name, to display progress.
        """
        name = self.names.add(Path(path))
        number = len(self.images) + 1 if self.ids is None else self.ids.image_id(Path(path))
        before, count = self.results.position(), 0
        files: list[_File] = []
        drawing = Overview(stream.source) if "drawn" in self.kinds else None
        try:
            files += self._files(Path(path), name, stream.size, labels="masks" in self.kinds)
            for piece in progress(stream, "tiles"):
                for file in files:
                    file.add(piece)
                if drawing is not None:
                    drawing.add(piece)
                if "coco" in self.kinds:
                    self.results.add(coco_records(piece, number, self._category_ids()))
                count += len(piece)
            if drawing is not None:
                with as_specified(stream.reading):
                    image = drawing.image()
                write_image(self._file("drawn", f"{name}.jpg"), image, sync=False)
            for file in files:
                file.close()
        except BaseException as error:
            for file in files:
                file.abandon()
            if not isinstance(error, ImageError):
                raise
            self.results.rewind(before)
            self.skipped.append((str(path), str(error)))
            return
        height, width = stream.size
        self.images.append({"id": number, "file_name": str(path), "height": height, "width": width})
        self.objects += count
        if stream.journal is not None:
            self._journals.append(stream.journal)

    def _files(self, path: Path, name: str, size: tuple[int, int], labels: bool = False) -> list[_File]:
        """The files about one image that are written object by object; `labels`: with a label image in any case."""
        files: list[_File] = []
        if "geojson" in self.kinds:
            target = self._file("geojson", f"{name}.geojson")
            files.append(GeoJsonStream(target, self.classes, read_georeference(path)))
        if labels or "labels" in self.kinds:
            files.append(LabelImage(self._file("labels", f"{name}.tif"), size))
        return files

    def _add_segments(self, found: Panoptic, name: str, number: int | str) -> None:
        if "coco" in self.kinds:
            self.segments.append(found.to_coco(number, self._category_ids(), f"{name}.png"))
            write_image(self._file("panoptic", f"{name}.png"), found.to_png(), sync=False)
        if "masks" in self.kinds:
            plane = found.semantic() + 1 if self.task.name == "semantic" else found.map()
            _write_plane(plane.numpy().astype(np.uint16), self._file("masks", f"{name}.png"))

    def close(self) -> None:
        """Write the files about all images: results.json and pictures.json, or panoptic.json."""
        try:
            if "coco" in self.kinds:
                self._write_documents()
                for name in ("results", "pictures", "panoptic"):
                    (self.folder / f"{name}.partial.json").unlink(missing_ok=True)
            self._remove_journals()
        finally:
            self._lock.release()

    def _remove_journals(self) -> None:
        """Remove the journals of large images, which are complete now."""
        for journal in self._journals:
            with contextlib.suppress(OSError):
                journal.unlink(missing_ok=True)
                journal.parent.rmdir()  # if it was the last one

    def stop(self) -> str:
        """Keep what has been written so far apart from the results of an earlier run.

        Returns:
            One sentence: how many images are complete, and where their results are.
        """
        of = "" if self.total is None else f" of {self.total}"
        done = f"{len(self.images)}{of} images are complete"
        if "coco" not in self.kinds or not self.images:
            self.results.abandon()
            self._lock.release()
            return f"{done} in {self.folder}"
        try:
            self._write_documents(".partial")
        finally:
            self._lock.release()
        name = f"{Path(self.task.results).stem}.partial.json"
        earlier = self.folder / self.task.results
        kept = f"; {earlier} of an earlier run is unchanged" if earlier.exists() else ""
        return f"{done}, their results are in {self.folder / name}{kept}"

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: object) -> None:
        if raised is None:
            self.close()
            return
        sentence = ""
        with contextlib.suppress(DataError):  # what ended the run matters more
            sentence = self.stop()
        if isinstance(raised, KeyboardInterrupt):
            number = getattr(raised, "exit_code", 130) - 128
            raise interruption(f"interrupted: {sentence or 'no results were written'}", number) from None

    def _write_documents(self, mark: str = "") -> None:
        """Write the files about all images, with `mark` before their suffix."""
        if self.task.segments:
            kinds = [
                {**entry, "isthing": int(name not in self.stuff)}
                for entry, name in zip(self._categories(), self.classes, strict=True)
            ]
            images = [
                {**entry, "file_name": self.names.relative(Path(entry["file_name"])).as_posix()}
                for entry in self.images
            ]
            segments = self.segments[: len(images)]
            document = {"images": images, "annotations": segments, "categories": kinds}
            write_json(self._marked(self.task.results, mark), document, DataError)
        else:
            about = {"images": self.images, "categories": self._categories()}
            # Both at once: the ids of one file refer to the other.
            with AtomicFile(self._marked("pictures.json", mark), DataError) as file:
                file.write(json_bytes(about, indent=1))
                self.results.close(self._marked(self.results.path.name, mark))

    def _marked(self, name: str, mark: str) -> Path:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 - the parts of a name, not of a path
        return self._file("", f"{stem}{mark}{suffix}")

    def _file(self, folder: str, name: str) -> Path:
        """A file of this run in one of the folders; "" is the output folder itself."""
        path = Path(folder, name)
        self._written.add(name_key(path.as_posix()))
        target = self.folder / path
        # Data sets have folders named "masks" and "labels" too, and theirs are not to be lost.
        if folder in MARKED and target.exists() and not self._replaceable and not has_mark(target):
            raise DataError(
                f"{target} exists and was not written by `maskwright predict`; choose another output folder than "
                f"{self.folder}"
            )
        return target

    def others(self) -> list[str]:
        """Return the results in the folder that this run has not written, such as those of an earlier one.

        Returns:
            Their names relative to the folder, sorted. Files of all kinds are listed, also those of other `kinds`.
        """
        below = [path for name in FOLDERS for path in (self.folder / name).rglob("*.*")]
        paths = [*below, *(self.folder / name for name in RECORDS)]
        names = sorted(path.relative_to(self.folder).as_posix() for path in paths if path.is_file())
        return [name for name in names if name_key(name) not in self._written]

    def _category_ids(self) -> list[int] | None:
        return None if self.ids is None else self.ids.category_ids

    def _categories(self) -> list[dict[str, Any]]:
        """COCO's list of categories."""
        if self.ids is not None:
            return self.ids.categories(self.classes)
        return [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)]

    def _draw(self, path: Path, found: Instances | Panoptic, target: Path, reading: Reading | None) -> None:
        if is_huge(path) or is_slide(path):
            with as_specified(reading or Reading()):
                image = open_windows(path).overview(OVERVIEW)
            image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
            objects = found if isinstance(found, Instances) else found.segments
            found = objects.place(Placement.resize(objects.image_size, (image.shape[1], image.shape[2])))
        else:
            image = displayed(Item(path, None, reading or Reading()))
        write_image(target, found.draw(image, self.classes).convert("RGB"), sync=False)


def _write_plane(plane: np.ndarray, target: Path) -> None:
    from PIL import Image

    write_image(target, Image.fromarray(plane), sync=False)

"""Annotations of the page as a data set: for export to every format, with who or what made each object."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from maskwright.data.convert import LossError, convert_data
from maskwright.data.dataset import Dataset, Sample
from maskwright.data.exchange.losses import find_losses
from maskwright.data.exchange.writing import Part
from maskwright.data.formats import load_format
from maskwright.errors import DataError, UsageError
from maskwright.files import write_bytes
from maskwright.structures import Instances
from maskwright.web.datasets import filled, unique_names
from maskwright.web.objects import Object, masks_of, step
from maskwright.web.project import Project, Snapshot
from maskwright.web.sources import Original
from maskwright.web.states import State

UNNAMED = "object"  # the class of a project without classes


class LossyError(DataError):
    """An export that would lose something and was not told to; nothing was written.

    Attributes:
        losses: What would be lost, a sentence for each kind.
    """

    def __init__(self, losses: Sequence[str]):
        super().__init__("the format cannot hold everything, and nothing was written: " + "; ".join(losses))
        self.losses = list(losses)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder.
        images: Number of images.
        objects: Number of objects.
        losses: What was lost, a sentence for each kind.
    """

    path: Path
    images: int
    objects: int
    losses: list[str]


class AnnotatedImages(Dataset):
    """Some images of a project, as a data set.

    Unchanged annotations are those of the original data set, polygons included.

    Args:
        snapshot: The annotations.
        positions: Images of the project.
        fill: Whether objects that are only boxes get the whole box as their mask.
    """

    has_areas = True

    def __init__(self, snapshot: Snapshot, positions: Sequence[int], fill: bool = False):
        source = snapshot.project.source
        self.snapshot, self.source, self.positions = snapshot, source, list(positions)
        self.name, self.fill = source.path.name, fill
        self.classes = snapshot.classes or (UNNAMED,)
        known = dict(zip(source.classes, source.category_ids, strict=True))
        following = itertools.count(1 + max([*known.values(), 0]))
        self.category_ids = tuple(known[name] if name in known else next(following) for name in self.classes)
        self.keypoint_names, self.stuff = source.keypoint_names, source.stuff
        self._labels = torch.tensor([self.classes.index(name) for name in source.classes], dtype=torch.int64)
        self._held: tuple[int, _Target] | None = None
        self._first_number: int | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        position = self.positions[index]
        image = self.source.read(position)
        return Sample(image, self.targets(index), self.source.id(position), self.source.file(position))

    def sizes(self) -> list[tuple[int, int]]:
        return [self._size(position) for position in self.positions]

    def _size(self, position: int) -> tuple[int, int]:
        return self.source.known_size(position) or self.snapshot.state(position).size

    def image_ids(self) -> list[int | str]:
        return [self.source.id(position) for position in self.positions]

    def paths(self) -> list[Path | None]:
        return [self.source.file(position) for position in self.positions]

    def targets(self, index: int) -> Instances:
        return self._target(index).instances

    def areas(self, index: int) -> np.ndarray:
        return self._target(index).areas

    def annotation_ids(self, index: int) -> list[Any]:
        return self._target(index).numbers

    def scores(self, index: int) -> list[float] | None:
        del index
        return None

    def extras(self, index: int) -> list[dict[str, Any]] | None:
        return [
            {"made": [dict(made) for made in one.made], **({} if one.track is None else {"track_id": one.track})}
            for one in self.objects(index)
        ]

    def objects(self, index: int) -> list[Object]:
        """Return the objects of an image, in the order of `targets`."""
        return self._target(index).objects

    # ---- targets -----------------------------------------------------------------------------------------------------

    def _target(self, index: int) -> _Target:
        index = range(len(self))[index]
        if self._held is None or self._held[0] != index:
            self._held = index, self._made(self.positions[index])
        return self._held[1]

    def _made(self, position: int) -> _Target:
        state = self.snapshot.state(position)
        if state.version == 0 and (whole := self.source.original(position)) is not None:
            return self._unchanged(state, whole)
        objects = labelled(state, self.snapshot.classes)
        kept = [one for one in objects if one.kept.get("source")]
        original = self.source.original(position) if kept else None
        parts: list[Instances] = []
        areas: list[npt.NDArray[np.float64]] = []
        if original is not None:
            rows = {name: row for row, name in enumerate(unique_names(original.ids, len(original.instances)))}
            kept = [one for one in kept if one.id in rows]  # others have gone from the data set meanwhile
            chosen = [rows[one.id] for one in kept]
            parts.append(self._relabelled(original.instances[torch.tensor(chosen, dtype=torch.int64)]))
            areas.append(original.areas[chosen])
        same = {one.id for one in kept}
        new = [one for one in objects if one.id not in same]
        if new or not kept:
            parts.append(self._drawn(new, state.size, parts[0] if kept else None))
            areas.append(own_areas(parts[-1]))
        found, ordered = Instances.join(parts), [*kept, *new]
        return self._numbered(found, ordered, [self._number(one) for one in ordered], np.concatenate(areas))

    def _unchanged(self, state: State, whole: Original) -> _Target:
        """The annotations of an unedited image, also those without pixels."""
        imported = (step(self.source.format or "data set", "import"),)
        names = unique_names(whole.ids, len(whole.instances))
        objects = [state.objects.get(name) or Object(name, None, "", imported) for name in names]
        return self._numbered(self._relabelled(whole.instances), objects, list(whole.ids), whole.areas)

    def _relabelled(self, found: Instances) -> Instances:
        if found.masks is None and self.fill:
            found = replace(found, masks=filled(found))
        return replace(found, labels=self._labels[found.labels], scores=None)

    def _numbered(
        self, found: Instances, objects: list[Object], numbers: list[Any], areas: npt.NDArray[np.float64]
    ) -> _Target:
        exact = len(numbers) == len(found) and all(isinstance(n, int) and abs(n) < 1 << 62 for n in numbers)
        found = replace(found, ids=torch.tensor(numbers if exact else range(len(found)), dtype=torch.int64))
        return _Target(found, objects, numbers, areas)

    def _drawn(self, objects: Sequence[Object], size: tuple[int, int], like: Instances | None) -> Instances:
        """Objects that have been drawn or changed, with the fields that those of the data set have."""
        masks = masks_of(objects, size)
        joints = len(self.keypoint_names) if self.keypoint_names is not None else 0
        keypoints = None
        if joints and (like is None or like.keypoints is not None):
            rows = [one.kept.get("keypoints") or [[0.0, 0.0, 0.0]] * joints for one in objects]
            keypoints = torch.tensor(rows, dtype=torch.float32).reshape(len(objects), joints, 3)
        labels = torch.tensor([one.label or 0 for one in objects], dtype=torch.int64)
        boxes_only = bool(objects) and not self.fill and all(one.kept.get("box_only") for one in objects)
        return Instances(
            size,
            masks.boxes(),
            labels,
            None if boxes_only else masks,
            keypoints=keypoints,
            crowd=torch.tensor([bool(one.kept.get("crowd")) for one in objects], dtype=torch.bool),
            ids=torch.zeros(len(objects), dtype=torch.int64),
        )

    def _number(self, one: Object) -> Any:
        """The id of an object as an annotation: that of the data set, or one that follows these."""
        if "number" in one.kept and one.kept["number"] is not None:
            return one.kept["number"]
        if self._first_number is None:
            self._first_number = largest_id(self.source)
        return self._first_number + int(one.kept.get("serial", 0))


@dataclass
class _Target:
    """The objects of an image, as `Instances` and as they were made."""

    instances: Instances
    objects: list[Object]
    numbers: list[Any]
    areas: npt.NDArray[np.float64]


def labelled(state: State, classes: Sequence[str]) -> list[Object]:
    """Return the objects that have a class; all of them if there are no classes."""
    return [one for one in state.objects.values() if one.label is not None or not classes]


def largest_id(source: Any) -> int:
    """Return the largest id of the annotations of a data set, if they are integers; 0 for others."""
    largest = 0
    for part in getattr(source, "parts", ()):
        for index in range(len(part.dataset)):
            ids: list[Any] = part.dataset.annotation_ids(index)
            largest = max([largest, *(id for id in ids if isinstance(id, int))])
    return largest


def own_areas(objects: Instances) -> npt.NDArray[np.float64]:
    """Return the pixels of masks, or the areas of boxes."""
    if objects.masks is not None:
        return objects.masks.areas().double().numpy()
    return (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1).double().numpy()


# ---- exporting -------------------------------------------------------------------------------------------------------


def export(project: Project, format: str, *, allow_loss: bool = False, target: Path | None = None) -> Exported:
    """Write the images that are complete or have objects as a data set.

    Args:
        project: The project.
        format: Name of the format, see `convert.writable_formats`.
        allow_loss: Write although objects lose something.
        target: The new folder; None: exports/FORMAT-N in the folder of the project.

    Returns:
        What was written and lost. The folder also has made.csv and made.jsonl: who or what made each object.

    Raises:
        LossyError: If objects would lose something and `allow_loss` is False.
        UsageError: If there is nothing to write, or no such format.
        DataError: If a file cannot be written.
    """
    chosen = project.labelled()
    positions = [position for position in chosen if project.source.is_there(position)]
    if not positions:
        why = "the images with objects are gone" if chosen else "no image has objects or is marked as done"
        raise UsageError(f"there is nothing to export yet: {why}")
    snapshot = project.snapshot()
    try:
        survey = surveyed(snapshot, positions)
        parts, losses = parts_of(snapshot, positions, fill=survey.mixed), survey.losses()
        losses += gone_images(snapshot, sorted({*chosen} - {*positions}))
        if losses and not allow_loss:
            module = load_format(format)
            further = find_losses(parts, module.NAME, module) if hasattr(module, "HOLDS") else []
            raise LossyError([*losses, *(loss.sentence for loss in further if loss.severe)])
        place = target or free_folder(project.folder / "exports", format)
        source = {part.split: part.dataset for part in parts}
        try:
            written = convert_data(source, place, format, allow_loss=allow_loss)
        except LossError as error:
            raise LossyError([*losses, *(loss.sentence for loss in error.losses)]) from None
        write_tables(place, parts)
        losses += [loss.sentence for loss in written.losses]
        return Exported(place, len(positions), sum(count for _, _, count in written.counts), losses)
    finally:
        snapshot.close()


def parts_of(snapshot: Snapshot, positions: Sequence[int], split: str | None = None, fill: bool = False) -> list[Part]:
    """Return images of a project as the splits of a data set.

    Args:
        snapshot: The annotations.
        positions: The images.
        split: Name of the only split; None: those of the data set that is annotated.
        fill: See `AnnotatedImages`.
    """
    if split is not None:
        return [Part(split, AnnotatedImages(snapshot, positions, fill))]
    source = snapshot.project.source
    grouped: dict[str | None, list[int]] = {}
    for position in positions:
        grouped.setdefault(source.split(position), []).append(position)
    return [Part(name, AnnotatedImages(snapshot, own, fill)) for name, own in grouped.items()]


@dataclass
class Survey:
    """What no format can hold.

    Attributes:
        total: Number of objects.
        unlabelled: Those without a class.
        boxes: Those with a class that are boxes without masks.
        masks: Those with a class and a mask.
    """

    total: int = 0
    unlabelled: int = 0
    boxes: int = 0
    masks: int = 0

    @property
    def mixed(self) -> bool:
        """Whether some objects are boxes without masks, and others not."""
        return bool(self.boxes and self.masks)

    def losses(self) -> list[str]:
        """Return a sentence for each kind of loss."""
        found: list[str] = []
        if self.unlabelled:
            found.append(f"{self.unlabelled} of {self.total} objects (without a class): they are left out")
        if self.mixed:
            what = "boxes without masks, beside objects with masks"
            found.append(f"{self.boxes} of {self.total} objects ({what}): they are filled")
        return found


def surveyed(snapshot: Snapshot, positions: Sequence[int]) -> Survey:
    """Count what no format can hold."""
    survey = Survey()
    for position in positions:
        state = snapshot.state(position)
        objects = labelled(state, snapshot.classes)
        boxes = sum(bool(one.kept.get("box_only")) for one in objects)
        survey.total += len(state.objects)
        survey.unlabelled += len(state.objects) - len(objects)
        survey.boxes += boxes
        survey.masks += len(objects) - boxes
    return survey


def gone_images(snapshot: Snapshot, positions: Sequence[int]) -> list[str]:
    """Return a sentence for images whose files are gone, which cannot be exported; none if there are none."""
    if not positions:
        return []
    total = sum(len(snapshot.state(position).objects) for position in positions)
    first = snapshot.project.source.name(positions[0])
    others = f" and {len(positions) - 1} others" if len(positions) > 1 else ""
    return [f"the file of {first}{others} is gone: left out with {total} objects, which are kept here"]


def free_folder(folder: Path, name: str) -> Path:
    """Return a folder that does not exist yet, name-N."""
    return next(path for number in itertools.count(1) if not (path := folder / f"{name}-{number}").exists())


def write_tables(folder: Path, parts: Sequence[Part]) -> None:
    """Write who or what made each object: made.csv, a line for each step, and made.jsonl, a line for each object.

    In made.csv, texts that a spreadsheet would calculate have a ' in front.
    """
    text, lines = io.StringIO(newline=""), list[str]()
    table = csv.writer(text)
    table.writerow(["split", "image", "annotation", "object", "class", "step", "by", "how", "clicks"])
    for part in parts:
        dataset = cast(AnnotatedImages, part.dataset)
        for index, position in enumerate(dataset.positions):
            name, numbers = dataset.source.key(position), dataset.annotation_ids(index)
            for one, number in zip(dataset.objects(index), numbers, strict=True):
                kind = dataset.classes[one.label or 0]
                about = {"split": part.split, "image": name, "annotation": number, "object": one.id, "class": kind}
                lines.append(json.dumps(about | {"made": [dict(made) for made in one.made]}))
                for count, made in enumerate(one.made):
                    row = [*about.values(), count, made["by"], made["how"], made["clicks"]]
                    table.writerow([_cell(value) for value in row])
    write_bytes(folder / "made.csv", text.getvalue().encode("utf-8", "backslashreplace"), DataError)
    write_bytes(folder / "made.jsonl", "".join(f"{line}\n" for line in lines).encode(), DataError)


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return "" if value is None else value

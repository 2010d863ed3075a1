"""The loop that compares a system with a data set; validation during training and `evaluate` both use it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.data import Dataset, OneClass
from maskwright.errors import DataError, UsageError
from maskwright.evaluation.evaluator import match_classes
from maskwright.evaluation.result import Result
from maskwright.evaluation.result_ids import PICTURES
from maskwright.evaluation.speed import Stopwatch
from maskwright.evaluation.tasks import KINDS, Task, on_host
from maskwright.files import write_bytes, write_json
from maskwright.structures import Batch, Instances, Panoptic
from maskwright.systems import System

Found = Instances | Panoptic
Gather = Callable[[Any], list[Any]]  # from a process's own object to those of all processes, in order of rank


@dataclass
class Measurement:
    """The answers of a system for one task, compared with a data set.

    Attributes:
        task: The task.
        system: The system; its classes are matched with those of the data set by name.
        dataset: The data set as the task sees it (`Task.view`).
        options: Options of the decoding method.
        process: Applied to the answer for each image, on the host, before it is compared.
    """

    task: Task
    system: System
    dataset: Dataset
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    process: Callable[[Instances], Instances] | None = None
    pairs: list[tuple[int, Found]] = field(default_factory=list[tuple[int, Found]])

    def __post_init__(self) -> None:
        if self.task.name == "proposals" or "proposals" in self.system.tasks:
            self._labels = torch.arange(len(self.system.classes))  # classes of proposals do not count
        else:
            self._labels = match_classes(self.system.classes, self.dataset.classes)

    def answer(self, raw: Any, batch: Batch) -> list[Found]:
        """Decodes the raw output of a batch: the answer for each image, on the host."""
        return [on_host(found) for found in self.task.of(self.system)(raw, batch.placements, **self.options)]

    def add(self, position: int, found: Found) -> None:
        """Keeps the answer for the image at `position` of the data set, with the data set's labels."""
        if self.process is not None and isinstance(found, Instances):
            found = self.process(found)
        self.pairs.append((position, self._renamed(found)))

    def gather(self, gather: Gather) -> None:
        """Takes over the answers of all processes."""
        self.pairs = [pair for part in gather(self.pairs) for pair in part]

    def result(
        self, kinds: Sequence[str] | None = None, boundary: bool = False, detections: int | None = None,
        examples: int = 6, title: str = "",
    ) -> Result:  # fmt: skip
        """Compares all answers.

        Args:
            kinds: What to measure of objects, of "segm", "bbox", "keypoints"; default: all that the system predicts and
                the data set has.
            boundary: Whether to measure boundary AP too, if there are masks.
            detections: Limit of objects per image.
            examples: Number of images to keep for the report page.
            title: Title of the report page.
        """
        if self.task.segments:
            evaluator: Any = self.task.evaluator(self.dataset)
            result_of = evaluator.result
            arguments: dict[str, Any] = {"title": title}
        else:
            chosen = self._kinds(kinds)
            evaluator = self.task.evaluator(self.dataset, chosen, boundary and "segm" in chosen, detections)
            result_of, arguments = evaluator.result, {"examples": examples, "title": title}
        for position, found in sorted(self.pairs, key=lambda pair: pair[0]):  # batches are not in order
            if isinstance(found, Panoptic) and self.task.name == "semantic":
                evaluator.add_at(position, found.semantic())
            else:
                evaluator.add_at(position, found)
        return result_of(**arguments)

    def write(self, folder: Path) -> Path:
        """Writes all answers with the ids of the data set.

        Args:
            folder: The folder. Objects are written to results.json, as COCO results, and what their ids stand for to
                pictures.json; segments to panoptic.json and the folder panoptic.

        Returns:
            The JSON file.

        Raises:
            DataError: If a file cannot be written.
        """
        dataset = self.dataset
        while isinstance(dataset, OneClass):  # results have the data set's own categories
            dataset = dataset.inner
        ids, sizes, paths = dataset.image_ids(), dataset.sizes(), dataset.paths()
        pairs = sorted(self.pairs, key=lambda pair: pair[0])
        images = [
            {"id": ids[i], "file_name": str(paths[i] or ids[i]), "height": sizes[i][0], "width": sizes[i][1]}
            for i, _ in pairs
        ]
        categories = [
            {"id": int(number), "name": name, **({"isthing": int(name not in dataset.stuff)} if dataset.stuff else {})}
            for number, name in zip(dataset.category_ids, dataset.classes, strict=True)
        ]
        about: dict[str, Any] = {"images": images, "categories": categories}
        records: list[dict[str, Any]] = []
        for position, found in pairs:
            if isinstance(found, Panoptic):
                name = f"{position + 1:06d}.png"
                records.append(found.to_coco(ids[position], dataset.category_ids, name))
                data = io.BytesIO()
                found.to_png().save(data, "PNG")
                write_bytes(folder / "panoptic" / name, data.getvalue(), DataError, sync=False)
            else:
                records += found.to_coco(ids[position], self._category_ids(dataset))
        if self.task.segments:
            return write_json(folder / self.task.results, {**about, "annotations": records}, DataError)
        write_json(folder / PICTURES, about, DataError, indent=1)
        return write_json(folder / self.task.results, records, DataError)

    def _category_ids(self, dataset: Dataset) -> Sequence[int]:
        """Category id of each label of the answers; classes of proposals that the data set lacks have its first."""
        if self.task.name != "proposals" and "proposals" not in self.system.tasks:
            return dataset.category_ids
        known = {name: number for number, name in zip(dataset.category_ids, dataset.classes, strict=True)}
        return [known.get(name, dataset.category_ids[0]) for name in self.system.classes]

    def _kinds(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        there = [kind for output, kind in KINDS.items() if output in self.system.outputs]
        if self.task.name == "proposals" and "keypoints" in there:
            there.remove("keypoints")
        if asked is not None:
            missing = [kind for kind in asked if kind not in {*there, "bbox"}]
            if missing:
                raise UsageError(
                    f"kinds has {missing[0]!r}, which {self.system.name} does not predict; it predicts "
                    f"{', '.join(there)}"
                )
            return tuple(asked)
        if self.dataset.keypoint_names is None and "keypoints" in there:
            there.remove("keypoints")
        if "segm" in there and not _has_masks(self.dataset):
            there.remove("segm")
        return tuple(there) or ("bbox",)

    def _renamed(self, found: Found) -> Found:
        objects = found.segments if isinstance(found, Panoptic) else found
        labels = self._labels[objects.labels]
        known = labels >= 0  # the data set has no class of this name
        objects = replace(objects, labels=labels)[known]
        return Panoptic(objects, found.things[known]) if isinstance(found, Panoptic) else objects


def run_network(system: System, batch: Batch, device: torch.device, dtype: torch.dtype) -> Any:
    """The raw output for a batch that lies on the host in float32."""
    images: Tensor = batch.images.to(device, non_blocking=True).to(dtype=dtype, memory_format=torch.channels_last)
    return system(*system.inputs(images, [placement.size for placement in batch.placements]))


def measure(
    batches: Iterable[tuple[Sequence[int], Batch]],
    measurements: Sequence[Measurement],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    watch: Stopwatch | None = None,
    after: Callable[[Any, Batch], None] | None = None,
) -> None:
    """Runs a system over batches and adds its answers to the measurements.

    Args:
        batches: For each batch the positions of its images in the data set, and the images.
        measurements: One for each task; all of one system.
        device: Where the system computes.
        dtype: Type of the network's input.
        watch: Measures the time of networks and decoding.
        after: Called with the raw output and the batch after decoding, for example for the losses.
    """
    system = measurements[0].system
    with torch.no_grad(), watch.watching(system) if watch else contextlib.nullcontext():
        for positions, batch in batches:
            for measurement, found in answers(
                batch, measurements, device=device, dtype=dtype, watch=watch, after=after
            ):
                for position, each in zip(positions, found, strict=True):
                    measurement.add(position, each)


def answers(
    batch: Batch,
    measurements: Sequence[Measurement],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    watch: Stopwatch | None = None,
    after: Callable[[Any, Batch], None] | None = None,
) -> list[tuple[Measurement, list[Found]]]:
    """One step of `measure`: the answers for a batch, for each measurement."""
    with watch.batch(len(batch)) if watch else contextlib.nullcontext():
        raw = run_network(measurements[0].system, batch, device, dtype)
        found = [(measurement, measurement.answer(raw, batch)) for measurement in measurements]
    if after is not None:
        after(raw, batch)
    return found


def _has_masks(dataset: Dataset) -> bool:
    """Whether the objects of a data set have masks; True if there are no objects."""
    targets = (dataset.targets(index) for index in range(len(dataset)))
    return next((target.masks is not None for target in targets if len(target)), True)

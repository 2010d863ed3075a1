"""Data sets made of checked tables."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskwright.data.dataset import Dataset, Sample
from maskwright.data.findings import DataWarning, format_findings
from maskwright.data.id_maps import read_map
from maskwright.data.images import common_white, read_image, white_words
from maskwright.data.table import Table
from maskwright.errors import AnnotationError, ImageError
from maskwright.structures import Instances, Masks, Panoptic

_LARGEST = 2**63 - 1


class TableDataset(Dataset):
    """Images of a folder and a table of their annotations; images are decoded on access.

    Attributes:
        path: The annotation file.
        folder: The folder that `files` are relative to.
        files: The image files, with "/".
        findings: What was found wrong with the annotation file.
    """

    def __init__(self, table: Table, strict: bool = False):
        self.path, self.folder = table.path, table.folder
        self.name = dataset_name(table)
        self.classes, self.category_ids = table.classes, table.category_ids
        self.keypoint_names, self.stuff = table.keypoint_names, table.stuff
        self.strict = strict
        self.findings = table.findings
        self.files = table.files
        self._image_ids, self._sizes = table.image_ids, table.sizes
        self._bounds = table.bounds()
        self._labels, self._crowd = torch.from_numpy(table.labels), torch.from_numpy(table.crowd)  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        self._ids = table.ids
        self._white: int | None = None
        self._white_known = False

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        what = "segments" if self.stuff else "objects"
        return f"{self.name}: {len(self)} images, {len(self._ids)} {what}, {len(self.classes)} classes"

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        path = self.folder / self.files[index]
        image = read_image(path, white=self.white)
        size = (image.shape[1], image.shape[2])
        if size != self._sizes[index]:
            height, width = self._sizes[index]
            raise ImageError(
                f"{path}: is {size[1]} x {size[0]}, but {self.path} lists {width} x {height}; "
                "correct the listed size, or restore the image that was annotated"
            )
        return Sample(image, self.targets(index), self._image_ids[index], path)

    def image_labels(self, index: int) -> np.ndarray:
        first, last = self._annotations(index)
        return self._labels[first:last].numpy()

    def white(self) -> int | None:
        if not self._white_known:
            self._white, self._white_known = common_white([self.folder / file for file in self.files]), True
            if self._white is not None and self._white < 0xFFFF:
                warnings.warn(f"{self.folder}: {white_words(self._white)}", DataWarning, stacklevel=2)
        return self._white

    def sizes(self) -> list[tuple[int, int]]:
        return list(self._sizes)

    def image_ids(self) -> list[int | str]:
        return list(self._image_ids)

    def paths(self) -> list[Path | None]:
        return [self.folder / file for file in self.files]

    def _annotations(self, index: int) -> tuple[int, int]:
        """First and last + 1 annotation of an image."""
        index = range(len(self))[index]
        return int(self._bounds[index]), int(self._bounds[index + 1])


class InstanceDataset(TableDataset):
    """Objects as outlines, run-length strings or boxes only; made by `read_coco` and other readers."""

    def __init__(self, table: Table, strict: bool = False):
        super().__init__(table, strict)
        self._boxes, self._areas, self._shapes = torch.from_numpy(table.boxes), table.areas, table.shapes  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        self._keypoints = None if table.keypoints is None else torch.from_numpy(table.keypoints)  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        exact = all(isinstance(i, int) and -_LARGEST <= i <= _LARGEST for i in table.ids)
        self._numbers = torch.tensor(table.ids if exact else range(len(table.ids)), dtype=torch.int64)
        self._scores = table.scores

    def targets(self, index: int) -> Instances:
        """Return the objects of one image.

        `ids` are those of the file if all of them are 64-bit integers, otherwise consecutive numbers;
        `annotation_ids` returns the exact ids.
        """
        index = range(len(self))[index]
        first, last = self._annotations(index)
        part = slice(first, last)
        return Instances(
            self._sizes[index],
            self._boxes[part].float(),
            self._labels[part].clone(),
            None if self._shapes is None else self._shapes.masks(first, last, self._sizes[index]),
            keypoints=None if self._keypoints is None else self._keypoints[part].clone(),
            crowd=self._crowd[part].clone(),
            ids=self._numbers[part].clone(),
        )

    def areas(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        first, last = self._annotations(index)
        areas = self._areas[first:last].copy()
        unknown = np.isnan(areas)
        if unknown.any() and self._shapes is not None:
            masks: Masks = self._shapes.masks(first, last, self._sizes[index])
            areas[unknown] = masks.areas().double().numpy()[unknown]
        return areas

    def annotation_ids(self, index: int) -> list[Any]:
        first, last = self._annotations(index)
        return self._ids[first:last]

    def scores(self, index: int) -> list[float] | None:
        first, last = self._annotations(index)
        return None if self._scores is None else self._scores[first:last].tolist()


class PanopticDataset(TableDataset):
    """Segments as maps of ids; made by `read_panoptic` and other readers.

    Targets contain all segments, things and stuff. The image and its map are decoded on access.

    Attributes:
        maps: The file with the segment ids of each image.
    """

    def __init__(self, table: Table, strict: bool = False):
        super().__init__(table, strict)
        self.maps = table.maps or []
        self._numbers = torch.tensor(table.ids, dtype=torch.int64)

    def targets(self, index: int) -> Instances:
        """Return the segments of one image that have pixels; `ids` are the segment ids of its map."""
        index = range(len(self))[index]
        part = slice(*self._annotations(index))
        numbers, labels = self._numbers[part], self._labels[part]
        plane = torch.from_numpy(read_map(self.maps[index], self._sizes[index]))  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        things = torch.ones(len(labels), dtype=torch.bool)
        segments = Panoptic.from_map(
            plane, labels.clone(), things, numbers=numbers, crowd=self._crowd[part].clone(), ids=numbers.clone()
        ).segments
        assert segments.masks is not None
        visible = segments.masks.areas() > 0
        return segments if bool(visible.all()) else segments[visible]


def dataset_from_table(table: Table, strict: bool = False) -> TableDataset:
    """Turn a table into a data set.

    Args:
        table: The table.
        strict: Treat skipped annotations and images as errors.

    Returns:
        A `PanopticDataset` if the table has maps, otherwise an `InstanceDataset`.

    Raises:
        AnnotationError: If the table has errors, or skipped entries in strict mode.

    Warns:
        DataWarning: Once, about everything that was skipped or repaired.
    """
    severe = table.findings_with("error") + (table.findings_with("skip") if strict else [])
    if severe:
        raise AnnotationError(format_findings(severe))
    if table.findings:
        warnings.warn(format_findings(table.findings), DataWarning, stacklevel=3)
    return (InstanceDataset if table.maps is None else PanopticDataset)(table, strict)


def dataset_name(table: Table) -> str:
    """Return "balloons/train" for balloons/annotations/instances_train.json, otherwise the name of the file."""
    path = table.path
    if table.name:
        return table.name
    if path.parent.name == "annotations":
        return f"{path.resolve().parent.parent.name}/{path.stem.rsplit('_', 1)[-1]}"
    if path.name == "_annotations.coco.json":  # Roboflow: SPLIT/_annotations.coco.json
        return f"{path.resolve().parent.parent.name}/{path.resolve().parent.name}"
    return path.stem

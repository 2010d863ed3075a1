"""COCO data sets: images in a folder, objects in one JSON file."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskwright.data.annotations import Table, Verify, read_table
from maskwright.data.dataset import Dataset, Sample
from maskwright.data.findings import DataWarning, Finding, digest
from maskwright.data.images import read_image
from maskwright.errors import AnnotationError, DataError, ImageError, UsageError
from maskwright.structures import Instances, Masks

_LARGEST = 2**63 - 1


class TableDataset(Dataset):
    """Images in a folder, and what a checked annotation file says of them; subclasses make the objects."""

    def __init__(self, table: Table, strict: bool):
        self.path, self.folder = table.path, table.folder
        self.name = name_of(table.path)
        self.classes, self.category_ids = table.classes, table.category_ids
        self.strict = strict
        self.findings = table.findings
        self.files = table.files
        self._image_ids, self._sizes = table.image_ids, table.sizes
        self._starts = np.searchsorted(table.owner, np.arange(len(table.files) + 1))
        self._labels, self._crowd = torch.from_numpy(table.labels), torch.from_numpy(table.crowd)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        path = self.folder / self.files[index]
        image = read_image(path)
        size = (image.shape[1], image.shape[2])
        if size != self._sizes[index]:
            height, width = self._sizes[index]
            raise ImageError(
                f"{path}: is {size[1]} x {size[0]}, but {self.path} says {width} x {height}; "
                "correct the size there, or put back the image that was annotated"
            )
        return Sample(image, self.targets(index), self._image_ids[index], path)

    def sizes(self) -> list[tuple[int, int]]:
        return list(self._sizes)

    def image_ids(self) -> list[int | str]:
        return list(self._image_ids)


class CocoDataset(TableDataset):
    """A checked COCO file and its images; made by `read_coco`. Images are decoded when they are asked for."""

    def __init__(self, table: Table, strict: bool = False):
        super().__init__(table, strict)
        self.keypoint_names, self._ids = table.keypoint_names, table.ids
        self._boxes, self._areas, self._shapes = torch.from_numpy(table.boxes), table.areas, table.shapes
        self._keypoints = None if table.keypoints is None else torch.from_numpy(table.keypoints)
        fits = all(isinstance(i, int) and -_LARGEST <= i <= _LARGEST for i in table.ids)
        self._numbers = torch.tensor(table.ids if fits else range(len(table.ids)), dtype=torch.int64)

    def __repr__(self) -> str:
        return f"{self.name}: {len(self)} images, {len(self._ids)} objects, {len(self.classes)} classes"

    def targets(self, index: int) -> Instances:
        """The objects of one image. `ids` are the file's where all of them are whole numbers of 64 bits, else
        running numbers; `annotation_ids` gives the exact ones."""
        index = range(len(self))[index]
        first, last = int(self._starts[index]), int(self._starts[index + 1])
        part = slice(first, last)
        return Instances(
            self._sizes[index],
            self._boxes[part].float(),
            self._labels[part].clone(),
            self._shapes.masks(first, last, self._sizes[index]),
            keypoints=None if self._keypoints is None else self._keypoints[part].clone(),
            crowd=self._crowd[part].clone(),
            ids=self._numbers[part].clone(),
        )

    def areas(self, index: int) -> np.ndarray:
        """(N,) the file's own areas; the masks' where it has none that make sense."""
        index = range(len(self))[index]
        first, last = int(self._starts[index]), int(self._starts[index + 1])
        areas = self._areas[first:last].copy()
        unknown = np.isnan(areas)
        if unknown.any():
            masks: Masks = self._shapes.masks(first, last, self._sizes[index])
            areas[unknown] = masks.areas().double().numpy()[unknown]
        return areas

    def annotation_ids(self, index: int) -> list[Any]:
        index = range(len(self))[index]
        return self._ids[int(self._starts[index]) : int(self._starts[index + 1])]


def read_coco(
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    strict: bool = False,
    verify: Verify | None = None,
) -> CocoDataset:
    """The data set in a COCO JSON file; file names in it are relative to the folder `images`.

    Everything is checked here, without decoding images: keys, ids, classes, paths, that the images are there and
    as large as the file says, every polygon and run-length code. What makes the set unusable is an AnnotationError.
    A broken annotation or image is left out with one `DataWarning` that names it, or is an error too if `strict`.
    Boxes and areas that are missing or impossible are those of the masks.

    Without `images` the usual places beside the file are tried. `verify` says of how many images the header is
    read: "all", "some" or "none"; left out, all of a set of up to 20,000. Keypoints are kept where categories name
    them, moved by half a pixel into our frame (COCO counts pixels, pixel 3 has its middle at 3.5).
    """
    path = Path(annotations)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder of images")
    table = read_table(path, folder, verify)
    worst = table.of("error") + (table.of("skip") if strict else [])
    if worst:
        raise AnnotationError(told(worst))
    if table.findings:
        warnings.warn(told(table.findings), DataWarning, stacklevel=2)
    return CocoDataset(table, strict)


def open_dataset(
    source: str | Path, split: str = "train", *, strict: bool = False, keypoints: bool = False, panoptic: bool = False
) -> Dataset:
    """The data set that `source` names.

    source      a folder DIR with DIR/annotations/instances_{split}.json (or panoptic_{split}.json) and the images in
                DIR/{split}; a COCO JSON file, panoptic where its name begins so; or "scenes",
                "scenes:count=200,size=192,seed=0,difficulty=0.5" for generated ones (split "val" gives others than
                "train"; "stuff=1" divides their ground among regions)
    strict      broken annotations and images are errors, not left out
    keypoints   read person_keypoints_{split}.json, the set with keypoints
    panoptic    read panoptic_{split}.json, the set whose images are divided among things and stuff, also where there
                is one of instances
    """
    text = str(source)
    if text == "scenes" or text.startswith("scenes:"):
        from maskwright.data.scenes import parse_scenes

        return parse_scenes(text, split, keypoints, panoptic)
    path = Path(source)
    if path.is_dir():
        path = find_annotations(path, split, keypoints, panoptic)
    elif not path.is_file():
        raise UsageError(f"{path}: there is no such file or folder; give a data set's folder, a COCO JSON or 'scenes'")
    if is_panoptic(path):
        from maskwright.data.panoptic import read_panoptic

        dataset: Dataset = read_panoptic(path, strict=strict)
    else:
        dataset = read_coco(path, strict=strict)
    if panoptic and not is_panoptic(path):
        raise DataError(f"{path}: its objects do not divide images; give a COCO panoptic file, panoptic_SPLIT.json")
    if keypoints and dataset.keypoint_names is None:
        raise DataError(f"{path}: none of its categories names keypoints; give a set that has keypoints")
    return dataset


def is_panoptic(path: Path) -> bool:
    """Whether a file's name says that it is COCO panoptic."""
    return path.stem.startswith("panoptic")


def find_annotations(folder: Path, split: str, keypoints: bool = False, panoptic: bool = False) -> Path:
    """The annotation file of a split, of instances before others; UsageError tells what there is instead."""
    kinds = ["person_keypoints"] if keypoints else ["panoptic"] if panoptic else ["instances", "panoptic"]
    wanted = f"{kinds[0]}_{split}.json"
    for kind in kinds:
        for place in (folder / "annotations", folder):
            if (place / f"{kind}_{split}.json").is_file():
                return place / f"{kind}_{split}.json"
    found = annotation_files(folder)
    there = f"there are {', '.join(p.name for p in found)}" if found else "there is no annotation file at all"
    raise UsageError(f"{folder / 'annotations' / wanted}: there is no such file; {there}")


def annotation_files(folder: Path) -> list[Path]:
    """The COCO files of instances, keypoints and segments below a folder; of other names only where there are none."""
    places = (folder / "annotations", folder)
    kinds = ("instances", "person_keypoints", "panoptic")
    found = [path for place in places for kind in kinds for path in sorted(place.glob(f"{kind}_*.json"))]
    others = ("captions", "stuff", "image_info")
    return found or [p for p in sorted(places[0].glob("*.json")) if not p.stem.startswith(others)]


def told(findings: list[Finding]) -> str:
    """A few of each kind, one per line, and how to see the rest."""
    lines = digest(findings)
    return "\n".join(lines)


def write_coco(path: Path, content: dict[str, Any]) -> None:
    """Written beside and renamed, so that there is never half a file."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise DataError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from None


def name_of(path: Path) -> str:
    """ "balloons/train" for balloons/annotations/instances_train.json, else the file's own name."""
    if path.parent.name == "annotations":
        return f"{path.resolve().parent.parent.name}/{path.stem.rsplit('_', 1)[-1]}"
    return path.stem

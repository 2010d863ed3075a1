"""COCO instance and keypoint data sets: images in a folder, objects in one JSON file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from maskwright.data import coco_json
from maskwright.data.coco_annotations import read_annotations
from maskwright.data.coco_json import start_table, strict_json
from maskwright.data.diagnosis import diagnose
from maskwright.data.exchange.files import json_kind
from maskwright.data.exchange.writing import BOXES, CROWD, HOLES, KEYPOINTS, OVERLAPS, PARTS, SCORES, ImageFiles, Part
from maskwright.data.formats import CERTAIN, LIKELY, POSSIBLE, Match, Request
from maskwright.data.judging import judge
from maskwright.data.table import Table, Verify
from maskwright.data.table_datasets import InstanceDataset, dataset_from_table
from maskwright.data.values import parse_float, parse_int
from maskwright.errors import UsageError

NAME = "COCO"
LAYOUT = "annotations/instances_{split}.json (COCO)"

HOLDS = frozenset({PARTS, HOLES, OVERLAPS, CROWD, BOXES, KEYPOINTS, SCORES})


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find the files of instances and keypoints in a folder, or recognize a JSON file."""
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() != ".json" or coco_json.is_panoptic(path) or coco_json.has_videos(path):
            return []
        return _sniff_file(path)
    if not path.is_dir() or request.panoptic:
        return []
    # `opening` documents the order; panoptic files, at 0.95, come between the two.
    order = {"person_keypoints": CERTAIN, "instances": 0.95} if request.keypoints else {"instances": CERTAIN}
    order.setdefault("person_keypoints", 0.9)
    matches: list[Match] = []
    for kind, confidence in order.items():
        if request.split is None:
            files = list(coco_json.annotation_files(path, kind).items())
        else:
            files = coco_json.fitting_files(path, kind, request.split)
        matches += [
            Match(str(file), confidence, str(file.relative_to(path)), split)
            for split, file in files
            if not coco_json.has_videos(file)
        ]
        if matches and request.split is not None:
            return matches
    if not matches and not coco_json.annotation_files(path, "panoptic"):
        others = coco_json.unnamed_files(path)
        if request.split is None:
            matches = [Match(str(file), POSSIBLE, str(file.relative_to(path))) for file in others]
    return matches


def _sniff_file(path: Path) -> list[Match]:
    """A JSON file, by its name and its first 64 kB."""
    if path.stem.startswith(coco_json.KINDS):
        return [Match(str(path), CERTAIN, path.name)]
    if json_kind(path) is not None:
        return []
    return [Match(str(path), LIKELY if coco_json.has_keys(path) else POSSIBLE, path.name)]


def read(match: Match, request: Request) -> Table:
    """Read one of the files that `sniff` has found."""
    return read_table(Path(match.location), request.images, request.verify)


def read_coco(
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    strict: bool = False,
    verify: Verify | None = None,
) -> InstanceDataset:
    """Read a COCO JSON file with instances or keypoints.

    Everything is checked without decoding images: keys, ids, classes, paths, that the images exist and have the listed
    sizes, every polygon and run-length code. A damaged annotation or image is skipped. Missing or invalid boxes and
    areas are replaced by those of the masks. Keypoints are read if categories list them; they are shifted by half a
    pixel into the continuous frame (COCO counts pixels: the center of pixel 3 is at 3.5).

    Args:
        annotations: The file.
        images: The folder that file names are relative to; None: the usual places beside the file are tried.
        strict: Raise for damaged annotations and images instead of skipping them.
        verify: Number of images whose headers are read: "all", "some" or "none"; None: all of up to 20,000 images,
            some of more.

    Returns:
        The data set.

    Raises:
        AnnotationError: If the file cannot be used, or anything would be skipped in strict mode.
        UsageError: If the folder of images does not exist.

    Warns:
        DataWarning: Once, about everything that was skipped or repaired.
    """
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of images")
    dataset = dataset_from_table(read_table(Path(annotations), folder, verify), strict)
    assert isinstance(dataset, InstanceDataset)
    return dataset


# ---- reading -------------------------------------------------------------------------------------------------------


def read_table(
    path: Path, images: Path | None = None, verify: Verify | None = None, content: dict[str, Any] | None = None
) -> Table:
    """Read everything that can be used from a COCO file; everything else becomes a finding.

    Args:
        path: The file.
        images: The folder that file names are relative to; None: searched for.
        verify: Number of images whose headers are read; see `add_images`.
        content: The content of the file, if it has been read.

    Returns:
        The table. No exception is raised for what is in the file.
    """
    table, position, labels = start_table(path, images, verify, content)
    if table.usable:
        entries = table.raw["annotations"]
        if any(isinstance(e, dict) and "segments_info" in e for e in entries[:3]):
            what = "contains segments (COCO panoptic), not instances"
            advice = "rename it to panoptic_SPLIT.json, or read it with read_panoptic"
            table.add_finding("error", "file", what, advice)
            return table
        columns, absent = read_annotations(table, entries, position, labels)
        kept = diagnose(table, columns)
        if table.usable:
            given = [(entries[row].get("bbox"), entries[row].get("area")) for row in kept.rows.tolist()]
            judge(table, kept, {i: absent[row] for i, row in enumerate(kept.rows.tolist()) if row in absent}, given)
            if entries and not table.ids and table.files and not table.findings_with("error"):
                what = f"none of its {len(entries)} annotations can be used"
                table.add_finding("error", "annotation", what, "see the other findings")
            scores = np.array([parse_float(entries[row].get("score")) for row in table.rows.tolist()], np.float64)
            table.scores = scores if len(scores) and np.isfinite(scores).all() else None
    return table


# ---- writing ------------------------------------------------------------------------------------------------------


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write annotations/instances_SPLIT.json and the images in SPLIT/."""
    from maskwright.data.exchange.coco_writer import write_instances

    write_instances(folder, parts, images)


# ---- a repaired copy -----------------------------------------------------------------------------------------------


def repaired(table: Table, skipped: set[int], folder: Path) -> dict[str, Any]:
    """Return a table as COCO JSON.

    Args:
        table: The table.
        skipped: Positions of images that are omitted, with their annotations.
        folder: Folder for further files; COCO instances need none.

    Returns:
        The content of the file: what could be read, and all other entries of the original that are valid JSON.
    """
    raw = table.raw
    images: list[dict[str, Any]] = []
    for index, (number, file, size) in enumerate(zip(table.image_ids, table.files, table.sizes, strict=True)):
        if index not in skipped:
            entry = strict_json(raw["images"][table.image_rows[index]])
            images.append({**entry, **coco_json.image_entry(number, file, size)})
    listed = cast(list[Any], raw["categories"])
    entries = [cast(dict[str, Any], e) for e in reversed(listed) if isinstance(e, dict)]
    originals = {parse_int(entry.get("id")): strict_json(entry) for entry in entries}
    categories = [
        {**originals.get(entry["id"], {}), **entry}
        for entry in coco_json.coco_categories(table.classes, table.category_ids)
    ]
    others = {k: v for k, v in strict_json(raw).items() if k not in ("images", "annotations", "categories")}
    return {**others, "images": images, "annotations": list(_records(table, skipped)), "categories": categories}


def _records(table: Table, skipped: set[int]) -> Iterator[dict[str, Any]]:
    """The annotations as COCO has them, with unique ids."""
    counts = Counter(table.ids)
    largest = max((i for i in table.ids if isinstance(i, int)), default=0)
    used: set[int | str] = set()
    image_index: list[int] = table.image_index.tolist()
    for index, image in enumerate(image_index):
        if image in skipped:
            continue
        number = table.ids[index]
        if counts[number] > 1 and number in used:
            largest += 1
            number = largest
        used.add(number)
        size = table.sizes[image]
        shape: dict[str, Any] | list[Any]
        if table.shapes is None:
            shape = []
        elif table.shapes.coded[index]:
            shape = {"size": list(size), "counts": table.shapes.code(index).decode("ascii")}
        else:
            shape = [ring.ravel().tolist() for ring in table.shapes.polygon(index)]
        area = float(table.areas[index])
        if math.isnan(area) and table.shapes is not None:
            area = float(table.shapes.masks(index, index + 1, size).areas()[0])
        x0, y0, x1, y1 = table.boxes[index].tolist()
        record: dict[str, Any] = {
            **strict_json(table.raw["annotations"][int(table.rows[index])]),
            "id": number,
            "image_id": table.image_ids[image],
            "category_id": table.category_ids[int(table.labels[index])],
            "segmentation": shape,
            "area": area,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "iscrowd": int(table.crowd[index]),
        }
        if table.keypoints is not None:
            points = table.keypoints[index].astype(float)
            points[points[:, 2] > 0, :2] -= 0.5
            record["keypoints"] = points.ravel().tolist()
            record["num_keypoints"] = int((points[:, 2] > 0).sum())
        yield record

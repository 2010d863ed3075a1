"""COCO instance and keypoint data sets: images in a folder, objects in one JSON file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskwright.data import coco_json
from maskwright.data.coco_json import start_table, strict_json
from maskwright.data.formats import CERTAIN, LIKELY, POSSIBLE, Match, Request
from maskwright.data.shapes import ShapesBuilder
from maskwright.data.table import Table, Verify
from maskwright.data.table_datasets import InstanceDataset, dataset_from_table
from maskwright.data.values import match_id, parse_flag, parse_float, parse_id, parse_int, shortened
from maskwright.errors import UsageError

NAME = "COCO"
LAYOUT = "annotations/instances_{split}.json (COCO)"


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find instances_SPLIT.json and person_keypoints_SPLIT.json in a folder, or recognize a JSON file."""
    path = Path(source)
    if path.is_file():
        return _sniff_file(path) if path.suffix.lower() == ".json" and not coco_json.is_panoptic(path) else []
    if not path.is_dir() or request.panoptic:
        return []
    # `opening` documents the order; panoptic files, at 0.95, come between the two.
    order = {"person_keypoints": CERTAIN, "instances": 0.95} if request.keypoints else {"instances": CERTAIN}
    order.setdefault("person_keypoints", 0.9)
    if request.split is None:
        matches = [
            Match(str(file), confidence, str(file.relative_to(path)), coco_json.split_of(file, kind))
            for kind, confidence in order.items()
            for file in coco_json.annotation_files(path, kind)
        ]
        if not matches and not coco_json.annotation_files(path, "panoptic"):
            others = coco_json.unnamed_files(path)
            matches = [Match(str(file), POSSIBLE, str(file.relative_to(path))) for file in others]
        return matches
    for kind, confidence in order.items():
        file = coco_json.annotation_file(path, kind, request.split)
        if file is not None:
            return [Match(str(file), confidence, str(file.relative_to(path)), request.split)]
    return []


def _sniff_file(path: Path) -> list[Match]:
    """A JSON file, by its name and its first 64 kB."""
    if path.stem.startswith(coco_json.KINDS):
        return [Match(str(path), CERTAIN, path.name)]
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError:
        head = b""
    keys = (b'"images"', b'"annotations"', b'"categories"')
    return [Match(str(path), LIKELY if any(key in head for key in keys) else POSSIBLE, path.name)]


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


def read_table(path: Path, images: Path | None = None, verify: Verify | None = None) -> Table:
    """Read everything that can be used from a COCO file; everything else becomes a finding.

    Args:
        path: The file.
        images: The folder that file names are relative to; None: searched for.
        verify: Number of images whose headers are read; see `add_images`.

    Returns:
        The table. No exception is raised for what is in the file.
    """
    table, position, labels = start_table(path, images, verify)
    if table.usable:
        _read_annotations(table, table.raw["annotations"], position, labels)
    return table


def _read_annotations(
    table: Table, entries: list[Any], position: dict[int | str, int | None], labels: dict[int, int]
) -> None:
    if any(isinstance(e, dict) and "segments_info" in e for e in entries[:3]):
        what = "contains segments (COCO panoptic), not instances"
        table.add_finding("error", "file", what, "rename it to panoptic_SPLIT.json, or read it with read_panoptic")
        return
    shapes = ShapesBuilder()
    image_index: list[int] = []
    rows: list[int] = []
    ids: list[int | str] = []
    classes: list[int] = []
    crowd: list[bool] = []
    first_row: dict[int | str, int] = {}
    for row, entry in enumerate(entries):
        number = parse_id(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            what = "no valid id" if isinstance(entry, dict) else f"type {type(entry).__name__}, expected an object"
            table.add_finding("skip", "annotation", f"annotations[{row}] has {what}", "the annotation is skipped")
            continue
        image = match_id(entry.get("image_id"), position)
        if image is None:
            value = entry.get("image_id")
            _skip(table, number, None, f"has image_id {value!r}, which is not in the list of images")
            continue
        index = position[image]
        if index is None:  # the image was skipped, with a finding
            continue
        category = parse_int(entry.get("category_id"))
        if category not in labels:
            value = entry.get("category_id")
            _skip(table, number, index, f"has category_id {value!r}, which is not in the list of categories")
            continue
        flag = parse_flag(entry.get("iscrowd"))
        if flag is None:
            _skip(table, number, index, f"has iscrowd {entry['iscrowd']!r}; expected 0 or 1")
            continue
        if number in first_row:
            what = f"annotations[{first_row[number]}] and annotations[{row}] share id {number!r}"
            table.add_finding("note", "duplicate", what, "both are kept", image=image, annotation=number)
        problem = shapes.add(entry.get("segmentation"), table.sizes[index])
        if problem:
            _skip(table, number, index, problem)
            continue
        first_row.setdefault(number, row)
        image_index.append(index)
        rows.append(row)
        ids.append(number)
        classes.append(labels[category])
        crowd.append(flag)
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)
    where = np.array(image_index, np.int64)
    done, problems, notes = shapes.finish(sizes[where])
    for index, text in problems.items():
        _skip(table, ids[index], image_index[index], text)
    for index, text in notes:
        image, what = table.image_ids[image_index[index]], f"annotation {ids[index]!r} {text}"
        table.add_finding("note", "outline", what, image=image, annotation=ids[index])
    keep = np.array([i for i in range(len(where)) if i not in problems], np.int64)
    order = keep[np.argsort(where[keep], kind="stable")]
    table.shapes = done.take(order)
    table.image_index = where[order]
    table.labels = np.array(classes, np.int64)[order]
    table.ids = [ids[i] for i in order]
    table.crowd = np.array(crowd, bool)[order]
    table.rows = np.array(rows, np.int64)[order]
    extents = table.shapes.extents(sizes[table.image_index])
    _read_boxes_and_areas(table, entries, extents, sizes)
    if table.keypoint_names is not None:
        _read_keypoints(table, entries)


def _read_boxes_and_areas(table: Table, entries: list[Any], extents: np.ndarray, sizes: np.ndarray) -> None:
    """Those of the file if they are plausible, otherwise those of the masks."""
    count = len(table.ids)
    given = np.full((count, 4), np.nan)
    areas = np.full(count, np.nan)
    absent = np.zeros(count, bool)
    for index, row in enumerate(table.rows.tolist()):
        box = entries[row].get("bbox")
        absent[index] = box is None
        if isinstance(box, list) and len(box) == 4:
            given[index] = [parse_float(v) for v in box]
        area = parse_float(entries[row].get("area"))
        if area > 0:
            areas[index] = area
    height, width = sizes[table.image_index].T if count else (np.zeros(0), np.zeros(0))
    areas[~(areas <= 1.01 * height * width)] = np.nan
    with np.errstate(invalid="ignore", over="ignore"):
        boxes = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], 1)
        valid = np.isfinite(boxes).all(1) & (given[:, 2:] > 0).all(1)
        clipped = np.clip(boxes, 0, np.stack([width, height, width, height], 1))
        low = np.maximum(clipped[:, :2], extents[:, :2])
        both = np.maximum(0, np.minimum(clipped[:, 2:], extents[:, 2:]) - low).prod(1)
        union = (clipped[:, 2:] - clipped[:, :2]).prod(1) + (extents[:, 2:] - extents[:, :2]).prod(1) - both
        # Annotators differ by a pixel or two, which is much for a small object; another place or size is a mistake.
        displaced = (np.abs(clipped - extents).max(1) > 3) & (both < 0.5 * union)
    wrong = ~valid | displaced
    table.boxes = np.where(wrong[:, None], extents, boxes)
    table.areas = areas
    for index in np.flatnonzero(wrong & ~absent).tolist():
        value = shortened(entries[int(table.rows[index])]["bbox"])
        what = f"annotation {table.ids[index]!r} has bbox {value}, which does not match its mask"
        table.add_finding("note", "box", what, "the box of the mask is used", **_about(table, index))
    for index in np.flatnonzero(np.isnan(areas)).tolist():
        value = entries[int(table.rows[index])].get("area")
        if value is not None:
            what = f"annotation {table.ids[index]!r} has invalid area {shortened(value)}"
            table.add_finding("note", "area", what, "the area of the mask is used", **_about(table, index))


def _read_keypoints(table: Table, entries: list[Any]) -> None:
    """COCO stores keypoints as pixel indices: the center of pixel 3 is at 3.5. Unlabelled keypoints become zeros."""
    names = table.keypoint_names or ()
    points = np.zeros((len(table.ids), len(names), 3), np.float32)
    for index, row in enumerate(table.rows.tolist()):
        given = entries[row].get("keypoints")
        if given is None:
            continue
        values = np.array([parse_float(v) for v in given]) if isinstance(given, list) else np.zeros(0)
        visibility = values[2::3]
        labelled = visibility > 0
        if (
            len(values) != 3 * len(names)
            or not np.isin(visibility, (0, 1, 2)).all()
            or not np.isfinite(values.reshape(-1, 3)[labelled]).all()
        ):
            what = f"annotation {table.ids[index]!r} has keypoints that are not {len(names)} times x, y and 0, 1 or 2"
            advice = "its keypoints are skipped, the object is kept"
            table.add_finding("note", "keypoints", what, advice, **_about(table, index))
            continue
        points[index, labelled] = values.reshape(-1, 3)[labelled] + np.array([0.5, 0.5, 0])
    table.keypoints = points


def _skip(table: Table, number: int | str, index: int | None, sentence: str) -> None:
    """Add the finding that an annotation is skipped; `index` is the position of its image."""
    on = "" if index is None else f" on {table.files[index]!r}"
    image = None if index is None else table.image_ids[index]
    what = f"annotation {number!r}{on} {sentence}"
    table.add_finding("skip", "annotation", what, "the annotation is skipped", image=image, annotation=number)


def _about(table: Table, index: int) -> dict[str, int | str]:
    """The ids of an annotation in the table and of its image."""
    return {"image": table.image_ids[int(table.image_index[index])], "annotation": table.ids[index]}


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
    images = []
    for index, (number, file, size) in enumerate(zip(table.image_ids, table.files, table.sizes, strict=True)):
        if index not in skipped:
            entry = strict_json(raw["images"][table.image_rows[index]])
            images.append({**entry, **coco_json.image_entry(number, file, size)})
    originals = {e.get("id"): strict_json(e) for e in reversed(raw["categories"]) if isinstance(e, dict)}
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
    for index, image in enumerate(table.image_index.tolist()):
        if image in skipped:
            continue
        number = table.ids[index]
        if counts[number] > 1 and number in used:
            largest += 1
            number = largest
        used.add(number)
        size = table.sizes[image]
        if table.shapes.coded[index]:
            shape: Any = {"size": list(size), "counts": table.shapes.code(index).decode("ascii")}
        else:
            shape = [ring.ravel().tolist() for ring in table.shapes.polygon(index)]
        area = float(table.areas[index])
        if math.isnan(area):
            area = float(table.shapes.masks(index, index + 1, size).areas()[0])
        x0, y0, x1, y1 = table.boxes[index].tolist()
        record = {
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

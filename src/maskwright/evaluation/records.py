"""Reading of COCO results: a list of records with image_id, category_id, score and segmentation or bbox."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from maskwright.errors import AnnotationError
from maskwright.structures import Instances, Masks


def read_results(
    path: str | Path, sizes: Mapping[Any, tuple[int, int]], category_ids: Sequence[int]
) -> dict[Any, Instances]:
    """Reads predictions from a COCO results file.

    Args:
        path: The file.
        sizes: Height and width of each image by id.
        category_ids: Category ids; label k is the k-th.

    Returns:
        Predictions by image id.

    Raises:
        AnnotationError: If a record (counted from 0) is damaged, of an unknown image or category, or of another size
            than its image.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); expected a COCO results file") from None
    except ValueError as error:
        raise AnnotationError(f"{path}: is not JSON ({error}); expected a COCO results file") from None
    if not isinstance(records, list):
        hint = "a data set" if isinstance(records, dict) and "images" in records else type(records).__name__
        raise AnnotationError(f"{path}: expected a COCO results file, which is a list of records, got {hint}")

    labels = {category: label for label, category in enumerate(category_ids)}
    groups: dict[Any, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for number, record in enumerate(records):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise AnnotationError(f"{where} is {type(record).__name__}; expected an object with image_id, category_id")
        absent = [key for key in ("image_id", "category_id", "score") if key not in record]
        if absent:
            raise AnnotationError(f"{where} has no {absent[0]!r}; every record needs image_id, category_id and score")
        if not _known(record["image_id"], sizes):
            raise AnnotationError(f"{where} is of image {record['image_id']!r}, which the data set does not have")
        if not _known(record["category_id"], labels):
            raise AnnotationError(f"{where} has category {record['category_id']!r}, which the data set does not have")
        groups[record["image_id"]].append((number, record))

    found = {}
    for image_id, group in groups.items():
        where = f"{path}: records of image {image_id!r}, from number {group[0][0]} on,"
        try:
            found[image_id] = instances_from_records([r for _, r in group], sizes[image_id], labels.__getitem__)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise AnnotationError(f"{where} cannot be read: {error}") from None
    return found


def instances_from_records(
    records: Sequence[dict[str, Any]], size: tuple[int, int], label_of: Callable[[int], int]
) -> Instances:
    """Converts records as written by `Instances.to_coco` to objects.

    Args:
        records: The records of one image. Each needs "bbox" or "segmentation"; missing boxes are those of the masks.
        size: Height and width of the image.
        label_of: From category id to label.

    Raises:
        ValueError: If the records are inconsistent.
    """
    if not records:
        return Instances.empty(size, masks=False)
    scored, masked, with_points, boxed = (
        _all_or_none(records, key) for key in ("score", "segmentation", "keypoints", "bbox")
    )
    if not masked and not boxed:
        raise ValueError('records have neither "segmentation" nor "bbox"')
    masks = _masks((r["segmentation"] for r in records), size) if masked else None
    if boxed:
        boxes = torch.tensor([_finite(r["bbox"], 4, "bbox") for r in records], dtype=torch.float64)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).float()
    else:
        assert masks is not None
        boxes = masks.boxes()
    scores = torch.tensor(_finite([r["score"] for r in records], len(records), "score")) if scored else None
    points = None
    if with_points:
        length = len(records[0]["keypoints"])
        rows = [_finite(r["keypoints"], length, "keypoints") for r in records]
        if length % 3:
            raise ValueError(f"keypoints has {length} numbers; expected x, y and score of each keypoint")
        points = torch.tensor(rows, dtype=torch.float64).reshape(len(records), length // 3, 3)
        # COCO counts from the centre of the first pixel; an annotated keypoint that is not labelled has no position.
        points[..., :2] += 0.5 * ((points[..., 2:] > 0) | scored)
        points = points.float()
    labels = torch.tensor([label_of(r["category_id"]) for r in records], dtype=torch.int64)
    return Instances(size, boxes, labels, masks, scores, points)


def _masks(codes: Iterable[Any], size: tuple[int, int]) -> Masks:
    """Masks from polygons (lists of rings) and run-length codes, which may be mixed."""
    return Masks.join(
        [Masks.empty(size)]
        + [
            (Masks.from_polygons([code], size) if isinstance(code, list) else Masks.from_rle([code], size)).pack()
            for code in codes
        ]
    )


def _all_or_none(records: Sequence[dict[str, Any]], key: str) -> bool:
    there = sum(key in r for r in records)
    if 0 < there < len(records):
        raise ValueError(f"{len(records) - there} of {len(records)} records have no {key!r}")
    return there > 0


def _finite(values: Sequence[Any], count: int, name: str) -> list[float]:
    numbers = [float(v) for v in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be {count} finite numbers, got {numbers[:8]}")
    return numbers


def _known(key: Any, table: Mapping[Any, Any]) -> bool:
    return isinstance(key, (int, str)) and not isinstance(key, bool) and key in table

"""Reading of COCO results: a list of records with image_id, category_id, score and segmentation, bbox or keypoints."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from maskwright.data.values import parse_float, parse_int
from maskwright.errors import AnnotationError
from maskwright.evaluation.plausible import check_classes, check_images
from maskwright.evaluation.result_ids import Id, Reference, checked_id, listing_beside, match_ids
from maskwright.structures import Instances, Masks

Record = dict[str, Any]

_PANOPTIC = "panoptic segments, which PanopticEvaluator.read and SemanticEvaluator.read accept"


def read_results(
    path: str | Path,
    sizes: Mapping[Any, tuple[int, int]],
    category_ids: Sequence[int],
    *,
    classes: Sequence[str] = (),
    paths: Mapping[Any, Path] | None = None,
    targets: Callable[[Any], Instances] | None = None,
    by_class: bool = True,
) -> dict[Any, Instances]:
    """Reads predictions from a COCO results file.

    Ids are accepted as annotation files may have them: 1, 1.0 and "1" are the same. If `pictures.json` of `predict` is
    in the folder of the file and lists its ids, images are matched by file name and classes by name. Image ids that
    are names of files are matched by name, too.

    Args:
        path: The file.
        sizes: Height and width of each image by id.
        category_ids: Category ids; label k is the k-th.
        classes: Class names, to match those of `pictures.json` with.
        paths: Image file by id, to match file names with.
        targets: Gives the annotated objects of an image id, to recognize ids that stand for other images or classes.

        by_class: Whether classes count; False for proposals.

    Returns:
        Predictions by image id. Label -1 is a class that the data set does not have.

    Raises:
        AnnotationError: If a record (counted from 0) is damaged, of an unknown image or category, or of another size
            than its image; or if the predictions fit other images or classes than those of their ids.

    Warns:
        DataWarning: If ids are matched by file name, classes are left out, or hardly any prediction fits an object.
    """
    path = Path(path)
    records = _checked(path, _load(path))
    reference = Reference(sizes, category_ids, classes, paths or {})
    images = {record["image_id"]: number for number, record in reversed(records)}
    categories = {record["category_id"]: number for number, record in reversed(records)}
    matched = match_ids(path, images, categories, reference, listing_beside(path))
    groups: dict[Id, list[tuple[int, Record]]] = defaultdict(list)
    for number, record in records:
        groups[matched.images[record["image_id"]]].append((number, record))
    found: dict[Id, Instances] = {}
    for image_id, group in groups.items():
        try:
            found[image_id] = instances_from_records(
                [record for _, record in group], sizes[image_id], matched.labels.__getitem__
            )
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise AnnotationError(
                f"{path}: records of image {image_id!r}, from number {group[0][0]} on, cannot be read: {error}"
            ) from None
    if targets is not None:
        check_images(path, found, reference, targets, certain=matched.images_by != "name")
    if targets is not None and by_class and matched.classes_by == "id":
        check_classes(path, found, reference, targets)
    return found


def _load(path: Path) -> list[Any]:
    """The list of records in a file."""
    try:
        records: Any = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); expected a COCO results file") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: is not JSON ({error}); expected a COCO results file") from None
    if isinstance(records, list):
        return cast(list[Any], records)
    hint = type(records).__name__
    if isinstance(records, dict):
        document = cast(Record, records)
        annotations: Any = document.get("annotations")
        first: Any = cast(list[Any], annotations)[0] if isinstance(annotations, list) and annotations else None
        hint = "a data set" if "images" in document else hint
        hint = _PANOPTIC if isinstance(first, dict) and "segments_info" in first else hint
    raise AnnotationError(f"{path}: expected a COCO results file, which is a list of records, got {hint}")


def _checked(path: Path, records: Sequence[Any]) -> list[tuple[int, Record]]:
    """Records with their numbers; ids are integers or strings, and values that are null are absent."""
    checked: list[tuple[int, Record]] = []
    for number, entry in enumerate(records):
        where = f"{path}: record {number}"
        if not isinstance(entry, dict):
            raise AnnotationError(f"{where} is {type(entry).__name__}; expected an object with image_id, category_id")
        record = cast(Record, entry)
        if "segments_info" in record:
            raise AnnotationError(f"{path}: expected COCO results of objects, got {_PANOPTIC}")
        absent = [key for key in ("image_id", "category_id", "score") if key not in record]
        if absent:
            raise AnnotationError(f"{where} has no {absent[0]!r}; every record needs image_id, category_id and score")
        ids = {key: checked_id(record[key], where, key) for key in ("image_id", "category_id")}
        score = parse_float(record["score"])
        if not math.isfinite(score):
            raise AnnotationError(f"{where}: score must be 1 finite numbers, got {record['score']!r}")
        # Other tools write null or an empty list for what they did not predict.
        given = {
            k: v for k, v in record.items() if k not in ("segmentation", "bbox", "keypoints") or v not in (None, [])
        }
        checked.append((number, {**given, **ids, "score": score}))
    return checked


def instances_from_records(
    records: Sequence[Record], size: tuple[int, int], label_of: Callable[[Any], int]
) -> Instances:
    """Converts records as written by `Instances.to_coco` to objects.

    Args:
        records: The records of one image. Each needs "bbox", "segmentation" or "keypoints"; missing boxes are those of
            the masks, or the extent of the keypoints. If all have an integer "track_id", these are the ids.
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
    if not masked and not boxed and not with_points:
        raise ValueError('records have neither "segmentation" nor "bbox" nor "keypoints"')
    masks = _masks((r["segmentation"] for r in records), size) if masked else None
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
    if boxed:
        boxes = torch.tensor([_finite(r["bbox"], 4, "bbox") for r in records], dtype=torch.float64)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).float()
    elif masks is not None:
        boxes = masks.boxes()
    else:
        assert points is not None
        boxes = torch.cat([points[..., :2].amin(1), points[..., :2].amax(1)], 1)
    labels = torch.tensor([label_of(r["category_id"]) for r in records], dtype=torch.int64)
    numbers = [parse_int(r.get("track_id")) for r in records]
    ids = None if None in numbers else torch.tensor(numbers, dtype=torch.int64)
    return Instances(size, boxes, labels, masks, scores, points, ids=ids)


def _masks(codes: Iterable[Any], size: tuple[int, int]) -> Masks:
    """Masks from polygons (lists of rings) and run-length codes, which may be mixed."""
    return Masks.join(
        [Masks.empty(size)]
        + [
            (
                Masks.from_polygons([cast(list[Any], code)], size)
                if isinstance(code, list)
                else Masks.from_rle([code], size)
            ).pack()
            for code in codes
        ]
    )


def _all_or_none(records: Sequence[Record], key: str) -> bool:
    there = sum(key in r for r in records)
    if 0 < there < len(records):
        raise ValueError(f"{len(records) - there} of {len(records)} records have no {key!r}")
    return there > 0


def _finite(values: Sequence[Any], count: int, name: str) -> list[float]:
    numbers = [float(v) for v in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be {count} finite numbers, got {numbers[:8]}")
    return numbers

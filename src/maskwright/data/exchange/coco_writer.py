"""Writing COCO data sets: annotations/instances_SPLIT.json and the images in SPLIT/."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from maskwright.data.coco_json import coco_categories, image_entry, write_coco_json
from maskwright.data.exchange.writing import (
    ImageFiles,
    Item,
    Part,
    boxes_of,
    crowd_of,
    items,
    labels_of,
    present,
)
from maskwright.structures import Panoptic


def write_instances(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write instances_SPLIT.json, or person_keypoints_SPLIT.json if there are keypoints."""
    for part in parts:
        split = part.split or "default"
        place = part.split or "images"
        dataset = part.dataset
        kind = "instances" if dataset.keypoint_names is None else "person_keypoints"
        names = images.names(part, place)
        ids = _unique_ids(dataset.image_ids())
        for index, name in enumerate(names):
            images.copy(part, index, f"{place}/{name}")
        entries = [image_entry(ids[index], name, dataset.sizes()[index]) for index, name in enumerate(names)]
        path = folder / "annotations" / f"{kind}_{split}.json"
        categories = coco_categories(dataset.classes, dataset.category_ids, None, dataset.keypoint_names)
        write_coco_json(path, entries, _annotations(part, ids), categories)


def _unique_ids(ids: Sequence[int | str]) -> list[int | str]:
    return list(ids) if len(set(ids)) == len(ids) else list(range(1, len(ids) + 1))


def _annotations(part: Part, image_ids: Sequence[int | str]) -> Iterator[dict[str, Any]]:
    """The annotations; ids are those of the data set if they are unique."""
    dataset = part.dataset
    own = [number for index in range(len(dataset)) for number in dataset.annotation_ids(index)]
    unique = all(count == 1 for count in Counter(own).values())
    counter = itertools.count(1)
    for item in items(part):
        areas = dataset.areas(item.index)
        numbers, extras = dataset.annotation_ids(item.index), dataset.extras(item.index)
        for position, record in enumerate(_records(item, dataset.category_ids)):
            following = next(counter)
            if record is None:
                continue
            named = numbers[position] if unique and position < len(numbers) else following
            area = float(areas[position]) if position < len(areas) else 0.0
            further = {} if extras is None else extras[position]
            yield {"id": named, "image_id": image_ids[item.index], **further, **record, "area": area}


def _records(item: Item, category_ids: Sequence[int]) -> Iterator[dict[str, Any] | None]:
    """The objects of an image as COCO has them; None for an object without pixels."""
    objects = item.objects
    crowd, labels, there = crowd_of(objects), labels_of(objects), present(objects)
    polygons = objects.masks.polygons() if objects.masks is not None and objects.masks.kind == "polygon" else None
    codes = objects.masks.rle() if objects.masks is not None and polygons is None else None
    for position, (x0, y0, x1, y1) in enumerate(boxes_of(objects)):
        if not there[position]:
            yield None
            continue
        shape: Any = []
        if polygons is not None:
            shape = [ring.ravel().tolist() for ring in polygons[position]]
        elif codes is not None:
            shape = {"size": list(item.size), "counts": codes[position]["counts"].decode("ascii")}
        record: dict[str, Any] = {
            "category_id": category_ids[labels[position]],
            "segmentation": shape,
            "bbox": [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)],
            "iscrowd": int(crowd[position]),
        }
        if item.scores is not None:
            record["score"] = item.scores[position]
        if objects.keypoints is not None:
            points: np.ndarray = cast(Any, objects.keypoints[position]).double().numpy().copy()
            labelled = points[:, 2] > 0
            points[labelled, :2] -= 0.5
            record["keypoints"] = np.round(points, 3).ravel().tolist()
            record["num_keypoints"] = int(labelled.sum())
        yield record


def write_maps(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write panoptic_SPLIT.json with its maps; of overlapping objects the smaller one keeps the pixels."""
    from maskwright.data.panoptic import write_panoptic

    for part in parts:
        split, place = part.split or "default", part.split or "images"
        names = images.names(part, place)
        ids = _unique_ids(part.dataset.image_ids())

        def segments(
            part: Part = part, place: str = place, names: Sequence[str] = names, ids: Sequence[int | str] = ids
        ) -> Iterator[tuple[dict[str, Any], Panoptic]]:
            for item in items(part):
                images.copy(part, item.index, f"{place}/{names[item.index]}")
                entry = image_entry(ids[item.index], names[item.index], item.size)
                yield entry, _disjoint(part, item)

        path = folder / "annotations" / f"panoptic_{split}.json"
        dataset = part.dataset
        write_panoptic(path, segments(), dataset.classes, dataset.category_ids, dataset.stuff)


def _disjoint(part: Part, item: Item) -> Panoptic:
    """The segments of an image."""
    import torch

    from maskwright.data.exchange.writing import painted

    objects = item.objects
    things = torch.tensor([name not in part.dataset.stuff for name in part.dataset.classes], dtype=torch.bool)
    if objects.masks is None or not len(objects):
        return Panoptic.empty(item.size)
    result = painted(objects, crowd_of(objects))
    kept = torch.from_numpy(np.flatnonzero(result.lost < result.areas))  # pyright: ignore[reportUnknownMemberType] - untyped in torch
    plane = torch.from_numpy(result.plane)  # pyright: ignore[reportUnknownMemberType] - untyped in torch
    chosen = objects[kept]
    return Panoptic.from_map(
        plane, chosen.labels, things[chosen.labels], numbers=kept + 1, crowd=torch.tensor(crowd_of(chosen))
    )

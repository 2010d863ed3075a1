"""Reading and writing of COCO panoptic results: a JSON file, and a PNG of segment ids for each image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from maskwright.data.dataset import Dataset
from maskwright.data.id_maps import read_map
from maskwright.data.values import parse_int, relative_path
from maskwright.errors import AnnotationError
from maskwright.evaluation.result_ids import Id, Listing, Reference, checked_id, listing_beside, match_ids
from maskwright.structures import Panoptic

_EXPECTED = 'expected COCO panoptic results: an object with "annotations", each with image_id, file_name, segments_info'


def read_panoptic_results(path: str | Path, dataset: Dataset) -> Iterator[tuple[Id, Panoptic]]:
    """Reads segments from a COCO panoptic results file, one image at a time.

    Ids are matched as in `read_results`; the lists "images" and "categories" of the file itself, which `predict`
    writes, take the place of `pictures.json`.

    Args:
        path: The JSON file. The PNGs are in a folder of its name, or else in its own folder.
        dataset: The data set.

    Returns:
        Pairs of the id in the data set and the segments, with its labels; -1 for a class that it does not have.

    Raises:
        AnnotationError: If the file or a map is damaged, or does not belong to the data set.
    """
    path = Path(path)
    document = _load(path)
    reference = reference_of(dataset)
    records: list[tuple[Id, str, list[tuple[int, Id]]]] = []
    images: dict[Id, int] = {}
    categories: dict[Id, int] = {}
    for number, entry in enumerate(cast(list[Any], document["annotations"])):
        where = f"{path}: record {number}"
        if not isinstance(entry, dict) or not isinstance(cast(dict[str, Any], entry).get("segments_info"), list):
            raise AnnotationError(f"{where} has no list segments_info; {_EXPECTED}")
        record = cast(dict[str, Any], entry)
        image = checked_id(record.get("image_id"), where, "image_id")
        segments = [_segment(each, where) for each in cast(list[Any], record["segments_info"])]
        name = relative_path(str(record.get("file_name") or ""))
        if name is None:
            raise AnnotationError(f"{where} has no file_name inside the folder of maps; {_EXPECTED}")
        images.setdefault(image, number)
        for _, category in segments:
            categories.setdefault(category, number)
        records.append((image, name, segments))
    listing = Listing.of(path, document) or listing_beside(path)
    matched = match_ids(path, images, categories, reference, listing)
    folder = path.with_suffix("") if path.with_suffix("").is_dir() else path.parent
    stuff = torch.tensor([name in dataset.stuff for name in dataset.classes], dtype=torch.bool)
    for image, name, segments in records:
        image_id = matched.images[image]
        plane = torch.as_tensor(read_map(folder / name, reference.sizes[image_id]))
        labels = torch.tensor([matched.labels[category] for _, category in segments], dtype=torch.int64)
        numbers = torch.tensor([number for number, _ in segments], dtype=torch.int64)
        yield image_id, Panoptic.from_map(plane, labels, ~stuff[labels] | (labels < 0), numbers=numbers)


def reference_of(dataset: Dataset) -> Reference:
    """The images and classes of a data set."""
    ids = dataset.image_ids()
    paths = {image_id: path for image_id, path in zip(ids, dataset.paths(), strict=True) if path is not None}
    sizes: Mapping[Id, tuple[int, int]] = dict(zip(ids, dataset.sizes(), strict=True))
    return Reference(sizes, dataset.category_ids, dataset.classes, paths)


def _load(path: Path) -> dict[str, Any]:
    try:
        document: Any = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: is not JSON ({error}); {_EXPECTED}") from None
    if isinstance(document, dict) and isinstance(cast(dict[str, Any], document).get("annotations"), list):
        return cast(dict[str, Any], document)
    hint = "; for COCO results of objects use Evaluator.read" if isinstance(document, list) else ""
    raise AnnotationError(f"{path}: {_EXPECTED}{hint}")


def _segment(entry: Any, where: str) -> tuple[int, Id]:
    """Id and category id of a segment."""
    segment = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
    number = parse_int(segment.get("id"))
    if number is None:
        raise AnnotationError(f"{where} has a segment without an integer id; {_EXPECTED}")
    return number, checked_id(segment.get("category_id"), where, "category_id")

"""COCO panoptic data sets: one PNG per image holds the segment id of each pixel, one JSON file lists the segments."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from maskwright.data import coco_json
from maskwright.data.coco_json import Entry, coco_categories, start_table, strict_json, write_coco_json
from maskwright.data.diagnosis_orientation import list_upright
from maskwright.data.exchange.writing import CROWD, HOLES, PARTS, STUFF, ImageFiles, Part
from maskwright.data.findings import first_few
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.id_maps import map_bytes, read_map, size_mismatch
from maskwright.data.image_names import is_file
from maskwright.data.images import read_size
from maskwright.data.table import Table, Verify, report_sizes
from maskwright.data.table_datasets import PanopticDataset, dataset_from_table
from maskwright.data.values import IdIndex, parse_flag, parse_int, relative_path
from maskwright.errors import AnnotationError, DataError, ImageError, UsageError
from maskwright.files import write_bytes
from maskwright.structures import Panoptic
from maskwright.structures.panoptic import LARGEST_ID

NAME = "COCO panoptic"
LAYOUT = "annotations/panoptic_{split}.json (COCO panoptic)"
HOLDS = frozenset({PARTS, HOLES, CROWD, STUFF})

# Up to this many maps are all decoded when a data set is opened, at about 10 ms each; of larger data sets a sample.
VERIFY_ALL_BELOW = 500
VERIFY_SOME = 200


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find panoptic_SPLIT.json in a folder, or recognize such a file by its name."""
    path = Path(source)
    if path.is_file():
        named = path.suffix.lower() == ".json" and coco_json.is_panoptic(path)
        return [Match(str(path), CERTAIN, path.name)] if named else []
    if not path.is_dir() or request.keypoints:
        return []
    confidence = CERTAIN if request.panoptic else 0.95  # after instances, before keypoints; see `opening`
    if request.split is None:
        files = list(coco_json.annotation_files(path, "panoptic").items())
    else:
        files = coco_json.fitting_files(path, "panoptic", request.split)
    return [Match(str(file), confidence, str(file.relative_to(path)), split) for split, file in files]


def read(match: Match, request: Request) -> Table:
    """Read one of the files that `sniff` has found."""
    return read_panoptic_table(Path(match.location), request.images, verify=request.verify)


def read_panoptic(
    annotations: str | Path,
    images: str | Path | None = None,
    maps: str | Path | None = None,
    *,
    strict: bool = False,
    verify: Verify | None = None,
) -> PanopticDataset:
    """Read a COCO panoptic JSON file.

    Everything is checked as by `read_coco`. Segments without a pixel are skipped, and pixels with an id that no
    segment has belong to no segment. Images without a record are skipped.

    Args:
        annotations: The file.
        images: The folder of the images; None: the usual places beside the file are tried.
        maps: The folder of the PNG maps; None: the folder with the name of the file.
        strict: Raise for damaged entries instead of skipping them.
        verify: Number of images and maps that are inspected: "all", "some" or "none"; None: all maps of up to 500
            images, some of more.

    Returns:
        The data set.

    Raises:
        AnnotationError: If the file cannot be used, or anything would be skipped in strict mode.
        UsageError: If a folder does not exist.

    Warns:
        DataWarning: Once, about everything that was skipped or repaired.
    """
    folders = [None if folder is None else Path(folder) for folder in (images, maps)]
    for folder, what in zip(folders, ("images", "maps"), strict=True):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of {what}")
    table = read_panoptic_table(Path(annotations), folders[0], folders[1], verify)
    table.maps = table.maps or []
    dataset = dataset_from_table(table, strict)
    assert isinstance(dataset, PanopticDataset)
    return dataset


# ---- reading -------------------------------------------------------------------------------------------------------


def read_panoptic_table(
    path: Path, images: Path | None = None, maps: Path | None = None, verify: Verify | None = None
) -> Table:
    """Read everything that can be used from a COCO panoptic file; everything else becomes a finding.

    Args:
        path: The file.
        images: The folder of the images; None: searched for.
        maps: The folder of the maps; None: searched for.
        verify: Number of images and maps that are inspected; see `read_panoptic`.

    Returns:
        The table. No exception is raised for what is in the files.
    """
    table, position, labels = start_table(path, images, verify)
    if not table.usable:
        return table
    list_upright(table)
    report_sizes(table)
    table.stuff = _read_stuff(table, table.raw["categories"])
    folder = maps or next((p for p in _map_folders(path) if p.is_dir()), path.with_suffix(""))
    listed, records = len(table.files), _read_records(table, table.raw["annotations"], position)
    available = _with_map(table, records, folder)
    chosen = sorted(available)
    _keep_images(table, chosen)
    image_index: list[int] = []
    segments: list[tuple[int, int, bool]] = []  # id, label, crowd
    for index, previous in enumerate(chosen):
        entry = table.raw["annotations"][available[previous][0]]
        for segment in _read_segments(table, entry, labels, table.image_ids[index]):
            image_index.append(index)
            segments.append(segment)
    table.image_index = np.array(image_index, np.int64)
    table.ids = [number for number, _, _ in segments]
    table.labels = np.array([label for _, label, _ in segments], np.int64)
    table.crowd = np.array([crowd for _, _, crowd in segments], bool)
    table.rows = np.array([available[previous][0] for previous in chosen], np.int64)
    table.maps = [available[previous][1] for previous in chosen]
    if listed and not table.files and not table.findings_with("error"):
        if records:
            what = f"none of its {len(records)} maps can be used"
        else:
            what = "none of its images has a list of segments"
        table.add_finding("error", "map", what, "see the other findings")
    _verify_maps(table, verify)
    return table


def _read_stuff(table: Table, entries: list[Any]) -> tuple[str, ...]:
    """The classes whose "isthing" is 0."""
    classes = dict(zip(table.category_ids, table.classes, strict=True))
    names: list[str] = []
    for value in entries:
        entry: Entry = cast(Entry, value) if isinstance(value, dict) else {}
        number = parse_int(entry.get("id"))
        if number not in classes:
            continue
        thing = parse_flag(entry["isthing"]) if entry.get("isthing") is not None else None
        if thing is None:
            what = f"category {number} ({classes[number]!r}) has isthing {entry.get('isthing')!r}"
            table.add_finding("error", "category", what, "expected 1 for countable objects, 0 for regions")
        elif not thing and classes[number] not in names:
            names.append(classes[number])
    return tuple(name for name in table.classes if name in names)


def _map_folders(path: Path) -> list[Path]:
    return [path.with_suffix(""), path.parent.parent / path.stem]


def _read_records(
    table: Table, entries: list[Any], position: dict[int | str, int | None]
) -> dict[int, tuple[int, str]]:
    """Position of each image that has a record -> row of the record and name of its map."""
    records: dict[int, tuple[int, str]] = {}
    known = IdIndex(position)
    for row, value in enumerate(entries):
        entry: Entry = cast(Entry, value) if isinstance(value, dict) else {}
        if not isinstance(entry.get("segments_info"), list):
            what = f"annotations[{row}] has no list 'segments_info'"
            table.add_finding("skip", "annotation", what, "the record is skipped")
            continue
        image = known.find(entry.get("image_id"))
        if image is None:
            what = f"annotations[{row}] has image_id {entry.get('image_id')!r}, which is not in the list of images"
            table.add_finding("skip", "annotation", what, "the record is skipped")
            continue
        index = position[image]
        if index is None:  # the image was skipped, with a finding
            continue
        name = entry.get("file_name")
        file = relative_path(name) if isinstance(name, str) and name else None
        if file is None:
            what = f"the map of image {image!r} has file name {name!r}; expected the name of a PNG inside the folder"
            table.add_finding("error" if name else "skip", "map", what, "the image is skipped", image=image)
        elif index in records:
            what = f"image {image!r} has two records"
            table.add_finding("error", "annotation", what, "keep one of them", image=image)
        else:
            records[index] = (row, file)
    without = [n for i, n in enumerate(table.image_ids) if i not in records]
    if without:
        what = f"{len(without)} of {len(table.image_ids)} images have no list of segments: {first_few(without)}"
        table.add_finding("skip", "annotation", what, "these images are skipped")
    return records


def _with_map(table: Table, records: dict[int, tuple[int, str]], folder: Path) -> dict[int, tuple[int, Path]]:
    """The records whose map exists and has the size of the image."""
    missing = [file for _, file in records.values() if not is_file(folder / file)]
    if missing:
        what = f"{len(missing)} of {len(records)} maps of segments are not in {folder}: {first_few(missing)}"
        table.add_finding("error", "missing", what, "put the PNGs there, or specify their folder")
    available: dict[int, tuple[int, Path]] = {}
    for index, (row, file) in records.items():
        path, image = folder / file, table.image_ids[index]
        if not is_file(path):
            continue
        try:
            size = read_size(path)
        except ImageError as error:
            reason = str(error).removeprefix(f"{path}: ")
            table.add_finding("error", "map", f"the map of image {image!r}, {path}: {reason}", image=image)
            continue
        if size != table.sizes[index]:
            what, _, advice = size_mismatch(path, size, table.sizes[index]).partition("; ")
            table.add_finding("error", "size", what, advice, image=image)
            continue
        available[index] = (row, path)
    return available


def _keep_images(table: Table, kept: list[int]) -> None:
    """Remove all other images from a table without annotations."""
    for name in ("image_ids", "files", "sizes", "listed_sizes", "stored_sizes", "image_rows"):
        values = getattr(table, name)
        setattr(table, name, [values[i] for i in kept])


def _read_segments(table: Table, entry: Entry, labels: dict[int, int], image: int | str) -> list[tuple[int, int, bool]]:
    """Id, label and crowd flag of each valid segment of a record."""
    kept: list[tuple[int, int, bool]] = []
    used: set[int] = set()
    for row, value in enumerate(cast(list[Any], entry["segments_info"])):
        segment: Entry = cast(Entry, value) if isinstance(value, dict) else {}
        number = parse_int(segment.get("id"))
        if number is None or not 0 < number <= LARGEST_ID:
            shown = segment.get("id") if isinstance(value, dict) else value
            problem = f"segment {row} of image {image!r} has id {shown!r}; expected 1 ... {LARGEST_ID}"
        elif number in used:
            problem = f"two segments of image {image!r} share id {number}"
            table.add_finding("skip", "segment", problem, "the first one gets all its pixels", image=image)
            continue
        elif (category := parse_int(segment.get("category_id"))) not in labels:
            shown = segment.get("category_id")
            problem = f"segment {number} of image {image!r} has category_id {shown!r}, which is not in the list"
        elif (crowd := parse_flag(segment.get("iscrowd"))) is None:
            problem = f"segment {number} of image {image!r} has iscrowd {segment['iscrowd']!r}; expected 0 or 1"
        else:
            used.add(number)
            kept.append((number, labels[category], crowd))
            continue
        advice = "the segment is skipped; its pixels belong to no segment"
        table.add_finding("skip", "segment", problem, advice, image=image)
    repeated = {label for _, label, _ in kept if sum(other == label for _, other, _ in kept) > 1}
    regions = [table.classes[label] for label in sorted(repeated) if table.classes[label] in table.stuff]
    if regions:
        what = f"image {image!r} has several segments of {first_few(regions)}; expected one for each stuff class"
        table.add_finding("note", "region", what, "they are kept as separate segments", image=image)
    return kept


def _verify_maps(table: Table, verify: Verify | None) -> None:
    """Decode maps; add findings for segments without pixels and for ids that no segment has."""
    maps = table.maps or []
    if verify == "none" or not maps:
        return
    every = verify == "all" or (verify is None and len(maps) <= VERIFY_ALL_BELOW)
    chosen = range(0, len(maps), 1 if every else max(1, len(maps) // VERIFY_SOME))
    bounds = table.bounds()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        results = list(threads.map(partial(_ids_in_map, table), chosen))
    if _of_other_ids(table, [(i, r[0]) for i, r in zip(chosen, results, strict=True) if not isinstance(r, str)]):
        return
    for index, result in zip(chosen, results, strict=True):
        image = table.image_ids[index]
        if isinstance(result, str):
            table.add_finding("error", "map", result.removeprefix(f"{table.path}: "), image=image)
            continue
        numbers, counts = result
        listed = table.ids[bounds[index] : bounds[index + 1]]
        empty = sorted(set(listed) - set(numbers))
        if empty:
            what = f"segments {first_few(empty)} of image {image!r} have no pixels in {maps[index]}"
            advice = "these segments are skipped"
            table.add_finding("skip", "segment", what, advice, image=image, annotation=empty[0])
        unknown = [(n, c) for n, c in zip(numbers, counts, strict=True) if n and n not in set(listed)]
        if unknown:
            pixels = sum(c for _, c in unknown)
            what = (
                f"{pixels} pixels of {maps[index]} have ids that are not listed for image {image!r}: "
                f"{first_few([n for n, _ in unknown])}"
            )
            table.add_finding("skip", "map", what, "they belong to no segment", image=image)


def _of_other_ids(table: Table, maps: list[tuple[int, list[int]]]) -> bool:
    """Add one finding if no map has an id of its listed segments."""
    bounds = table.bounds()
    listed = [set(table.ids[bounds[index] : bounds[index + 1]]) for index, _ in maps]
    used = [{number for number in numbers if number} for _, numbers in maps]
    if not any(listed) or not any(used) or any(own & found for own, found in zip(listed, used, strict=True)):
        return False
    reversed_ids = [{(n & 0xFF) << 16 | n & 0xFF00 | n >> 16 for n in found} for found in used]
    swapped = any(own & found for own, found in zip(listed, reversed_ids, strict=True))
    what = f"none of the listed segments is in the maps ({len(maps)} were read)"
    advice = "restore the maps that belong to this file; the id of a segment is red + 256 green + 65536 blue"
    if swapped:
        what += "; with red and blue exchanged they are"
        advice = "write the maps in the order red, green, blue (OpenCV's order is blue, green, red)"
    table.add_finding("error", "map", what, advice)
    return True


def _ids_in_map(table: Table, index: int) -> tuple[list[int], list[int]] | str:
    """The ids in the map of an image and their numbers of pixels, or the message of an error."""
    assert table.maps is not None
    try:
        numbers, counts = np.unique(read_map(table.maps[index], table.sizes[index]), return_counts=True)
    except AnnotationError as error:
        return str(error)
    return numbers.tolist(), counts.tolist()


# ---- writing -------------------------------------------------------------------------------------------------------


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write annotations/panoptic_SPLIT.json with its maps, and the images in SPLIT/."""
    from maskwright.data.exchange.coco_writer import write_maps

    write_maps(folder, parts, images)


def write_panoptic(
    path: str | Path,
    images: Iterable[tuple[dict[str, Any], Panoptic]],
    classes: Sequence[str],
    category_ids: Sequence[int],
    stuff: Sequence[str],
) -> Path:
    """Write a COCO panoptic file, and the maps into the folder with the same name.

    Args:
        path: The JSON file.
        images: Entries of images ("id", "file_name", "height", "width"), each with its segments.
        classes: Class names.
        category_ids: The id of each class.
        stuff: Those classes that are regions.

    Returns:
        The path.

    Raises:
        DataError: If a file cannot be written. Each file is complete or absent; the JSON file is written last.
    """
    path = Path(path)
    entries: list[Entry] = []
    records: list[Entry] = []
    used: set[str] = set()
    for entry, panoptic in images:
        name = _unused_name(Path(entry["file_name"]).stem, used)
        data = io.BytesIO()
        panoptic.to_png().save(data, "PNG")
        write_bytes(path.with_suffix("") / name, data.getvalue(), DataError, sync=False)
        entries.append(entry)
        records.append(panoptic.to_coco(entry["id"], category_ids, name))
    return write_coco_json(path, entries, records, coco_categories(classes, category_ids, stuff))


def _unused_name(stem: str, used: set[str]) -> str:
    """The name of a map that no other image has: "a/1.jpg" and "b/1.jpg" become 1.png and 1-2.png."""
    stem = os.fsdecode(os.fsencode(stem)[:240])  # file systems allow 255 bytes per name
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    name = next(n for n in (f"{stem}{suffix}.png" for suffix in suffixes) if n not in used)
    used.add(name)
    return name


def repaired(table: Table, skipped: set[int], folder: Path) -> dict[str, Any]:
    """Return a table as COCO panoptic JSON, and write its maps without the ids that no segment has.

    Args:
        table: The table.
        skipped: Positions of images that are omitted; those whose maps cannot be read are added.
        folder: The folder of the maps; created if needed.

    Returns:
        The content of the file: what could be read, and all other entries of the original that are valid JSON.
    """
    raw, maps, bounds = table.raw, table.maps or [], table.bounds()
    folder.mkdir(parents=True, exist_ok=True)
    images: list[Entry] = []
    records: list[Entry] = []
    used: set[str] = set()
    for index, path in enumerate(maps):
        if index in skipped:
            continue
        image, size = table.image_ids[index], table.sizes[index]
        try:
            ids = read_map(path, size)
        except AnnotationError:  # there is a finding about it
            skipped.add(index)
            continue
        entry = strict_json(raw["images"][table.image_rows[index]])
        images.append({**entry, **coco_json.image_entry(image, table.files[index], size)})
        part = slice(int(bounds[index]), int(bounds[index + 1]))
        kept = [n for n in table.ids[part] if isinstance(n, int)]
        ids = np.where(np.isin(ids, kept), ids, 0)
        name = _unused_name(path.stem, used)
        write_bytes(folder / name, map_bytes(ids), DataError, sync=False)
        labels, crowd = torch.from_numpy(table.labels[part]), torch.from_numpy(table.crowd[part])  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        panoptic = Panoptic.from_map(
            torch.from_numpy(ids),  # pyright: ignore[reportUnknownMemberType] - untyped in torch
            labels,
            torch.ones(len(labels), dtype=torch.bool),
            numbers=torch.tensor(kept, dtype=torch.int64),
            crowd=crowd,
            ids=torch.tensor(kept, dtype=torch.int64),
        )
        records.append(panoptic.to_coco(image, table.category_ids, name))
    others = {k: v for k, v in strict_json(raw).items() if k not in ("images", "annotations", "categories")}
    categories = coco_categories(table.classes, table.category_ids, table.stuff)
    return {**others, "images": images, "annotations": records, "categories": categories}

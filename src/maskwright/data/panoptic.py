"""COCO panoptic sets: a PNG per image says which segment each pixel is of, one JSON file lists the segments."""

from __future__ import annotations

import io
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskwright.data.annotations import Table, Verify, begin_table, flag_of, inside, lookup, whole
from maskwright.data.coco import TableDataset, told, write_coco
from maskwright.data.findings import DataWarning, few
from maskwright.data.images import MAX_PIXELS, opened, read_size
from maskwright.errors import AnnotationError, DataError, ImageError, UsageError
from maskwright.structures import Instances, Panoptic
from maskwright.structures.panoptic import LARGEST_ID, colours_to_ids, ids_to_colours

# The maps of so many images are decoded before training; of larger sets a sample. About 10 ms each.
VERIFY_ALL_BELOW = 500
VERIFY_SOME = 200


class PanopticDataset(TableDataset):
    """A checked COCO panoptic file with its maps and images; made by `read_panoptic`. Targets hold all segments,
    things and stuff; both files of an image are decoded when they are asked for."""

    def __init__(self, table: Table, strict: bool = False):
        super().__init__(table, strict)
        self.stuff, self.maps = table.stuff, table.maps or []
        self._numbers = torch.tensor(table.ids, dtype=torch.int64)

    def __repr__(self) -> str:
        return f"{self.name}: {len(self)} images, {len(self._numbers)} segments, {len(self.classes)} classes"

    def targets(self, index: int) -> Instances:
        """The segments of one image that have pixels; `ids` are the numbers in its map."""
        index = range(len(self))[index]
        part = slice(int(self._starts[index]), int(self._starts[index + 1]))
        numbers, labels = self._numbers[part], self._labels[part]
        plane = torch.from_numpy(read_map(self.maps[index], self._sizes[index]))
        things = torch.ones(len(labels), dtype=torch.bool)
        whole_image = Panoptic.from_map(
            plane, labels.clone(), things, numbers=numbers, crowd=self._crowd[part].clone(), ids=numbers.clone()
        )
        segments = whole_image.segments
        assert segments.masks is not None
        there = segments.masks.areas() > 0
        return segments if bool(there.all()) else segments[there]


def read_panoptic(
    annotations: str | Path,
    images: str | Path | None = None,
    maps: str | Path | None = None,
    *,
    strict: bool = False,
    verify: Verify | None = None,
) -> PanopticDataset:
    """The data set in a COCO panoptic JSON file, whose maps are PNGs in `maps` (the folder called like the file, unless
    given) and whose images are in `images`.

    Everything is checked as `read_coco` does: what makes the set unusable is an AnnotationError; a segment without a
    pixel, or pixels of a number that no segment has, are told in one `DataWarning`, or are errors if `strict`. An
    image without a record is left out. `verify` says how many maps and images are looked into: "all", "some" or
    "none"; left out, all maps of a set of up to 500 and some of a larger one.
    """
    folders = [None if folder is None else Path(folder) for folder in (images, maps)]
    for folder, what in zip(folders, ("images", "maps"), strict=True):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder}: there is no such folder of {what}")
    table = read_panoptic_table(Path(annotations), folders[0], folders[1], verify)
    worst = table.of("error") + (table.of("skip") if strict else [])
    if worst:
        raise AnnotationError(told(worst))
    if table.findings:
        warnings.warn(told(table.findings), DataWarning, stacklevel=2)
    return PanopticDataset(table, strict)


def read_panoptic_table(
    path: Path, images: Path | None = None, maps: Path | None = None, verify: Verify | None = None
) -> Table:
    """Everything in the file that can be used, and a finding for everything else; never raises for what is in it."""
    table, position, labels = begin_table(path, images, verify)
    if not table.usable:
        return table
    table.stuff = _stuff(table, table.raw["categories"])
    folder = maps or next((p for p in _map_folders(path) if p.is_dir()), path.with_suffix(""))
    listed, found = len(table.files), _records(table, table.raw["annotations"], position)
    there = _with_map(table, found, folder)
    _keep_images(table, sorted(there))
    owner: list[int] = []
    columns: list[tuple[int, int, bool]] = []  # number, label, crowd
    for place, index in enumerate(sorted(there)):
        row = there[index][0]
        for segment in _segments(table, table.raw["annotations"][row], labels, table.image_ids[place]):
            owner.append(place)
            columns.append(segment)
    table.owner = np.array(owner, np.int64)
    table.ids = [number for number, _, _ in columns]
    table.labels = np.array([label for _, label, _ in columns], np.int64)
    table.crowd = np.array([crowd for _, _, crowd in columns], bool)
    table.rows = np.array([there[index][0] for index in sorted(there)], np.int64)
    table.maps = [there[index][1] for index in sorted(there)]
    if listed and not table.files and not table.of("error"):
        what = f"none of its {len(found)} maps can be used" if found else "none of its images has segments listed"
        table.say("error", "map", what, "see the other findings")
    _look_into(table, verify)
    return table


def read_map(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The numbers (H, W) int32 in a map of segments. AnnotationError names a file that is none, or of another size."""
    try:
        own = read_size(path)
        if size is not None and own != tuple(size):
            raise AnnotationError(_other_size(path, own, size))
        with path.open("rb") as file, opened(file, path, MAX_PIXELS) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise AnnotationError(
                    f"{path}: is an image of mode {image.mode}; a map of segments is an RGB PNG, a segment's number "
                    "being red + 256 green + 65536 blue"
                )
            return colours_to_ids(np.asarray(image))
    except FileNotFoundError:
        raise AnnotationError(f"{path}: there is no such map of segments") from None
    except ImageError as error:
        raise AnnotationError(str(error)) from None
    except AnnotationError:
        raise
    except Exception as error:  # a decoder fed with foreign bytes may raise anything
        raise AnnotationError(f"{path}: the map is damaged ({error}); put it back") from None


def map_bytes(plane: np.ndarray) -> bytes:
    """A map of numbers as the PNG that `read_map` reads."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(ids_to_colours(plane)).save(data, "PNG")
    return data.getvalue()


def write_panoptic(
    path: str | Path,
    images: Iterable[tuple[dict[str, Any], Panoptic]],
    classes: Sequence[str],
    category_ids: Sequence[int],
    stuff: Sequence[str],
) -> Path:
    """A COCO panoptic file and, in the folder called like it, the maps. `images` gives each one's entry ("id",
    "file_name", "height", "width") and its segments; everything is written beside and renamed."""
    path = Path(path)
    entries, records, taken = [], [], set()
    try:
        path.with_suffix("").mkdir(parents=True, exist_ok=True)
        for entry, panoptic in images:
            name = _free_name(Path(entry["file_name"]).stem, taken)
            target = path.with_suffix("") / name
            beside = target.with_name(f".{name}.part")
            beside.write_bytes(_png(panoptic))
            beside.replace(target)
            entries.append(entry)
            records.append(panoptic.to_coco(entry["id"], category_ids, name))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another place"
        ) from None
    categories = categories_of(classes, category_ids, stuff)
    write_coco(path, {"images": entries, "annotations": records, "categories": categories})
    return path


def categories_of(classes: Sequence[str], category_ids: Sequence[int], stuff: Sequence[str]) -> list[dict[str, Any]]:
    """COCO's list of categories, with "isthing"."""
    return [
        {"id": int(number), "name": name, "isthing": int(name not in stuff)}
        for number, name in zip(category_ids, classes, strict=True)
    ]


def _free_name(stem: str, taken: set[str]) -> str:
    """A map's name in a folder where no two may be the same: "a/1.jpg" and "b/1.jpg" give 1.png and 1-2.png."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    name = next(n for n in (f"{stem}{number}.png" for number in numbers) if n not in taken)
    taken.add(name)
    return name


def _png(panoptic: Panoptic) -> bytes:
    data = io.BytesIO()
    panoptic.to_png().save(data, "PNG")
    return data.getvalue()


# ---- reading ---------------------------------------------------------------------------------------------------------


def _stuff(table: Table, entries: list[Any]) -> tuple[str, ...]:
    known = dict(zip(table.category_ids, table.classes, strict=True))
    names: list[str] = []
    for entry in entries:
        number = whole(entry.get("id")) if isinstance(entry, dict) else None
        if number not in known:
            continue
        thing = flag_of(entry["isthing"]) if entry.get("isthing") is not None else None
        if thing is None:
            what = f"category {number} ({known[number]!r}) has {entry.get('isthing')!r} for 'isthing'"
            table.say("error", "category", what, "expected 1 for a countable object, 0 for a region")
        elif not thing and known[number] not in names:
            names.append(known[number])
    return tuple(name for name in table.classes if name in names)


def _map_folders(path: Path) -> list[Path]:
    return [path.with_suffix(""), path.parent.parent / path.stem]


def _records(table: Table, entries: list[Any], position: dict[int | str, int | None]) -> dict[int, tuple[int, str]]:
    """Position of each image that has a record -> the record's row and the name of its map."""
    found: dict[int, tuple[int, str]] = {}
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("segments_info"), list):
            table.say("skip", "annotation", f"annotations[{row}] has no list 'segments_info'", "it is left out")
            continue
        image = lookup(entry.get("image_id"), position)
        if image is None:
            what = f"annotations[{row}] is of image {entry.get('image_id')!r}, which is not in the list of images"
            table.say("skip", "annotation", what, "it is left out")
            continue
        place = position[image]
        if place is None:  # left out, and said so
            continue
        name = entry.get("file_name")
        file = inside(name) if isinstance(name, str) and name else None
        if file is None:
            what = f"the map of image {image!r} is called {name!r}; expected the name of a PNG inside the folder"
            table.say("error" if name else "skip", "map", what, "the image is left out", image=image)
        elif place in found:
            table.say("error", "annotation", f"image {image!r} is divided twice", "keep one record", image=image)
        else:
            found[place] = (row, file)
    without = [n for i, n in enumerate(table.image_ids) if i not in found]
    if without:
        what = f"{len(without)} of {len(table.image_ids)} images have no segments listed: {few(without)}"
        table.say("skip", "annotation", what, "they are left out")
    return found


def _with_map(table: Table, found: dict[int, tuple[int, str]], folder: Path) -> dict[int, tuple[int, Path]]:
    """Those whose map is there and as large as the image."""
    missing = [file for _, file in found.values() if not (folder / file).is_file()]
    if missing:
        what = f"{len(missing)} of {len(found)} maps of segments are not in {folder}: {few(missing)}"
        table.say("error", "missing", what, "put the PNGs there, or name their folder")
    there: dict[int, tuple[int, Path]] = {}
    for place, (row, file) in found.items():
        path = folder / file
        if not path.is_file():
            continue
        try:
            size = read_size(path)
        except ImageError as error:
            about = str(error).removeprefix(f"{path}: ")
            what = f"the map of image {table.image_ids[place]!r}, {path}: {about}"
            table.say("error", "map", what, image=table.image_ids[place])
            continue
        if size != table.sizes[place]:
            what = _other_size(path, size, table.sizes[place]).removesuffix("; put back the map of this very image")
            table.say("error", "size", what, "put back the map of this very image", image=table.image_ids[place])
            continue
        there[place] = (row, path)
    return there


def _other_size(path: Path, size: tuple[int, int], expected: tuple[int, int]) -> str:
    return (
        f"the map {path} is {size[1]} x {size[0]}, its image is {expected[1]} x {expected[0]}; "
        "put back the map of this very image"
    )


def _keep_images(table: Table, kept: list[int]) -> None:
    for name in ("image_ids", "files", "sizes", "image_rows"):
        values = getattr(table, name)
        setattr(table, name, [values[i] for i in kept])


def _segments(
    table: Table, entry: dict[str, Any], labels: dict[int, int], image: int | str
) -> list[tuple[int, int, bool]]:
    kept: list[tuple[int, int, bool]] = []
    seen: set[int] = set()
    for row, segment in enumerate(entry["segments_info"]):
        number = whole(segment.get("id")) if isinstance(segment, dict) else None
        if number is None or not 0 < number <= LARGEST_ID:
            shown = segment.get("id") if isinstance(segment, dict) else segment
            complaint = f"segment {row} of image {image!r} has {shown!r} as its id; expected 1 ... {LARGEST_ID}"
        elif number in seen:
            complaint = f"two segments of image {image!r} share id {number}"
            table.say("skip", "segment", complaint, "the first one has all their pixels", image=image)
            continue
        elif whole(segment.get("category_id")) not in labels:
            category = segment.get("category_id")
            complaint = f"segment {number} of image {image!r} has category {category!r}, which is not in the list"
        elif (crowd := flag_of(segment.get("iscrowd"))) is None:
            complaint = f"segment {number} of image {image!r} has {segment['iscrowd']!r} for 'iscrowd'; expected 0 or 1"
        else:
            seen.add(number)
            label = labels[whole(segment.get("category_id"))]  # pyright: ignore[reportArgumentType]
            kept.append((number, label, crowd))
            continue
        table.say("skip", "segment", complaint, "it is left out; its pixels belong to nothing", image=image)
    twice = {label for _, label, _ in kept if sum(o == label for _, o, _ in kept) > 1}
    regions = [table.classes[label] for label in sorted(twice) if table.classes[label] in table.stuff]
    if regions:
        what = f"image {image!r} has several regions of {few(regions)}; expected one per class of stuff"
        table.say("note", "region", what, "they are kept apart", image=image)
    return kept


def _look_into(table: Table, verify: Verify | None) -> None:
    """Decodes maps: segments that have no pixel in theirs, numbers in a map that are no segment's."""
    maps = table.maps or []
    if verify == "none" or not maps:
        return
    every = verify == "all" or (verify is None and len(maps) <= VERIFY_ALL_BELOW)
    places = range(0, len(maps), 1 if every else max(1, len(maps) // VERIFY_SOME))
    starts = np.searchsorted(table.owner, np.arange(len(maps) + 1))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        answers = list(threads.map(partial(_numbers_in, table), places))
    for place, answer in zip(places, answers, strict=True):
        image = table.image_ids[place]
        if isinstance(answer, str):
            table.say("error", "map", answer.removeprefix(f"{table.path}: "), image=image)
            continue
        numbers, counts = answer
        listed = table.ids[starts[place] : starts[place + 1]]
        empty = sorted(set(listed) - set(numbers))
        if empty:
            what = f"segments {few(empty)} of image {image!r} have no pixel in {maps[place]}"
            table.say("skip", "segment", what, "they are left out", image=image, annotation=empty[0])
        extra = [(n, c) for n, c in zip(numbers, counts, strict=True) if n and n not in set(listed)]
        if extra:
            pixels = sum(c for _, c in extra)
            what = (
                f"{pixels} pixels of {maps[place]} have numbers that no segment of image {image!r} has: "
                f"{few([n for n, _ in extra])}"
            )
            table.say("skip", "map", what, "they belong to nothing", image=image)


def _numbers_in(table: Table, place: int) -> tuple[list[int], list[int]] | str:
    assert table.maps is not None
    try:
        numbers, counts = np.unique(read_map(table.maps[place], table.sizes[place]), return_counts=True)
    except AnnotationError as error:
        return str(error)
    return numbers.tolist(), counts.tolist()


# ---- a repaired copy -------------------------------------------------------------------------------------------------


def repaired(table: Table, lost: set[int], folder: Path) -> dict[str, Any]:
    """The table as COCO panoptic JSON without the images `lost`; writes the maps into `folder` on the way, without
    numbers that are no segment's."""
    raw, maps = table.raw, table.maps or []
    starts = np.searchsorted(table.owner, np.arange(len(maps) + 1))
    folder.mkdir(parents=True, exist_ok=True)
    images, records, taken = [], [], set()
    for place, path in enumerate(maps):
        if place in lost:
            continue
        image, (height, width) = table.image_ids[place], table.sizes[place]
        entry = raw["images"][table.image_rows[place]]
        images.append({**entry, "id": image, "file_name": table.files[place], "height": height, "width": width})
        part = slice(int(starts[place]), int(starts[place + 1]))
        plane = read_map(path, table.sizes[place])
        kept = [n for n in table.ids[part] if isinstance(n, int)]
        plane = np.where(np.isin(plane, kept), plane, 0)
        name = _free_name(path.stem, taken)
        (folder / name).write_bytes(map_bytes(plane))
        labels, crowd = torch.from_numpy(table.labels[part]), torch.from_numpy(table.crowd[part])
        whole_image = Panoptic.from_map(
            torch.from_numpy(plane),
            labels,
            torch.ones(len(labels), dtype=torch.bool),
            numbers=torch.tensor(kept, dtype=torch.int64),
            crowd=crowd,
            ids=torch.tensor(kept, dtype=torch.int64),
        )
        records.append(whole_image.to_coco(image, table.category_ids, name))
    rest = {k: v for k, v in raw.items() if k not in ("images", "annotations", "categories")}
    categories = categories_of(table.classes, table.category_ids, table.stuff)
    return json.loads(json.dumps({**rest, "images": images, "annotations": records, "categories": categories}))

"""Maps of object numbers, as microscopy tools write them: one PNG or TIFF beside each image.

Pixel value 0 is background and k is the k-th object; a second map may give the class of each pixel. Folders:
images/NAME and masks/NAME (Cellpose, StarDist and others use further names), NAME.tif with NAME_masks.tif, or, as in
the Data Science Bowl 2018, ID/images/ID.png with one binary mask for each object in ID/masks/.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maskwright.data.exchange.collecting import (
    Collector,
    chosen_splits,
    new_table,
    run_length_code,
    split_in_path,
    unwanted,
)
from maskwright.data.exchange.files import (
    FileProblem,
    add_file_problem,
    files_below,
    is_image_name,
    read_lines,
    shown_path,
)
from maskwright.data.exchange.planes import Plane, ahead, background_first, crops_of, majority, read_plane
from maskwright.data.exchange.writing import (
    HOLES,
    PARTS,
    ImageFiles,
    Item,
    Part,
    crowd_of,
    items,
    labels_of,
    painted,
    present,
    write_plane,
    write_text_file,
)
from maskwright.data.findings import first_few
from maskwright.data.formats import LIKELY, Match, Request
from maskwright.data.image_names import is_file
from maskwright.data.table import Table
from maskwright.data.values import clean_name

NAME = "label map"
LAYOUT = "images/{split} and masks/{split} (label maps)"

_IMAGES = ("images", "image", "imgs", "img", "raw", "inputs", "input")
_MAPS = ("masks", "mask", "labels", "label", "instances", "instance_masks", "instance", "label_maps", "inst")
_CLASS_MAPS = ("classes", "class_maps", "class_masks", "class_map", "types")
_NAME_LISTS = ("classes.txt", "class_names.txt", "labels.txt")
_SUFFIX = re.compile(r"(_cp_masks|_masks?|_labels?|_instances?|_seg|_gt|_label_map)$", re.I)
_IMAGE_SUFFIX = re.compile(r"(_img|_image|_raw)$", re.I)
_LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif")


# ---- the format ----------------------------------------------------------------------------------------------------


@dataclass
class _Pair:
    """An image with its maps, relative to the root.

    Attributes:
        image: The image.
        maps: One map of object numbers, or one binary mask for each object.
        classes: The map of classes; None if there is none.
        binary: Whether each map is the mask of one object.
    """

    image: str
    maps: list[str]
    classes: str | None = None
    binary: bool = False


def sniff(source: str, request: Request) -> list[Match]:
    """Find images with maps of the same name in sibling folders, or beside them."""
    root = Path(source)
    if not root.is_dir() or unwanted(request):
        return []
    if any((root / name).exists() for name in ("SegmentationObject", "gtFine", "gtCoarse", "Annotations")):
        return []
    found: dict[str | None, str] = {}
    for pair in _pairs(root):
        found.setdefault(split_in_path(pair.image), f"{pair.maps[0].rpartition('/')[0] or pair.maps[0]}")
    return [Match(str(root), LIKELY, found[split], split) for split in chosen_splits(found, request)]


def _pairs(root: Path) -> list[_Pair]:
    """All images with maps."""
    files = list(files_below(root, is_image_name, 4))
    kinds = _kinds(files)
    pairs = [
        _Pair(images[0], kinds["map"][key], kinds["class"].get(key, [None])[0])
        for key, images in kinds["image"].items()
        if len(kinds["map"].get(key, ())) == 1
    ]
    return sorted(pairs or _bowl(files) or _beside(files), key=lambda pair: pair.image)


def _kinds(files: Sequence[str]) -> dict[str, dict[tuple[str, str], list[str]]]:
    """The images, maps and maps of classes in folders of these kinds, by what images and their maps have in common."""
    kinds: dict[str, dict[tuple[str, str], list[str]]] = {"image": {}, "map": {}, "class": {}}
    places: dict[str, tuple[str, str] | None] = {}  # kind of each folder, and the pattern that its images and maps have
    for file in files:
        folder = file.rpartition("/")[0]
        if folder not in places:
            places[folder] = _place(folder.split("/"))
        place = places[folder]
        if place is None:
            continue
        kind, around = place
        if kind != "image" and not file.lower().endswith(_LOSSLESS):
            continue
        kinds[kind].setdefault((around, _stem(file, kind)), []).append(file)
    return kinds


def _report_unpaired(table: Table, root: Path, split: str | None) -> None:
    """Report images and maps in folders of these kinds that are not used because the other one is missing."""
    kinds = _kinds(list(files_below(root, is_image_name, 4)))
    images, maps = kinds["image"], kinds["map"]
    if not images.keys() & maps.keys():
        return

    def of_split(files: Iterable[str]) -> list[str]:
        return sorted(file for file in files if split_in_path(file) == split)

    alone = of_split(file for key, own in images.items() if key not in maps for file in own)
    if alone:
        what = f"{len(alone)} images have no map: {first_few(alone)}"
        table.add_finding("note", "missing", what, "they are not used; add an empty map for images without objects")
    stray = of_split(file for key, own in maps.items() if key not in images for file in own)
    if stray:
        what = f"{len(stray)} maps have no image: {first_few(stray)}"
        table.add_finding("skip", "missing", what, "restore the images, or remove the maps")
    several = of_split(own[0] for key, own in images.items() if len(maps.get(key, ())) > 1)
    if several:
        what = f"{len(several)} images have several maps of the same name: {first_few(several)}"
        table.add_finding("skip", "map", what, "they are not used; keep one map for each image")
    hidden = of_split(file for key, own in images.items() if key in maps for file in own[1:])
    if hidden:
        what = f"{len(hidden)} images have the name of another but for the suffix: {first_few(hidden)}"
        table.add_finding("skip", "image", what, "they are not used; rename them and their maps")


def _place(folders: Sequence[str]) -> tuple[str, str] | None:
    """The kind of the last folder that has one, and all folders with a star in its place; None if none has one."""
    for number in range(len(folders) - 1, -1, -1):
        kind = _kind_of_folder(folders[number])
        if kind is not None:
            return kind, "/".join([*folders[:number], "*", *folders[number + 1 :]])
    return None


def _kind_of_folder(name: str) -> str | None:
    low = name.lower()
    return "image" if low in _IMAGES else "map" if low in _MAPS else "class" if low in _CLASS_MAPS else None


def _stem(file: str, kind: str) -> str:
    stem = file.rpartition("/")[2].rpartition(".")[0]
    if kind == "image":
        return _IMAGE_SUFFIX.sub("", stem)
    return _SUFFIX.sub("", stem)


def _bowl(files: Sequence[str]) -> list[_Pair]:
    """ID/images/ID.png with binary masks ID/masks/*.png."""
    images: dict[str, list[str]] = defaultdict(list)
    masks: dict[str, list[str]] = defaultdict(list)
    for file in files:
        parts = file.split("/")
        if len(parts) >= 3 and parts[-2] in ("images", "masks"):
            (images if parts[-2] == "images" else masks)["/".join(parts[:-2])].append(file)
    return [_Pair(own[0], masks[place], binary=True) for place, own in images.items() if len(own) == 1 and masks[place]]


def _beside(files: Sequence[str]) -> list[_Pair]:
    """NAME.tif with NAME_masks.tif."""
    maps: dict[str, list[str]] = defaultdict(list)
    for file in files:
        stem = file.rpartition(".")[0]
        base = _SUFFIX.sub("", stem)
        if base != stem and file.lower().endswith(_LOSSLESS):
            maps[base].append(file)
    used = {file for own in maps.values() for file in own}
    pairs: list[_Pair] = []
    for file in files:
        if file in used:
            continue
        stem = file.rpartition(".")[0]
        own = maps.get(stem) or maps.get(_IMAGE_SUFFIX.sub("", stem)) or []
        if len(own) == 1:
            pairs.append(_Pair(file, own))
    return pairs


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """The objects of an image.

    Attributes:
        objects: Number, class number and pixels with their corner of each object.
        problems: What is wrong with files.
        void: Whether pixels with 255 were omitted.
        values: The numbers in the map.
    """

    objects: list[tuple[int, int, Any, int, int]] = field(default_factory=list[tuple[int, int, Any, int, int]])
    problems: list[tuple[str, FileProblem]] = field(default_factory=list[tuple[str, FileProblem]])
    void: bool = False
    values: set[int] = field(default_factory=set[int])
    mixed: list[int] = field(default_factory=list[int])


def read(match: Match, request: Request) -> Table:
    """Read one split."""
    root = Path(match.location)
    table = new_table(root, root, "/".join(filter(None, [root.resolve().name, match.split])))
    every = _pairs(root)
    pairs = [pair for pair in every if split_in_path(pair.image) == match.split]
    collector = Collector(table, request)
    names = _class_names(table, root)
    mapped = any(pair.classes is not None for pair in pairs)
    collector.place_images([pair.image for pair in pairs])
    rows = sorted(collector.positions)

    def load(row: int) -> _Found:
        return _load(root, pairs[row], collector.size(row) or (1, 1))

    results = list(zip(rows, ahead(load, rows), strict=True))
    for row, found in results:
        for file, problem in found.problems:
            add_file_problem(table, root / file, problem, "skip", image=row + 1)
            collector.exclude(row)
    if _are_binary(table, pairs, [found for _, found in results]):
        return table
    used = sorted({label for _, found in results for _, label, _, _, _ in found.objects})
    numbers = _set_classes(table, names, used, mapped)
    unlabelled: list[str] = []
    for row, found in results:
        file = pairs[row].maps[0]
        for number, label, crop, x0, y0 in found.objects:
            name = f"{file}: object {number}"
            if label not in numbers:
                unlabelled.append(name)
                continue
            collector.add(row, numbers[label], run_length_code(crop, x0, y0, collector.size(row) or (1, 1)), name)
    _report(table, pairs, results, unlabelled)
    _report_unpaired(table, root, match.split)
    return collector.finish()


def _class_names(table: Table, root: Path) -> list[str]:
    """The names of classes 1, 2, ...; empty if the data set lists none."""
    for path in (root / name for name in _NAME_LISTS):
        if is_file(path):
            try:
                return [clean_name(name) for name in background_first(read_lines(path))[1:]]
            except FileProblem as problem:
                add_file_problem(table, path, problem)
    return []


def _set_classes(table: Table, names: list[str], used: Sequence[int], mapped: bool) -> dict[int, int]:
    """Set the classes of the table; returns the label of each class number."""
    if not mapped:
        if len(names) > 1:
            what = f"lists {len(names)} classes, but has no maps of classes (folder 'classes')"
            table.add_finding("error", "class", what, "add the maps, or keep one name")
        table.classes, table.category_ids = (names[0] if names else "object",), (1,)
        return {1: 0}
    known = {number: name for number, name in enumerate(names, 1) if name}
    new = [number for number in used if number > 0 and number not in known]
    if new:
        what = f"maps of classes have {len(new)} numbers without a name: {first_few(new)}"
        table.add_finding("note", "class", what, "'class N' is used; list the names in classes.txt")
    known |= {number: f"class {number}" for number in new}
    ids = sorted(known)
    table.classes, table.category_ids = tuple(known[n] for n in ids), tuple(ids)
    return {number: label for label, number in enumerate(ids)}


def _load(root: Path, pair: _Pair, size: tuple[int, int]) -> _Found:
    """Read the maps of one image."""
    result = _Found()
    codes: Plane | None = None
    if pair.classes is not None:
        try:
            codes = read_plane(root / pair.classes, size)
        except FileProblem as problem:
            result.problems.append((pair.classes, problem))
            return result
    for position, file in enumerate(pair.maps):
        try:
            plane = read_plane(root / file, size)
        except FileProblem as problem:
            result.problems.append((file, problem))
            continue
        omitted = [0]
        if pair.binary:
            plane = (plane > 0).astype(np.int64) * (position + 1)
        else:
            values = np.unique(plane[plane != 0]).tolist()
            result.values |= set(values)
            # 255 marks pixels of no object if the others are 1, 2, ... and do not reach it.
            if len(values) > 1 and values[-1] == 255 and values[-2] < 254 and values[-2] == len(values) - 1:
                omitted.append(255)
                result.void = True
        for number, crop, x0, y0 in crops_of(plane, omitted):
            label, share = (1, 1.0) if codes is None else majority(codes, crop, x0, y0)
            if share < 0.9:
                result.mixed.append(number)
            result.objects.append((number, label, crop, x0, y0))
    return result


def _are_binary(table: Table, pairs: Sequence[_Pair], results: Sequence[_Found]) -> bool:
    """Whether all maps have the one value 255: foreground, not numbers of objects. Adds the error."""
    filled = [found for found in results if found.values]
    if any(pair.binary for pair in pairs) or not filled or any(found.values != {255} for found in filled):
        return False
    what = f"all {len(filled)} maps have the only value 255: they mark the foreground, not single objects"
    advice = "number the objects 1, 2, ... in each map, for example with scipy.ndimage.label"
    table.add_finding("error", "map", what, advice)
    table.usable = False
    return True


def _in_pieces(found: _Found) -> bool:
    """Whether an object is not connected."""
    from scipy import ndimage  # pyright: ignore[reportMissingTypeStubs] - no types

    label: Any = ndimage.label  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - no types
    return any(label(crop, np.ones((3, 3)))[1] > 1 for _, _, crop, _, _ in found.objects)


def _report(
    table: Table, pairs: Sequence[_Pair], results: Sequence[tuple[int, _Found]], unlabelled: Sequence[str]
) -> None:
    """Add notes about what was omitted or is doubtful."""
    if unlabelled:
        what = f"{len(unlabelled)} objects have no class in the maps of classes: {first_few(unlabelled)}"
        table.add_finding("skip", "class", what, "they are skipped")
    void = [pairs[row].maps[0] for row, found in results if found.void]
    if void:
        what = f"{len(void)} maps have pixels with 255 besides the numbers of objects: {first_few(void)}"
        table.add_finding("note", "map", what, "they are read as void, not as an object")
    filled = [found for _, found in results if found.values]
    if filled and all(found.values == {1} for found in filled) and any(map(_in_pieces, filled)):
        what = f"the only value in {len(filled)} maps is 1: each map is read as one object, some in several pieces"
        advice = "if the maps mark the foreground, number the objects 1, 2, ... in each"
        table.add_finding("note", "map", what, advice)
    mixed = [f"{shown_path(table, table.path / pairs[r].maps[0])}: object {f.mixed[0]}" for r, f in results if f.mixed]
    if mixed:
        what = f"objects in {len(mixed)} maps have several classes: {first_few(mixed)}"
        table.add_finding("note", "class", what, "the class of most pixels is used")


# ---- writing -------------------------------------------------------------------------------------------------------

HOLDS = frozenset({PARTS, HOLES})


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write images/, masks/ and, for several classes, classes/ and classes.txt. Crowd regions are left out.

    Maps are PNGs with 16 bits, or TIFFs with 32 bits for more than 65,535 objects; the smallest of several objects has
    a pixel.
    """
    classes = parts[0].dataset.classes
    for part in parts:
        prefix = f"{part.split}/" if part.split else ""
        names = images.names(part, prefix)
        for item in items(part):
            stem = names[item.index].rpartition(".")[0]
            images.copy(part, item.index, f"images/{prefix}{names[item.index]}")
            numbers, labels = _maps(item)
            suffix = ".png" if numbers.max(initial=0) <= 0xFFFF else ".tif"
            write_plane(folder / "masks" / f"{prefix}{stem}{suffix}",
                        numbers.astype(np.uint16 if suffix == ".png" else np.int32))  # fmt: skip
            if len(classes) > 1:
                kind = np.uint8 if len(classes) < 256 else np.uint16
                write_plane(folder / "classes" / f"{prefix}{stem}.png", labels.astype(kind))
    write_text_file(folder / "classes.txt", "".join(f"{name}\n" for name in ["background", *classes]))


def _maps(item: Item) -> tuple[Any, Any]:
    """The numbers of objects and classes of an image (H, W); objects that are covered have no number."""
    objects = item.objects
    crowd = crowd_of(objects)
    if objects.masks is None or not len(objects):
        return np.zeros(item.size, np.int64), np.zeros(item.size, np.int64)
    objects = objects[[n for n, there in enumerate(present(objects)) if there and not crowd[n]]]
    result = painted(objects)
    seen = result.lost < result.areas
    numbers, labels = np.zeros(len(objects) + 1, np.int64), np.zeros(len(objects) + 1, np.int64)
    numbers[1:][seen] = np.arange(1, int(seen.sum()) + 1)
    labels[1:] = np.array(labels_of(objects), np.int64) + 1
    return numbers[result.plane], labels[result.plane]

"""Pascal VOC: SegmentationObject/ and SegmentationClass/ with a PNG for each image, Annotations/ with an XML file.

Pixels of SegmentationObject are numbers of objects, those of SegmentationClass are numbers of classes; 0 is background
and 255 is void, which belongs to no object. Some tools write colours of VOC's palette in place of the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from maskwright.data.exchange.collecting import Collector, chosen_splits, new_table, run_length_code, unwanted
from maskwright.data.exchange.files import (
    Element,
    FileProblem,
    add_file_problem,
    files_below,
    is_image_name,
    read_lines,
    read_xml,
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
from maskwright.data.exchange.writing import crops_of as windows_of
from maskwright.data.findings import first_few
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.image_names import is_file
from maskwright.data.table import Table
from maskwright.data.values import clean_name, parse_float, parse_int

NAME = "Pascal VOC"
LAYOUT = "SegmentationObject/ with ImageSets/Segmentation/{split}.txt (Pascal VOC)"

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255
_NAME_LISTS = ("class_names.txt", "labels.txt", "classes.txt")
_MIXED = 0.9  # share of an object's pixels that should have one class


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find a folder SegmentationObject, in the source or in its only subfolder such as VOC2012 that has one."""
    root = _root(Path(source))
    if root is None or unwanted(request):
        return []
    known = _image_sets(root)
    if {"train", "val", "trainval"} <= known.keys():
        known = {split: path for split, path in known.items() if split != "trainval" or request.split == "trainval"}
    splits: list[str | None] = [*known] or [None]
    if list(known) == ["default"]:  # CVAT
        splits = [None]
    return [
        Match(str(root), CERTAIN, f"SegmentationObject{f', {split}.txt' if split else ''}", split)
        for split in chosen_splits(splits, request)
    ]


def _root(source: Path) -> Path | None:
    if not source.is_dir():
        return None
    if (source / "SegmentationObject").is_dir():
        return source
    for place in (source, source / "VOCdevkit"):
        below = [p.parent for p in sorted(place.glob("VOC[0-9]*/SegmentationObject"))] if place.is_dir() else []
        if len(below) == 1:
            return below[0]
    return None


def _image_sets(root: Path) -> dict[str, Path]:
    folder = root / "ImageSets" / "Segmentation"
    return {path.stem: path for path in sorted(folder.glob("*.txt"))} if folder.is_dir() else {}


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Planes:
    """The numbers of objects and classes of an image; None for a file that does not exist."""

    objects: Plane | None
    classes: Plane | None
    problems: list[tuple[Path, FileProblem]]


def read(match: Match, request: Request) -> Table:
    """Read one set of images."""
    root = Path(match.location)
    table = new_table(root, root, "/".join(filter(None, [root.resolve().name, match.split])))
    stems = _stems(table, root, match.split)
    if not stems:
        table.add_finding("error", "file", "lists no images", "add them to ImageSets/Segmentation, or remove the file")
        table.usable = False
        return table
    names, colours = _class_names(table, root)
    collector = Collector(table, request)
    folder = request.images or root
    collector.place_images([_image_file(folder, stem, request.images is None) for stem in stems])
    rows = sorted(collector.positions)
    loaded = ahead(lambda row: _load(root, stems[row], collector.size(row), colours), rows)
    extra: dict[int, str] = {}
    unlabelled: list[str] = []
    waiting: list[tuple[int, int | str, dict[str, Any], str]] = []
    for row, planes in zip(rows, loaded, strict=True):
        stem = stems[row]
        for path, problem in planes.problems:
            add_file_problem(table, path, problem, "skip", image=row + 1)
        if planes.objects is None:
            collector.exclude(row)
            continue
        described = _described(table, root, stem, report=planes.classes is None)
        for number, crop, x0, y0 in crops_of(planes.objects, (0, VOID)):
            name = f"SegmentationObject/{stem}.png: object {number}"
            label = _label(collector, planes, crop, x0, y0, name, row, described, number)
            if label is None:
                unlabelled.append(name)
                continue
            if isinstance(label, int) and label > len(names):
                extra[label] = f"class {label}"
            code = run_length_code(crop, x0, y0, collector.size(row) or (1, 1))
            waiting.append((row, label, code, name))
    _set_classes(table, names, extra, {label for _, label, _, _ in waiting if isinstance(label, str)})
    places = {number: index for index, number in enumerate(table.category_ids)}
    by_name = {name: index for index, name in enumerate(table.classes)}
    for row, label, code, name in waiting:
        collector.add(row, places[label] if isinstance(label, int) else by_name[label], code, name)
    if unlabelled:
        what = f"{len(unlabelled)} objects have no class in SegmentationClass: {first_few(unlabelled)}"
        table.add_finding("skip", "class", what, "they are skipped")
    return collector.finish()


def _stems(table: Table, root: Path, split: str | None) -> list[str]:
    """The names of the images of a set, without suffix."""
    lists = _image_sets(root)
    path = lists.get(split or "default")
    if path is not None:
        try:
            lines = [_stem_of(root, line) for line in read_lines(path)]
        except FileProblem as problem:
            add_file_problem(table, path, problem)
            return []
        repeated = [line for line, count in Counter(lines).items() if count > 1]
        if repeated:
            what = f"{shown_path(table, path)} lists {len(repeated)} images more than once: {first_few(repeated)}"
            table.add_finding("note", "image", what, "each is used once")
        return list(dict.fromkeys(lines))
    files = files_below(root / "SegmentationObject", is_image_name, 2)
    return [file.rpartition(".")[0] for file in files]


def _stem_of(root: Path, line: str) -> str:
    """The name in a line of an image set, which may be followed by a flag."""
    known = is_file(root / "SegmentationObject" / f"{line}.png")
    return line if known or not line.split()[-1].lstrip("-").isdigit() else line.split()[0]


def _image_file(folder: Path, stem: str, standard: bool) -> str:
    """The image of a name, relative to the folder."""
    prefix = "JPEGImages/" if standard else ""
    for suffix in (".jpg", ".png", ".jpeg", ".JPG", ".bmp", ".tif", ".webp"):
        if is_file(folder / f"{prefix}{stem}{suffix}"):
            return f"{prefix}{stem}{suffix}"
    return f"{prefix}{stem}.jpg"


def _load(root: Path, stem: str, size: tuple[int, int] | None, colours: dict[int, int]) -> _Planes:
    """The planes of an image, with palette colours replaced by their numbers."""
    result = _Planes(None, None, [])
    for attribute in ("objects", "classes"):
        folder = root / ("SegmentationObject" if attribute == "objects" else "SegmentationClass")
        path = folder / f"{stem}.png"
        if attribute == "classes" and not is_file(path):
            continue
        table = {**_PALETTE, **colours} if attribute == "classes" else _PALETTE
        try:
            setattr(result, attribute, read_plane(path, size, table))
        except FileProblem as problem:
            result.problems.append((path, problem))
    return result


def palette() -> list[tuple[int, int, int]]:
    """Return the 256 colours of VOC: bits 0, 1, 2 of a number are the highest of red, green and blue, and so on."""
    colours: list[tuple[int, int, int]] = []
    for number in range(256):
        red = green = blue = 0
        rest = number
        for shift in range(7, -1, -1):
            red |= (rest & 1) << shift
            green |= (rest >> 1 & 1) << shift
            blue |= (rest >> 2 & 1) << shift
            rest >>= 3
        colours.append((red, green, blue))
    return colours


_PALETTE = {red + (green << 8) + (blue << 16): number for number, (red, green, blue) in enumerate(palette())}


# ---- classes -------------------------------------------------------------------------------------------------------


def _class_names(table: Table, root: Path) -> tuple[list[str], dict[int, int]]:
    """The names of classes 1, 2, ..., and the number of each colour (red + 256 green + 65536 blue)."""
    path = root / "labelmap.txt"
    try:
        if is_file(path):  # CVAT: "name:r,g,b:parts:actions"
            return _label_map(read_lines(path))
        for path in (root / name for name in _NAME_LISTS):
            if is_file(path):
                names = [line for line in read_lines(path) if line != "__ignore__"]
                return [clean_name(name) for name in background_first(names)[1:]], {}
    except FileProblem as problem:
        add_file_problem(table, path, problem)
    return list(CLASSES), {}


def _label_map(lines: Sequence[str]) -> tuple[list[str], dict[int, int]]:
    names: list[str] = []
    colours: dict[int, int] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        values = [parse_int(value) for value in rest.partition(":")[0].split(",")]
        background = name.strip().lower() == "background"
        if not background:
            names.append(clean_name(name))
        if len(values) == 3 and all(value is not None for value in values):
            red, green, blue = (value or 0 for value in values)
            colours[red + (green << 8) + (blue << 16)] = 0 if background else len(names)
    return names, colours


def _set_classes(table: Table, names: Sequence[str], extra: dict[int, str], named: set[str]) -> None:
    """Set the classes: those of the list, numbers beyond it, and names that only XML files have."""
    numbers = {number: name for number, name in enumerate(names, 1) if name} | dict(sorted(extra.items()))
    if extra:
        listed = first_few(sorted(extra))
        what = f"SegmentationClass has {len(extra)} class numbers beyond the {len(names)} class names: {listed}"
        table.add_finding("note", "class", what, "'class N' is used; list the names in class_names.txt")
    new = sorted(named - set(numbers.values()))
    following = 1 + max(numbers, default=0)
    numbers |= {following + offset: name for offset, name in enumerate(new)}
    table.classes, table.category_ids = tuple(numbers.values()), tuple(numbers)


def _label(
    collector: Collector, planes: _Planes, crop: Any, x0: int, y0: int, name: str, row: int,
    described: list[tuple[str, tuple[float, ...]]], number: int,
) -> int | str | None:  # fmt: skip
    """The class of an object: a number of SegmentationClass, or a name of the XML file."""
    if planes.classes is not None:
        label, share = majority(planes.classes, crop, x0, y0)
        if share < _MIXED:
            what = f"annotation {name!r} has class {label} on {share:.0%} of its pixels only"
            collector.table.add_finding("note", "class", what, "the class of most pixels is used")
        return None if label in (0, VOID) else label
    if not described:
        return "object" if not collector.table.path.joinpath("SegmentationClass").is_dir() else None
    frame = np.array([x0, y0, x0 + crop.shape[1], y0 + crop.shape[0]])
    if number <= len(described) and np.abs(frame - described[number - 1][1]).max() <= 5:
        return described[number - 1][0]
    distances = [float(np.abs(frame - box).max()) for _, box in described]
    return described[int(np.argmin(distances))][0]


def _described(table: Table, root: Path, stem: str, report: bool) -> list[tuple[str, tuple[float, ...]]]:
    """Name and box (x0, y0, x1, y1) of each object of the XML file; empty if there is none."""
    path = root / "Annotations" / f"{stem}.xml"
    if not is_file(path):
        return []
    try:
        content = read_xml(path)
    except FileProblem as problem:
        what, _, advice = str(problem).partition("; ")
        severity = "skip" if report else "note"
        table.add_finding(severity, "file", f"{shown_path(table, path)} {what}", advice if report else "it is not used")
        return []
    found: list[tuple[str, tuple[float, ...]]] = []
    for entry in content.all("object"):
        name, box = entry.text_at("name"), _box(entry)
        if name and box is not None:
            found.append((clean_name(name), box))
    return found


def _box(entry: Element) -> tuple[float, ...] | None:
    values = [parse_float(entry.text_at(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    # VOC counts pixels from 1, inclusive.
    return (values[0] - 1, values[1] - 1, values[2], values[3]) if np.isfinite(values).all() else None


# ---- writing -------------------------------------------------------------------------------------------------------

HOLDS = frozenset({PARTS, HOLES})
MOST = 254
CROWD_BECOMES = "their pixels become void (255)"


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write the folders of VOC and class_names.txt. A pixel of several objects belongs to the smallest one."""
    colours = palette()
    for part in parts:
        names = images.names(part, "")
        stems = [name.rpartition(".")[0] for name in names]
        for item in items(part):
            name, stem = names[item.index], stems[item.index]
            images.copy(part, item.index, f"JPEGImages/{name}")
            numbers, classes, entries = _maps(item, part.dataset.classes)
            write_plane(folder / "SegmentationObject" / f"{stem}.png", numbers, colours)
            write_plane(folder / "SegmentationClass" / f"{stem}.png", classes, colours)
            write_text_file(folder / "Annotations" / f"{stem}.xml", _description(name, item.size, entries))
        split = part.split or "default"
        write_text_file(folder / "ImageSets" / "Segmentation" / f"{split}.txt", "".join(f"{s}\n" for s in stems))
    names = ["background", *parts[0].dataset.classes]
    write_text_file(folder / "class_names.txt", "".join(f"{name}\n" for name in names))


def _maps(item: Item, classes: Sequence[str]) -> tuple[Any, Any, list[tuple[str, list[int]]]]:
    """The maps of objects and classes of an image, and the name and pixel window of each object."""
    objects = item.objects
    if objects.masks is None or not len(objects):
        return np.zeros(item.size, np.uint8), np.zeros(item.size, np.uint8), []
    crowd = crowd_of(objects)
    kept = [n for n, there in enumerate(present(objects)) if there]
    regular = [n for n in kept if not crowd[n]][:MOST]
    objects = objects[[*regular, *(n for n in kept if crowd[n])]]
    void = crowd_of(objects)
    result = painted(objects, void)
    numbers, labels = np.zeros(len(objects) + 1, np.uint8), np.zeros(len(objects) + 1, np.uint8)
    seen = [bool(lost < area) for lost, area in zip(result.lost, result.areas, strict=True)]
    entries: list[tuple[str, list[int]]] = []
    frames = windows_of(objects)[0]
    for position, label in enumerate(labels_of(objects)):
        if void[position]:
            numbers[position + 1] = labels[position + 1] = VOID
        elif seen[position]:
            entries.append((classes[label], list(frames[position])))
            numbers[position + 1], labels[position + 1] = len(entries), label + 1
    return numbers[result.plane], labels[result.plane], entries


def _description(name: str, size: tuple[int, int], entries: Sequence[tuple[str, list[int]]]) -> str:
    """The XML file of an image; VOC counts pixels from 1, inclusive."""
    lines = ["<annotation>", f"  <filename>{escape(name)}</filename>"]
    lines.append(f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>")
    lines.append("  <segmented>1</segmented>")
    for label, (x0, y0, x1, y1) in entries:
        box = f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        flags = "<pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        lines.append(f"  <object><name>{escape(label)}</name>{flags}<bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])

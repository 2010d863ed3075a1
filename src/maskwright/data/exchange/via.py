"""VGG Image Annotator (VIA) 1 and 2: the regions of all images in one JSON file, a project or bare annotations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from maskwright.data import splits
from maskwright.data.exchange import outlines
from maskwright.data.exchange.collecting import (
    ClassNames,
    Collector,
    matches_of,
    new_table,
    split_in_path,
    unwanted,
)
from maskwright.data.exchange.files import (
    FileProblem,
    add_file_problem,
    as_dict,
    as_list,
    files_below,
    json_kind,
    read_json,
)
from maskwright.data.exchange.writing import (
    CROWD,
    CUT,
    OVERLAPS,
    PARTS,
    SCORES,
    ImageFiles,
    Item,
    Part,
    boxes_of,
    crowd_of,
    items,
    labels_of,
    number,
    outlines_of,
    present,
)
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.table import Table
from maskwright.data.values import parse_flag, shortened
from maskwright.errors import DataError
from maskwright.files import json_bytes, write_bytes

NAME = "VIA"
LAYOUT = "via_region_data.json (VIA)"

_CLASS = ("class", "label", "category", "class_name", "classname", "name", "type", "object", "object_name", "species")
_OBJECT = ("instance", "instance_id", "object_id", "group_id", "group")
_OTHERS = (
    *_OBJECT,
    "crowd",
    "iscrowd",
    "is_crowd",
    "score",
    "confidence",
    "id",
    "image_quality",
    "occluded",
    "truncated",
)
_NOT_AREAS = ("point", "polyline", "line")


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find VIA files in a folder and its subfolders, or recognize one file."""
    path = Path(source)
    if unwanted(request):
        return []
    if path.is_file():
        fits = path.suffix.lower() == ".json" and json_kind(path) == "via"
        return [Match(str(path), CERTAIN, path.name, direct=True)] if fits else []
    if not path.is_dir():
        return []
    files = via_files(path)
    named = {folder: _named(folder) for folder in {(path / file).parent for file in files}}
    apart = _splits_of([path / file for file in files if not named[(path / file).parent]])
    found: dict[str | None, str] = {}
    for file in files:
        beside = named[(path / file).parent]
        # The file's own name first: train_data/via_val.json is not of the split "train_data".
        split = beside.get(path / file) or split_in_path(file) or apart.get(path / file)
        if split is None and beside:  # a file of no split beside those of splits
            continue
        found.setdefault(split, file)
    return matches_of(found, request, CERTAIN, lambda split: str(path / found[split]))


def via_files(root: Path) -> list[str]:
    """Return the VIA files of a folder and its subfolders, bare annotations before projects."""
    found = [f for f in files_below(root, lambda n: n.lower().endswith(".json"), 3) if json_kind(root / f) == "via"]
    return sorted(found, key=lambda file: (file.count("/"), "project" in file.lower(), file))


def _named(folder: Path) -> dict[Path, str]:
    """The VIA files of a folder that are named for a split, as via_train.json and via_val.json, and their splits.

    Training comes first. Empty if there is one split only: a single file is that of the folder, whatever its name.
    """
    return _splits_of(_files_in(folder))


def _files_in(folder: Path) -> list[Path]:
    """The VIA files of a folder, without its subfolders."""
    return [p for p in sorted(folder.glob("*")) if p.suffix.lower() == ".json" and json_kind(p) == "via"]


def _splits_of(files: Sequence[Path]) -> dict[Path, str]:
    """Those of the VIA files that are named for a split, and their splits; empty if there is one split only."""
    found: dict[Path, str] = {}
    for path in files:
        words = [word for word in re.split(r"[\W_]+", path.stem) if splits.is_usual(word)]
        if words:
            found[path] = words[-1]
    if len(set(found.values())) < 2:
        return {}
    return dict(sorted(found.items(), key=lambda pair: _order(pair[1])))


def _order(split: str) -> int:
    return splits.KINDS.index(splits.kind_of(split) or "train")


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Image:
    """One entry.

    Attributes:
        key: Its key in the file.
        file: Name of the image.
        regions: Its regions.
    """

    key: str
    file: str
    regions: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def read(match: Match, request: Request) -> Table:
    """Read one VIA file."""
    path = Path(match.location)
    named = _named(path.parent)
    if not named and match.split is not None:  # a/via_train.json and b/via_val.json
        named = _splits_of([f for f in sorted(path.parent.parent.glob("*/*.json")) if json_kind(f) == "via"])
    folder = path.parent if match.split in (None, named.get(path)) else _folder(path, match.split)
    table = new_table(path, folder, "/".join(filter(None, [folder.resolve().name, match.split])))
    try:
        raw = read_json(path)
    except FileProblem as problem:
        add_file_problem(table, path, problem)
        table.usable = False
        return table
    content = as_dict(raw)
    images = _images(table, _entries(content))
    if not table.usable:
        return table
    if not match.direct:
        _name_unread(table, path, images, named)
    attribute, own = _class_attribute(table, content, images)
    # All splits have the classes of all files, in the same order.
    options: list[str] = []
    used: set[str] = set()
    for file in named if path in named else _files_of_splits(path, folder, match.split is not None):
        listed, had = (own, _used(images, attribute)) if file.samefile(path) else _classes_of(file)
        options += listed
        used |= had
    names = ClassNames(options, used or ([] if options else ["object"]))
    names.fill(table)
    collector = Collector(table, request)
    collector.place_images([image.file for image in images])
    for row, image in enumerate(images):
        if row in collector.positions:
            _add_regions(collector, row, image, attribute, names)
    return collector.finish()


def _name_unread(table: Table, path: Path, images: Sequence[_Image], named: Mapping[Path, str]) -> None:
    """Reports images that only another VIA file of the folder and of the same split lists: one file is read."""
    listed = {image.file for image in images}
    for other in _files_in(path.parent):
        if other == path or named.get(other) != named.get(path):
            continue
        try:
            entries = _entries(as_dict(read_json(other)))
        except FileProblem:
            continue
        names = (as_dict(entry).get("filename") for entry in entries.values())
        missing = {name for name in names if isinstance(name, str) and name} - listed
        if missing:
            images_ = "image" if len(missing) == 1 else "images"
            what = f"{other.name} lists {len(missing)} {images_} that {path.name} does not have"
            table.add_finding(
                "skip", "file", what, f"only {path.name} is read; merge the files, or put each into a folder of its own"
            )


def _folder(path: Path, split: str) -> Path:
    """The folder of a split: the one of its name above the file."""
    return next((p for p in path.parents if p.name == split), path.parent)


def _entries(content: dict[str, Any]) -> dict[str, Any]:
    """The images of a project or of bare annotations, by their keys."""
    return as_dict(content.get("_via_img_metadata")) if "_via_img_metadata" in content else content


def _images(table: Table, entries: dict[str, Any]) -> list[_Image]:
    """The images of a file."""
    images: list[_Image] = []
    for key, value in entries.items():
        entry = as_dict(value)
        name = entry.get("filename")
        if not isinstance(name, str) or not name:
            if isinstance(value, dict) and not key.startswith("_via_"):
                table.add_finding("skip", "image", f"entry {shortened(key)} has no 'filename'", "the entry is skipped")
            continue
        regions: Any = entry.get("regions")
        # VIA 1 writes {"0": ..., "1": ...}, VIA 2 a list.
        listed = list(cast(dict[str, Any], regions).values()) if isinstance(regions, dict) else as_list(regions)
        images.append(_Image(key, name, [as_dict(region) for region in listed]))
    if not images:
        table.add_finding("error", "file", "has no images", "expected entries with 'filename' and 'regions'")
        table.usable = False
    return images


# ---- classes -------------------------------------------------------------------------------------------------------


def _class_attribute(table: Table, content: dict[str, Any], images: Sequence[_Image]) -> tuple[str | None, list[str]]:
    """The region attribute that is the class, and the names that the project lists for it."""
    counts: Counter[str] = Counter()
    values: dict[str, set[str]] = {}
    regions = 0
    for image in images:
        for region in image.regions:
            regions += 1
            for key, value in as_dict(region.get("region_attributes")).items():
                if value not in ("", None, {}):
                    counts[key] += 1
                    values.setdefault(key, set()).add(shortened(value, 80))
    declared = as_dict(as_dict(content.get("_via_attributes")).get("region"))
    candidates = [key for key in {**declared, **counts} if key.lower() not in _OTHERS]
    if not candidates:
        if regions:
            what = "its regions have no attribute with a class"
            table.add_finding("note", "class", what, "all are read as the one class 'object'")
        return None, []
    usual = [key for wanted in _CLASS for key in candidates if key.lower() == wanted]
    by_use = sorted(candidates, key=lambda key: (-counts[key], len(values.get(key, ()))))
    usual = [key for key in usual if counts[key] >= 0.5 * counts[by_use[0]]]
    chosen = usual[0] if usual else by_use[0]
    if len(candidates) > 1 and not usual:
        what = f"its regions have the attributes {', '.join(map(repr, candidates[:5]))}"
        table.add_finding("note", "class", what, f"{chosen!r} is read as the class")
    options = as_dict(as_dict(declared.get(chosen)).get("options"))
    return chosen, [name for name in options if name not in ("", "undefined")]


def _used(images: Sequence[_Image], attribute: str | None) -> set[str]:
    """The classes that regions have."""
    classes = (_class(region, attribute) for image in images for region in image.regions)
    return {name for name in classes if name is not None}


def _classes_of(path: Path) -> tuple[list[str], set[str]]:
    """The classes that the file of another split lists, and those that its regions have; none if it is damaged."""
    try:
        content = as_dict(read_json(path))
    except FileProblem:
        return [], set()
    unused = new_table(path, path.parent, "")  # its findings are those of that split
    images = _images(unused, _entries(content))
    attribute, options = _class_attribute(unused, content, images)
    return options, _used(images, attribute)


def _files_of_splits(path: Path, folder: Path, below: bool) -> list[Path]:
    """The file, and those of the other splits in the folders beside its own, training first.

    Args:
        path: The file.
        folder: The folder of its split.
        below: Whether `folder` was found below the folder that the caller named. Otherwise its neighbours may be
            anything, so only usual names of splits count, also for the folder above, as in train/images.
    """

    def is_split(name: str) -> bool:
        return splits.kind_of(name) is not None if below else splits.is_usual(name)

    folder = folder.absolute()  # a link is a neighbour of what lies beside it, not of its target
    if not below and not is_split(folder.name):
        folder = folder.parent
    if not is_split(folder.name):
        return [path]
    beside = [p for p in folder.parent.glob("*") if is_split(p.name) and p.is_dir() and not p.is_symlink()]
    folders = sorted({folder, *beside}, key=lambda p: (_order(p.name), p.name))
    files = [place / file for place in folders for file in via_files(place)]
    return files if any(file.samefile(path) for file in files) else [path, *files]  # it may be hidden


def _class(region: dict[str, Any], attribute: str | None) -> str | None:
    """The class of a region; None if it has none."""
    if attribute is None:
        return "object"
    value: Any = as_dict(region.get("region_attributes")).get(attribute)
    if isinstance(value, dict):  # checkboxes: {"cup": true}
        chosen = [key for key, ticked in cast(dict[str, Any], value).items() if ticked]
        return chosen[0] if len(chosen) == 1 else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


# ---- regions -------------------------------------------------------------------------------------------------------


def _add_regions(collector: Collector, row: int, image: _Image, attribute: str | None, names: ClassNames) -> None:
    """Add the objects of an image; regions with the same class and number of an instance are parts of one object."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, region in enumerate(image.regions):
        attributes = as_dict(region.get("region_attributes"))
        own = next((attributes[key] for key in _OBJECT if attributes.get(key) not in (None, "")), None)
        groups.setdefault((place,) if own is None else (str(own), _class(region, attribute)), []).append(place)
    for members in groups.values():
        name = f"{image.file}: regions[{members[0]}]"
        label = _class(image.regions[members[0]], attribute)
        if label is None:
            value = as_dict(image.regions[members[0]].get("region_attributes")).get(attribute or "")
            collector.skip(name, row, f"has no single class (attribute {attribute!r} is {shortened(value)})", "class")
            continue
        rings: list[list[float]] = []
        crowd = False
        for place in members:
            part = _ring(as_dict(image.regions[place].get("shape_attributes")))
            attributes = as_dict(image.regions[place].get("region_attributes"))
            crowd |= any(bool(parse_flag(attributes.get(key))) for key in ("crowd", "iscrowd", "is_crowd"))
            if isinstance(part, str):
                kind = part if "shape" in part else None
                collector.skip(f"{image.file}: regions[{place}]", row, part, kind)
            else:
                rings.append(part)
        if rings:
            collector.add(row, names.label(label), rings, name, crowd)


def _ring(shape: dict[str, Any]) -> list[float] | str:
    """The outline of a region, or what is wrong with it."""
    kind = shape.get("name")
    if kind == "polygon":
        return _polygon(shape)
    if kind not in ("rect", "circle", "ellipse"):
        return f"has the shape {shortened(kind, 30)}; expected polygon, rect, circle or ellipse"
    keys = {"rect": ("x", "y", "width", "height"), "circle": ("cx", "cy", "r"), "ellipse": ("cx", "cy", "rx", "ry")}
    values = outlines.numbers([shape.get(key) for key in keys[kind]])
    if values is None:
        return f"is a {kind} without the numbers {', '.join(keys[kind])}"
    if min(values[2:]) <= 0 or max(values) > 1e7:
        return f"is a {kind} without area"
    if kind == "rect":
        x, y, width, height = values
        return outlines.rectangle(x, y, x + width, y + height)
    angle = outlines.numbers([shape.get("theta", 0)]) or [0.0]
    return outlines.ellipse(values[0], values[1], values[2], values[-1], angle[0])


def _polygon(shape: dict[str, Any]) -> list[float] | str:
    xs, ys = as_list(shape.get("all_points_x")), as_list(shape.get("all_points_y"))
    if len(xs) != len(ys):
        return f"has a polygon with {len(xs)} x and {len(ys)} y coordinates"
    if len(xs) < 3:
        return f"has a polygon of {len(xs)} points; at least 3 are needed"
    x, y = outlines.numbers(xs), outlines.numbers(ys)
    if x is None or y is None:
        return "has a polygon with a coordinate that is not a finite number"
    return np.stack([x, y], 1).ravel().tolist()


# ---- writing -------------------------------------------------------------------------------------------------------

HOLDS = frozenset({OVERLAPS, PARTS, CROWD, SCORES, CUT})
BOXES_BECOME = "they become rectangles"


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write a VIA 2 project, via_region_data.json, beside the images of each split.

    The class is the region attribute "class"; parts of an object have the same "instance".
    """
    for part in parts:
        prefix = f"{part.split}/" if part.split else ""
        names = images.names(part, prefix)
        entries: dict[str, Any] = {}
        for item in items(part):
            name = names[item.index]
            images.copy(part, item.index, prefix + name)
            size = (images.folder / (prefix + name)).stat().st_size
            regions = list(_regions(item, part.dataset.classes))
            entries[f"{name}{size}"] = {"filename": name, "size": size, "regions": regions, "file_attributes": {}}
        options = dict.fromkeys(part.dataset.classes, "")
        content: dict[str, Any] = {
            "_via_settings": {
                "ui": {},
                "core": {"buffer_size": 18, "filepath": {}, "default_filepath": ""},
                "project": {"name": part.split or "project"},
            },
            "_via_img_metadata": entries,
            "_via_attributes": {
                "region": {"class": {"type": "dropdown", "description": "", "options": options, "default_options": {}}},
                "file": {},
            },
            "_via_data_format_version": "2.0.10",
            "_via_image_id_list": list(entries),
        }
        write_bytes(folder / f"{prefix}via_region_data.json", json_bytes(content), DataError, sync=False)


def _regions(item: Item, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The regions of an image."""
    objects = item.objects
    crowd, labels, there = crowd_of(objects), labels_of(objects), present(objects)
    found = None if objects.masks is None else outlines_of(objects)
    for position, (x0, y0, x1, y1) in enumerate(boxes_of(objects)):
        if not there[position]:
            continue
        attributes: dict[str, Any] = {"class": classes[labels[position]]}
        if crowd[position]:
            attributes["crowd"] = "1"
        if item.scores is not None:
            attributes["score"] = f"{item.scores[position]:.5g}"
        if found is None:
            shape = {"name": "rect", "x": x0, "y": y0, "width": round(x1 - x0, 3), "height": round(y1 - y0, 3)}
            yield {"shape_attributes": shape, "region_attributes": attributes}
            continue
        outline = found[position]
        rings = [outlines.joined(outline.rings)] if outline.holes else outline.rings
        if len(rings) > 1:
            attributes["instance"] = str(position + 1)
        for ring in rings:
            shape = {
                "name": "polygon",
                "all_points_x": [number(x) for x in ring[:, 0].tolist()],
                "all_points_y": [number(y) for y in ring[:, 1].tolist()],
            }
            yield {"shape_attributes": shape, "region_attributes": attributes}

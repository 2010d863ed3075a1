"""YOLO segmentation data sets (Ultralytics): data.yaml, images/ and labels/ with one text file for each image.

A line of a label file is `CLASS x y x y ...`, the outline of one object in shares of the width and height of the image,
or `CLASS x y w h`, a box around its center. The label file of images/a/b.jpg is labels/a/b.txt.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from maskwright.data import splits
from maskwright.data.exchange import outlines
from maskwright.data.exchange.collecting import Collector, matches_of, new_table, split_in_path, unwanted
from maskwright.data.exchange.files import (
    FileProblem,
    add_file_problem,
    as_dict,
    files_below,
    is_image_name,
    read_lines,
    read_text,
    read_yaml,
    shown_path,
)
from maskwright.data.exchange.writing import (
    BOXES,
    CUT,
    OVERLAPS,
    ImageFiles,
    Item,
    Part,
    boxes_of,
    crowd_of,
    items,
    labels_of,
    outlines_of,
    present,
    separate,
    write_text_file,
)
from maskwright.data.findings import first_few
from maskwright.data.formats import CERTAIN, LIKELY, Match, Request
from maskwright.data.image_names import is_file
from maskwright.data.table import Table
from maskwright.data.values import clean_name, parse_int, relative_path, shortened

NAME = "YOLO"
LAYOUT = "data.yaml with images/{split} and labels/{split} (YOLO)"

_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SETTING = re.compile(r"^\s*[\"']?(names|nc)[\"']?\s*:", re.M)
_NAME_LISTS = ("classes.txt", "obj.names", "names.txt", "labels.txt", "predefined_classes.txt")
_BEYOND = 0.1  # share of the image that a coordinate may lie outside of it
_ROUNDING = 5  # decimals of a pixel to which coordinates are rounded, so that x / width * width is x again


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find the splits of a data.yaml, or of folders images/ and labels/ with text files."""
    path = Path(source)
    if unwanted(request):
        return []
    settings = path if path.is_file() else _settings_file(path) if path.is_dir() else None
    if settings is not None:
        if not _is_settings(settings):
            return []
        reason = settings.name if path.is_file() else settings.relative_to(path).as_posix()
        try:
            listed: list[str | None] = [*_existing_splits(settings)]
        except FileProblem:
            listed = []
        return matches_of(dict.fromkeys(listed or [None], reason), request, CERTAIN, lambda _: str(settings))
    if not path.is_dir():
        return []
    parts = dict.fromkeys(_folders_without_settings(path), "images and labels")
    return matches_of(parts, request, LIKELY, lambda _: str(path))


def _settings_file(folder: Path) -> Path | None:
    """data.yaml, or the only other YAML file of a folder that has the keys of one."""
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if is_file(folder / name):
            return folder / name
    with os.scandir(folder) as entries:  # paths of all files would take seconds for very many images
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith((".yaml", ".yml")))
    others = [folder / name for name in names if _is_settings(folder / name)]
    return others[0] if len(others) == 1 else None


def _is_settings(path: Path) -> bool:
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        text = read_text(path)
    except FileProblem:
        return path.stem in ("data", "dataset")
    return _SETTING.search(text) is not None or path.stem == "data"


def _listed_splits(settings: Any) -> list[str]:
    """The splits that a data.yaml lists, in the order train, val, test."""
    given = as_dict(settings)
    named = {_KEYS[key]: value for key, value in given.items() if key in _KEYS and value not in (None, "", [])}
    return [split for split in ("train", "val", "test") if split in named]


def _existing_splits(path: Path) -> list[str]:
    """The splits of a data.yaml; not a split "test" whose files do not exist, as of Roboflow's exports without one."""
    settings = as_dict(read_yaml(path))
    listed = _listed_splits(settings)
    if "test" in listed:
        table = Table(path, path.parent)
        _listed_images(table, settings, "test")
        if table.findings_with("error"):
            listed.remove("test")
    return listed


def _folders_without_settings(root: Path) -> list[str | None]:
    """The splits of folders with images and labels but no data.yaml; [None] if they are not divided."""
    found: list[str | None] = []
    for file in _label_files(root):
        if "/labels/" not in "/" + file:
            continue
        split = split_in_path(file)
        if split not in found:
            found.append(split)
    return found if found and any((folder / "images").is_dir() for folder in _with_children(root)) else []


def _label_files(root: Path) -> list[str]:
    lists = ("readme", "license", "classes.txt", "notes.txt")
    return list(files_below(root, lambda name: name.endswith(".txt") and not name.lower().startswith(lists), 4))


def _with_children(root: Path) -> list[Path]:
    return [root, *(p for p in sorted(root.iterdir()) if p.is_dir())]


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """The rows of all label files of a split.

    Attributes:
        image: Place of the image in the list of each row.
        names: File and line of each row.
        classes: The class of each row.
        values: The other numbers of each row.
    """

    image: list[int] = field(default_factory=list[int])
    names: list[str] = field(default_factory=list[str])
    classes: list[int] = field(default_factory=list[int])
    values: list[npt.NDArray[np.float64]] = field(default_factory=list[npt.NDArray[np.float64]])


def read(match: Match, request: Request) -> Table:
    """Read one of the splits that `sniff` has found."""
    path = Path(match.location)
    root = path if path.is_dir() else path.parent
    table = new_table(path, root, "/".join(filter(None, [root.resolve().name, match.split])))
    if path.is_dir():
        images = _images_without_settings(path, match.split)
        names: dict[int, str] | None = _names_beside(table, root, match.split)
        listed = False
    else:
        try:
            settings = as_dict(read_yaml(path))
        except FileProblem as problem:
            add_file_problem(table, path, problem)
            table.usable = False
            return table
        names = _names(table, settings)
        images = _listed_images(table, settings, match.split)
        listed = names is not None
    if not table.usable:
        return table
    collector = Collector(table, request)
    collector.place_images(images)
    rows = _read_rows(collector, images)
    _set_classes(table, names, rows, listed)
    if table.usable:
        _add_objects(collector, rows)
        collector.finish()
    return table


# ---- classes -------------------------------------------------------------------------------------------------------


def _names(table: Table, settings: dict[str, Any]) -> dict[int, str] | None:
    """The class names of a data.yaml by number; None if it has only their count."""
    given, count = settings.get("names") or None, parse_int(settings.get("nc"))
    if settings.get("kpt_shape") is not None:
        what = "has 'kpt_shape': it is a data set of poses, not of masks"
        table.add_finding("error", "key", what, "export outlines (YOLO segmentation)")
        table.usable = False
        return None
    named: dict[int, str] = {}
    if isinstance(given, list):
        named = {number: _class_name(value) for number, value in enumerate(cast(list[Any], given))}
    elif isinstance(given, dict):
        for key, value in cast(dict[Any, Any], given).items():
            number = parse_int(key)
            if number is None or number < 0:
                table.add_finding("error", "category", f"'names' has key {key!r}", "expected numbers from 0 on")
                table.usable = False
            elif number in named:
                what = f"class number {number} is used for both {named[number]!r} and {value!r}"
                table.add_finding("error", "category", what, "give each class its own number")
                table.usable = False
            else:
                named[number] = _class_name(value)
    elif given is not None:
        what = f"'names' is {shortened(given)}"
        table.add_finding("error", "category", what, "expected a list of class names, or a mapping from numbers")
        table.usable = False
    elif count is None:
        what = "has neither 'names' nor 'nc'"
        table.add_finding("error", "key", what, "list the names of the classes")
        table.usable = False
    if named and count is not None and count != len(named):
        what = f"'nc' is {count}, but 'names' lists {len(named)} classes"
        if len(named) > count:
            table.add_finding("note", "category", what, "the names are used")
        else:
            table.add_finding("error", "category", what, "correct one of them")
            table.usable = False
    if given is None and count is not None:
        table.add_finding("note", "category", f"has no 'names' for its {count} classes", "'class 0' and so on are used")
        named = {number: f"class {number}" for number in range(min(max(count, 0), 100_000))}
    return named or None


def _class_name(value: Any) -> str:
    return clean_name(str(value)) if isinstance(value, (str, int, float, bool)) else ""


def _names_beside(table: Table, root: Path, split: str | None) -> dict[int, str] | None:
    """The class names of a classes.txt in the data set's folder; None if there is none."""
    places = [root, *([root / split, root / "labels" / split] if split else []), root / "labels"]
    for path in (place / name for place in places for name in _NAME_LISTS):
        if is_file(path):
            try:
                return dict(enumerate(clean_name(line) for line in read_lines(path)))
            except FileProblem as problem:
                add_file_problem(table, path, problem)
                table.usable = False
    return None


def _set_classes(table: Table, names: dict[int, str] | None, rows: _Rows, listed: bool) -> None:
    """Set the classes of the table; a note if the data set names none."""
    if names is None and table.usable:
        used = sorted(set(rows.classes))
        names = {number: f"class {number}" for number in (range(used[-1] + 1) if used and used[-1] < 1000 else used)}
        if used:
            what = "has no class names (no data.yaml or classes.txt)"
            table.add_finding("note", "category", what, "'class 0' and so on are used")
    names = names or {}
    numbers = sorted(names)
    taken: Counter[str] = Counter()
    classes: list[str] = []
    repeated: list[str] = []
    for number in numbers:
        name = names[number] or f"class {number}"
        taken[name] += 1
        if taken[name] > 1:
            repeated.append(name)
            name = f"{name} ({number})"
        classes.append(name)
    if repeated:
        what = f"{len(repeated)} class names occur more than once: {first_few(repeated)}"
        table.add_finding("note", "category", what, "the classes are kept apart; the number is added to the name")
    table.classes, table.category_ids = tuple(classes), tuple(numbers)


# ---- images --------------------------------------------------------------------------------------------------------


def _listed_images(table: Table, settings: dict[str, Any], split: str | None) -> list[str]:
    """The images of a split of a data.yaml, relative to the root, which becomes the folder of the table."""
    given: Any = next(
        (value for key, value in settings.items() if _KEYS.get(key) == split and value not in (None, "", [])), None
    )
    if given is None:
        what = "lists no images" if split is None else f"has no split {split!r}"
        table.add_finding(
            "error", "key", what, "expected 'train' and 'val', each a folder, a list of folders or a list file"
        )
        table.usable = False
        return []
    roots = _roots(table, settings.get("path"))
    sources = cast(list[Any], given) if isinstance(given, list) else [given]
    images: list[str] = []
    for source in sources:
        if not isinstance(source, str):
            table.add_finding("error", "path", f"{split!r} has {shortened(source)}", "expected the path of a folder")
            table.usable = False
            continue
        images += _images_of(table, roots, source, split)
    return list(dict.fromkeys(images))


def _roots(table: Table, given: Any) -> list[Path]:
    """The folders that paths of a data.yaml may be relative to: its `path`, and its own folder."""
    own = table.path.parent
    if not isinstance(given, str) or given.strip() in ("", "."):
        return [own]
    inside = relative_path(given.strip())
    return [own / inside, own] if inside is not None and (own / inside).is_dir() else [own]


def _images_of(table: Table, roots: Sequence[Path], source: str, split: str | None) -> list[str]:
    """The images in a folder or a list file, relative to the folder of the table."""
    base = table.folder
    text = source.strip()
    candidates = [relative_path(text)]
    if text.replace("\\", "/").startswith("../"):  # Roboflow writes ../train/images for train/images
        candidates.append(relative_path(text[3:]))
    parts = [p for p in re.split(r"[/\\]", text) if p]
    ends = (3, 2) if len(parts) > 1 else (1,)
    candidates += [relative_path("/".join(parts[-n:])) for n in ends]  # of another computer
    for root in roots:
        for number, inside in enumerate(candidates):
            if inside is None and text not in (".", "./"):
                continue
            place = root / (inside or "")
            if place.is_dir() or is_file(place):
                if number > 1:
                    what = f"{split!r} is {source!r}, which is read as {shown_path(table, place)!r}"
                    table.add_finding("note", "path", what, "paths are searched in the folder of data.yaml only")
                prefix = place.relative_to(base).as_posix()
                if place.is_dir():
                    found = [f"{prefix}/{file}" for file in files_below(place, is_image_name)]
                    return [file.removeprefix("./") for file in found]
                return _images_in_list(table, place, root)
    what = f"{split!r} is {source!r}, which is not a folder or list of images in {base}"
    advice = "correct the path; 'path' may name a folder beside data.yaml, and other folders are not read"
    table.add_finding("error", "path", what, advice)
    table.usable = False
    return []


def _images_in_list(table: Table, path: Path, root: Path) -> list[str]:
    """The images that a text file lists, one a line; paths beginning with "./" are relative to the file."""
    try:
        lines = read_lines(path)
    except FileProblem as problem:
        add_file_problem(table, path, problem)
        table.usable = False
        return []
    images: list[str] = []
    for line in lines:
        places = [path.parent, root, table.folder]
        inside = relative_path(line)
        if inside is not None:
            place = next((p / inside for p in places if is_file(p / inside)), None)
            images.append(inside if place is None else place.relative_to(table.folder).as_posix())
        else:
            images.append(line)  # refused or matched by its name when the images are looked up
    return images


def _images_without_settings(root: Path, split: str | None) -> list[str]:
    found = files_below(root, is_image_name, 4)
    return [file for file in found if "/images/" in "/" + file and (split is None or split_in_path(file) == split)]


# ---- labels --------------------------------------------------------------------------------------------------------


def _label_file(image: str) -> str:
    """The label file of an image: the last folder "images" becomes "labels", and the suffix ".txt"."""
    before, folder, after = ("/" + image).rpartition("/images/")
    return (f"{before}/labels/{after}" if folder else "/" + image).rpartition(".")[0][1:] + ".txt"


def _read_rows(collector: Collector, images: Sequence[str]) -> _Rows:
    """Read all label files; rows that are not numbers are skipped with a finding."""
    table = collector.table
    rows = _Rows()
    shared: dict[str, list[str]] = {}
    absent: list[str] = []
    for row, image in enumerate(images):
        position = collector.positions.get(row)
        if position is None:
            continue
        file = _label_file(table.files[position])
        shared.setdefault(file, []).append(image)
        path = table.folder / file
        if not is_file(path) and is_file(path.with_suffix(".TXT")):
            path = path.with_suffix(".TXT")
        if not is_file(path):
            absent.append(image)
            continue
        try:
            text = read_text(path, 1 << 28)
        except FileProblem as problem:
            add_file_problem(table, path, problem, "skip", image=table.image_ids[position])
            collector.exclude(row)
            continue
        _read_file(collector, rows, row, file, text)
    if absent and len(absent) == len(collector.positions):
        expected = _label_file(table.files[0])
        what = f"none of its {len(absent)} images has a label file; expected {expected!r} for {table.files[0]!r}"
        table.add_finding("error", "missing", what, "put the folder 'labels' beside 'images'")
    elif absent:
        what = f"{len(absent)} of {len(images)} images have no label file: {first_few(absent)}"
        table.add_finding("note", "missing", what, "they are read as images without objects")
    double = [images for images in shared.values() if len(images) > 1]
    if double:
        what = f"{len(double)} label files belong to several images, such as {first_few(double[0])}"
        table.add_finding(
            "note", "duplicate", what, "each of these images has their objects; rename the images that are others"
        )
    _report_orphans(table, shared)
    return rows


def _report_orphans(table: Table, used: dict[str, list[str]]) -> None:
    """Report label files without an image, in the folders of those that have one."""
    folders = {os.path.dirname(file) for file in used}  # noqa: PTH120 - a text with "/"
    stray: list[str] = []
    for folder in sorted(folders):
        place = table.folder / folder
        if place.is_dir() and folder.split("/")[0:1] != [""] and "labels" in folder.split("/"):
            stray += [
                f"{folder}/{name}"
                for name in files_below(place, lambda n: n.endswith(".txt") and n not in _NAME_LISTS, 0)
                if f"{folder}/{name}" not in used
            ]
    if stray:
        what = f"{len(stray)} label files have no image: {first_few(stray)}"
        table.add_finding("skip", "missing", what, "restore the images, or remove the label files")


def _read_file(collector: Collector, rows: _Rows, image: int, file: str, text: str) -> None:
    """Append the rows of one label file."""
    for number, line in enumerate(text.split("\n"), 1):
        tokens = line.replace(",", " ").split()
        if not tokens:
            continue
        name = f"{file}:{number}"
        try:
            values = np.array(tokens, np.float64)
        except ValueError:
            wrong = next(t for t in tokens if not _is_number(t))
            collector.skip(name, image, f"has {shortened(wrong, 40)} where a number is expected", "text")
            continue
        if not np.isfinite(values).all():
            collector.skip(name, image, "has a value that is not a finite number", "finite")
        elif values[0] != int(values[0]) or values[0] < 0:
            collector.skip(name, image, f"has class {tokens[0]}; expected a class number from 0 on", "class")
        elif len(values) % 2 == 0:
            count = len(values) - 1
            what = f"has {count} values after the class, an odd number; expected x, y, x, y, ..."
            collector.skip(name, image, what, "odd")
        elif len(values) < 5:
            collector.skip(name, image, f"has {len(values) // 2} points; at least 3 are needed", "few")
        else:
            rows.image.append(image)
            rows.names.append(name)
            rows.classes.append(int(values[0]))
            rows.values.append(values[1:])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _add_objects(collector: Collector, rows: _Rows) -> None:
    """Convert the rows to pixels and add them."""
    table = collector.table
    labels = {number: label for label, number in enumerate(table.category_ids)}
    extent = [np.abs(values).max() for values in rows.values]
    pixels = _in_pixels(collector, rows, extent)
    clipped: list[str] = []
    for image, name, number, values in zip(rows.image, rows.names, rows.classes, rows.values, strict=True):
        if number not in labels:
            listed = f"0 to {max(labels)}" if labels else "none"
            collector.skip(name, image, f"has class {number}, but the classes are {listed}", "unknown class")
            continue
        height, width = collector.size(image) or (1, 1)
        scale = np.array([1.0, 1.0]) if pixels else np.array([width, height], np.float64)
        if len(values) == 4:
            (x, y), (w, h) = values.reshape(2, 2) * scale
            if not pixels and (values.max() > 1 + _BEYOND or values.min() < 0):
                collector.skip(name, image, _out_of_range(values), "range")
                continue
            box = (float(x - w / 2), float(y - h / 2), float(w), float(h))
            collector.add(image, labels[number], None, name, box=box)
            continue
        if not pixels and (values.max() > 1 + _BEYOND or values.min() < -_BEYOND):
            collector.skip(name, image, _out_of_range(values), "range")
            continue
        if not pixels and (values.max() > 1 or values.min() < 0):
            clipped.append(name)
            values = values.clip(0, 1)
        points = np.round(values.reshape(-1, 2) * scale, _ROUNDING)
        collector.add(image, labels[number], [points.ravel().tolist()], name)
    beyond = sum(number == len(labels) for number in rows.classes)
    if beyond and sorted(labels) == list(range(len(labels))) and 0 not in rows.classes:
        what = f"no object has class 0, but {beyond} have class {len(labels)}, which is not listed"
        table.add_finding("note", "class", what, "if the label files count classes from 1, subtract 1 from each")
    if clipped:
        what = f"{len(clipped)} outlines reach slightly out of their images (0 ... 1): {first_few(clipped)}"
        table.add_finding("note", "outline", what, "they are clipped")


def _out_of_range(values: npt.NDArray[np.float64]) -> str:
    value = float(values.max() if values.max() > 1 else values.min())
    return f"has the coordinate {value:g}; expected shares of the image's width and height, 0 ... 1"


def _in_pixels(collector: Collector, rows: _Rows, extent: Sequence[Any]) -> bool:
    """Whether all rows are in pixels rather than shares; adds the finding, which `check --fix` repairs."""
    total = len(rows.values)
    large = [n for n in range(total) if extent[n] > 1 + _BEYOND]
    if len(large) < 2 or len(large) < 0.5 * total:
        return False
    for n in large:
        height, width = collector.size(rows.image[n]) or (1, 1)
        points = rows.values[n].reshape(-1, 2)
        if (points > np.array([width + 2, height + 2])).any() or (points < -2).any():
            return False
    what = f"{len(large)} of {total} objects have coordinates in pixels; YOLO's are shares of the width and height"
    advice = "divide them by the size of the image, as `maskwright check --fix` does"
    collector.table.add_finding("error", "outline", what, advice, repaired=True)
    return True


# ---- writing -------------------------------------------------------------------------------------------------------

HOLDS = frozenset({OVERLAPS, BOXES, CUT})
_DIGITS = 10  # decimals of a share


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write data.yaml, images/SPLIT and labels/SPLIT. Crowd regions are left out.

    Holes and parts are joined to one outline by lines that lead there and back, as Ultralytics joins parts.
    """
    listed: dict[str, str] = {}
    for part in parts:
        split = part.split or "train"
        kind = splits.kind_of(split) or split
        listed.setdefault(kind, f"images/{split}")
        names = images.names(part, split)
        for item in items(part):
            name = names[item.index]
            images.copy(part, item.index, f"images/{split}/{name}")
            text = "".join(f"{line}\n" for line in _lines(item))
            write_text_file(folder / "labels" / split / f"{name.rpartition('.')[0]}.txt", text)
    classes = parts[0].dataset.classes
    text = "".join(f"{kind}: {json.dumps(place)}\n" for kind, place in listed.items())
    text += "names:\n" + "".join(
        f"  {number}: {json.dumps(name, ensure_ascii=False)}\n" for number, name in enumerate(classes)
    )
    write_text_file(folder / "data.yaml", text)


def _lines(item: Item) -> Iterator[str]:
    """The lines of a label file."""
    objects = item.objects
    height, width = item.size
    scale = np.array([width, height], np.float64)
    crowd, labels, there = crowd_of(objects), labels_of(objects), present(objects)
    shapes = None if objects.masks is None else outlines_of(objects)
    for position, (x0, y0, x1, y1) in enumerate(boxes_of(objects)):
        if crowd[position] or not there[position]:
            continue
        if shapes is None:
            values = np.array([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height])
        else:
            ring = outlines.joined(separate(shapes[position], item.size).rings)
            values = (ring / scale).clip(0, 1).ravel()
        yield " ".join([str(labels[position]), *(f"{value:.{_DIGITS}g}" for value in values)])

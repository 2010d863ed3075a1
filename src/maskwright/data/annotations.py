"""What a COCO annotation file says, checked before anything else sees it, as columns.

The common rasteriser dies on coordinates that are not finite, reads garbage from short run-length codes and accepts
codes of another size. Nothing reaches it from here that was not looked at. A list of objects in Python takes ten times
the memory of the file and is copied into every worker process; columns are shared.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np

from maskwright.data.findings import Finding, Severity, few
from maskwright.data.images import probe
from maskwright.data.shapes import Shapes, ShapesBuilder
from maskwright.errors import ImageError

Verify = Literal["all", "some", "none"]

# Headers of so many images are looked at before training; of larger sets a sample, evenly spread. About 50 us each.
VERIFY_ALL_BELOW = 20_000
VERIFY_SOME = 2_000


@dataclass
class Table:
    """A checked annotation file. M images; A annotations, sorted by image, in the file's order within one."""

    path: Path
    folder: Path
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    keypoint_names: tuple[str, ...] | None = None
    image_ids: list[int | str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # relative to `folder`, with "/"
    sizes: list[tuple[int, int]] = field(default_factory=list)  # H, W as looked at
    image_rows: list[int] = field(default_factory=list)  # position in the file's list
    owner: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (A,) position of the image
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ids: list[int | str] = field(default_factory=list)
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # x0, y0, x1, y1
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))  # NaN: to be measured on the mask
    keypoints: np.ndarray | None = None  # (A, J, 3) float32, continuous coordinates
    shapes: Shapes = field(default_factory=lambda: ShapesBuilder().finish()[0])
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # position in the file's list
    maps: list[Path] | None = None  # a panoptic file: each image's map of segments; `ids` are the numbers in it
    stuff: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    usable: bool = True  # False: so broken that there is nothing to repair
    raw: dict[str, Any] = field(default_factory=dict)

    def say(self, severity: Severity, kind: str, sentence: str, advice: str = "", **about: Any) -> None:
        self.findings.append(Finding(severity, kind, str(self.path), sentence, advice, **about))

    def of(self, severity: Severity) -> list[Finding]:
        return [f for f in self.findings if f.severity == severity]


def read_table(path: Path, images: Path | None = None, verify: Verify | None = None) -> Table:
    """Everything in the file that can be used, and a finding for everything else; never raises for what is in it.

    `images` is the folder that file names are relative to; without it the usual places are tried. `verify` says of
    how many images the header is compared with the file's sizes: "all", "some" or "none" (then sizes must be in the
    file); left out, all of a set of up to 20,000 and some of a larger one.
    """
    table, position, labels = begin_table(path, images, verify)
    if table.usable:
        _annotations(table, table.raw["annotations"], position, labels)
    return table


def begin_table(
    path: Path, images: Path | None, verify: Verify | None
) -> tuple[Table, dict[int | str, int | None], dict[int, int]]:
    """Classes and images of a file that has objects, or segments, of whatever kind; image id -> position (None: it
    cannot be used); category id -> label."""
    table = Table(path, images or path.parent)
    raw = _load(table)
    if raw is None:
        table.usable = False
        return table, {}, {}
    table.raw = raw
    labels = _categories(table, raw["categories"])
    return table, _images(table, raw["images"], images, verify), labels


# ---- the file ----------------------------------------------------------------------------------------------------


def _load(table: Table) -> dict[str, Any] | None:
    advice = "expected a COCO data set with the keys images, annotations and categories"
    try:
        text = table.path.read_bytes()
        if not text.strip():
            table.say("error", "file", f"the file is empty ({len(text)} bytes)", advice)
            return None
        raw = json.loads(text.decode("utf-8-sig"))
    except FileNotFoundError:
        table.say("error", "file", "there is no such file", advice)
        return None
    except OSError as error:
        table.say("error", "file", f"cannot be read ({error.strerror})", advice)
        return None
    except UnicodeDecodeError as error:
        table.say("error", "file", f"is not UTF-8 text (byte {error.start})", advice)
        return None
    except json.JSONDecodeError as error:
        cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        what = "is JSON that was cut off" if cut else "is not JSON"
        table.say("error", "file", f"{what}: {error.msg} at line {error.lineno}, column {error.colno}", "write it anew")
        return None
    except (ValueError, RecursionError) as error:
        table.say("error", "file", f"is not usable JSON ({error})", advice)
        return None
    if isinstance(raw, list):
        results = raw and isinstance(raw[0], dict) and {"image_id", "category_id"} & set(raw[0])
        what = "this looks like COCO results, not a data set" if results else "the file holds a list, not an object"
        table.say("error", "file", what, advice)
        return None
    if not isinstance(raw, dict):
        table.say("error", "file", f"the file holds a {type(raw).__name__}, not an object", advice)
        return None
    for key in ("images", "annotations", "categories"):
        if key not in raw:
            table.say("error", "key", f"there is no key {key!r}", advice)
        elif not isinstance(raw[key], list):
            table.say("error", "key", f"{key!r} is a {type(raw[key]).__name__}; expected a list", advice)
    return None if table.findings else raw


# ---- categories --------------------------------------------------------------------------------------------------


def _categories(table: Table, entries: list[Any]) -> dict[int, int]:
    """Category id -> label; labels count the ids in ascending order."""
    names: dict[int, str] = {}
    keypoints: list[list[str]] = []
    for row, entry in enumerate(entries):
        number = whole(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            table.say("error", "category", f"categories[{row}] has no whole number as its id", "give it one")
            continue
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            name = f"category {number}" if name is None else str(name)
            table.say("note", "category", f"category {number} has no name", f"it is called {name!r}")
        if number in names and names[number] != name:
            table.say(
                "error",
                "category",
                f"category id {number} stands for both {names[number]!r} and {name!r}",
                "give each class an id of its own",
            )
            continue
        if number in names:
            table.say("note", "category", f"category {number} ({name!r}) is listed twice", "it counts once")
            continue
        names[number] = name
        points = entry.get("keypoints")
        if isinstance(points, list) and points:
            keypoints.append([str(p) for p in points])
    if not names and not table.findings:
        table.say("error", "category", "'categories' is empty", "list the classes with an id and a name each")
    order = sorted(names)
    used: dict[str, int] = {}
    classes = []
    for number in order:
        name = names[number]
        if name in used:
            own = f"{name} ({number})"
            table.say(
                "note",
                "category",
                f"categories {used[name]} and {number} share the name {name!r}",
                f"they stay two classes; the second is called {own!r}",
            )
            name = own
        used.setdefault(name, number)
        classes.append(name)
    table.classes, table.category_ids = tuple(classes), tuple(order)
    if keypoints:
        longest = max(keypoints, key=len)
        table.keypoint_names = tuple(longest)
        if any(j != longest for j in keypoints):
            table.say("note", "category", "categories name different keypoints", "the longest list is taken for all")
    return {number: label for label, number in enumerate(order)}


# ---- images ------------------------------------------------------------------------------------------------------


def _images(
    table: Table, entries: list[Any], images: Path | None, verify: Verify | None
) -> dict[int | str, int | None]:
    """Image id -> position among the images that can be used; None for those that cannot."""
    position: dict[int | str, int | None] = {}
    kept: list[tuple[int, int | str, str, int | None, int | None]] = []
    twice: set[int | str] = set()
    for row, entry in enumerate(entries):
        number = identity(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            table.say("skip", "image", f"images[{row}] has no usable id", "the image is left out")
            continue
        if number in position:
            if number not in twice:
                table.say("error", "image", f"two images share id {number!r}", "give each image an id of its own")
            twice.add(number)
            continue
        position[number] = None
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            table.say("skip", "image", f"image {number!r} has no 'file_name'", "it is left out", image=number)
            continue
        file = inside(name)
        if file is None:
            table.say(
                "error",
                "path",
                f"image {number!r} is called {name!r}, which leads out of the image folder; it was not opened",
                "give a path inside the folder",
                image=number,
            )
            continue
        kept.append((row, number, file, _length(entry.get("height")), _length(entry.get("width"))))
    kept = [k for k in kept if k[1] not in twice]
    for number in twice:
        position[number] = None
    table.folder = images if images is not None else _find_folder(table.path, [k[2] for k in kept])
    for row, number, file, size in _sized(table, kept, verify):
        position[number] = len(table.files)
        table.image_ids.append(number)
        table.files.append(file)
        table.sizes.append(size)
        table.image_rows.append(row)
    if entries and not table.files and not table.of("error"):
        table.say("error", "image", f"none of the {len(entries)} images can be used", "see the other findings")
    return position


def _find_folder(path: Path, files: list[str]) -> Path:
    """Where the images of an annotation file are: the first of the usual places that has one of the first names."""
    split = path.stem.rsplit("_", 1)[-1]
    roots = (
        [path.parent.parent, path.parent] if path.parent.name == "annotations" else [path.parent, path.parent.parent]
    )
    candidates = [root / part for root in roots for part in (split, f"images/{split}", "images", "")]
    for candidate in candidates:
        if any((candidate / file).is_file() for file in files[:20]):
            return candidate
    return next((c for c in candidates if c.is_dir()), path.parent)


def _sized(
    table: Table, kept: list[tuple[int, int | str, str, int | None, int | None]], verify: Verify | None
) -> Iterable[tuple[int, int | str, str, tuple[int, int]]]:
    """The images that are there, each with its true size; findings for the others."""
    if verify is None:
        verify = "all" if len(kept) <= VERIFY_ALL_BELOW else "some"
    folder, missing = table.folder, []
    if verify != "none":
        missing = [k for k in kept if not (folder / k[2]).is_file()]
    if missing:
        names = [k[2] for k in missing]
        advice = "put them there or take them out of the file"
        if len(missing) == len(kept):
            advice = "name the folder that the images are in"
        table.say("error", "missing", f"{len(names)} of {len(kept)} images are not in {folder}: {few(names)}", advice)
        gone = {k[1] for k in missing}
        kept = [k for k in kept if k[1] not in gone]
    step = 1 if verify == "all" else max(1, len(kept) // VERIFY_SOME)
    looked = {
        k[1]
        for number, k in enumerate(kept)
        if k[3] is None or k[4] is None or (verify != "none" and number % step == 0)
    }
    asked = [k for k in kept if k[1] in looked]
    found = dict(zip((k[1] for k in asked), _probe([folder / k[2] for k in asked]), strict=True))
    for row, number, file, height, width in kept:
        answer = found.get(number)
        if isinstance(answer, ImageError):
            about = str(answer).removeprefix(f"{folder / file}: ")
            table.say("skip", "image", f"image {number!r}, {folder / file}: {about}", image=number)
            continue
        if answer is None:
            assert height is not None
            assert width is not None
            yield row, number, file, (height, width)
            continue
        size, stored = answer
        if height is None or width is None or (height, width) == size:
            yield row, number, file, size
        else:
            what = f"image {number!r} is said to be {width} x {height}, but {folder / file} is {size[1]} x {size[0]}"
            advice = "correct the size, or put back the image that was annotated; its masks would be displaced"
            if (height, width) == stored:
                what += " once its EXIF orientation is applied"
                advice = "its annotations were drawn on the image as stored: remove the EXIF orientation from the file"
            table.say("error", "size", what, advice, image=number)


def _probe(paths: list[Path]) -> list[tuple[tuple[int, int], tuple[int, int]] | ImageError]:
    def one(path: Path) -> tuple[tuple[int, int], tuple[int, int]] | ImageError:
        try:
            return probe(path)
        except ImageError as error:
            return error

    if len(paths) < 64:
        return [one(p) for p in paths]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as threads:
        return list(threads.map(one, paths, chunksize=64))


# ---- annotations -------------------------------------------------------------------------------------------------


def _annotations(
    table: Table, entries: list[Any], position: dict[int | str, int | None], labels: dict[int, int]
) -> None:
    if any(isinstance(e, dict) and "segments_info" in e for e in entries[:3]):
        what = "its annotations divide images among segments (COCO panoptic)"
        table.say("error", "file", what, "call it panoptic_SPLIT.json, or read it with read_panoptic")
        return
    shapes = ShapesBuilder()
    owner: list[int] = []
    chosen: list[int] = []
    ids: list[int | str] = []
    classes: list[int] = []
    crowd: list[bool] = []
    first: dict[int | str, int] = {}
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            table.say("skip", "annotation", f"annotations[{row}] is no object", "it is left out")
            continue
        number = identity(entry.get("id"))
        if number is None:
            table.say("skip", "annotation", f"annotations[{row}] has no usable id", "it is left out")
            continue
        image = lookup(entry.get("image_id"), position)
        if image is None:
            asked = entry.get("image_id")
            _skip(table, number, None, f"is on image {asked!r}, which is not in the list of images")
            continue
        place = position[image]
        if place is None:  # left out, and said so
            continue
        category = whole(entry.get("category_id"))
        if category not in labels:
            _skip(table, number, place, f"has category {entry.get('category_id')!r}, which is not in the list")
            continue
        flag = flag_of(entry.get("iscrowd"))
        if flag is None:
            _skip(table, number, place, f"has {entry['iscrowd']!r} for 'iscrowd'; expected 0 or 1")
            continue
        if number in first:
            table.say(
                "note",
                "duplicate",
                f"annotations[{first[number]}] and annotations[{row}] share id {number!r}",
                "both are kept",
                image=image,
                annotation=number,
            )
        complaint = shapes.add(entry.get("segmentation"), table.sizes[place])
        if complaint:
            _skip(table, number, place, complaint)
            continue
        first.setdefault(number, row)
        owner.append(place)
        chosen.append(row)
        ids.append(number)
        classes.append(labels[category])
        crowd.append(flag)
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)
    where = np.array(owner, np.int64)
    done, complaints, notes = shapes.finish(sizes[where])
    for index, text in complaints.items():
        _skip(table, ids[index], owner[index], text)
    for index, text in notes:
        table.say(
            "note",
            "outline",
            f"annotation {ids[index]!r} {text}",
            image=table.image_ids[owner[index]],
            annotation=ids[index],
        )
    keep = np.array([i for i in range(len(owner)) if i not in complaints], np.int64)
    order = keep[np.argsort(where[keep], kind="stable")]
    table.shapes = done.take(order)
    table.owner = where[order]
    table.labels = np.array(classes, np.int64)[order]
    table.ids = [ids[i] for i in order]
    table.crowd = np.array(crowd, bool)[order]
    table.rows = np.array(chosen, np.int64)[order]
    extents = table.shapes.extents(sizes[table.owner])
    _measures(table, entries, extents, sizes)
    if table.keypoint_names is not None:
        _keypoints(table, entries)


def _measures(table: Table, entries: list[Any], extents: np.ndarray, sizes: np.ndarray) -> None:
    """Boxes and areas: the file's where they make sense, else those of the masks."""
    count = len(table.ids)
    given = np.full((count, 4), np.nan)
    areas = np.full(count, np.nan)
    absent = np.zeros(count, bool)
    for index, row in enumerate(table.rows.tolist()):
        box = entries[row].get("bbox")
        absent[index] = box is None
        if isinstance(box, list) and len(box) == 4:
            given[index] = [number_of(v) for v in box]
        area = number_of(entries[row].get("area"))
        if area > 0:
            areas[index] = area
    height, width = sizes[table.owner].T if count else (np.zeros(0), np.zeros(0))
    areas[~(areas <= 1.01 * height * width)] = np.nan
    with np.errstate(invalid="ignore", over="ignore"):
        boxes = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], 1)
        good = np.isfinite(boxes).all(1) & (given[:, 2:] > 0).all(1)
        limits = np.stack([width, height, width, height], 1)
        clipped = np.clip(boxes, 0, limits)
        both = np.maximum(
            0, np.minimum(clipped[:, 2:], extents[:, 2:]) - np.maximum(clipped[:, :2], extents[:, :2])
        ).prod(1)
        union = (clipped[:, 2:] - clipped[:, :2]).prod(1) + (extents[:, 2:] - extents[:, :2]).prod(1) - both
        # Annotators differ by a pixel or two, which is much for a small object; another place or size is a mistake.
        astray = (np.abs(clipped - extents).max(1) > 3) & (both < 0.5 * union)
    wrong = ~good | astray
    table.boxes = np.where(wrong[:, None], extents, boxes)
    table.areas = areas
    for index in np.flatnonzero(wrong & ~absent).tolist():
        row = int(table.rows[index])
        table.say(
            "note",
            "box",
            f"annotation {table.ids[index]!r} has the bbox {shorten(entries[row]['bbox'])}, not that of its mask",
            "the box of the mask is taken",
            image=table.image_ids[int(table.owner[index])],
            annotation=table.ids[index],
        )
    for index in np.flatnonzero(np.isnan(areas)).tolist():
        value = entries[int(table.rows[index])].get("area")
        if value is not None:
            table.say(
                "note",
                "area",
                f"annotation {table.ids[index]!r} has the area {shorten(value)}, which cannot be",
                "the area of the mask is taken",
                image=table.image_ids[int(table.owner[index])],
                annotation=table.ids[index],
            )


def _keypoints(table: Table, entries: list[Any]) -> None:
    """COCO writes keypoints as pixel indices: the middle of pixel 3 is 3.5 in our frame. Unlabelled ones are
    all zero."""
    keypoints = table.keypoint_names or ()
    points = np.zeros((len(table.ids), len(keypoints), 3), np.float32)
    for index, row in enumerate(table.rows.tolist()):
        given = entries[row].get("keypoints")
        if given is None:
            continue
        values = np.array([number_of(v) for v in given]) if isinstance(given, list) else np.zeros(0)
        marks = values[2::3]
        labelled = marks > 0
        if (
            len(values) != 3 * len(keypoints)
            or not np.isin(marks, (0, 1, 2)).all()
            or not np.isfinite(values.reshape(-1, 3)[labelled]).all()
        ):
            table.say(
                "note",
                "keypoints",
                f"annotation {table.ids[index]!r} has keypoints that are not {len(keypoints)} times x, y and 0, 1 or 2",
                "they are left out, the object stays",
                image=table.image_ids[int(table.owner[index])],
                annotation=table.ids[index],
            )
            continue
        places = values.reshape(-1, 3)[labelled]
        points[index, labelled] = places + np.array([0.5, 0.5, 0])
    table.keypoints = points


def _skip(table: Table, number: int | str, place: int | None, sentence: str) -> None:
    on = "" if place is None else f" on {table.files[place]!r}"
    image = None if place is None else table.image_ids[place]
    about = f"annotation {number!r}{on} {sentence}"
    table.say("skip", "annotation", about, "it is left out", image=image, annotation=number)


# ---- values ------------------------------------------------------------------------------------------------------


def inside(name: str) -> str | None:
    """The file name as a plain relative path with "/"; None where it is absolute or climbs out of its folder.

    Backslashes separate, as they do where such names are written; "a/../b" is "b", whether or not there is an "a".
    """
    windows = PureWindowsPath(name)
    if "\0" in name or windows.drive or windows.root or PurePosixPath(name).is_absolute():
        return None
    parts: list[str] = []
    for part in name.replace("\\", "/").split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) or None


def identity(value: Any) -> int | str | None:
    """An id, exact: whole numbers and strings as they are, 3.0 as 3; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else None
    return value if isinstance(value, (int, str)) else None


def whole(value: Any) -> int | None:
    """A whole number, also from "3" or 3.0; None for anything else."""
    number = identity(value)
    if isinstance(number, str):
        text = number.strip()
        return int(text) if text.removeprefix("-").isdecimal() and len(text) < 40 else None
    return number


def number_of(value: Any) -> float:
    """A number, also from "3.5"; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def shorten(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def lookup(asked: Any, position: dict[int | str, int | None]) -> int | str | None:
    """The image id that is meant: exactly, or "1" for 1 and 1 for "1" where only that exists."""
    number = identity(asked)
    if number is None or number in position:
        return number
    other = whole(number) if isinstance(number, str) else str(number)
    return other if other in position else None


def _length(value: Any) -> int | None:
    number = whole(value)
    return number if number is not None and 0 < number < 1 << 31 else None


def flag_of(value: Any) -> bool | None:
    """0 or 1 as False or True, nothing as False; None for anything else."""
    if value is None:
        return False
    number = number_of(int(value) if isinstance(value, bool) else value)
    return None if number not in (0.0, 1.0) else number == 1.0

"""COCO JSON files: what instance, keypoint and panoptic annotations have in common. Used by `coco` and `panoptic`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from maskwright.data.table import ImageEntry, Table, Verify, add_images
from maskwright.data.values import parse_id, parse_int, parse_length, relative_path
from maskwright.errors import DataError
from maskwright.files import write_json

KINDS = ("instances", "person_keypoints", "panoptic")  # names of COCO's annotation files, followed by _SPLIT.json
_OTHER_KINDS = ("captions", "stuff", "image_info")  # files of COCO without objects

_EXPECTED = "expected a COCO data set with the keys images, annotations and categories"


# ---- files ---------------------------------------------------------------------------------------------------------


def annotation_file(folder: Path, kind: str, split: str) -> Path | None:
    """Return KIND_SPLIT.json of a data set folder, from its subfolder "annotations" or the folder itself."""
    for place in (folder / "annotations", folder):
        if (place / f"{kind}_{split}.json").is_file():
            return place / f"{kind}_{split}.json"
    return None


def annotation_files(folder: Path, kind: str) -> list[Path]:
    """Return all files KIND_*.json of a data set folder, one for each split."""
    files: dict[str, Path] = {}
    for place in (folder / "annotations", folder):
        for path in sorted(place.glob(f"{kind}_*.json")):
            files.setdefault(path.name, path)
    return list(files.values())


def unnamed_files(folder: Path) -> list[Path]:
    """Return the JSON files of the subfolder "annotations" whose names are not COCO's."""
    return [
        p for p in sorted((folder / "annotations").glob("*.json")) if not p.stem.startswith((*KINDS, *_OTHER_KINDS))
    ]


def split_of(path: Path, kind: str) -> str:
    """Return the split of a file KIND_SPLIT.json."""
    return path.stem.removeprefix(f"{kind}_")


def is_panoptic(path: Path) -> bool:
    """Return whether the name of a file says that it is a COCO panoptic file."""
    return path.stem.startswith("panoptic")


# ---- reading -------------------------------------------------------------------------------------------------------


def start_table(
    path: Path, images: Path | None, verify: Verify | None
) -> tuple[Table, dict[int | str, int | None], dict[int, int]]:
    """Read the categories and images of a COCO file.

    Args:
        path: The file.
        images: The folder that file names are relative to; None: searched for in the usual places.
        verify: Number of images whose headers are read; see `add_images`.

    Returns:
        The table without annotations; the position of each image id in it, None for images that cannot be used; and
        the label of each category id. All are empty if the table is not usable.
    """
    table = Table(path, images or path.parent)
    raw = _load(table)
    if raw is None:
        table.usable = False
        return table, {}, {}
    table.raw = raw
    labels = _read_categories(table, raw["categories"])
    return table, _read_images(table, raw["images"], images, verify), labels


def _load(table: Table) -> dict[str, Any] | None:
    """The parsed file; None, with a finding, if it is not a COCO data set."""
    try:
        text = table.path.read_bytes()
        if not text.strip():
            table.add_finding("error", "file", f"the file is empty ({len(text)} bytes)", _EXPECTED)
            return None
        raw = json.loads(text.decode("utf-8-sig"))
    except FileNotFoundError:
        table.add_finding("error", "file", "no such file", _EXPECTED)
        return None
    except OSError as error:
        table.add_finding("error", "file", f"cannot be read ({error.strerror})", _EXPECTED)
        return None
    except UnicodeDecodeError as error:
        table.add_finding("error", "file", f"not UTF-8 text (byte {error.start})", _EXPECTED)
        return None
    except json.JSONDecodeError as error:
        truncated = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        what = "truncated JSON" if truncated else "invalid JSON"
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        table.add_finding("error", "file", f"{what}: {where}", "export the file again")
        return None
    except (ValueError, RecursionError) as error:
        table.add_finding("error", "file", f"JSON that cannot be parsed ({error})", _EXPECTED)
        return None
    if isinstance(raw, list):
        results = raw and isinstance(raw[0], dict) and {"image_id", "category_id"} & set(raw[0])
        what = "contains COCO results, not a data set" if results else "contains a list, not an object"
        table.add_finding("error", "file", what, _EXPECTED)
        return None
    if not isinstance(raw, dict):
        table.add_finding("error", "file", f"contains a value of type {type(raw).__name__}, not an object", _EXPECTED)
        return None
    for key in ("images", "annotations", "categories"):
        if key not in raw:
            table.add_finding("error", "key", f"key {key!r} is missing", _EXPECTED)
        elif not isinstance(raw[key], list):
            what = f"{key!r} must be a list, got a value of type {type(raw[key]).__name__}"
            table.add_finding("error", "key", what, _EXPECTED)
    return None if table.findings else raw


def _read_categories(table: Table, entries: list[Any]) -> dict[int, int]:
    """Category id -> label; labels follow the ids in ascending order."""
    names: dict[int, str] = {}
    keypoints: list[list[str]] = []
    for row, entry in enumerate(entries):
        number = parse_int(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            table.add_finding("error", "category", f"categories[{row}] has no integer id", "add one")
            continue
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            name = f"category {number}" if name is None else str(name)
            table.add_finding("note", "category", f"category {number} has no name", f"{name!r} is used")
        if number in names and names[number] != name:
            what = f"category id {number} is used for both {names[number]!r} and {name!r}"
            table.add_finding("error", "category", what, "give each class its own id")
            continue
        if number in names:
            what = f"category {number} ({name!r}) is listed more than once"
            table.add_finding("note", "category", what, "one entry is used")
            continue
        names[number] = name
        points = entry.get("keypoints")
        if isinstance(points, list) and points:
            keypoints.append([str(p) for p in points])
    if not names and not table.findings:
        table.add_finding("error", "category", "'categories' is empty", "list each class with an id and a name")
    order = sorted(names)
    table.classes, table.category_ids = _unique_names(table, names, order), tuple(order)
    if keypoints:
        longest = max(keypoints, key=len)
        table.keypoint_names = tuple(longest)
        if any(points != longest for points in keypoints):
            table.add_finding("note", "category", "categories list different keypoints", "the longest list is used")
    return {number: label for label, number in enumerate(order)}


def _unique_names(table: Table, names: dict[int, str], order: list[int]) -> tuple[str, ...]:
    """Class names in the order of the ids; the id is added to a name that is used more than once."""
    first_id: dict[str, int] = {}
    classes: list[str] = []
    for number in order:
        name = names[number]
        if name in first_id:
            distinct = f"{name} ({number})"
            what = f"categories {first_id[name]} and {number} have the same name {name!r}"
            table.add_finding("note", "category", what, f"both are kept; the second is renamed to {distinct!r}")
            name = distinct
        first_id.setdefault(name, number)
        classes.append(name)
    return tuple(classes)


def _read_images(
    table: Table, entries: list[Any], images: Path | None, verify: Verify | None
) -> dict[int | str, int | None]:
    """Image id -> position in the table; None for images that cannot be used."""
    position: dict[int | str, int | None] = {}
    kept: list[ImageEntry] = []
    repeated: set[int | str] = set()
    for row, entry in enumerate(entries):
        number = parse_id(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            table.add_finding("skip", "image", f"images[{row}] has no valid id", "the image is skipped")
            continue
        if number in position:
            if number not in repeated:
                table.add_finding("error", "image", f"two images share id {number!r}", "give each image its own id")
            repeated.add(number)
            continue
        position[number] = None
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            what = f"image {number!r} has no 'file_name'"
            table.add_finding("skip", "image", what, "the image is skipped", image=number)
            continue
        file = relative_path(name)
        if file is None:
            what = f"image {number!r} has file name {name!r}, which is outside the image folder; it was not opened"
            table.add_finding("error", "path", what, "specify a path inside the folder", image=number)
            continue
        kept.append(ImageEntry(row, number, file, parse_length(entry.get("height")), parse_length(entry.get("width"))))
    kept = [entry for entry in kept if entry.id not in repeated]
    table.folder = images if images is not None else _find_folder(table.path, [entry.file for entry in kept])
    position.update(add_images(table, kept, verify))
    if entries and not table.files and not table.findings_with("error"):
        table.add_finding("error", "image", f"none of the {len(entries)} images can be used", "see the other findings")
    return position


def _find_folder(path: Path, files: list[str]) -> Path:
    """The folder of the images of an annotation file: the first usual place that contains one of the first files."""
    split = path.stem.rsplit("_", 1)[-1]
    parents = [path.parent, path.parent.parent]
    roots = parents[::-1] if path.parent.name == "annotations" else parents
    candidates = [root / part for root in roots for part in (split, f"images/{split}", "images", "")]
    for candidate in candidates:
        if any((candidate / file).is_file() for file in files[:20]):
            return candidate
    return next((c for c in candidates if c.is_dir()), path.parent)


# ---- writing -------------------------------------------------------------------------------------------------------


def coco_categories(
    classes: Sequence[str],
    category_ids: Sequence[int],
    stuff: Sequence[str] | None = None,
    keypoints: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return COCO's list of categories.

    Args:
        classes: Class names.
        category_ids: The id of each class.
        stuff: Those classes that are regions; adds "isthing" unless None.
        keypoints: Names of keypoints, added to every category unless None.

    Returns:
        One dictionary for each class.
    """
    entries: list[dict[str, Any]] = []
    for number, name in zip(category_ids, classes, strict=True):
        entry: dict[str, Any] = {"id": int(number), "name": name}
        if stuff is not None:
            entry["isthing"] = int(name not in stuff)
        if keypoints is not None:
            entry["keypoints"] = list(keypoints)
        entries.append(entry)
    return entries


def image_entry(number: int | str, file: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return COCO's entry of an image; `size` is H, W."""
    return {"id": number, "file_name": file, "height": size[0], "width": size[1]}


def write_coco_json(
    path: Path,
    images: Iterable[dict[str, Any]],
    annotations: Iterable[dict[str, Any]],
    categories: Iterable[dict[str, Any]],
    **others: Any,
) -> Path:
    """Write a COCO file atomically.

    Args:
        path: The file.
        images: Entries of images.
        annotations: Entries of annotations.
        categories: Entries of categories.
        **others: Further keys, such as `info`.

    Returns:
        The path.

    Raises:
        DataError: If the file cannot be written.
    """
    content = {
        **others,
        "images": list(images),
        "annotations": list(annotations),
        "categories": list(categories),
    }
    return write_json(path, content, DataError)


def strict_json(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an entry that are strict JSON, without the long lists.

    Python's parser accepts NaN and Infinity, which JSON does not have.
    """

    def valid(value: Any) -> bool:
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            return False
        return True

    long = ("images", "annotations", "categories", "segmentation")
    return {k: v for k, v in entry.items() if k not in long and valid(v)}

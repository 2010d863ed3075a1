"""COCO JSON files: what instance, keypoint and panoptic annotations have in common. Used by `coco` and `panoptic`."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from maskwright.data import splits
from maskwright.data.exchange.files import json_kind
from maskwright.data.findings import first_few
from maskwright.data.image_folder import locate_images
from maskwright.data.image_names import is_file, listed_name
from maskwright.data.table import ImageEntry, Table, Verify, add_images
from maskwright.data.values import LONGEST_NAME, clean_name, parse_id, parse_int, parse_length, shortened
from maskwright.errors import DataError
from maskwright.files import write_json

Entry = dict[str, Any]

KINDS = ("instances", "person_keypoints", "panoptic")  # names of COCO's annotation files, followed by _SPLIT.json
_OTHER_KINDS = ("captions", "stuff", "image_info")  # files of COCO without objects
PICTURES = "pictures.json"  # what `predict` writes about the images and classes of its results
ROBOFLOW = "_annotations.coco.json"  # the name of the annotation file in each split's folder

_EXPECTED = "expected a COCO data set with the keys images, annotations and categories"


# ---- files ---------------------------------------------------------------------------------------------------------


def annotation_files(folder: Path, kind: str) -> dict[str | None, Path]:
    """Return the annotation files of a data set folder.

    Args:
        folder: The folder of a data set, or of one of its splits.
        kind: One of `KINDS`.

    Returns:
        The file of each split; key None is a file that is not divided into splits and serves as any. KIND_SPLIT.json
        in the subfolder "annotations" or the folder itself. Of instances also SPLIT/_annotations.coco.json (Roboflow),
        annotations/SPLIT.json and lvis_v1_SPLIT.json; the only other JSON file with the keys of COCO if there is no
        other (Label Studio's result.json), and an only file whose split is not one of train, val and test.
    """
    files: dict[str | None, Path] = {}
    places = (folder / "annotations", folder)
    for place in places:
        for path in sorted(place.glob(f"{kind}_*.json")):
            files.setdefault(_undivided(path.stem.removeprefix(f"{kind}_")), path)
    if kind != "instances":
        return files
    for path in sorted(folder.glob(f"*/{ROBOFLOW}")):
        files.setdefault(path.parent.name, path)
    for place in places:
        for path in sorted(place.glob("*.json")):
            name = path.stem.removeprefix("lvis_v1_").removeprefix("lvis_v0.5_")
            named = splits.kind_of(name) is not None and not path.stem.startswith((*KINDS, *_OTHER_KINDS))
            if named and json_kind(path) is None:
                files.setdefault(name, path)
    if not files:
        others = unnamed_files(folder)
        if len(others) == 1:
            files[None] = others[0]
    if len(files) == 1:  # a name such as instances_default.json or instances_polygons.json divides nothing
        files = {name if name is not None and splits.kind_of(name) else None: path for name, path in files.items()}
    return files


def fitting_files(folder: Path, kind: str, split: str) -> list[tuple[str | None, Path]]:
    """Return the splits of a data set folder that `split` refers to, and their files; more than one is ambiguous."""
    files = annotation_files(folder, kind)
    names = splits.fitting(split, [name for name in files if name is not None])
    return [(name, files[name]) for name in names] or [(None, path) for name, path in files.items() if name is None]


def unnamed_files(folder: Path) -> list[Path]:
    """Return the files of a data set folder that hold COCO annotations although their names are not COCO's.

    Those of the subfolder "annotations"; if there are none, those of the folder itself with COCO's keys.
    """

    def other(path: Path) -> bool:
        foreign = path.stem.startswith((*(f"{kind}_" for kind in KINDS), *_OTHER_KINDS)) or json_kind(path) is not None
        return path.stem in KINDS or not (foreign or path.name == PICTURES)

    inside = [p for p in sorted((folder / "annotations").glob("*.json")) if other(p)]
    return inside or [p for p in sorted(folder.glob("*.json")) if other(p) and has_keys(p)]


def has_keys(path: Path) -> bool:
    """Return whether a JSON file is an object with COCO's keys, by its first 64 kB.

    The key "categories" alone is not enough if the file is shorter: notes.json of Label Studio's YOLO exports has it.
    """
    if not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError:
        return False
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return False
    keys = (b'"images"', b'"annotations"', *((b'"categories"',) if len(head) == 1 << 16 else ()))
    return any(key in head for key in keys)


def has_videos(path: Path) -> bool:
    """Return whether a JSON file lists clips instead of images (YouTube-VIS), by its first and last 64 kB."""
    if not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            tail = file.read(1 << 16)
    except OSError:
        return False
    keys = (b'"videos"', b'"file_names"', b'"segmentations"')
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and any(key in head or key in tail for key in keys)


def _undivided(split: str) -> str | None:
    """The name of a split; None for CVAT's "default", which stands for no division."""
    return None if split == "default" else split


def is_panoptic(path: Path) -> bool:
    """Return whether the name of a file says that it is a COCO panoptic file."""
    return path.stem.startswith("panoptic")


# ---- reading -------------------------------------------------------------------------------------------------------


def start_table(
    path: Path, images: Path | None, verify: Verify | None, content: dict[str, Any] | None = None
) -> tuple[Table, dict[int | str, int | None], dict[int, int]]:
    """Read the categories and images of a COCO file.

    Args:
        path: The file.
        images: The folder that file names are relative to; None: searched for in the usual places.
        verify: Number of images whose headers are read; see `add_images`.
        content: The content of the file, if it has been read.

    Returns:
        The table without annotations; the position of each image id in it, None for unusable images; and the
        label of each category id. All are empty if the table is not usable.
    """
    table = Table(path, images or path.parent)
    raw = _load(table) if content is None else content
    if raw is None:
        table.usable = False
        return table, {}, {}
    table.raw = raw
    labels = _read_categories(table, raw["categories"])
    return table, _read_images(table, raw["images"], images, verify), labels


def _load(table: Table) -> dict[str, Any] | None:
    """The parsed file; None, with a finding, if it is not a COCO data set."""
    try:
        if stat.S_ISFIFO(table.path.stat().st_mode):  # opening it would wait for its other end
            table.add_finding("error", "file", "is a named pipe, not a file", _EXPECTED)
            return None
        text = table.path.read_bytes()
        if not text.strip():
            table.add_finding("error", "file", f"the file is empty ({len(text)} bytes)", _EXPECTED)
            return None
        repeated = RepeatedKeys()
        raw = json.loads(text.decode("utf-8-sig"), object_pairs_hook=repeated.collect)
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
        table.add_finding("error", "file", f"invalid JSON ({error})", _EXPECTED)
        return None
    if isinstance(raw, list):
        items = cast(list[Any], raw)
        results = items and isinstance(items[0], dict) and {"image_id", "category_id"} & set(cast(Entry, items[0]))
        what = "contains COCO results, not a data set" if results else "contains a list, not an object"
        table.add_finding("error", "file", what, _EXPECTED)
        return None
    if not isinstance(raw, dict):
        table.add_finding("error", "file", f"contains a value of type {type(raw).__name__}, not an object", _EXPECTED)
        return None
    content = cast(Entry, raw)
    for key in ("images", "annotations", "categories"):
        if key not in content:
            table.add_finding("error", "key", f"key {key!r} is missing", _EXPECTED)
        elif not isinstance(content[key], list):
            what = f"{key!r} must be a list, got a value of type {type(content[key]).__name__}"
            table.add_finding("error", "key", what, _EXPECTED)
    repeated.report(table, content)
    return None if table.findings_with("error") else content


class RepeatedKeys:
    """Finds keys that occur twice in one JSON object, of which Python's parser keeps the last one."""

    def __init__(self) -> None:
        self._same: Counter[str] = Counter()
        self._different: Counter[str] = Counter()
        self._objects: dict[int, tuple[dict[str, Any], list[tuple[str, Any]]]] = {}

    def collect(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return an object; the `object_pairs_hook` of `json.loads`. Of several lists, one that is not empty counts."""
        entry = dict(pairs)
        if len(entry) == len(pairs):
            return entry
        values: dict[str, list[Any]] = {}
        for key, value in pairs:
            values.setdefault(key, []).append(value)
        for key, several in values.items():
            filled = [value for value in several if value not in ([], None)] or several[:1]
            entry[key] = filled[-1]
            if len(several) > 1:
                same = all(_text(value) == _text(filled[0]) for value in filled)
                (self._same if same else self._different)[key] += 1
        return entry

    def report(self, table: Table, raw: dict[str, Any]) -> None:
        """Add a finding for each key: an error if its values differ."""
        for key, count in self._different.items():
            where = "at the top level" if key in raw else f"in {count} objects"
            what = f"key {key!r} occurs more than once {where}, with different values"
            table.add_finding("error", "key", what, "keep one of them, or join them; a JSON parser keeps only the last")
        for key in self._same.keys() - self._different.keys():
            where = "at the top level" if key in raw else f"in {self._same[key]} objects"
            table.add_finding(
                "note", "key", f"key {key!r} occurs more than once {where}", "its values are the same or empty"
            )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _read_categories(table: Table, entries: list[Any]) -> dict[int, int]:
    """Category id -> label; labels follow the ids in ascending order."""
    names: dict[int, str] = {}
    keypoints: list[list[str]] = []
    unnamed: list[int] = []
    cleaned: list[str] = []
    for row, value in enumerate(entries):
        entry: Entry = cast(Entry, value) if isinstance(value, dict) else {}
        number = parse_int(entry.get("id"))
        if number is None:
            table.add_finding("error", "category", f"categories[{row}] has no integer id", "add one")
            continue
        given = entry.get("name")
        name = clean_name("" if given is None else str(given))
        if not name:
            name = f"category {number}"
            unnamed.append(number)
        elif name != given:
            cleaned.append(shortened(given, 40))
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
            keypoints.append([str(p) for p in cast(list[Any], points)])
    if not names and not table.findings_with("error"):
        table.add_finding("error", "category", "'categories' is empty", "list each class with an id and a name")
    if len(unnamed) == 1:
        what = f"category {unnamed[0]} has no name"
        table.add_finding("note", "category", what, f"{f'category {unnamed[0]}'!r} is used")
    elif unnamed:
        what = f"{len(unnamed)} of {len(names)} categories have no name: {first_few(unnamed)}"
        table.add_finding("note", "category", what, f"{f'category {unnamed[0]}'!r} and so on are used")
    if cleaned:
        what = f"{len(cleaned)} of {len(names)} class names are not one line of text of at most {LONGEST_NAME} letters"
        advice = "line breaks and surrounding blanks are removed, and the rest is cut off"
        table.add_finding("note", "category", f"{what}: {', '.join(cleaned[:3])}", advice)
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
    taken = set(names.values())
    renamed: list[tuple[int, int, str, str]] = []
    for number in order:
        name = names[number]
        if name in first_id:
            distinct = f"{name} ({number})"
            while distinct in taken:
                distinct += "'"
            renamed.append((first_id[name], number, name, distinct))
            taken.add(distinct)
            name = distinct
        first_id.setdefault(name, number)
        classes.append(name)
    if len(renamed) == 1:
        first, second, name, distinct = renamed[0]
        what = f"categories {first} and {second} have the same name {name!r}"
        table.add_finding("note", "category", what, f"both are kept; the second is renamed to {distinct!r}")
    elif renamed:
        what = (
            f"{len(renamed)} of {len(order)} categories have the name of another: {first_few([r[2] for r in renamed])}"
        )
        table.add_finding("note", "category", what, f"all are kept; they are renamed to {renamed[0][3]!r} and so on")
    folded: dict[str, list[str]] = {}
    for name in dict.fromkeys(names[number] for number in order):
        folded.setdefault("".join(name.casefold().split()), []).append(name)
    similar = [pair for pair in folded.values() if len(pair) > 1]
    if similar:
        shown = "; ".join(" and ".join(repr(name) for name in pair) for pair in similar[:3])
        what = f"{sum(map(len, similar))} class names differ only in case or blanks: {shown}"
        table.add_finding("note", "category", what, "they are separate classes; give them one name if they are one")
    return tuple(classes)


def _read_images(
    table: Table, entries: list[Any], images: Path | None, verify: Verify | None
) -> dict[int | str, int | None]:
    """Image id -> position in the table; None for unusable images."""
    position: dict[int | str, int | None] = {}
    kept: list[ImageEntry] = []  # with names as listed
    repeated: dict[int | str, list[str]] = {}  # file names of images that share an id
    first: dict[int | str, Entry] = {}
    copies: list[int | str] = []
    for row, value in enumerate(entries):
        entry: Entry = cast(Entry, value) if isinstance(value, dict) else {}
        number = parse_id(entry.get("id"))
        if number is None:
            table.add_finding("skip", "image", f"images[{row}] has no valid id", "the image is skipped")
            continue
        if number in position:
            keys = ("file_name", "height", "width")
            if all(entry.get(key) == first[number].get(key) for key in keys):
                copies.append(number)
            else:
                repeated.setdefault(number, [str(first[number].get("file_name"))]).append(str(entry.get("file_name")))
            continue
        position[number] = None
        first[number] = entry
        name = listed_name(entry)
        if name is None:
            what = f"image {number!r} has no 'file_name'"
            table.add_finding("skip", "image", what, "the image is skipped", image=number)
            continue
        kept.append(ImageEntry(row, number, name, parse_length(entry.get("height")), parse_length(entry.get("width"))))
    _report_repeated(table, repeated, copies, len(entries))
    kept = [entry for entry in kept if entry.id not in repeated]
    position.update(add_images(table, locate_images(table, kept, images, verify), verify))
    if entries and not table.files and not table.findings_with("error"):
        table.add_finding("error", "image", f"none of the {len(entries)} images can be used", "see the other findings")
    return position


def _report_repeated(table: Table, repeated: dict[int | str, list[str]], copies: list[int | str], total: int) -> None:
    """Add findings for image ids that occur more than once."""
    if copies:
        what = f"{len(copies)} of {total} entries of images occur twice: {first_few(copies)}"
        table.add_finding("note", "image", what, "each is used once")
    if len(repeated) == 1:
        number, files = next(iter(repeated.items()))
        what = f"{'two' if len(files) == 2 else len(files)} images share id {number!r}: {first_few(files)}"
        table.add_finding("error", "image", what, "give each image its own id")
    elif repeated:
        number, files = next(iter(repeated.items()))
        what = f"{len(repeated)} ids are shared by several images, such as {number!r} by {first_few(files)}"
        table.add_finding("error", "image", what, "give each image its own id, and its annotations that image_id")


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

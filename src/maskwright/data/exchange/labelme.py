"""LabelMe: one JSON file for each image, beside it, with shapes that have a label, points and a group."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from maskwright.data.exchange import outlines
from maskwright.data.exchange.collecting import (
    ClassNames,
    Collector,
    matches_of,
    new_table,
    run_length_code,
    split_in_path,
    unwanted,
)
from maskwright.data.exchange.files import (
    FileProblem,
    add_file_problem,
    as_dict,
    as_list,
    files_below,
    is_image_name,
    json_kind,
    read_json,
    read_lines,
    shown_path,
)
from maskwright.data.exchange.writing import (
    CROWD,
    HOLES,
    OVERLAPS,
    PARTS,
    SCORES,
    ImageFiles,
    Item,
    Part,
    boxes_of,
    crops_of,
    crowd_of,
    items,
    labels_of,
    number,
    outlines_of,
    present,
    write_text_file,
)
from maskwright.data.findings import first_few
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.image_names import is_file
from maskwright.data.images import MAX_PIXELS
from maskwright.data.table import Table
from maskwright.data.values import parse_flag, parse_length, relative_path, shortened
from maskwright.errors import DataError
from maskwright.files import json_bytes, write_bytes
from maskwright.structures import Instances, rle

NAME = "LabelMe"
LAYOUT = "a JSON file for each image (LabelMe)"

IGNORED = ("__ignore__", "_background_")  # labels that are no classes
_LISTS = ("labels.txt", "class_names.txt", "classes.txt")
_OUTLINES = ("polygon", "rotation", "oriented_rectangle")
_NOT_AREAS = ("point", "points", "line", "linestrip")


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find LabelMe files in a folder and its subfolders, or recognize one file."""
    path = Path(source)
    if unwanted(request):
        return []
    if path.is_file():
        fits = path.suffix.lower() == ".json" and json_kind(path) == "labelme"
        return [Match(str(path), CERTAIN, path.name)] if fits else []
    if not path.is_dir():
        return []
    counts: dict[str | None, int] = {}
    for file in _json_files(path):
        if json_kind(path / file) == "labelme":
            split = split_in_path(file)
            counts[split] = counts.get(split, 0) + 1
    found = {split: f"{count} LabelMe files{f' in {split}' if split else ''}" for split, count in counts.items()}
    return matches_of(found, request, CERTAIN, lambda split: str(path))


def _json_files(root: Path) -> list[str]:
    return list(files_below(root, lambda name: name.lower().endswith(".json")))


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _File:
    """One file.

    Attributes:
        path: The file.
        image: Name of its image, relative to the root, as listed.
        size: H, W as listed.
        shapes: Its shapes.
        embedded: Whether the image is in the file.
    """

    path: Path
    image: str
    size: tuple[int, int] | None
    shapes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    embedded: bool = False


def read(match: Match, request: Request) -> Table:
    """Read the LabelMe files of one split."""
    path = Path(match.location)
    root = path if path.is_dir() else path.parent
    table = new_table(path, root, "/".join(filter(None, [root.resolve().name, match.split])))
    files: list[_File] = []
    labels: set[str] = set()
    for file in _json_files(root) if path.is_dir() else [path.name]:
        inside = not path.is_dir() or split_in_path(file) == match.split
        parsed = _read_file(table, root, file, report=inside)
        if parsed is None:
            continue
        labels |= {label for shape in parsed.shapes if isinstance(label := shape.get("label"), str) and label.strip()}
        if inside:
            files.append(parsed)
    names = ClassNames(_listed_names(table, root), labels - set(IGNORED))
    names.fill(table)
    collector = Collector(table, request)
    _place(collector, files)
    for row, file in enumerate(files):
        if row in collector.positions:
            _add_shapes(collector, row, file, names)
    _report_ignored(table, files)
    if path.is_dir() and request.images is None:
        _report_images(table, match.split)
    collector.finish()
    if not files and not table.findings_with("error"):
        table.add_finding("error", "file", "none of its JSON files can be used", "see the other findings")
        table.usable = False
    return table


def _report_images(table: Table, split: str | None) -> None:
    """Add a note about images without a JSON file, in the folders of those that have one."""
    used = set(table.files)
    folders = {file.rpartition("/")[0] for file in used}
    others = [
        file
        for file in files_below(table.folder, is_image_name)
        if file not in used and file.rpartition("/")[0] in folders and split_in_path(file) == split
    ]
    embedded = set(table.raw.get("embedded", {}).values())
    others = [file for file in others if file not in embedded]
    if others:
        what = f"{len(others)} images have no JSON file: {first_few(others)}"
        table.add_finding("note", "missing", what, "they are not used; save a file without shapes to use them")


def _listed_names(table: Table, root: Path) -> list[str]:
    """The names of a labels.txt."""
    for path in (root / name for name in _LISTS):
        if is_file(path):
            try:
                return [name for name in read_lines(path) if name not in IGNORED]
            except FileProblem as problem:
                add_file_problem(table, path, problem)
    return []


def _read_file(table: Table, root: Path, file: str, report: bool) -> _File | None:
    """One parsed file; None, with a finding, if it is not a LabelMe file."""
    path = root / file
    if json_kind(path) not in ("labelme", None):
        return None
    try:
        raw = as_dict(read_json(path))
    except FileProblem as problem:
        if report:
            add_file_problem(table, path, problem, "error" if path == table.path else "skip")
        return None
    if not isinstance(raw.get("shapes"), list):
        if report and json_kind(path) == "labelme":
            what, advice = f"{file} has no list 'shapes'", "its image is skipped; export the file again"
            table.add_finding("error" if path == table.path else "skip", "file", what, advice)
        return None
    height, width = parse_length(raw.get("imageHeight")), parse_length(raw.get("imageWidth"))
    name = raw.get("imagePath")
    folder = file.rpartition("/")[0]
    listed = name if isinstance(name, str) and name else path.stem + ".jpg"
    # Relative to the file; LabelMe also writes ..\images\1.jpg, which may be inside of the data set.
    inside = relative_path(f"{folder}/{listed}") if relative_path(listed) is not None or folder else None
    image = inside if inside is not None and not _is_absolute(listed) else listed
    shapes = [cast(dict[str, Any], s) for s in as_list(raw["shapes"]) if isinstance(s, dict)]
    lost = len(as_list(raw["shapes"])) - len(shapes)
    if lost and report:
        table.add_finding("skip", "annotation", f"{file} has {lost} shapes that are not objects", "they are skipped")
    size = None if height is None or width is None else (height, width)
    return _File(path, image, size, shapes, isinstance(raw.get("imageData"), str) and bool(raw["imageData"]))


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "\\")) or name[1:3] in (":\\", ":/")


def _place(collector: Collector, files: Sequence[_File]) -> None:
    """Find the images; those that are only embedded are one finding, which `check --fix` repairs."""
    table = collector.table
    only_embedded = [
        file
        for file in files
        if file.embedded
        and not is_file((collector.request.images or table.folder) / (relative_path(file.image) or "-"))
    ]
    found = _embedded_elsewhere(table, only_embedded) if only_embedded else []
    if found:
        names = first_few([shown_path(table, file.path) for file in found])
        what = f"{len(found)} of {len(files)} images exist only in their JSON files (imageData): {names}"
        advice = "save them as image files beside the JSON files, as `maskwright check --fix` does"
        table.add_finding("error", "embedded", what, advice, repaired=True)
        table.raw["embedded"] = {file.path: file.image for file in found}
    kept = [file for file in files if file not in found]
    rows = [row for row, file in enumerate(files) if file not in found]
    collector.place_images([file.image for file in kept], [file.size for file in kept])
    collector.positions = {rows[row]: position for row, position in collector.positions.items()}


def _embedded_elsewhere(table: Table, files: Sequence[_File]) -> list[_File]:
    """Those of the files whose images are not elsewhere in the folder under the same name."""
    names = {name.rpartition("/")[2].lower() for name in files_below(table.folder, lambda n: not n.endswith(".json"))}
    return [file for file in files if file.image.replace("\\", "/").rpartition("/")[2].lower() not in names]


# ---- shapes --------------------------------------------------------------------------------------------------------


def _add_shapes(collector: Collector, row: int, file: _File, names: ClassNames) -> None:
    """Add the objects of one file; shapes of one label and group are parts of one object."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, shape in enumerate(file.shapes):
        group = shape.get("group_id")
        own = (place,) if group is None else (str(group), shape.get("label"))
        groups.setdefault(own, []).append(place)
    where = shown_path(collector.table, file.path)
    size = collector.size(row) or (1, 1)
    for members in groups.values():
        label = file.shapes[members[0]].get("label")
        if label in IGNORED:
            continue
        name = f"{where}: shapes[{members[0]}]"
        rings: list[list[float]] = []
        codes: list[dict[str, Any]] = []
        failed = False
        if not isinstance(label, str) or not label.strip():
            collector.skip(name, row, f"has label {shortened(label)}; expected the name of a class")
            continue
        for place in members:
            part = _part(file.shapes[place], size)
            if isinstance(part, str):
                collector.skip(f"{where}: shapes[{place}]", row, part, _kind_of_problem(part))
                failed = True
            elif isinstance(part, dict):
                codes.append(part)
            else:
                rings.append(part)
        if not rings and not codes and failed:
            continue
        crowd = any(parse_flag(as_dict(file.shapes[n].get("flags")).get("crowd")) for n in members)
        collector.add(row, names.label(label), merged(rings, codes, size), name, crowd)


def _kind_of_problem(text: str) -> str | None:
    return text if "shape type" in text else None


def merged(
    rings: list[list[float]], codes: Sequence[dict[str, Any]], size: tuple[int, int]
) -> list[Any] | dict[str, Any] | None:
    """Return the union of outlines and run-length codes as one segmentation."""
    if not codes:
        return rings or None
    if len(codes) == 1 and not rings:
        return codes[0]
    from maskwright.structures import Masks, polygons

    parts = [code["counts"].encode("ascii") for code in codes]
    if rings:
        parts.append(polygons.fill(polygons.validated(rings, size), size, "union"))
    counts = Masks("rle", parts, size).union().rle()[0]["counts"]
    return {"size": list(size), "counts": counts.decode("ascii")}


def _part(shape: dict[str, Any], size: tuple[int, int]) -> list[float] | dict[str, Any] | str:
    """The outline or run-length code of a shape, or what is wrong with it."""
    kind = shape.get("shape_type") or "polygon"
    given = as_list(shape.get("points"))
    if kind in _NOT_AREAS or kind not in (*_OUTLINES, "rectangle", "circle", "mask"):
        return f"has the shape type {shortened(kind, 30)}; expected polygon, rectangle, circle or mask"
    if not all(isinstance(p, (list, tuple)) and len(cast(list[Any], p)) == 2 for p in given):
        return "has points that are not pairs x, y"
    values = outlines.numbers([value for point in given for value in cast(list[Any], point)])
    if values is None:
        return "has a coordinate that is not a finite number"
    points = np.array(values).reshape(-1, 2)
    if kind == "mask":
        return _mask(shape, points, size)
    if kind in _OUTLINES or (kind == "rectangle" and len(points) == 4):
        return points.ravel().tolist() if len(points) >= 3 else f"has {len(points)} points; at least 3 are needed"
    if len(points) != 2:
        return f"is a {kind} of {len(points)} points; expected 2"
    (x0, y0), (x1, y1) = points.tolist()
    if kind == "rectangle":
        return outlines.rectangle(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    radius = math.hypot(x1 - x0, y1 - y0)
    return outlines.ellipse(x0, y0, radius, radius) if 0 < radius < 1e7 else "is a circle without a radius"


def _mask(shape: dict[str, Any], points: np.ndarray, size: tuple[int, int]) -> dict[str, Any] | str:
    """The run-length code of a mask shape: a PNG of its pixels from the first point to the second, inclusive."""
    if len(points) != 2:
        return f"is a mask with {len(points)} points; expected two corners"
    plane = decoded_plane(shape.get("mask"))
    if isinstance(plane, str):
        return plane
    low = np.floor(points.min(0) + 0.5)
    expected = np.abs(points[1] - points[0]) + 1
    if np.abs(np.array(plane.shape[::-1]) - expected).max() > 1.5:
        wide, tall = expected.round().astype(int).tolist()
        return f"is a mask of {plane.shape[1]} x {plane.shape[0]} pixels for corners {wide} x {tall} pixels apart"
    if np.abs(low).max() > 1e7:
        return "is a mask far outside its image"
    if not plane.any():
        return "is a mask without foreground pixels"
    code = run_length_code(plane, int(low[0]), int(low[1]), size)
    return code if rle.area(code["counts"].encode()) else f"is a mask outside its image of {size[1]} x {size[0]}"


def decoded_plane(text: Any) -> np.ndarray | str:
    """Return the bool plane (h, w) of a base64 image, or what is wrong with it."""
    from PIL import Image

    if not isinstance(text, str):
        return "is a mask without pixels (mask is missing)"
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"is a mask of {image.width} x {image.height} pixels, more than {MAX_PIXELS}"
            plane = np.asarray(image.convert("L") if image.mode not in ("1", "L", "P", "I;16") else image)
    except (binascii.Error, ValueError):
        return "is a mask that is not base64 text"
    except Exception as error:  # decoders raise exceptions of any class on damaged data
        return f"is a mask whose PNG is damaged ({error})"
    return plane != 0


def _report_ignored(table: Table, files: Sequence[_File]) -> None:
    """A note about regions that are not classes."""
    count = sum(shape.get("label") in IGNORED for file in files for shape in file.shapes)
    if count:
        what = f"{count} shapes have the label {' or '.join(IGNORED)}"
        table.add_finding("note", "class", what, "they are no objects and are omitted")


def rescued(table: Table, folder: Path) -> Table | None:
    """Return a table of the images that are only embedded in their files, which are written to a folder.

    Args:
        table: A table that `read` has returned.
        folder: The folder; created if needed.

    Returns:
        The table; None if there are none, or they are no images.
    """
    embedded = cast(dict[Path, str], table.raw.get("embedded") or {})
    for place_number, path in enumerate(embedded):
        try:
            content = as_dict(read_json(path))
            data = base64.b64decode(content["imageData"], validate=True)
        except (FileProblem, binascii.Error, ValueError):
            continue
        suffix = ".png" if data.startswith(b"\x89PNG") else ".jpg"
        name = f"{path.stem}{suffix}"
        place = folder / f"{place_number}" if (folder / name).exists() else folder
        place.mkdir(parents=True, exist_ok=True)
        write_bytes(place / name, data, DataError, sync=False)
        content |= {"imagePath": name, "imageData": None}
        write_bytes(place / f"{path.stem}.json", json_bytes(strict_json_values(content)), DataError, sync=False)
    if not folder.is_dir():
        return None
    result = read(Match(str(folder), CERTAIN, ""), Request())
    return result if result.files and result.usable else None


def strict_json_values(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with None for NaN and Infinity, which JSON does not have."""
    return cast(dict[str, Any], json.loads(json.dumps(content), parse_constant=lambda _: None))


# ---- writing -------------------------------------------------------------------------------------------------------

HOLDS = frozenset({OVERLAPS, PARTS, HOLES, CROWD, SCORES})
BOXES_BECOME = "they become rectangles"


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write a JSON file beside each image, in a folder for each split, and labels.txt.

    Objects with holes become shapes of type mask, other objects polygons with one group for the parts of an object.
    """
    for part in parts:
        prefix = f"{part.split}/" if part.split else ""
        names = images.names(part, prefix)
        for item in items(part):
            name = names[item.index]
            images.copy(part, item.index, prefix + name)
            content: dict[str, Any] = {
                "version": "5.4.1",
                "flags": {},
                "shapes": list(_shapes(item, part.dataset.classes)),
                "imagePath": name,
                "imageData": None,
                "imageHeight": item.size[0],
                "imageWidth": item.size[1],
            }
            path = folder / f"{prefix}{name.rpartition('.')[0]}.json"
            write_bytes(path, json_bytes(content, indent=2), DataError, sync=False)
    names = [*IGNORED, *parts[0].dataset.classes]
    write_text_file(folder / "labels.txt", "".join(f"{name}\n" for name in names))


def _shapes(item: Item, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The shapes of an image."""
    objects = item.objects
    crowd, labels, there = crowd_of(objects), labels_of(objects), present(objects)
    found = None if objects.masks is None else outlines_of(objects)
    for position, (x0, y0, x1, y1) in enumerate(boxes_of(objects)):
        if not there[position]:
            continue
        shape: dict[str, Any] = {
            "label": classes[labels[position]],
            "group_id": None,
            "description": "",
            "flags": {"crowd": True} if crowd[position] else {},
            "mask": None,
        }
        if item.scores is not None:
            shape |= {"score": round(item.scores[position], 5), "description": f"score {item.scores[position]:.3f}"}
        if found is None:
            yield {**shape, "shape_type": "rectangle", "points": [[x0, y0], [x1, y1]]}
        elif found[position].holes:
            yield {**shape, **_mask_shape(objects, position)}
        else:
            group = position + 1 if len(found[position].rings) > 1 else None
            for ring in found[position].rings:
                points = [[number(x), number(y)] for x, y in ring.tolist()]
                yield {**shape, "group_id": group, "shape_type": "polygon", "points": points}


def _mask_shape(objects: Instances, position: int) -> dict[str, Any]:
    """A shape of type mask: its corners, inclusive, and a PNG of the pixels between them."""
    from PIL import Image

    windows, crops = crops_of(objects[position : position + 1])
    x0, y0, x1, y1 = windows[0]
    data = io.BytesIO()
    Image.fromarray(crops[0].astype(np.uint8) * 255).convert("1").save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode("ascii")
    return {"shape_type": "mask", "points": [[x0, y0], [x1 - 1, y1 - 1]], "mask": text}

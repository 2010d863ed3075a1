"""Cityscapes: gtFine/SPLIT/CITY/*_instanceIds.png with the images leftImg8bit/SPLIT/CITY/*_leftImg8bit.png.

A pixel of an instance map is 1000 * class + number for an object, and the class alone for regions and for groups of
objects that are not separated, which are read as crowd regions. Without the map, the polygons of the JSON file are
drawn, later ones over earlier ones, as Cityscapes' own scripts draw them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskwright.data.exchange import outlines
from maskwright.data.exchange.collecting import Collector, chosen_splits, new_table, run_length_code, unwanted
from maskwright.data.exchange.files import (
    FileProblem,
    add_file_problem,
    as_dict,
    as_list,
    files_below,
    read_json,
    shown_path,
)
from maskwright.data.exchange.planes import Plane, ahead, crops_of, read_plane
from maskwright.data.exchange.writing import (
    CROWD,
    HOLES,
    PARTS,
    ImageFiles,
    Item,
    Part,
    crowd_of,
    items,
    labels_of,
    outlines_of,
    painted,
    present,
    write_plane,
)
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.image_names import is_file
from maskwright.data.table import Table
from maskwright.errors import DataError
from maskwright.files import json_bytes, write_bytes

NAME = "Cityscapes"
LAYOUT = "gtFine/{split} and leftImg8bit/{split} (Cityscapes)"

THINGS = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
NOT_EVALUATED = {29: "caravan", 30: "trailer"}  # objects that Cityscapes neither trains on nor evaluates
# Names and ids of the other labels, https://github.com/mcordts/cityscapesScripts (helpers/labels.py).
STUFF = {
    "unlabeled": 0, "ego vehicle": 1, "rectification border": 2, "out of roi": 3, "static": 4, "dynamic": 5,
    "ground": 6, "road": 7, "sidewalk": 8, "parking": 9, "rail track": 10, "building": 11, "wall": 12,
    "fence": 13, "guard rail": 14, "bridge": 15, "tunnel": 16, "pole": 17, "polegroup": 18,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "license plate": -1,
}  # fmt: skip
_KINDS = ("gtFine", "gtCoarse")
_MARK = re.compile(r"_(gtFine|gtCoarse)_(instanceIds\.png|polygons\.json)$")


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find the splits of gtFine, or of gtCoarse if there is no other."""
    root = Path(source)
    if unwanted(request):
        return []
    kind = next((kind for kind in _KINDS if (root / kind).is_dir()), None)
    if kind is None:
        return []
    splits = [p.name for p in sorted((root / kind).iterdir()) if p.is_dir() and any(p.glob(f"*/*_{kind}_*"))]
    return [
        Match(str(root / kind / split), CERTAIN, f"{kind}/{split}", split)
        for split in chosen_splits(splits, request)
        if split is not None
    ]


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Objects:
    """The objects of an image.

    Attributes:
        found: Class, number (None: a group) and run-length code of each.
        others: Counts of what is omitted, by description.
        problem: What is wrong with the file.
    """

    found: list[tuple[int | str, int | None, dict[str, Any]]] = field(
        default_factory=list[tuple[int | str, int | None, dict[str, Any]]]
    )
    others: Counter[str] = field(default_factory=Counter[str])
    problem: FileProblem | None = None


def read(match: Match, request: Request) -> Table:
    """Read one split."""
    folder = Path(match.location)
    root = folder.parent.parent
    table = new_table(root, root, f"{root.resolve().name}/{match.split}")
    files: dict[str, str] = {}  # the map of each image, or its polygons
    for file in files_below(folder, lambda name: _MARK.search(name) is not None, 2):
        stem = _MARK.sub("", file)
        if file.endswith(".png") or stem not in files:
            files[stem] = file
    stems = sorted(files)
    collector = Collector(table, request)
    collector.place_images([_image_file(request.images or root, match.split or "", stem) for stem in stems])
    rows = sorted(collector.positions)

    def load(row: int) -> _Objects:
        return _load(folder / files[stems[row]], collector.size(row) or (1, 1))

    numbers = dict(THINGS)
    names = {name: number for number, name in THINGS.items()}
    others: Counter[str] = Counter()
    waiting: list[tuple[int, int, dict[str, Any], str, bool]] = []
    for row, objects in zip(rows, ahead(load, rows), strict=True):
        path = folder / files[stems[row]]
        if objects.problem is not None:
            add_file_problem(table, path, objects.problem, "skip", image=row + 1)
            collector.exclude(row)
        others.update(objects.others)
        for count, (label, number, code) in enumerate(objects.found):
            if isinstance(label, str):
                label = names.setdefault(label, 1 + max(numbers))
                numbers.setdefault(label, next(name for name, n in names.items() if n == label))
            elif label not in numbers:
                numbers[label] = f"class {label}"
            what = f"object {count}" if number is None else f"object {label * 1000 + number}"
            waiting.append((row, label, code, f"{shown_path(table, path)}: {what}", number is None))
    ids = sorted(numbers)
    table.classes, table.category_ids = tuple(numbers[n] for n in ids), tuple(ids)
    labels = {number: label for label, number in enumerate(ids)}
    for row, label, code, name, crowd in waiting:
        collector.add(row, labels[label], code, name, crowd)
    if others:
        listed = ", ".join(f"{name} ({count})" for name, count in others.most_common(8))
        table.add_finding("note", "class", f"has objects of classes that Cityscapes does not evaluate: {listed}",
                          "they are omitted")  # fmt: skip
    return collector.finish()


def _image_file(root: Path, split: str, stem: str) -> str:
    """The image of a name such as "aachen/aachen_000000_000019", relative to the root."""
    base = f"leftImg8bit/{split}/{stem}_leftImg8bit"
    return next((base + s for s in (".png", ".jpg", ".jpeg") if is_file(root / (base + s))), base + ".png")


def _load(path: Path, size: tuple[int, int]) -> _Objects:
    try:
        if path.suffix == ".json":
            return _drawn(as_dict(read_json(path)), size)
        return _numbered(read_plane(path, size), size)
    except FileProblem as problem:
        return _Objects(problem=problem)


def _numbered(plane: Plane, size: tuple[int, int]) -> _Objects:
    """The objects of an instance map."""
    result = _Objects()
    for value, crop, x0, y0 in crops_of(plane, (0,)):
        label, number = (value, None) if value < 1000 else divmod(value, 1000)
        if label in THINGS or (number is not None and label not in NOT_EVALUATED):
            result.found.append((label, number, run_length_code(crop, x0, y0, size)))
        elif label in NOT_EVALUATED:
            result.others[NOT_EVALUATED[label]] += 1
    return result


# ---- polygons ------------------------------------------------------------------------------------------------------


def _drawn(content: dict[str, Any], size: tuple[int, int]) -> _Objects:
    """The objects of a file of polygons; later ones cover earlier ones."""
    from PIL import Image, ImageDraw

    height, width = content.get("imgHeight"), content.get("imgWidth")
    if (height, width) != size:
        raise FileProblem(
            f"is for an image of {width} x {height}, but its image is {size[1]} x {size[0]}; restore the image"
        )
    result = _Objects()
    canvas = Image.new("I", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    labels: list[tuple[int | str, bool] | None] = []
    things = {name: number for number, name in THINGS.items()}
    for entry in as_list(content.get("objects")):
        shape = as_dict(entry)
        if shape.get("deleted"):
            continue
        name = str(shape.get("label"))
        group = name.endswith("group") and name not in STUFF
        name = name.removesuffix("group") if group else name
        points = [value for point in as_list(shape.get("polygon")) for value in as_list(point)]
        values = outlines.numbers(points)
        if values is None or len(values) < 6 or len(values) % 2 or np.abs(values).max() > 1e6:
            result.others[f"a polygon of {len(points) // 2} points ({name})"] += 1
            continue
        if name in NOT_EVALUATED.values():
            result.others[name] += 1
        omitted = name in STUFF or name in NOT_EVALUATED.values()
        labels.append(None if omitted else (things.get(name, name), group))
        draw.polygon([tuple(pair) for pair in np.array(values).reshape(-1, 2).tolist()], fill=len(labels))
    plane = np.asarray(canvas).astype(np.int64)
    count: Counter[int | str] = Counter()
    for value, crop, x0, y0 in crops_of(plane, (0,)):
        known = labels[value - 1]
        if known is None:
            continue
        label, group = known
        result.found.append((label, None if group else count[label], run_length_code(crop, x0, y0, size)))
        count[label] += not group
    return result


# ---- writing -------------------------------------------------------------------------------------------------------

HOLDS = frozenset({PARTS, HOLES, CROWD})
CLASSES_ONLY = tuple(THINGS.values())
MOST_PER_CLASS = 999
_CITY = "images"


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write gtFine and leftImg8bit; objects of other classes than Cityscapes' are left out."""
    numbers = {name: number for number, name in THINGS.items()}
    for part in parts:
        split = part.split or "train"
        names = images.names(part, split)
        known = [numbers.get(name) for name in part.dataset.classes]
        for item in items(part):
            stem, _, suffix = names[item.index].rpartition(".")
            images.copy(part, item.index, f"leftImg8bit/{split}/{_CITY}/{stem}_leftImg8bit.{suffix}")
            base = folder / "gtFine" / split / _CITY
            values, shapes = _map(item, known)
            write_plane(base / f"{stem}_gtFine_instanceIds.png", values)
            write_plane(base / f"{stem}_gtFine_labelIds.png", _labels(values))
            content = {"imgHeight": item.size[0], "imgWidth": item.size[1], "objects": shapes}
            write_bytes(base / f"{stem}_gtFine_polygons.json", json_bytes(content), DataError, sync=False)


def _labels(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """The class of each pixel of an instance map."""
    return np.where(values >= 1000, values // 1000, values).astype(np.uint8)


def _map(item: Item, known: Sequence[int | None]) -> tuple[Any, list[dict[str, Any]]]:
    """The instance map of an image, and the outer borders of its objects."""
    objects = item.objects
    if objects.masks is None or not len(objects):
        return np.zeros(item.size, np.uint16), []
    kept = [n for n, there in enumerate(present(objects)) if there and known[labels_of(objects)[n]] is not None]
    objects = objects[kept]
    crowd = crowd_of(objects)
    result = painted(objects, crowd)
    values = np.zeros(len(objects) + 1, np.uint16)
    count: Counter[int] = Counter()
    for position, label in enumerate(labels_of(objects)):
        number = known[label] or 0
        if crowd[position]:
            values[position + 1] = number
        elif result.lost[position] < result.areas[position] and count[number] < MOST_PER_CLASS:
            values[position + 1] = number * 1000 + count[number]
            count[number] += 1
    shapes: list[dict[str, Any]] = []
    borders = outlines_of(objects)
    order: list[int] = np.argsort(-result.areas, kind="stable").tolist()
    for position in order:
        number = known[labels_of(objects)[position]] or 0
        name = THINGS[number] + ("group" if crowd[position] else "")
        for ring in borders[position].rings:
            shapes.append({"label": name, "polygon": [[round(x), round(y)] for x, y in ring.tolist()]})
    return values[result.plane], shapes

"""CVAT for images 1.1: the shapes of all images in one XML file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from maskwright.data.exchange import outlines
from maskwright.data.exchange.collecting import (
    ClassNames,
    Collector,
    matches_of,
    new_table,
    run_length_code,
    unwanted,
)
from maskwright.data.exchange.files import Element, FileProblem, add_file_problem, read_xml, shown_path
from maskwright.data.exchange.labelme import merged
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
    present,
    write_text_file,
)
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.image_names import is_file
from maskwright.data.images import MAX_PIXELS
from maskwright.data.table import Table
from maskwright.data.values import parse_int, parse_length, shortened
from maskwright.structures import rle

NAME = "CVAT for images"
LAYOUT = "annotations.xml (CVAT for images)"

_AREAS = ("polygon", "mask", "box", "ellipse")
_NOT_AREAS = ("polyline", "points", "cuboid", "skeleton", "tag")
_CROWD = ("is_crowd", "iscrowd", "crowd")
_SUBSET = re.compile(rb"<image\b[^>]*\bsubset=\"([^\"]*)\"")


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find annotations.xml in a folder, or recognize a file by its root element."""
    path = Path(source)
    if unwanted(request):
        return []
    file = path if path.is_file() else _file_in(path) if path.is_dir() else None
    if file is None or not is_cvat(file):
        return []
    reason = file.name if path.is_file() else file.relative_to(path).as_posix()
    found = {subset: f"{reason}{f', subset {subset}' if subset else ''}" for subset in _subsets(file)}
    return matches_of(found or {None: reason}, request, CERTAIN, lambda _: str(file))


def _file_in(folder: Path) -> Path | None:
    """annotations.xml, or the only other XML file of a folder that is one of CVAT."""
    if is_file(folder / "annotations.xml"):
        return folder / "annotations.xml"
    others = [p for p in sorted(folder.glob("*.xml"))[:100] if is_cvat(p)]
    return others[0] if len(others) == 1 else None


def is_cvat(path: Path) -> bool:
    """Return whether an XML file has the root element of CVAT."""
    if path.suffix.lower() != ".xml" or not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    head = head.replace(b"\0", b"")
    return b"<annotations" in head or (not head.strip() and path.name == "annotations.xml")


def _subsets(path: Path) -> list[str | None]:
    """The subsets of the images of a file; [None] if they have none."""
    try:
        found = {match.decode("utf-8", "replace") for match in _SUBSET.findall(path.read_bytes())}
    except OSError:
        return []
    named = sorted(name for name in found if name and name.lower() != "default")
    return [*named] if named else [None]


# ---- reading -------------------------------------------------------------------------------------------------------


def read(match: Match, request: Request) -> Table:
    """Read one subset of a CVAT file."""
    path = Path(match.location)
    table = new_table(path, _image_folder(path), "/".join(filter(None, [path.resolve().parent.name, match.split])))
    try:
        root = read_xml(path)
    except FileProblem as problem:
        add_file_problem(table, path, problem)
        table.usable = False
        return table
    if root.tag != "annotations":
        table.add_finding("error", "file", f"has the root element <{root.tag}>", "expected <annotations> (CVAT)")
        table.usable = False
        return table
    if root.all("track") and not root.all("image"):
        what = "has tracks: it is an export 'CVAT for video'"
        table.add_finding("error", "file", what, "export the task as 'CVAT for images 1.1'")
        table.usable = False
        return table
    every = root.all("image")
    images = [e for e in every if match.split is None or e.attributes.get("subset", "") == match.split]
    listed = [text for e in _labels(root) if (text := e.text_at("name"))]
    used = {shape.attributes.get("label", "") for image in every for shape in image.all(*_AREAS)}
    names = ClassNames(listed, used - {""})
    names.fill(table)
    if not images:
        table.add_finding("error", "file", "has no images", "export the task again")
        table.usable = False
        return table
    collector = Collector(table, request)
    files = [image.attributes.get("name", "") or f"line {image.line}" for image in images]
    collector.place_images([_inside(table, file) for file in files], [_size(image) for image in images])
    others: Counter[str] = Counter()
    for row, image in enumerate(images):
        others.update(child.tag for child in image.children if child.tag not in _AREAS)
        if row in collector.positions:
            _add_shapes(collector, row, image, names)
    unused = {tag: count for tag, count in others.items() if tag != "tag"}
    if unused:
        listed_shapes = ", ".join(f"{count} {tag}" for tag, count in sorted(unused.items()))
        what = f"has shapes that are no areas: {listed_shapes}"
        table.add_finding("skip", "annotation", what, f"they are skipped; expected {', '.join(_AREAS)}")
    return collector.finish()


def _image_folder(path: Path) -> Path:
    folder = path.parent / "images"
    return folder if folder.is_dir() else path.parent


def _inside(table: Table, file: str) -> str:
    """The name of an image relative to the folder: a leading "images/" is the folder itself."""
    if table.folder.name == "images" and file.startswith("images/") and not is_file(table.folder / file):
        return file.removeprefix("images/")
    return file


def _size(image: Element) -> tuple[int, int] | None:
    height, width = parse_length(image.attributes.get("height")), parse_length(image.attributes.get("width"))
    return None if height is None or width is None else (height, width)


def _labels(root: Element) -> list[Element]:
    """The labels of a task, a project or a job; not those of the parts of skeletons."""
    for kind in ("task", "project", "job"):
        found = root.find(f"meta/{kind}/labels")
        if found is not None:
            return [e for e in found.all("label") if not e.text_at("parent")]
    return []


# ---- shapes --------------------------------------------------------------------------------------------------------


def _add_shapes(collector: Collector, row: int, image: Element, names: ClassNames) -> None:
    """Add the objects of an image; shapes of one label and group are parts of one object."""
    groups: dict[tuple[Any, ...], list[Element]] = {}
    for place, shape in enumerate(image.all(*_AREAS)):
        group, label = shape.attributes.get("group_id"), shape.attributes.get("label")
        alone = group is None or not group.strip() or parse_int(group) == 0
        groups.setdefault((place,) if alone else (group, label), []).append(shape)
    size = collector.size(row) or (1, 1)
    for shapes in groups.values():
        label = shapes[0].attributes.get("label", "")
        name = _name(collector.table, shapes[0])
        if not label.strip():
            collector.skip(name, row, "has no label")
            continue
        rings: list[list[float]] = []
        codes: list[dict[str, Any]] = []
        for shape in shapes:
            part = _part(shape, size)
            if isinstance(part, str):
                collector.skip(_name(collector.table, shape), row, part)
            elif isinstance(part, dict):
                codes.append(part)
            else:
                rings.append(part)
        if rings or codes:
            crowd = any(_is_crowd(shape) for shape in shapes)
            collector.add(row, names.label(label), merged(rings, codes, size), name, crowd)


def _name(table: Table, shape: Element) -> str:
    return f"{shown_path(table, table.path)}:{shape.line}"


def _is_crowd(shape: Element) -> bool:
    return any(
        e.attributes.get("name", "").lower() in _CROWD and e.text.strip().lower() in ("true", "1")
        for e in shape.all("attribute")
    )


def _part(shape: Element, size: tuple[int, int]) -> list[float] | dict[str, Any] | str:
    """The outline or run-length code of a shape, or what is wrong with it."""
    given = shape.attributes
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in given.get("points", "").split(";") if pair.strip()]
        if not all(len(pair) == 2 for pair in pairs):
            return "has points that are not pairs x,y"
        values = outlines.numbers([value for pair in pairs for value in pair])
        if values is None:
            return "has a coordinate that is not a finite number"
        return values if len(pairs) >= 3 else f"has a polygon of {len(pairs)} points; at least 3 are needed"
    if shape.tag == "mask":
        return _mask(given, size)
    keys = ("xtl", "ytl", "xbr", "ybr") if shape.tag == "box" else ("cx", "cy", "rx", "ry")
    values = outlines.numbers([given.get(key) for key in keys])
    turned = outlines.numbers([given.get("rotation", 0)])
    if values is None or turned is None:
        return f"is a {shape.tag} without the numbers {', '.join(keys)}"
    a, b, c, d = values
    if shape.tag == "box":
        return outlines.rectangle(a, b, c, d, turned[0]) if c > a and d > b else "is a box without area"
    if not (0 < c < 1e7 and 0 < d < 1e7):
        return "is an ellipse without area"
    return outlines.ellipse(a, b, c, d, float(np.deg2rad(turned[0])))


def _mask(given: dict[str, str], size: tuple[int, int]) -> dict[str, Any] | str:
    """The run-length code of a mask: runs of background and foreground, row by row, in a window of the image."""
    left, top = parse_int(given.get("left")), parse_int(given.get("top"))
    width, height = parse_length(given.get("width")), parse_length(given.get("height"))
    if left is None or top is None or width is None or height is None:
        return "is a mask without left, top, width and height"
    if width * height > MAX_PIXELS:
        return f"is a mask of {width} x {height} pixels, more than {MAX_PIXELS}"
    runs = [parse_int(value) for value in given.get("rle", "").split(",")]
    if any(run is None or run < 0 for run in runs):
        return f"is a mask with the run lengths {shortened(given.get('rle', ''), 30)}; expected counts"
    counts = np.array(runs, np.float64)
    if counts.sum() != width * height:
        return f"is a mask with runs of {int(counts.sum())} pixels for a window of {width * height}"
    values = np.arange(len(counts)) % 2 == 1
    plane = np.repeat(values, counts.astype(np.int64)).reshape(height, width)
    if not plane.any():
        return "is a mask without foreground pixels"
    if max(abs(left), abs(top)) > 1 << 30:
        return "is a mask far outside its image"
    code = run_length_code(plane, left, top, size)
    return code if rle.area(code["counts"].encode()) else f"is a mask outside its image of {size[1]} x {size[0]}"


# ---- writing -------------------------------------------------------------------------------------------------------

HOLDS = frozenset({OVERLAPS, PARTS, HOLES, CROWD, SCORES})
BOXES_BECOME = "they become boxes, which are read as rectangles"


def write(folder: Path, parts: Sequence[Part], images: ImageFiles) -> None:
    """Write annotations.xml, with the splits as subsets, and the images in images/.

    Polygons stay polygons, with one group for the parts of an object; other masks become masks.
    """
    scored = any(item.scores is not None for part in parts for item in items(part))
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations>", "  <version>1.1</version>"]
    lines += _meta(parts, scored)
    count = 0
    for part in parts:
        prefix = f"{part.split}/" if part.split else ""
        names = images.names(part, prefix)
        for item in items(part):
            name = prefix + names[item.index]
            images.copy(part, item.index, f"images/{name}")
            subset = f" subset={quoteattr(part.split)}" if part.split else ""
            height, width = item.size
            lines.append(f'  <image id="{count}" name={quoteattr(name)}{subset} width="{width}" height="{height}">')
            lines += _shape_lines(item, part.dataset.classes)
            lines.append("  </image>")
            count += 1
    lines.append("</annotations>")
    write_text_file(folder / "annotations.xml", "\n".join(lines) + "\n")


def _meta(parts: Sequence[Part], scored: bool) -> list[str]:
    """The labels of the task, with the attributes that shapes have."""
    attributes = [("is_crowd", "checkbox", "false", "false")]
    if scored:
        attributes.append(("score", "text", "", ""))
    lines = ["  <meta>", "    <task>", "      <labels>"]
    for name in parts[0].dataset.classes:
        lines += ["        <label>", f"          <name>{escape(name)}</name>", "          <attributes>"]
        lines += [
            f"            <attribute><name>{own}</name><mutable>False</mutable><input_type>{kind}</input_type>"
            f"<default_value>{default}</default_value><values>{values}</values></attribute>"
            for own, kind, default, values in attributes
        ]
        lines += ["          </attributes>", "        </label>"]
    return [*lines, "      </labels>", "    </task>", "  </meta>"]


def _shape_lines(item: Item, classes: Sequence[str]) -> Iterator[str]:
    """The shapes of an image."""
    objects = item.objects
    crowd, labels, there = crowd_of(objects), labels_of(objects), present(objects)
    polygons = objects.masks.polygons() if objects.masks is not None and objects.masks.kind == "polygon" else None
    crops = None if objects.masks is None or polygons is not None else crops_of(objects)
    for position, (x0, y0, x1, y1) in enumerate(boxes_of(objects)):
        if not there[position]:
            continue
        start = f'label={quoteattr(classes[labels[position]])} source="auto" occluded="0"'
        inside = [f'<attribute name="is_crowd">{"true" if crowd[position] else "false"}</attribute>']
        if item.scores is not None:
            inside.append(f'<attribute name="score">{item.scores[position]:.5g}</attribute>')
        shapes: list[tuple[str, str]]
        if polygons is not None:
            rings = polygons[position]
            group = f' group_id="{position + 1}"' if len(rings) > 1 else ""
            shapes = [
                ("polygon", f'points="{";".join(f"{_text(x)},{_text(y)}" for x, y in ring.tolist())}"{group}')
                for ring in rings
            ]
        elif crops is not None:
            left, top, right, bottom = crops[0][position]
            runs = ", ".join(map(str, _row_runs(crops[1][position])))
            window = f'left="{left}" top="{top}" width="{right - left}" height="{bottom - top}"'
            shapes = [("mask", f'rle="{runs}" {window}')]
        else:
            shapes = [("box", f'xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}"')]
        for tag, given in shapes:
            yield f'    <{tag} {start} {given} z_order="0">{"".join(inside)}</{tag}>'


def _text(value: float) -> str:
    return str(number(value))


def _row_runs(plane: np.ndarray) -> list[int]:
    """Run lengths row by row, beginning with background."""
    flat = np.concatenate([[False], plane.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], edges, [plane.size]])).tolist()

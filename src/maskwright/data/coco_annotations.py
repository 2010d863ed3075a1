"""The annotations of a COCO file as columns: values are parsed and ids are looked up; nothing is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from maskwright.data.columns import Columns
from maskwright.data.findings import first_few
from maskwright.data.judging import skip_annotation
from maskwright.data.shapes import ShapesBuilder
from maskwright.data.table import Table
from maskwright.data.values import IdIndex, parse_flag, parse_float, parse_id, parse_int

_FEW = 3  # up to this many annotations with the same problem are named one by one

Entry = dict[str, Any]


def read_annotations(
    table: Table, entries: Sequence[Any], position: dict[int | str, int | None], labels: dict[int, int]
) -> tuple[Columns, dict[int, str]]:
    """Collect the annotations of a COCO file.

    Args:
        table: The table with its images and classes; findings are added.
        entries: The file's list of annotations.
        position: Position in the table of each image id; None for unusable images.
        labels: Label of each category id.

    Returns:
        The annotations that belong to an image and a class, and have a segmentation that can be parsed or none; and
        what those without have in its place, by their position in `entries`.
    """
    numbers = _numbers(table, entries)
    images = _image_ids(table, entries, numbers, position)
    categories = _labels(table, entries, numbers, labels)
    shapes = ShapesBuilder()
    rows: list[int] = []
    crowd: list[bool] = []
    changed = 0
    for row, number in numbers.items():
        if row not in images or row not in categories:
            continue
        entry, index = entries[row], images[row]
        flag = parse_flag(entry.get("iscrowd"))
        if flag is None:
            skip_annotation(table, number, index, f"has iscrowd {entry['iscrowd']!r}; expected 0 or 1")
            continue
        if parse_flag(entry.get("ignore")):
            changed += not flag
            flag = True
            table.ignored += 1
        problem = shapes.add(entry.get("segmentation"))
        if problem:
            skip_annotation(table, number, index, problem)
            continue
        rows.append(row)
        crowd.append(flag)
    if changed:
        what = f"{changed} of {len(numbers)} annotations have the flag 'ignore'"
        table.add_finding("note", "crowd", what, "they are treated as crowd regions: not learnt, and not counted")
    if shapes.nested:
        what = f"{len(shapes.nested)} of {len(rows)} outlines are lists of points [x, y] or nested too deeply"
        table.add_finding("note", "outline", f"{what}; expected x, y, x, y, ...", "they are read as polygons")
    if shapes.quoted:
        what = f"{shapes.quoted} of {len(rows)} run-length codes are Python's notation of bytes, b'...'"
        table.add_finding("note", "code", what, "they are read without the b and the quotes")
    for index, text in shapes.notes:
        number, image = numbers[rows[index]], table.image_ids[images[rows[index]]]
        what = f"annotation {number!r} {text}"
        table.add_finding("note", "outline", what, image=image, annotation=number)
    outlines, problems = shapes.finish()
    for index, text in problems.items():
        skip_annotation(table, numbers[rows[index]], images[rows[index]], text)
    kept = [cast(Entry, entries[row]) for row in rows]
    columns = Columns(
        image_index=np.array([images[row] for row in rows], np.int64),
        labels=np.array([categories[row] for row in rows], np.int64),
        ids=[numbers[row] for row in rows],
        rows=np.array(rows, np.int64),
        crowd=np.array(crowd, bool),
        boxes=_boxes(kept),
        boxed=np.array([entry.get("bbox") is not None for entry in kept], bool),
        areas=np.array([parse_float(entry.get("area")) for entry in kept], np.float64),
        sized=np.array([entry.get("area") is not None for entry in kept], bool),
        shapes=outlines,
        code_sizes=np.array(shapes.code_sizes, np.int64).reshape(-1, 2),
    )
    if problems:
        columns = columns.take(np.array([i for i in range(len(rows)) if i not in problems], np.int64))
        kept = [entries[row] for row in columns.rows.tolist()]
    _note_shared_ids(table, columns)
    if table.keypoint_names is not None:
        columns.keypoints = _keypoints(table, kept, columns)
    return columns, {rows[index]: text for index, text in shapes.absent.items()}


# ---- ids -----------------------------------------------------------------------------------------------------------


def _numbers(table: Table, entries: Sequence[Any]) -> dict[int, int | str]:
    """The id of each entry that is an object, by its position; entries without a valid one are numbered."""
    given: dict[int, int | str | None] = {}
    for row, entry in enumerate(entries):
        if isinstance(entry, dict):
            given[row] = parse_id(cast(Entry, entry).get("id"))
        else:
            what = f"annotations[{row}] has type {type(entry).__name__}, expected an object"
            table.add_finding("skip", "annotation", what, "the annotation is skipped")
    without = [row for row, number in given.items() if number is None]
    if without:
        following = 1 + max((number for number in given.values() if isinstance(number, int)), default=0)
        new = {row: following + offset for offset, row in enumerate(without)}
        given.update(new)
        what = f"{len(without)} of {len(given)} annotations have no valid id, the first is annotations[{without[0]}]"
        table.add_finding("note", "id", what, f"they are numbered from {following} on")
    return {row: number for row, number in given.items() if number is not None}


def _note_shared_ids(table: Table, columns: Columns) -> None:
    """Note annotations that have the same id; all are kept."""
    first: dict[int | str, int] = {}
    shared: list[tuple[int, int, int]] = []  # row of the first, row and position of the other
    for index, (row, number) in enumerate(zip(columns.rows.tolist(), columns.ids, strict=True)):
        if first.setdefault(number, row) != row:
            shared.append((first[number], row, index))
    if len(shared) > _FEW:
        names = first_few(list(dict.fromkeys(columns.ids[index] for _, _, index in shared)))
        what = f"{len(shared)} of {len(columns)} annotations have an id that another one has: {names}"
        table.add_finding("note", "duplicate", what, "all are kept")
        return
    for before, row, index in shared:
        number, image = columns.ids[index], table.image_ids[int(columns.image_index[index])]
        what = f"annotations[{before}] and annotations[{row}] share id {number!r}"
        table.add_finding("note", "duplicate", what, "both are kept", image=image, annotation=number)


def _image_ids(
    table: Table, entries: Sequence[Any], numbers: dict[int, int | str], position: dict[int | str, int | None]
) -> dict[int, int]:
    """Position of the image of each entry; entries of unusable images are missing."""
    index = IdIndex(position)
    found: dict[int, int] = {}
    unknown: list[int] = []
    for row in numbers:
        image = index.find(entries[row].get("image_id"))
        if image is None or image not in position:
            unknown.append(row)
        elif (place := position[image]) is not None:
            found[row] = place
    if not unknown:
        return found
    files = _by_file(table)
    named = {row: files[name] for row in unknown if (name := str(entries[row].get("image_id"))) in files}
    if named:
        what = f"{len(named)} of {len(numbers)} annotations name the file of their image in place of its id"
        table.add_finding("note", "id", what, "they are assigned by the file names")
        found.update(named)
    unknown = [row for row in unknown if row not in named]
    if _many(unknown, numbers):
        values = first_few(list(dict.fromkeys(str(entries[row].get("image_id")) for row in unknown)))
        what = (
            f"{len(unknown)} of {len(numbers)} annotations have an image_id that is not in the list of images: {values}"
        )
        listed = f"the list has {first_few(list(position))}" if position else "the list is empty"
        table.add_finding("error", "id", f"{what}; {listed}", "give each annotation the id of its image")
        table.usable = False
        return found
    for row in unknown:
        value = entries[row].get("image_id")
        skip_annotation(table, numbers[row], None, f"has image_id {value!r}, which is not in the list of images")
    return found


def _by_file(table: Table) -> dict[str, int]:
    """Position of each image by its file name, without and with suffix, where these are unambiguous."""
    names: dict[str, set[int]] = {}
    for position, file in enumerate(table.files):
        path = PurePosixPath(file)
        for name in (file, path.name, path.stem):
            names.setdefault(name, set()).add(position)
    return {name: min(places) for name, places in names.items() if len(places) == 1}


def _labels(
    table: Table, entries: Sequence[Any], numbers: dict[int, int | str], labels: dict[int, int]
) -> dict[int, int]:
    """Label of each entry; entries of unknown categories are missing."""
    names = {name: label for label, name in enumerate(table.classes)}
    found: dict[int, int] = {}
    unknown: dict[int, Any] = {}
    named = 0
    for row in numbers:
        value = entries[row].get("category_id")
        category = parse_int(value)
        if category in labels:
            found[row] = labels[category]
        elif isinstance(value, str) and value.strip() in names:
            found[row] = names[value.strip()]
            named += 1
        else:
            unknown[row] = value
    if named:
        what = f"{named} of {len(numbers)} annotations have the name of a category as category_id"
        table.add_finding("note", "category", what, "they are assigned by the names")
    if not unknown or not labels:  # without categories there is an error already
        return found
    values = Counter(str(value) for value in unknown.values())
    listed = ", ".join(f"{number} ({table.classes[label]!r})" for number, label in list(labels.items())[:8])
    what = f"{len(unknown)} of {len(numbers)} annotations have category_id {', '.join(list(values)[:5])}"
    numbers_used = {number for number, label in labels.items() if label in set(found.values())}
    if len(values) == 1 and len(labels) == 1 and not found:
        table.add_finding(
            "note", "category", f"{what}, but the only category is {listed}", "they are read as this class"
        )
        return dict.fromkeys(unknown, 0)
    if set(values) == {str(min(labels) - 1)} and len(unknown) >= 2 and max(labels) not in numbers_used:
        what += f", and none has {max(labels)}; the list has {listed}"
        advice = "if the ids count from 0 in one and from 1 in the other, all classes are shifted: correct the ids"
        table.add_finding("error", "category", what, advice)
        table.usable = False
    elif _many(list(unknown), numbers):
        what += f", which is not in the list of categories: {listed}"
        table.add_finding("error", "category", what, "add the categories, or correct the ids")
        table.usable = False
    else:
        for row, value in unknown.items():
            sentence = f"has category_id {value!r}, which is not in the list of categories"
            skip_annotation(table, numbers[row], None, sentence)
    return found


def _many(rows: Sequence[int], numbers: dict[int, int | str]) -> bool:
    """Whether so many annotations have a problem that it is one of the whole set."""
    return len(rows) == len(numbers) or (len(rows) > _FEW and len(rows) >= 0.5 * len(numbers))


# ---- values --------------------------------------------------------------------------------------------------------


def _boxes(entries: Sequence[Entry]) -> npt.NDArray[np.float64]:
    """Boxes (N, 4) as given; also from {"x": ..., "y": ..., "width": ..., "height": ...}. NaN for anything else."""
    boxes = np.full((len(entries), 4), np.nan)
    for index, entry in enumerate(entries):
        box = entry.get("bbox")
        if isinstance(box, dict):
            box = [cast(Entry, box).get(key) for key in ("x", "y", "width", "height")]
        if isinstance(box, list) and len(cast(list[Any], box)) == 4:
            boxes[index] = [parse_float(v) for v in cast(list[Any], box)]
    return boxes


def _keypoints(table: Table, entries: Sequence[Entry], columns: Columns) -> npt.NDArray[np.float32]:
    """COCO stores keypoints as pixel indices: the center of pixel 3 is at 3.5. Unlabelled keypoints become zeros."""
    names = table.keypoint_names or ()
    points = np.zeros((len(entries), len(names), 3), np.float32)
    for index, entry in enumerate(entries):
        given = entry.get("keypoints")
        if given is None:
            continue
        values = np.array([parse_float(v) for v in cast(list[Any], given)] if isinstance(given, list) else [])
        visibility = values[2::3]
        labelled = visibility > 0
        if (
            len(values) != 3 * len(names)
            or not np.isin(visibility, (0, 1, 2)).all()
            or not np.isfinite(values.reshape(-1, 3)[labelled]).all()
        ):
            number, image = columns.ids[index], table.image_ids[int(columns.image_index[index])]
            what = f"annotation {number!r} has keypoints that are not {len(names)} times x, y and 0, 1 or 2"
            advice = "its keypoints are skipped, the object is kept"
            table.add_finding("note", "keypoints", what, advice, image=image, annotation=number)
            continue
        points[index, labelled] = values.reshape(-1, 3)[labelled] + np.array([0.5, 0.5, 0])
    return points

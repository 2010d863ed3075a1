"""Judging annotations one by one: what can be used goes into the table, everything else becomes a finding.

Run after `diagnosis.diagnose`, which corrects what is wrong throughout a set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskwright.data.columns import Bools, Columns, Floats, Ints, clipped, disagree, every, some
from maskwright.data.findings import first_few
from maskwright.data.shapes import check_polygons
from maskwright.data.table import Table
from maskwright.data.values import shortened

_FEW = 3  # up to this many annotations without a mask are named one by one
_MANY = 0.2  # from this share of all boxes or areas on, invalid ones are one finding


def judge(table: Table, columns: Columns, absent: dict[int, str], given: Sequence[tuple[object, object]]) -> None:
    """Fill the annotations of a table.

    A set in which no annotation has a segmentation is read as boxes (`table.shapes` is None). In any other, annotations
    without a usable mask are skipped. Missing or invalid boxes and areas are those of the masks.

    Args:
        table: The table, with its images.
        columns: The annotations.
        absent: What annotations without a segmentation have in its place, by position.
        given: The box and the area of each annotation as the file has them, for messages.
    """
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)[columns.image_index]
    present = columns.shapes.present()
    masked = bool(present.any()) or not len(columns)
    if not masked and _boxes_only(table, columns):
        problems = _problems_of_boxes(columns, sizes, given)
    elif not masked:
        what = f"its {len(columns)} annotations have neither a segmentation nor a valid bbox"
        table.add_finding("error", "annotation", what, "add segmentations, or boxes x, y, width, height")
        return
    else:
        problems = _problems_of_masks(table, columns, sizes, absent)
    for index, text in problems.items():
        skip_annotation(table, columns.ids[index], int(columns.image_index[index]), text)
    unnamed = set(absent) - set(problems) if masked else set[int]()
    kept = np.array([i for i in range(len(columns)) if i not in problems and i not in unnamed], np.int64)
    order = kept[np.argsort(columns.image_index[kept], kind="stable")]
    columns, sizes = columns.take(order), sizes[order]
    kept_given: list[tuple[object, object]] = [given[i] for i in order.tolist()]
    table.image_index, table.labels, table.ids = columns.image_index, columns.labels, columns.ids
    table.crowd, table.rows, table.keypoints = columns.crowd, columns.rows, columns.keypoints
    table.shapes = columns.shapes if masked else None
    _set_boxes(table, columns, sizes, kept_given)
    _set_areas(table, columns, sizes, kept_given)


def skip_annotation(table: Table, number: int | str, index: int | None, sentence: str) -> None:
    """Add the finding that an annotation is skipped.

    Args:
        table: The table.
        number: Id of the annotation.
        index: Position of its image; None if it has none.
        sentence: What is wrong, without the subject.
    """
    on = "" if index is None else f" on {table.files[index]!r}"
    image = None if index is None else table.image_ids[index]
    what = f"annotation {number!r}{on} {sentence}"
    table.add_finding("skip", "annotation", what, "the annotation is skipped", image=image, annotation=number)


# ---- masks or boxes ------------------------------------------------------------------------------------------------


def _boxes_only(table: Table, columns: Columns) -> bool:
    """Whether a set without any segmentation has boxes, or keypoints that boxes can be drawn around."""
    valid = every(np.isfinite(columns.corners()))
    around = _around_keypoints(columns)
    derived = ~valid & every(np.isfinite(around))
    if not (valid | derived).any():
        return False
    if derived.any():
        low, high = around[derived, :2], around[derived, 2:]
        columns.boxes[derived] = np.concatenate([low, high - low], 1)
        columns.boxed[derived] = True
        what = f"{_of(derived)} annotations have keypoints and no valid box"
        table.add_finding("note", "box", what, "the box around the keypoints is used")
    keypoints = columns.keypoints is not None and bool((columns.keypoints[..., 2] > 0).any())
    what = f"its {len(columns)} annotations have boxes{' and keypoints' if keypoints else ''}, but no masks"
    advice = "systems of boxes can be trained on it, such as faster-rcnn or fcos; systems that need masks cannot"
    table.add_finding("note", "masks", what, advice)
    return True


def _around_keypoints(columns: Columns) -> Floats:
    """Boxes (N, 4) around the labelled keypoints; NaN for fewer than two, or a line."""
    boxes = np.full((len(columns), 4), np.nan)
    if columns.keypoints is None or not len(columns):
        return boxes
    points = columns.keypoints[..., :2].astype(np.float64)
    labelled = columns.keypoints[..., 2:] > 0
    low = np.where(labelled, points, np.inf).min(1)
    high = np.where(labelled, points, -np.inf).max(1)
    valid = every(high > low)
    boxes[valid] = np.concatenate([low, high], 1)[valid]
    return boxes


def _problems_of_boxes(columns: Columns, sizes: Floats, given: Sequence[tuple[object, object]]) -> dict[int, str]:
    """What is wrong with the boxes of annotations without masks, by position."""
    problems: dict[int, str] = {}
    corners = columns.corners()
    finite = every(np.isfinite(corners))
    inside = clipped(np.nan_to_num(corners), sizes)
    visible = every(inside[:, 2:] > inside[:, :2])
    for index in np.flatnonzero(~(finite & visible)).tolist():
        if not columns.boxed[index]:
            problems[index] = "has neither a segmentation nor a bbox"
        elif not finite[index]:
            problems[index] = f"has bbox {shortened(given[index][0])}; expected x, y and a positive width and height"
        else:
            height, width = sizes[index].astype(int)
            problems[index] = f"has bbox {shortened(given[index][0])}, outside its image of {width} x {height}"
    return problems


def _problems_of_masks(table: Table, columns: Columns, sizes: Floats, absent: dict[int, str]) -> dict[int, str]:
    """What is wrong with masks, by position. Many annotations without a mask are one finding."""
    problems = check_polygons(columns.shapes, sizes)
    coded = columns.shapes.coded
    for index in np.flatnonzero(coded & some(columns.code_sizes != sizes)).tolist():
        own, size = columns.code_sizes[index].tolist(), sizes[index].astype(int).tolist()
        if own == size[::-1]:
            problems[index] = f"has a run-length code of size {own}, that is [width, height]; expected [height, width]"
        else:
            problems[index] = f"has a run-length code of size {own}, but its image is {size} (height, width)"
    if len(absent) <= _FEW or len(absent) == len(columns):
        return {**problems, **absent}
    what = f"{len(absent)} of {len(columns)} annotations have no segmentation: {first_few(_ids(columns, absent))}"
    table.add_finding("skip", "masks", what, "the others have masks, which are required; these are skipped")
    return problems


# ---- boxes and areas -----------------------------------------------------------------------------------------------


def _set_boxes(table: Table, columns: Columns, sizes: Floats, given: Sequence[tuple[object, object]]) -> None:
    """Boxes of the file if they are plausible, otherwise those of the masks."""
    boxes = columns.corners()
    if table.shapes is None:
        table.boxes = clipped(boxes, sizes)
        return
    extents = columns.shapes.extents(sizes)
    wrong = disagree(clipped(boxes, sizes), extents)
    table.boxes = np.where(wrong[:, None], extents, boxes)
    reported = np.flatnonzero(wrong & columns.boxed)
    if len(reported) > _FEW and len(reported) > _MANY * len(columns):
        names = first_few([table.ids[i] for i in reported.tolist()])
        what = f"{len(reported)} of {len(columns)} boxes do not match their masks, those of the annotations {names}"
        table.add_finding("note", "box", what, "the boxes of the masks are used")
        return
    for index in reported.tolist():
        what = f"annotation {table.ids[index]!r} has bbox {shortened(given[index][0])}, which does not match its mask"
        _note(table, index, "box", what, "the box of the mask is used")


def _set_areas(table: Table, columns: Columns, sizes: Floats, given: Sequence[tuple[object, object]]) -> None:
    """Areas of the file if they are plausible; NaN, for those of the masks, otherwise."""
    areas = columns.areas.copy()
    areas[~((areas > 0) & (areas <= 1.01 * sizes.prod(1)))] = np.nan
    source = "mask" if table.shapes is not None else "box"
    reported = np.flatnonzero(np.isnan(areas) & columns.sized)
    if len(reported) > _FEW and len(reported) > _MANY * len(columns):
        names = first_few([table.ids[i] for i in reported.tolist()])
        what = f"{len(reported)} of {len(columns)} areas are invalid, those of the annotations {names}"
        table.add_finding("note", "area", what, f"the areas of the {'masks' if source == 'mask' else 'boxes'} are used")
        reported = reported[:0]
    for index in reported.tolist():
        what = f"annotation {table.ids[index]!r} has invalid area {shortened(given[index][1])}"
        _note(table, index, "area", what, f"the area of the {source} is used")
    table.areas = areas if table.shapes is not None else np.where(np.isnan(areas), _areas_of(table.boxes), areas)


def _areas_of(boxes: Floats) -> Floats:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _note(table: Table, index: int, kind: str, what: str, advice: str) -> None:
    """Add a note about an annotation of the table."""
    image = table.image_ids[int(table.image_index[index])]
    table.add_finding("note", kind, what, advice, image=image, annotation=table.ids[index])


def _ids(columns: Columns, positions: dict[int, str]) -> list[int | str]:
    return [columns.ids[i] for i in positions]


def _of(chosen: Bools | Ints) -> str:
    return f"{int(chosen.sum())} of {len(chosen)}"

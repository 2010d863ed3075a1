"""What is wrong with the annotations of a set throughout: one finding with its cause and its count, and a repair.

Each check looks at all annotations at once, before `judging` looks at single ones. Where the cause is certain, the
columns are corrected. A correction that changes no mask, or that the data prove, is a note; one that moves masks is an
error that `maskwright check --fix` repairs, so that nothing is trained on a guess. Where several causes are possible,
the finding names them, and the set is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from maskwright.data.columns import Bools, Columns, Ints
from maskwright.data.diagnosis_boxes import box_formats
from maskwright.data.diagnosis_codes import code_order, code_sizes
from maskwright.data.diagnosis_images import listed_sizes, repeated_files
from maskwright.data.diagnosis_orientation import orientation
from maskwright.data.diagnosis_outlines import (
    all_near_the_corner,
    outlines_and_boxes,
    outlines_beyond,
    relative_outlines,
)
from maskwright.data.findings import Cause, first_few
from maskwright.data.table import Table

_SAMPLE = 5000  # annotations whose areas are compared with their masks before all are


def diagnose(table: Table, columns: Columns) -> Columns:
    """Find and correct what is wrong with a set throughout.

    Args:
        table: A table with its images; findings are added, and `usable` becomes False if annotations cannot be
            interpreted.
        columns: Its annotations.

    Returns:
        The corrected annotations.
    """
    for check in CHECKS:
        for cause in check(table, columns):
            table.add_cause(cause)
        if not table.usable:  # the following checks need coordinates whose meaning is known
            return columns
    return _without_repetitions(table, columns)


# ---- areas ---------------------------------------------------------------------------------------------------------


def areas_of_something_else(table: Table, columns: Columns) -> Iterator[Cause]:
    """Areas that are those of the images, or in another unit than pixels."""
    if len(columns) > 2 * _SAMPLE:  # decoding all masks takes longer than everything else
        sample = columns.take(np.linspace(0, len(columns) - 1, _SAMPLE).astype(np.int64))
        if not list(_areas_of_something_else(table, sample)):
            return
    yield from _areas_of_something_else(table, columns)


def _areas_of_something_else(table: Table, columns: Columns) -> Iterator[Cause]:
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)[columns.image_index]
    whole = sizes.prod(1)
    masked = columns.shapes.present()
    boxes = columns.corners()
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        true = np.where(masked, columns.shapes.pixels(), box_areas)
        usable = (true > 0) & (columns.areas > 0) & np.isfinite(columns.areas)
        filled = usable & (np.abs(columns.areas - whole) <= 0.01 * whole)
        images = filled & (true < 0.8 * whole)
        ratio = np.where(usable, columns.areas / np.where(true > 0, true, 1), np.nan)
    count = int(usable.sum())
    source = "masks" if masked.any() else "boxes"
    advice = f"the areas of the {source} are used"
    if images.sum() >= max(2, 0.3 * count):
        _drop_areas(columns, images)
        what = f"{int(images.sum())} of {len(columns)} areas are height * width of the image, not the object's"
        yield Cause("note", "area", what, advice, repaired=True)
        usable &= ~images
    if masked.any():
        usable &= masked & ~columns.shapes.coded  # codes have a size of their own
    if usable.sum() < 3:
        return
    if masked.any() and _are_box_areas(columns, usable):
        return  # some tools write the area of the box; it is used as given, as pycocotools does
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = usable & (np.abs(np.log(ratio * whole)) < 0.3) & (columns.areas <= 1)
        if relative.sum() >= 0.5 * usable.sum() and relative.sum() >= 2:
            _drop_areas(columns, relative)
            what = f"{int(relative.sum())} of {len(columns)} areas are shares of the image, not pixels"
            yield Cause("note", "area", what, advice, repaired=True)
            return
        logs = np.log(ratio)
        middle = float(np.median(logs[usable]))
        constant = usable & (np.abs(logs - middle) < 0.15)
    # Without masks, areas may be those of masks that the file does not have: a share of the boxes.
    expected = abs(middle) <= np.log(1.5) or (not masked.any() and np.log(0.05) < middle < 0)
    if expected or constant.sum() < max(3, 0.9 * usable.sum()):
        return
    factor = float(np.exp(middle / 2))
    what = f"{int(constant.sum())} of {len(columns)} areas are {np.exp(middle):.3g} times those of the {source}"
    ends = np.where(masked[:, None], columns.shapes.extents(), boxes)[:, 2:]
    if factor > 1 and constant.sum() >= 10 and (ends[constant] * factor <= sizes[constant][:, ::-1] + 2).all():
        # Correct outlines would reach further in some of the images.
        columns.scale(constant, np.full(2, factor))
        what += f", and {'outlines' if masked.any() else 'boxes'} {factor:.3g} times as large fit into all images"
        advice = "scale the annotations, as `maskwright check --fix` does, or remove the areas if these are wrong"
        yield Cause("error", "size", f"{what}: the images were enlarged after annotation", advice, repaired=True)
        return
    _drop_areas(columns, constant)
    why = "they are in another unit than pixels"
    if factor > 1:
        why += f", or the annotations are for images {1 / factor:.3g} times as large"
    yield Cause("note", "area", f"{what}: {why}", advice, repaired=True)


def _are_box_areas(columns: Columns, usable: Bools) -> bool:
    """Whether areas are those of the boxes around the masks."""
    extents = columns.shapes.extents()
    with np.errstate(invalid="ignore", over="ignore"):
        same = np.abs(columns.areas / np.maximum((extents[:, 2:] - extents[:, :2]).prod(1), 1) - 1) < 0.05
    return bool((same & usable).sum() >= 0.9 * usable.sum())


def _drop_areas(columns: Columns, chosen: np.ndarray) -> None:
    columns.areas[chosen] = np.nan
    columns.sized[chosen] = False


# ---- flags ---------------------------------------------------------------------------------------------------------


def all_crowd(table: Table, columns: Columns) -> Iterator[Cause]:
    """Objects that an exporter has marked as crowd regions, as CVAT marks every brush mask."""
    count, crowd = len(columns), int(columns.crowd.sum())
    flagged = crowd - table.ignored  # those with a flag "ignore" have a finding of their own
    marked = "is marked crowd (iscrowd 1)" if crowd == 1 else "are marked crowd (iscrowd 1)"
    why = f"{crowd} of {count} annotations {marked}, and crowd regions are ignored in training and evaluation"
    cause = "some tools mark every brush mask or every run-length code as crowd"
    if crowd and crowd == count:
        if table.ignored:
            what = f"all {count} annotations are marked to be ignored (ignore 1 or iscrowd 1): nothing can be learnt"
            yield Cause("error", "crowd", what, "remove the flags from the objects that are to be learnt")
            return
        columns.crowd[:] = False
        advice = f"{cause}; set iscrowd to 0 for single objects, as `maskwright check --fix` does for all"
        yield Cause("error", "crowd", why, advice, repaired=True)
    elif flagged >= 3 and flagged >= 0.5 * count:
        yield Cause("note", "crowd", why, f"{cause}; set iscrowd to 0 where it is a single object")


# ---- the same object twice -----------------------------------------------------------------------------------------


def _without_repetitions(table: Table, columns: Columns) -> Columns:
    """The annotations without exact copies of others, unless these are few; a note in both cases."""
    first: dict[tuple[object, ...], int] = {}
    kept: list[int] = []
    for index, key in enumerate(columns.keys()):
        if first.setdefault((int(columns.image_index[index]), *key), index) == index:
            kept.append(index)
    copies = len(columns) - len(kept)
    if not copies:
        return columns
    originals = set(kept)
    names = first_few([columns.ids[i] for i in range(len(columns)) if i not in originals])
    what = f"{copies} of {len(columns)} annotations are exact copies of others on the same image: {names}"
    # Published sets have a few; leaving those out would change their AP.
    if copies <= 0.01 * len(columns):
        table.add_finding("note", "duplicate", what, "they are kept")
        return columns
    table.add_finding("note", "duplicate", what, "each object is read once")
    order: Ints = np.array(kept, np.int64)
    return columns.take(order)


Check = Callable[[Table, Columns], Iterator[Cause]]

# The order matters: later checks see what earlier ones have corrected.
CHECKS: tuple[Check, ...] = (
    orientation,
    listed_sizes,
    relative_outlines,
    code_order,
    code_sizes,
    outlines_and_boxes,
    outlines_beyond,
    box_formats,
    areas_of_something_else,
    all_near_the_corner,
    all_crowd,
    repeated_files,
)

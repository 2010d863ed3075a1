"""Outlines in another coordinate frame than their images: shares, another image size, x and y exchanged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maskwright.data.columns import Bools, Columns, Floats, agree, disagree, every, some
from maskwright.data.diagnosis_boxes import ENOUGH, are_shares
from maskwright.data.findings import Cause
from maskwright.data.table import Table

_FIX = "as `maskwright check --fix` does"


def relative_outlines(table: Table, columns: Columns) -> Iterator[Cause]:
    """Outlines whose coordinates are shares of the image, 0 ... 1."""
    sizes = _sizes(table, columns)
    drawn = _drawn(columns)
    extents = columns.shapes.extents()
    with np.errstate(invalid="ignore"):
        small = every(extents[:, :2] >= -0.05) & every(extents[:, 2:] <= 1.05)
    relative = drawn & small & (sizes.min(1, initial=9) > 4)
    total = int(drawn.sum())
    if relative.sum() < max(2, ENOUGH * total) and not 0 < relative.sum() == total:
        return
    columns.scale(relative, sizes[:, ::-1], boxes=False)
    what = f"{int(relative.sum())} of {total} outlines have coordinates relative to the image (0 ... 1), not pixels"
    yield Cause("note", "outline", what, "they are multiplied by its width and height", repaired=True)


def outlines_and_boxes(table: Table, columns: Columns) -> Iterator[Cause]:
    """Outlines that are elsewhere than their boxes, all by the same factor or with x and y exchanged."""
    sizes = _sizes(table, columns)
    boxes = columns.corners()
    judged = _drawn(columns) & every(np.isfinite(boxes))
    total = int(judged.sum())
    extents = columns.shapes.extents()
    wrong = judged & disagree(extents, boxes) & ~are_shares(columns, sizes, extents)
    if total < 2 or wrong.sum() < max(2, ENOUGH * total):
        return
    need = max(2, 0.5 * wrong.sum())
    plain = agree(extents, boxes)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        in_percent = agree(extents * np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], 1) / 100, boxes)
        ratios = (boxes[:, 2:] - boxes[:, :2]) / (extents[:, 2:] - extents[:, :2])
        factors = np.median(ratios[wrong], 0)
        in_scale = agree(extents * np.concatenate([factors, factors]), boxes)
    swapped = agree(extents[:, [1, 0, 3, 2]], boxes)
    if (wrong & swapped).sum() >= need:
        chosen = _throughout(columns, judged, wrong, plain, swapped)
        what = f"{int(chosen.sum())} of {total} outlines have x and y exchanged in comparison with their boxes"
        yield _decide(columns, sizes, chosen, extents, boxes, what, None)
    elif (
        (percent := wrong & in_percent).sum() >= need
        and (extents[percent] <= 101).all()
        and (boxes[percent] > 101).any()
    ):
        percent = _throughout(columns, judged, wrong, plain, in_percent)
        columns.scale(percent, sizes[:, ::-1] / 100, boxes=False)
        what = f"{int(percent.sum())} of {total} outlines are in percent of the image, as their boxes show"
        yield Cause("note", "outline", what, "they are converted to pixels", repaired=True)
    elif (wrong & in_scale).sum() >= need and (np.abs(np.log(factors)) > 0.1).any():
        chosen = _throughout(columns, judged, wrong, plain, in_scale)
        times = f"{factors[0]:.3g}"
        if abs(factors[0] / factors[1] - 1) > 0.03:
            times += f" x {factors[1]:.3g}"
        what = f"the boxes of {int(chosen.sum())} of {total} outlines are {times} times as large and as far away"
        yield _decide(columns, sizes, chosen, extents, boxes, what, factors)


def _throughout(columns: Columns, judged: Bools, wrong: Bools, plain: Bools, changed: Bools) -> Bools:
    """Which outlines a change concerns that many of the wrong ones show.

    All of them, also those that lie in their boxes before and after the change or have no box, unless some need to stay
    as they are.
    """
    unchanged = judged & plain & ~changed
    if unchanged.sum() <= 0.02 * (wrong & changed).sum() and (wrong & changed).sum() >= 0.9 * wrong.sum():
        return (judged & changed) | (_drawn(columns) & ~judged)
    return judged & changed & ~plain


def _decide(
    columns: Columns, sizes: Floats, chosen: Bools, extents: Floats, boxes: Floats, what: str, factors: Floats | None
) -> Cause:
    """Whether the outlines or the boxes are wrong: those that reach out of the images."""
    outlines_out, boxes_out = _beyond(extents, sizes)[chosen].sum(), _beyond(boxes, sizes)[chosen].sum()
    if outlines_out and not boxes_out:
        if factors is None:
            _exchange(columns, chosen, boxes=False)
        else:
            columns.scale(chosen, factors, boxes=False)
        what += ", and the boxes lie inside the images, the outlines do not"
        return Cause("error", "outline", what, f"correct the outlines, {_FIX}", repaired=True)
    if boxes_out and not outlines_out:
        columns.boxes[chosen] = np.nan
        columns.boxed[chosen] = False
        what += ", and the outlines lie inside the images, the boxes do not"
        return Cause("note", "box", what, "the boxes of the masks are used", repaired=True)
    advice = "correct the outlines or the boxes; which of them describe the images cannot be decided"
    return Cause("error", "outline", what, advice)


def outlines_beyond(table: Table, columns: Columns) -> Iterator[Cause]:
    """Outlines, with their boxes, for images of another size or with x and y exchanged, by how far they reach."""
    sizes = _sizes(table, columns)
    drawn = _drawn(columns)
    total = int(drawn.sum())
    if total < 2:
        return
    extents = columns.shapes.extents()
    limits = np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], 1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        reach = np.where(drawn[:, None], extents / limits, np.nan)
    plausible = every(np.isfinite(reach)) & every(np.abs(reach) < 100)
    high = plausible & some(reach[:, 2:] > 1.1)
    low = plausible & some(reach[:, :2] < -0.1)
    # Sets cut from larger images have outlines that continue beyond every border; these are clipped.
    if high.sum() < 2 or low.sum() > 0.25 * high.sum():
        return
    subject = f"{int(high.sum())} of {total} outlines reach out of their images"
    oblong = np.abs(np.log(sizes[:, 0] / sizes[:, 1])) > 0.05
    fits = drawn & oblong & ~_beyond(extents[:, [1, 0, 3, 2]], sizes)
    if fits.sum() >= 0.98 * total and (high.sum() >= 0.2 * total or total >= 10):
        what = f"{subject}, and all lie inside with x and y exchanged"
        if total >= 5:
            _exchange(columns, drawn)
            yield Cause("error", "outline", what, f"exchange x and y, {_FIX}", repaired=True)
        else:
            yield Cause("error", "outline", what, "exchange x and y, or restore the images that were annotated")
    elif (high & fits).sum() >= 0.98 * high.sum() and high.sum() >= max(3, 0.05 * total):
        what = f"{subject}, and lie inside with x and y exchanged; others lie inside as they are"
        yield Cause("error", "outline", what, "exchange x and y where these are exchanged")
    elif high.sum() >= 0.2 * total:
        wide, tall = reach[plausible, 2:].max(0)
        what = f"{subject}, up to {max(wide, tall):.2g} times as far as the images"
        advice = (
            "if the images were resized after annotation, restore them, or scale the annotations (where the file lists "
            "the sizes of the images that were annotated, `maskwright check --fix` does)"
        )
        yield Cause("error", "size", what, advice)


def all_near_the_corner(table: Table, columns: Columns) -> Iterator[Cause]:
    """Annotations in one corner of all images, as after enlarging the images, or if given in percent."""
    sizes = _sizes(table, columns)
    present = columns.shapes.present()
    places = np.where(present[:, None], columns.shapes.extents(), columns.corners())
    with np.errstate(invalid="ignore"):
        reach = places / np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], 1)
    valid = every(np.isfinite(reach)) & ~columns.shapes.coded
    total = int(valid.sum())
    if total < 20 or len(np.unique(columns.image_index[valid])) < 5:
        return
    furthest = reach[valid, 2:].max(0)
    if (furthest < 0.6).all() and (reach[valid, :2].min(0) < 0.1).all():
        what = (
            f"all {total} objects lie in the upper left {furthest[0]:.0%} of the width and {furthest[1]:.0%} of the "
            "height of their images"
        )
        advice = "if the images were enlarged after annotation, scale the annotations"
        if places[valid].max() <= 101 and sizes[valid].min() > 150:
            advice += "; if the coordinates are in percent, convert them to pixels"
        yield Cause("note", "outline", what, advice)


def _exchange(columns: Columns, chosen: Bools, *, boxes: bool = True) -> None:
    """Exchange x and y of some annotations in place."""
    owner = columns.shapes.point_owners()
    points = columns.shapes.points.copy()
    moved = (owner >= 0) & chosen[owner]
    points[moved] = points[moved][:, ::-1]
    columns.shapes = columns.shapes.with_points(points)
    if boxes:
        columns.boxes[chosen] = columns.boxes[chosen][:, [1, 0, 3, 2]]


def _beyond(boxes: Floats, sizes: Floats) -> Bools:
    """Which boxes (N, 4) reach out of their images by more than annotators are off by."""
    limits = sizes[:, ::-1]
    slack = np.maximum(2, 0.02 * limits)
    with np.errstate(invalid="ignore"):
        return some(boxes[:, :2] < -slack) | some(boxes[:, 2:] > limits + slack)


def _drawn(columns: Columns) -> Bools:
    """Which annotations have outlines with finite coordinates."""
    with np.errstate(invalid="ignore"):
        finite = every(np.isfinite(columns.shapes.extents()))
    return columns.shapes.present() & ~columns.shapes.coded & finite


def _sizes(table: Table, columns: Columns) -> Floats:
    """H, W (N, 2) of the image of each annotation."""
    return np.array(table.sizes, np.float64).reshape(-1, 2)[columns.image_index]

"""Outlines in another coordinate frame than their images: shares, another image size, x and y exchanged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maskwright.data.columns import Bools, Columns, Floats, agree, disagree
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
        small = (extents[:, :2] >= -0.05).all(1) & (extents[:, 2:] <= 1.05).all(1)
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
    judged = _drawn(columns) & np.isfinite(boxes).all(1)
    total = int(judged.sum())
    extents = columns.shapes.extents()
    wrong = judged & disagree(extents, boxes) & ~are_shares(columns, sizes, extents)
    if total < 2 or wrong.sum() < max(2, ENOUGH * total):
        return
    need = max(2, 0.5 * wrong.sum())
    swapped = wrong & agree(extents[:, [1, 0, 3, 2]], boxes)
    percent = wrong & agree(extents * np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], 1) / 100, boxes)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        ratios = (boxes[:, 2:] - boxes[:, :2]) / (extents[:, 2:] - extents[:, :2])
        factors = np.median(ratios[wrong], 0)
        scaled = wrong & agree(extents * np.concatenate([factors, factors]), boxes)
    if swapped.sum() >= need:
        yield from _decide(
            columns, sizes, swapped, extents, boxes, f"{int(swapped.sum())} of {total} outlines have x and y exchanged"
            " in comparison with their boxes", None,
        )  # fmt: skip
    elif percent.sum() >= need and (extents[percent] <= 101).all() and (boxes[percent] > 101).any():
        columns.scale(percent, sizes[:, ::-1] / 100, boxes=False)
        what = f"{int(percent.sum())} of {total} outlines are in percent of the image, as their boxes show"
        yield Cause("note", "outline", what, "they are converted to pixels", repaired=True)
    elif scaled.sum() >= need and (np.abs(np.log(factors)) > 0.1).any():
        times = (
            " x ".join(f"{f:.3g}" for f in factors) if abs(factors[0] / factors[1] - 1) > 0.03 else f"{factors[0]:.3g}"
        )
        yield from _decide(
            columns, sizes, scaled, extents, boxes,
            f"the boxes of {int(scaled.sum())} of {total} outlines are {times} times as large and as far away",
            factors,
        )  # fmt: skip


def _decide(
    columns: Columns, sizes: Floats, chosen: Bools, extents: Floats, boxes: Floats, what: str, factors: Floats | None
) -> Iterator[Cause]:
    """Whether the outlines or the boxes are wrong: those that reach out of the images."""
    outlines_out, boxes_out = _beyond(extents, sizes)[chosen].sum(), _beyond(boxes, sizes)[chosen].sum()
    if outlines_out and not boxes_out:
        if factors is None:
            _exchange(columns, chosen, boxes=False)
        else:
            columns.scale(chosen, factors, boxes=False)
        what += ", and the boxes lie inside the images, the outlines do not"
        yield Cause("error", "outline", what, f"correct the outlines, {_FIX}", repaired=True)
    elif boxes_out and not outlines_out:
        columns.boxes[chosen] = np.nan
        columns.boxed[chosen] = False
        what += ", and the outlines lie inside the images, the boxes do not"
        yield Cause("note", "box", what, "the boxes of the masks are used", repaired=True)
    else:
        advice = "correct the outlines or the boxes; which of them describe the images cannot be decided"
        yield Cause("error", "outline", what, advice)


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
    plausible = np.isfinite(reach).all(1) & (np.abs(reach) < 100).all(1)
    high = plausible & (reach[:, 2:] > 1.1).any(1)
    low = plausible & (reach[:, :2] < -0.1).any(1)
    # Sets cut from larger images have outlines that continue beyond every border; these are clipped.
    if high.sum() >= max(2, 0.2 * total) and low.sum() <= 0.25 * high.sum():
        yield _beyond_cause(columns, sizes, drawn, plausible, high, extents, reach)
    elif total >= 20 and len(np.unique(columns.image_index[drawn])) >= 5:
        furthest = reach[plausible, 2:].max(0, initial=0)
        if (furthest < 0.6).all() and (reach[plausible, :2] < 0.1).any(0).all():
            what = (
                f"all {total} outlines lie in the upper left {furthest[0]:.0%} of the width and {furthest[1]:.0%} of "
                "the height of their images"
            )
            yield Cause("note", "outline", what, "if the images were enlarged after annotation, scale the outlines")


def _beyond_cause(
    columns: Columns, sizes: Floats, drawn: Bools, plausible: Bools, high: Bools, extents: Floats, reach: Floats
) -> Cause:
    total = int(drawn.sum())
    swapped = extents[:, [1, 0, 3, 2]]
    oblong = drawn & (np.abs(np.log(sizes[:, 0] / sizes[:, 1])) > 0.05)
    fits = oblong & ~_beyond(swapped, sizes)
    subject = f"{int(high.sum())} of {total} outlines reach out of their images"
    wide, tall = np.nanmax(np.where(plausible[:, None], reach, np.nan)[:, 2:], 0)
    if fits.sum() >= 0.98 * total:
        what = f"{subject}, and all lie inside with x and y exchanged"
        if total >= 5:
            _exchange(columns, drawn)
            return Cause("error", "outline", what, f"exchange x and y, {_FIX}", repaired=True)
        return Cause("error", "outline", what, "exchange x and y, or restore the images that were annotated")
    what = f"{subject}, up to {max(wide, tall):.2g} times as far as the images"
    advice = "if the images were resized after annotation, restore them, or scale the annotations and list both sizes"
    return Cause("error", "size", what, advice)


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
        return (boxes[:, :2] < -slack).any(1) | (boxes[:, 2:] > limits + slack).any(1)


def _drawn(columns: Columns) -> Bools:
    """Which annotations have outlines with finite coordinates."""
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(columns.shapes.extents()).all(1)
    return columns.shapes.present() & ~columns.shapes.coded & finite


def _sizes(table: Table, columns: Columns) -> Floats:
    """H, W (N, 2) of the image of each annotation."""
    return np.array(table.sizes, np.float64).reshape(-1, 2)[columns.image_index]

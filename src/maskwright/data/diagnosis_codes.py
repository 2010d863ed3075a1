"""Run-length codes that are counted in another order, or for images of another size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maskwright.data.columns import Bools, Columns, Floats, Ints, agree, clipped, disagree, every, some
from maskwright.data.findings import Cause
from maskwright.data.table import Table
from maskwright.structures import Masks, rle

_ENOUGH = 0.1  # share of the codes from which on a cause is one of the whole set

_AT_ONCE = 4096  # codes that are converted at once


def code_order(table: Table, columns: Columns) -> Iterator[Cause]:
    """Codes that are counted row by row, or whose size is [width, height]; recognized by the boxes."""
    sizes = np.array(table.sizes, np.int64).reshape(-1, 2)[columns.image_index]
    coded = columns.shapes.coded
    if not coded.any():
        return
    fits = coded & every(columns.code_sizes == sizes)
    turned = coded & every(columns.code_sizes == sizes[:, ::-1]) & ~fits
    boxes = columns.corners()
    boxed = every(np.isfinite(boxes))
    boxes = clipped(boxes, sizes.astype(np.float64))
    frames = columns.shapes.frames.astype(np.float64)
    yield from _row_by_row(columns, sizes, fits, boxed, boxes, frames)
    if turned.sum() >= max(2, _ENOUGH * coded.sum()):
        yield _turned(columns, sizes, turned, boxed, boxes)


def _row_by_row(
    columns: Columns, sizes: Ints, fits: Bools, boxed: Bools, boxes: Floats, frames: Floats
) -> Iterator[Cause]:
    judged = fits & boxed
    total = int(judged.sum())
    if total:
        wrong = judged & disagree(frames, boxes)
        if wrong.sum() < max(2, _ENOUGH * total) and wrong.sum() < total:
            return
        rows = _frames(columns, fits, sizes[:, 1])[:, [1, 0, 3, 2]]
        explained = wrong & agree(rows, boxes)
        if explained.sum() < max(1 if total < 3 else 2, 0.5 * wrong.sum()):
            return
        # Where both orders fit the box, the order of the others decides.
        only_columns = judged & agree(frames, boxes) & ~agree(rows, boxes)
        if only_columns.sum() <= 0.02 * explained.sum():
            explained |= judged & agree(rows, boxes)
        _transpose(columns, explained, sizes)
        what = (
            f"{int(explained.sum())} of {int(fits.sum())} run-length codes are counted row by row, as their boxes show"
        )
        yield Cause("note", "code", f"{what}; COCO counts column by column", "they are read so", repaired=True)
        return
    count = int(fits.sum())
    if count < 3 or boxed.any():
        return
    rows = _frames(columns, fits, sizes[:, 1])[:, [1, 0, 3, 2]]
    with np.errstate(invalid="ignore", divide="ignore"):
        compact = fits & (_extent(rows) < 0.6 * _extent(frames))
    if compact.sum() >= 0.9 * count:
        _transpose(columns, fits, sizes)
        what = f"{count} run-length codes are scattered over their images column by column, and compact row by row"
        advice = "count them column by column, as COCO does and `maskwright check --fix` does"
        yield Cause("error", "code", what, advice, repaired=True)


def _turned(columns: Columns, sizes: Ints, turned: Bools, boxed: Bools, boxes: Floats) -> Cause:
    """Codes whose size is [width, height]: only the size is, or the mask is transposed too."""
    count = int(turned.sum())
    what = f"{count} of {int(columns.shapes.coded.sum())} run-length codes have a size [width, height]"
    judged = turned & boxed
    upright = _frames(columns, turned, sizes[:, 0])
    transposed = _frames(columns, turned, sizes[:, 1])[:, [1, 0, 3, 2]]
    as_upright = judged & agree(upright, boxes)
    as_transposed = judged & agree(transposed, boxes)
    need = max(1, 0.8 * judged.sum())
    if as_upright.sum() >= need and as_upright.sum() > as_transposed.sum():
        frames = {i: _frame(upright[i]) for i in np.flatnonzero(turned).tolist()}
        codes = {i: columns.shapes.code(i) for i in frames}
        columns.shapes = columns.shapes.with_codes(codes, frames)
        columns.code_sizes[turned] = sizes[turned]
        return Cause("note", "code", f"{what}, but count column by column", "the size is read as [height, width]", True)
    if as_transposed.sum() >= need and as_transposed.sum() > as_upright.sum():
        _transpose(columns, turned, sizes)
        columns.code_sizes[turned] = sizes[turned]
        return Cause("note", "code", f"{what} and count row by row", "they are read so, as their boxes show", True)
    advice = "write the size as [height, width] and count column by column"
    return Cause("error", "code", f"{what}; whether they also count row by row cannot be decided", advice)


def code_sizes(table: Table, columns: Columns) -> Iterator[Cause]:
    """Codes for images that are larger or smaller by one factor."""
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)[columns.image_index]
    coded = columns.shapes.coded
    other = coded & some(columns.code_sizes != sizes)
    if other.sum() < max(2, 0.5 * coded.sum()):
        return
    factors = sizes / np.where(other[:, None], columns.code_sizes, 1)
    middle = np.median(factors[other], 0)
    common = np.abs(columns.code_sizes * middle - sizes).max(1) <= 1.5
    proportional = np.abs(factors[:, 0] - factors[:, 1]) * columns.code_sizes.max(1) <= 1.5
    if not (common[other].all() or proportional[other].all()):
        return
    first = int(np.flatnonzero(other)[0])
    own, size = columns.code_sizes[first].tolist(), sizes[first].astype(int).tolist()
    what = (
        f"{int(other.sum())} of {int(coded.sum())} run-length codes are for images of another size, such as "
        f"{own[1]} x {own[0]} for {size[1]} x {size[0]}: the images were resized after annotation"
    )
    boxes = columns.corners()
    same = other & agree(boxes, columns.shapes.frames.astype(np.float64))
    resize_codes(columns, other, sizes)
    columns.scale(same, factors[:, ::-1], outlines=False)
    columns.areas[other] *= factors[other].prod(1)
    advice = "restore the images, or scale the masks, as `maskwright check --fix` does"
    yield Cause("error", "size", what, advice, repaired=True)


def resize_codes(columns: Columns, chosen: Bools, sizes: Floats) -> None:
    """Resize the codes of some annotations to the sizes (N, 2), H, W, of their images."""
    codes: dict[int, bytes] = {}
    frames: dict[int, rle.Frame] = {}
    rows = np.flatnonzero(chosen & columns.shapes.coded)
    groups, owner = np.unique(
        np.concatenate([columns.code_sizes, sizes.astype(np.int64)], 1)[rows], axis=0, return_inverse=True
    )
    for number, (height, width, new_height, new_width) in enumerate(groups.tolist()):
        members: list[int] = rows[owner.ravel() == number].tolist()
        masks = Masks("rle", [columns.shapes.code(i) for i in members], (height, width))
        texts = [code["counts"] for code in masks.resize((new_height, new_width)).rle()]
        for index, text, frame in zip(members, texts, rle.frames(texts, new_height), strict=True):
            if frame[2] > frame[0]:  # an object that is too small for the new size is left as it is, and skipped later
                codes[index], frames[index] = text, frame
                columns.code_sizes[index] = new_height, new_width
    columns.shapes = columns.shapes.with_codes(codes, frames)


def _transpose(columns: Columns, chosen: Bools, sizes: Ints) -> None:
    """Read the codes of some annotations row by row."""
    codes: dict[int, bytes] = {}
    frames: dict[int, rle.Frame] = {}
    rows = np.flatnonzero(chosen)
    groups, owner = np.unique(sizes[rows], axis=0, return_inverse=True)
    for number, (height, width) in enumerate(groups.tolist()):
        members: list[int] = rows[owner.ravel() == number].tolist()
        for first in range(0, len(members), _AT_ONCE):
            part = members[first : first + _AT_ONCE]
            edges: list[Ints] = []
            for index, (box, crop) in zip(
                part, rle.to_crops([columns.shapes.code(i) for i in part], width), strict=True
            ):
                x0, y0, x1, y1 = box
                edges.append(rle.edges(crop.T, y0, x0, (height, width)))
                frames[index] = (y0, x0, y1, x1)
            codes.update(zip(part, rle.from_edges(edges, height * width), strict=True))
    columns.shapes = columns.shapes.with_codes(codes, frames)


def _frames(columns: Columns, chosen: Bools, heights: Ints) -> Floats:
    """Boxes (N, 4) of some codes, decoded column by column for these heights (N,); NaN for the others."""
    boxes = np.full((len(columns), 4), np.nan)
    for height in np.unique(heights[chosen]).tolist():
        rows = np.flatnonzero(chosen & (heights == height))
        boxes[rows] = rle.frames([columns.shapes.code(i) for i in rows.tolist()], height)
    return boxes


def _frame(box: Floats) -> rle.Frame:
    x0, y0, x1, y1 = box.astype(int).tolist()
    return x0, y0, x1, y1


def _extent(boxes: Floats) -> Floats:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)

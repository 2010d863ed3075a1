"""Images with an EXIF orientation: whether the annotations are for the upright image or for the image as stored.

Images are read upright. Where orientation exchanges width and height, outlines that leave one of the two frames show
which one was annotated, and so does the size of a run-length code. Orientations that keep the size (180 degrees,
mirrored) leave no trace in the annotations; they are treated as the others of the set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from maskwright.data.columns import Bools, Columns, Floats
from maskwright.data.findings import Cause
from maskwright.data.images import read_orientation
from maskwright.data.table import Table
from maskwright.errors import ImageError
from maskwright.structures import rle

_FEW = 0.05  # share of images that may contradict the others, because of single wrong outlines


def orientation(table: Table, columns: Columns) -> Iterator[Cause]:
    """Images whose listed size, or whose annotations, are for the image as stored."""
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)
    stored = np.array(table.stored_sizes, np.float64).reshape(-1, 2)
    listed = np.array(table.listed_sizes, np.float64).reshape(-1, 2)
    turned = (sizes != stored).any(1)
    if not turned.any():
        return
    upright, as_stored = _evidence(columns, sizes, stored)
    yield from _listed_as_stored(table, columns, turned & (listed == stored).all(1), upright, as_stored)
    yield from _listed_upright(table, columns, turned & (listed == sizes).all(1), upright, as_stored)


def _listed_as_stored(
    table: Table, columns: Columns, chosen: Bools, upright: Bools, as_stored: Bools
) -> Iterator[Cause]:
    if not chosen.any():
        return
    _list_upright(table, chosen)
    count, first = int(chosen.sum()), int(np.flatnonzero(chosen)[0])
    (height, width), (high, wide) = table.sizes[first], table.stored_sizes[first]
    what = (
        f"{count} of {len(chosen)} images have an EXIF orientation and are listed in the size as stored: image "
        f"{table.image_ids[first]!r} as {wide} x {high}, but {table.folder / table.files[first]} is {width} x {height} "
        "with its EXIF orientation applied"
    )
    for_upright, for_stored = int((chosen & upright).sum()), int((chosen & as_stored).sum())
    if not chosen[columns.image_index].any():
        yield Cause("note", "size", what, "they have no annotations; the upright size is used", repaired=True)
    elif for_upright and for_stored <= _FEW * for_upright:
        what += f", and the annotations are for the upright images (as those of {for_upright} show)"
        advice = "the upright size is used; correct width and height, as `maskwright check --fix` does"
        yield Cause("note", "size", what, advice, repaired=True)
    elif for_stored and for_upright <= _FEW * for_stored:
        yield _turn(table, columns, chosen, f"{what}, and the annotations are for the images as stored", for_stored)
    elif for_upright and for_stored:
        what += f", and {for_upright} are annotated upright, {for_stored} as stored"
        advice = (
            "correct width and height of those annotated upright, and remove the EXIF orientation from the files of "
            "the others"
        )
        yield Cause("error", "size", what, advice)
    else:
        what += "; the annotations fit both, so that it cannot be decided which they are for"
        advice = (
            "if they are for the upright images, correct width and height; if they are for the images as stored, "
            "remove the EXIF orientation from the files"
        )
        yield Cause("error", "size", what, advice)


def _listed_upright(table: Table, columns: Columns, chosen: Bools, upright: Bools, as_stored: Bools) -> Iterator[Cause]:
    for_upright, for_stored = int((chosen & upright).sum()), int((chosen & as_stored).sum())
    if not for_stored or for_upright > _FEW * for_stored or for_stored < 2 * _FEW * chosen.sum():
        return
    what = (
        f"{int(chosen.sum())} of {len(chosen)} images have an EXIF orientation and are listed in the upright size, "
        "but the annotations are for the images as stored"
    )
    yield _turn(table, columns, chosen, what, for_stored)


def _turn(table: Table, columns: Columns, chosen: Bools, what: str, evidence: int) -> Cause:
    # What ignored the orientation of these images has also ignored 180 degrees and mirroring.
    others = _keeping_size(table)
    turn_annotations(table, columns, chosen | others)
    what += f" (as those of {evidence} show)"
    what += f"; so are those of {int(others.sum())} turned by 180 degrees or mirrored" if others.any() else ""
    advice = "turn the annotations, as `maskwright check --fix` does, or remove the EXIF orientation from the files"
    return Cause("error", "size", what, advice, repaired=True)


def _keeping_size(table: Table) -> Bools:
    """Which images have an EXIF orientation that does not exchange width and height."""
    result = np.zeros(len(table.files), np.bool_)
    for index, (size, stored) in enumerate(zip(table.sizes, table.stored_sizes, strict=True)):
        with contextlib.suppress(ImageError):
            result[index] = size == stored and read_orientation(table.folder / table.files[index]) in (2, 3, 4)
    return result


def list_upright(table: Table) -> None:
    """Correct listed sizes that are those of images as stored, with a note; for maps of segments, which have sizes."""
    sizes, stored, listed = table.sizes, table.stored_sizes, table.listed_sizes
    chosen = np.array([a != b == c for a, b, c in zip(sizes, stored, listed, strict=True)], bool)
    if chosen.any():
        _list_upright(table, chosen)
        what = f"{int(chosen.sum())} of {len(chosen)} images have an EXIF orientation"
        advice = "the upright size is used; correct width and height"
        table.add_finding("note", "size", f"{what} and are listed in the size as stored", advice)


def _list_upright(table: Table, chosen: Bools) -> None:
    for index in np.flatnonzero(chosen).tolist():
        table.listed_sizes[index] = table.sizes[index]


def _evidence(columns: Columns, sizes: Floats, stored: Floats) -> tuple[Bools, Bools]:
    """Which images have annotations that are for the upright image, and for the image as stored."""
    own_sizes, own_stored = sizes[columns.image_index], stored[columns.image_index]
    placed = np.where(columns.shapes.present()[:, None], columns.shapes.extents()[:, 2:], np.nan)
    ends = np.fmax(placed, columns.corners()[:, 2:])
    coded = columns.shapes.coded
    beyond_upright, beyond_stored = _beyond(ends, own_sizes), _beyond(ends, own_stored)
    beyond_upright[coded] = (columns.code_sizes != own_sizes).any(1)[coded]
    beyond_stored[coded] = (columns.code_sizes != own_stored).any(1)[coded]
    results: list[Bools] = []
    for inside, outside in ((beyond_upright, beyond_stored), (beyond_stored, beyond_upright)):
        votes = np.bincount(columns.image_index, outside & ~inside, len(sizes))
        others = np.bincount(columns.image_index, inside & ~outside, len(sizes))
        results.append(votes > others)
    return results[0], results[1]


def _beyond(ends: Floats, sizes: Floats) -> Bools:
    limits = sizes[:, ::-1]
    with np.errstate(invalid="ignore"):
        return np.asarray((ends > limits + np.maximum(2, 0.02 * limits)).any(1), np.bool_)


# ---- turning annotations -------------------------------------------------------------------------------------------


def turn_annotations(table: Table, columns: Columns, chosen: Bools) -> None:
    """Move annotations from the frame of the images as stored into that of the upright images, in place.

    Args:
        table: The table.
        columns: Its annotations.
        chosen: (M,) the images.
    """
    orientations = np.ones(len(table.files), np.int64)
    for index in np.flatnonzero(chosen).tolist():
        orientations[index] = read_orientation(table.folder / table.files[index])
    own = orientations[columns.image_index]
    stored = np.array(table.stored_sizes, np.float64).reshape(-1, 2)[columns.image_index]

    owner = columns.shapes.point_owners()
    points = columns.shapes.points.copy()
    used = owner >= 0
    points[used] = _turned(points[used], own[owner[used]], stored[owner[used]])
    columns.shapes = columns.shapes.with_points(points)
    first = _turned(columns.boxes[:, :2], own, stored)
    second = _turned(columns.boxes[:, :2] + columns.boxes[:, 2:], own, stored)
    moved = own > 1
    columns.boxes[moved] = np.concatenate([np.minimum(first, second), np.abs(second - first)], 1)[moved]
    if columns.keypoints is not None:
        for column in range(columns.keypoints.shape[1]):
            labelled = columns.keypoints[:, column, 2] > 0
            places = columns.keypoints[:, column, :2].astype(np.float64)
            columns.keypoints[labelled, column, :2] = _turned(places, own, stored)[labelled]
    codes: dict[int, bytes] = {}
    frames: dict[int, rle.Frame] = {}
    for index in np.flatnonzero(moved & columns.shapes.coded).tolist():
        height, width = (int(side) for side in columns.code_sizes[index])
        (x0, y0, x1, y1), crop = rle.to_crop(columns.shapes.code(index), height)
        corners = np.array([[x0, y0], [x1, y1]], np.float64)
        sides = np.array([[height, width]] * 2, np.float64)
        placed = _turned(corners, np.repeat(own[index], 2), sides)
        (x0, y0), (x1, y1) = placed.min(0).astype(int).tolist(), placed.max(0).astype(int).tolist()
        size = (width, height) if own[index] >= 5 else (height, width)
        codes[index] = rle.from_crop(np.ascontiguousarray(_turned_plane(crop, int(own[index]))), x0, y0, size)
        frames[index] = (x0, y0, x1, y1)
        columns.code_sizes[index] = size
    columns.shapes = columns.shapes.with_codes(codes, frames)


def _turned(points: Floats, orientations: np.ndarray, stored: Floats) -> Floats:
    """Points (N, 2) x, y of stored images of sizes (N, 2), H, W, in the upright images."""
    x: Floats
    y: Floats
    height: Floats
    width: Floats
    x, y = points.T
    height, width = stored.T
    exchanged = orientations >= 5
    x, y = np.where(exchanged, y, x), np.where(exchanged, x, y)
    width, height = np.where(exchanged, height, width), np.where(exchanged, width, height)
    x = np.where(np.isin(orientations, (2, 3, 6, 7)), width - x, x)
    y = np.where(np.isin(orientations, (3, 4, 7, 8)), height - y, y)
    return np.stack([x, y], 1)


def _turned_plane(plane: Bools, orientation: int) -> Bools:
    """A plane (H, W) of a stored image in the upright image."""
    if orientation >= 5:
        plane = plane.T
    if orientation in (3, 4, 7, 8):
        plane = plane[::-1]
    return plane[:, ::-1] if orientation in (2, 3, 6, 7) else plane

"""Boxes in another format than x, y, width, height: recognized by the outlines, or by the sizes of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from maskwright.data.columns import Bools, Columns, Floats, agree, clipped, disagree, every
from maskwright.data.findings import Cause
from maskwright.data.table import Table

ENOUGH = 0.1  # share of the annotations from which on a cause is one of the whole set

Format = Callable[[Floats, Floats, Floats], Floats]  # boxes as given (N, 4), heights and widths (N,) -> x0, y0, x1, y1


def _columns(*values: Floats) -> Floats:
    return np.stack(values, 1)


def _corners(b: Floats, h: Floats, w: Floats) -> Floats:
    return b.copy()


def _center(b: Floats, h: Floats, w: Floats) -> Floats:
    return _columns(b[:, 0] - b[:, 2] / 2, b[:, 1] - b[:, 3] / 2, b[:, 0] + b[:, 2] / 2, b[:, 1] + b[:, 3] / 2)


def _on_the_bottom(b: Floats, h: Floats, w: Floats) -> Floats:
    return _columns(b[:, 0], b[:, 1] - b[:, 3], b[:, 0] + b[:, 2], b[:, 1])


def _plain(b: Floats, h: Floats, w: Floats) -> Floats:
    return _columns(b[:, 0], b[:, 1], b[:, 0] + b[:, 2], b[:, 1] + b[:, 3])


def _times(inner: Format, divisor: float) -> Format:
    """A format whose values are shares of the image, of which `divisor` is the whole."""

    def convert(b: Floats, h: Floats, w: Floats) -> Floats:
        one = np.ones_like(h)
        return inner(b / divisor, one, one) * _columns(w, h, w, h)

    return convert


def _swapped(inner: Format) -> Format:
    """A format with y before x."""

    def convert(b: Floats, h: Floats, w: Floats) -> Floats:
        return inner(b, w, h)[:, [1, 0, 3, 2]]

    return convert


# Boxes that the sizes of the images alone can tell apart.
_PIXELS: dict[str, Format] = {
    "corners x0, y0, x1, y1": _corners,
    "center x, center y, width, height": _center,
    "x, y, width, height with the bottom edge as y": _on_the_bottom,
}
_SHARES: dict[str, Format] = {
    "x, y, width, height as shares of the image": _times(_plain, 1),
    "center x, center y, width, height as shares of the image": _times(_center, 1),
    "corners x0, y0, x1, y1 as shares of the image": _times(_corners, 1),
}
_FORMATS: dict[str, Format] = {
    **_PIXELS,
    "x, y, width, height counted from the bottom of the image": lambda b, h, w: _columns(
        b[:, 0], h - b[:, 1] - b[:, 3], b[:, 0] + b[:, 2], h - b[:, 1]
    ),
    "x, y, width, height with the top edge counted from the bottom of the image": lambda b, h, w: _columns(
        b[:, 0], h - b[:, 1], b[:, 0] + b[:, 2], h - b[:, 1] + b[:, 3]
    ),
    "corners x0, y0, x1, y1 counted from the bottom of the image": lambda b, h, w: _columns(
        b[:, 0], h - np.maximum(b[:, 1], b[:, 3]), b[:, 2], h - np.minimum(b[:, 1], b[:, 3])
    ),
    "corners y0, x0, y1, x1": _swapped(_corners),
    "corners x0, x1, y0, y1": lambda b, h, w: b[:, [0, 2, 1, 3]],
    "y, x, height, width": _swapped(_plain),
    **_SHARES,
    "corners y0, x0, y1, x1 as shares of the image": _times(_swapped(_corners), 1),
    "x, y, width, height in percent of the image": _times(_plain, 100),
    "center x, center y, width, height in percent of the image": _times(_center, 100),
}


def box_formats(table: Table, columns: Columns) -> Iterator[Cause]:
    """Boxes in another format."""
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)[columns.image_index]
    present = columns.shapes.present() & every(np.isfinite(columns.boxes))
    if present.sum() >= max(1, 0.1 * len(columns)):
        yield from _by_outlines(columns, sizes, present)
    elif not columns.shapes.present().any():
        yield from _by_images(columns, sizes)


def are_shares(columns: Columns, sizes: Floats, extents: Floats) -> Bools:
    """Return which boxes (N,), read as shares or percent of the image, lie around boxes (N, 4) in pixels."""
    height, width = sizes.T
    forms = [form for name, form in _FORMATS.items() if "share" in name or "percent" in name]
    return np.any([agree(form(columns.boxes, height, width), extents) for form in forms], axis=0)


def convert(columns: Columns, chosen: Bools, corners: Floats) -> None:
    """Set some boxes to others (N, 4), given as x0, y0, x1, y1."""
    columns.boxes[chosen] = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)[chosen]


def _by_outlines(columns: Columns, sizes: Floats, present: Bools) -> Iterator[Cause]:
    """Formats in which boxes lie around the outlines."""
    height, width = sizes.T
    extents = columns.shapes.extents(sizes)
    total = int(present.sum())
    large = (extents[:, 2:] - extents[:, :2]).min(1) > 8  # smaller ones agree with several formats
    for _ in range(3):  # a set merged from several sources may have several formats
        plain = clipped(columns.corners(), sizes)
        off = present & ~agree(plain, extents)
        wrong = off & disagree(plain, extents)
        if not off.any():
            return
        with np.errstate(invalid="ignore", over="ignore"):
            fits = {
                name: (corners := clipped(form(columns.boxes, height, width), sizes), off & agree(corners, extents))
                for name, form in _FORMATS.items()
            }
        name, (corners, explained) = max(fits.items(), key=lambda pair: int(pair[1][1].sum()))
        clear = (explained & wrong).sum() >= max(2, ENOUGH * total)
        shown = int((explained & large).sum())
        throughout = shown >= max(2, 0.8 * total) or shown >= max(3, 0.3 * total, 0.8 * off.sum())
        if not clear and not throughout:
            return
        with np.errstate(invalid="ignore"):
            closer = np.abs(corners - extents).max(1) < np.abs(plain - extents).max(1)
        explained |= present & agree(corners, extents) & closer
        convert(columns, explained, corners)
        what = f"{int(explained.sum())} of {total} boxes are {name}; expected x, y, width, height"
        yield Cause("note", "box", what, "they are converted", repaired=True)


def _by_images(columns: Columns, sizes: Floats) -> Iterator[Cause]:
    """Formats in which boxes without outlines lie inside their images, if as x, y, width, height they do not."""
    given = columns.boxed & every(np.isfinite(columns.boxes))
    total = int(given.sum())
    if total < 2:
        return
    height, width = sizes.T
    shares = given & every(np.abs(columns.boxes) <= 1.001) & (sizes.min(1) > 4)
    if shares.sum() >= max(2, ENOUGH * total):
        yield _chosen_format(columns, sizes, shares, shares, _SHARES)
        return
    plain = given & _inside(_plain(columns.boxes, height, width), sizes)
    # With their areas, boxes tell which of the numbers are width and height.
    with np.errstate(invalid="ignore", over="ignore"):
        area_as_corners = (columns.boxes[:, 2:] - columns.boxes[:, :2]).prod(1)
        as_corners = given & (np.abs(columns.areas - area_as_corners) <= 0.02 * columns.areas)
        as_sizes = given & (np.abs(columns.areas - columns.boxes[:, 2:].prod(1)) <= 0.02 * columns.areas)
    proven = as_corners & ~as_sizes & every(columns.boxes[:, 2:] > columns.boxes[:, :2])
    if proven.sum() >= max(2, 0.5 * total):
        corners = _corners(columns.boxes, height, width)
        convert(columns, proven, corners)
        what = f"{int(proven.sum())} of {total} boxes are corners x0, y0, x1, y1, as their areas show"
        yield Cause("note", "box", f"{what}; expected x, y, width, height", "they are converted", repaired=True)
        return
    outside = given & ~plain & every(columns.boxes[:, 2:] > 0)
    if outside.sum() < max(1 if total < 10 else 2, 0.05 * total):
        return
    formats = dict(_PIXELS)
    if as_sizes.sum() >= 0.9 * total:
        del formats["corners x0, y0, x1, y1"]
    yield _chosen_format(columns, sizes, given, outside, formats)


def _chosen_format(columns: Columns, sizes: Floats, given: Bools, wrong: Bools, formats: dict[str, Format]) -> Cause:
    """The format in which all boxes lie inside their images; an error if there is none or more than one."""
    height, width = sizes.T
    total = int(given.sum())
    inside: dict[str, Bools] = {}
    for name, form in formats.items():
        inside[name] = given & _inside(form(columns.boxes, height, width), sizes)
    fitting = [name for name, kept in inside.items() if kept.sum() >= 0.98 * total]
    subject = f"{int(wrong.sum())} of {int((columns.boxed).sum())} boxes"
    if formats is _SHARES:
        subject += " are shares of the image (0 ... 1)"
    else:
        subject += " reach out of their images as x, y, width, height"
    if len(fitting) == 1:
        name = fitting[0]
        convert(columns, given, formats[name](columns.boxes, height, width))
        what = f"{subject}; all {total} fit as {name}"
        if wrong.sum() >= 3 and total >= 5:
            return Cause("note", "box", what, "they are converted", repaired=True)
        advice = "convert them to x, y, width, height, as `maskwright check --fix` does"
        return Cause("error", "box", what, advice, repaired=True)
    if fitting:
        what = f"{subject}; they fit as {' and as '.join(fitting)}"
        return Cause("error", "box", what, "convert them to x, y, width, height in pixels")
    share = wrong.sum() / max(1, total) if wrong.sum() > 1 else 0
    if formats is _SHARES:
        return Cause("error", "box", f"{subject}, others are not", "convert all to x, y, width, height in pixels")
    as_corners = inside.get("corners x0, y0, x1, y1", np.zeros_like(wrong)) & wrong
    if share >= 0.2 and as_corners.sum() >= 0.9 * wrong.sum():
        what = f"{subject}; these fit as corners x0, y0, x1, y1, others do not"
        return Cause("error", "box", what, "convert all to x, y, width, height")
    reach = (_plain(columns.boxes, height, width)[:, 2:] / sizes[:, ::-1])[wrong].max()
    what = f"{subject}, up to {reach:.2g} times as far"
    if share >= 0.2:
        return Cause("error", "box", what, "if the images were resized after annotation, scale the boxes accordingly")
    return Cause("note", "box", what, "they are clipped")


def _inside(corners: Floats, sizes: Floats) -> Bools:
    """Which boxes (N, 4) have a positive size and lie inside their images, up to what annotators are off by."""
    limits = sizes[:, ::-1]
    slack = np.maximum(2, 0.02 * limits)
    with np.errstate(invalid="ignore"):
        positive = every(corners[:, 2:] > corners[:, :2])
        return positive & every(corners[:, :2] >= -slack) & every(corners[:, 2:] <= limits + slack)

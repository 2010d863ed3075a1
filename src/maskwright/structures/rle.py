"""COCO's run-length code, vectorised in numpy.

A mask is read column by column (top to bottom, then left to right) as alternating run lengths that start with
background. The compressed form writes each run, from the fourth on as its difference to the run before the last, in
groups of five bits: the sixth bit says that another group follows, and 48 is added so that the text is printable.

pycocotools holds the same code in C, but it trusts its input (a short or garbled string makes it read memory that is
not its own) and it only knows whole planes. Strings from outside therefore pass through `decode_counts`, and crops
are coded here without ever making the plane.
"""

from __future__ import annotations

import numpy as np

Frame = tuple[int, int, int, int]  # x0, y0, x1, y1: whole pixels, x1 and y1 exclusive


def decode_counts(text: bytes) -> np.ndarray:
    """Run lengths (int64) from COCO's compressed string. ValueError where the text is no such string."""
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(groups):
        return np.zeros(0, np.int64)
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError("it holds characters that no run-length string has")
    last = (groups & 32) == 0
    if not last[-1]:
        raise ValueError("it ends in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 11:
        raise ValueError("it holds a number too large for any picture")
    values = np.add.reduceat((groups & 31) << (5 * place), starts)
    negative = (groups[ends] & 16) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if values.min() < 0:
        raise ValueError("it holds a negative run")
    return values


def encode_counts(counts: np.ndarray) -> bytes:
    """COCO's compressed string of these run lengths."""
    rest = np.asarray(counts, np.int64).copy()
    rest[3:] -= np.asarray(counts, np.int64)[1:-2]
    columns, going = [], np.ones(len(rest), bool)
    while going.any():
        group = rest & 31
        rest = rest >> 5
        more = np.where(group & 16, rest != -1, rest != 0) & going
        columns.append(np.where(going, (group | (more << 5)) + 48, 0))
        going = more
    if not columns:
        return b""
    text = np.stack(columns, 1).ravel()
    return text[text > 0].astype(np.uint8).tobytes()


def runs(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (exclusive) of each run of foreground, as positions in column order."""
    edges = np.cumsum(decode_counts(text))
    starts, ends = edges[0::2], edges[1::2]
    starts = starts[: len(ends)]
    solid = ends > starts
    return starts[solid], ends[solid]


def from_runs(starts: np.ndarray, ends: np.ndarray, total: int) -> bytes:
    """The compressed string of runs in ascending order; runs that touch are joined. `total` is H * W."""
    if len(starts):
        apart = starts[1:] != ends[:-1]
        starts, ends = starts[np.concatenate([[True], apart])], ends[np.concatenate([apart, [True]])]
    edges = np.empty(2 * len(starts) + 2, np.int64)
    edges[0], edges[-1] = 0, total
    edges[1:-1:2], edges[2:-1:2] = starts, ends
    counts = np.diff(edges)
    return encode_counts(counts[:-1] if counts[-1] == 0 and len(counts) > 1 else counts)


def from_crop(crop: np.ndarray, x0: int, y0: int, size: tuple[int, int]) -> bytes:
    """The string of a plane of `size` (H, W) that is empty but for `crop` (h, w) bool with its corner at (x0, y0)."""
    height, width = size
    left, top = max(0, -x0), max(0, -y0)
    crop = crop[top : max(top, height - y0), left : max(left, width - x0)]
    if not crop.size:
        return from_runs(np.zeros(0, np.int64), np.zeros(0, np.int64), height * width)
    columns = np.zeros((crop.shape[1], crop.shape[0] + 2), bool)
    columns[:, 1:-1] = crop.T
    # Every column begins and ends with background, so that changes are begin, end, begin, end ... all the way.
    x, y = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), columns.shape[1] - 1)
    edges = (x + x0 + left) * height + y + y0 + top
    return from_runs(edges[0::2], edges[1::2], height * width)


def frame(text: bytes, height: int) -> Frame:
    """The tightest frame around the foreground; all zeros where there is none."""
    starts, ends = runs(text)
    if not len(starts):
        return 0, 0, 0, 0
    first, last = starts // height, (ends - 1) // height
    x0, x1 = int(first[0]), int(last[-1]) + 1
    if (first != last).any():  # a run that goes on in the next column touches both the lower and the upper border
        return x0, 0, x1, height
    return x0, int((starts % height).min()), x1, int(((ends - 1) % height).max()) + 1


def to_crop(text: bytes, height: int) -> tuple[Frame, np.ndarray]:
    """The tightest frame and the bool mask inside it (a view, columns first in memory), without making the plane."""
    x0, y0, x1, y1 = box = frame(text, height)
    starts, ends = runs(text)
    line = np.zeros((x1 - x0) * height + 1, np.int8)
    line[starts - x0 * height] += 1
    line[ends - x0 * height] -= 1
    plane = np.cumsum(line[:-1], dtype=np.int8).reshape(x1 - x0, height)
    return box, plane.view(bool)[:, y0:y1].T


def area(text: bytes) -> int:
    """Number of foreground pixels."""
    return int(decode_counts(text)[1::2].sum())

"""COCO's run-length code, vectorised in numpy.

A mask is read column by column (top to bottom, then left to right) as alternating run lengths that start with
background. The compressed form writes each run, from the fourth on as its difference to the run before the last, in
groups of five bits: the sixth bit says that another group follows, and 48 is added so that the text is printable.

pycocotools holds the same code in C, but it trusts its input (a short or garbled string makes it read memory that is
not its own) and it only knows whole planes. Strings from outside therefore pass through `decode_counts`, and crops
are coded here without ever making the plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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
    return _encoded(np.asarray(counts, np.int64), np.array([len(counts)]))[0]


def runs(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (exclusive) of each run of foreground, as positions in column order."""
    edges = np.cumsum(decode_counts(text))
    starts, ends = edges[0::2], edges[1::2]
    starts = starts[: len(ends)]
    solid = ends > starts
    return starts[solid], ends[solid]


def from_runs(starts: np.ndarray, ends: np.ndarray, total: int) -> bytes:
    """The compressed string of runs in ascending order; runs that touch are joined. `total` is H * W."""
    return from_edges([np.stack([starts, ends], 1).ravel()], total)[0]


def from_edges(edges: Sequence[np.ndarray], total: int) -> list[bytes]:
    """The strings of several masks, each given as where its runs begin and end: begin, end, begin, end ..., ascending.

    All are written in one go: for a mask of a few hundred runs that is several times quicker than one by one.
    """
    lengths = np.array([len(own) for own in edges], np.int64)
    owner = np.repeat(np.arange(len(edges)), lengths)
    place = np.concatenate([np.zeros(0, np.int64), *edges]) + owner * (total + 1)  # one line, on which no masks meet
    meets = place[1:] == place[:-1]  # a run begins where the last one ends: neither is there
    stays = np.ones(len(place), bool)
    stays[1:] &= ~meets
    stays[:-1] &= ~meets
    place, owner = place[stays], owner[stays]
    # Run lengths are differences, from each mask's beginning to its end.
    begins = np.arange(len(edges)) * (total + 1)
    lengths = np.bincount(owner, minlength=len(edges))
    first = np.cumsum(lengths + 2) - lengths - 2
    line = np.empty(len(place) + 2 * len(edges), np.int64)
    line[first], line[first + lengths + 1] = begins, begins + total
    line[2 * owner + 1 + np.arange(len(place))] = place
    counts = np.diff(line)
    said = np.ones(len(counts), bool)
    said[first[1:] - 1] = False  # from a mask's end to the next one's beginning
    said[(first + lengths)[(counts[first + lengths] == 0) & (lengths > 0)]] = False  # a last run of no pixels
    return _encoded(counts[said], np.add.reduceat(said, first).astype(np.int64) if len(first) else lengths)


def _encoded(counts: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    """Compressed strings of several masks' run lengths, so many of each."""
    ends = np.cumsum(lengths)
    within = np.arange(len(counts)) - np.repeat(ends - lengths, lengths)
    later = np.flatnonzero(within >= 3)
    rest = counts.copy()
    rest[later] -= counts[later - 2]
    columns, going = [np.zeros(len(rest), np.uint8)], np.ones(len(rest), bool)
    while going.any():
        group = rest & 31
        rest = rest >> 5
        more = np.where(group & 16, rest != -1, rest != 0) & going
        columns.append(np.where(going, (group | (more << 5)) + 48, 0).astype(np.uint8))
        going = more
    text = np.stack(columns, 1)
    there = text > 0
    letters = text[there].tobytes()
    cuts = np.concatenate([[0], np.cumsum(there.sum(1))])[np.concatenate([[0], ends])].tolist()
    return [letters[a:b] for a, b in pairwise(cuts)]


def from_crop(crop: np.ndarray, x0: int, y0: int, size: tuple[int, int]) -> bytes:
    """The string of a plane of `size` (H, W) that is empty but for `crop` (h, w) bool with its corner at (x0, y0)."""
    return from_edges([edges(crop, x0, y0, size)], size[0] * size[1])[0]


def edges(crop: np.ndarray, x0: int, y0: int, size: tuple[int, int]) -> np.ndarray:
    """Where the runs of such a plane begin and end, in column order; what reaches beyond it is cut off."""
    height, width = size
    left, top = max(0, -x0), max(0, -y0)
    crop = crop[top : max(top, height - y0), left : max(left, width - x0)]
    if not crop.size:
        return np.zeros(0, np.int64)
    columns = np.zeros((crop.shape[1], crop.shape[0] + 2), bool)
    columns[:, 1:-1] = crop.T
    # Every column begins and ends with background, so that changes are begin, end, begin, end ... all the way.
    x, y = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), columns.shape[1] - 1)
    return (x + x0 + left) * height + y + y0 + top


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

"""COCO's run-length code, vectorized in NumPy.

A mask is read column by column (top to bottom, then left to right) as alternating run lengths, starting with
background. The compressed string stores each run, from the fourth on as the difference to the run before the last one,
in groups of five bits, lowest first: the sixth bit marks that another group follows, and 48 is added to make the
characters printable.

pycocotools implements the same code in C, but does not check its input (a truncated or damaged string makes it read
memory out of bounds) and encodes only full planes. Strings from files are therefore decoded by `decode_counts`, and
crops are encoded here without making planes.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import numpy as np
import numpy.typing as npt

Frame = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def decode_counts(text: bytes) -> Ints:
    """Decode a compressed string.

    Args:
        text: The string.

    Returns:
        Run lengths.

    Raises:
        ValueError: If the string is invalid.
    """
    return decode_all([text])[0]


def decode_all(texts: Sequence[bytes]) -> tuple[Ints, Ints]:
    """Decode several compressed strings at once, which is many times faster than one by one for small masks.

    Args:
        texts: The strings.

    Returns:
        The run lengths of all masks, one after the other, and the number of runs of each mask.

    Raises:
        ValueError: If a string is invalid.
    """
    groups = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
    if not len(groups):
        return np.zeros(0, np.int64), np.zeros(len(texts), np.int64)
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError("it contains invalid characters")
    last = (groups & 32) == 0
    if not last[stops[stops > 0] - 1].all():
        raise ValueError("it ends in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 11:
        raise ValueError("it contains a number that is too large")
    values = np.add.reduceat((groups & 31) << (5 * place), starts)
    negative = (groups[ends] & 16) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    lengths = np.diff(np.searchsorted(ends, stops), prepend=0)
    if len(texts) == 1:  # fewer NumPy calls, which dominate for short strings
        values[1::2] = np.cumsum(values[1::2])
        values[2::2] = np.cumsum(values[2::2])
    else:
        within = _within(lengths)
        for chain in (within % 2 == 1, (within % 2 == 0) & (within > 0)):
            rows = np.flatnonzero(chain)
            values[rows] = _sums(values[rows], within[rows] <= 2)
    if values.min() < 0:
        raise ValueError("it contains a negative run")
    return values, lengths


def _within(lengths: Ints) -> Ints:
    """0, 1, 2 ... in each of several segments."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _sums(values: Ints, first: Bools) -> Ints:
    """Cumulative sums that restart wherever `first` is True."""
    sums, begins = np.cumsum(values), np.flatnonzero(first)
    return sums - np.repeat(sums[begins] - values[begins], np.diff(begins, append=len(values)))


def encode_counts(counts: Ints) -> bytes:
    """Return the compressed string of run lengths."""
    return _encoded(np.asarray(counts, np.int64), np.array([len(counts)]))[0]


def encode_all(counts: Sequence[Ints]) -> list[bytes]:
    """Return the compressed strings of the run lengths of several masks."""
    lengths = np.array([len(own) for own in counts], np.int64)
    return _encoded(np.concatenate([np.zeros(0, np.int64), *counts]), lengths)


def runs(text: bytes) -> tuple[Ints, Ints]:
    """Return start and end (exclusive) of each foreground run, as positions in column order."""
    edges = np.cumsum(decode_counts(text))
    starts, ends = edges[0::2], edges[1::2]
    starts = starts[: len(ends)]
    solid = ends > starts
    return starts[solid], ends[solid]


def runs_all(texts: Sequence[bytes]) -> tuple[Ints, Ints, Ints]:
    """Return start and end of each run of several masks, and the position of the mask that each run belongs to."""
    counts, lengths = decode_all(texts)
    within = _within(lengths)
    edges = _sums(counts, within == 0) if len(counts) else counts
    ends = np.flatnonzero(within % 2 == 1)
    solid = ends[counts[ends] > 0]
    return edges[solid - 1], edges[solid], np.repeat(np.arange(len(texts)), lengths)[solid]


def from_runs(starts: Ints, ends: Ints, total: int) -> bytes:
    """Encode foreground runs.

    Args:
        starts: Start of each run, in ascending order.
        ends: End (exclusive) of each run; adjacent runs are joined.
        total: H * W.

    Returns:
        The compressed string.
    """
    return from_edges([np.stack([starts, ends], 1).ravel()], total)[0]


def from_edges(edges: Sequence[Ints], total: int) -> list[bytes]:
    """Encode several masks at once, which is several times faster than one by one.

    Args:
        edges: For each mask the starts and ends of its runs: start, end, start, end ..., ascending.
        total: H * W.

    Returns:
        One compressed string for each mask.
    """
    lengths = np.array([len(own) for own in edges], np.int64)
    owner = np.repeat(np.arange(len(edges)), lengths)
    # All masks on one line, separated by one position.
    place = np.concatenate([np.zeros(0, np.int64), *edges]) + owner * (total + 1)
    meets = place[1:] == place[:-1]  # adjacent runs are joined
    stays = np.ones(len(place), bool)
    stays[1:] &= ~meets
    stays[:-1] &= ~meets
    place, owner = place[stays], owner[stays]
    # Run lengths are differences of positions, from the start of a mask to its end.
    begins = np.arange(len(edges)) * (total + 1)
    lengths = np.bincount(owner, minlength=len(edges))
    first = np.cumsum(lengths + 2) - lengths - 2
    line = np.empty(len(place) + 2 * len(edges), np.int64)
    line[first], line[first + lengths + 1] = begins, begins + total
    line[2 * owner + 1 + np.arange(len(place))] = place
    counts = np.diff(line)
    kept = np.ones(len(counts), bool)
    kept[first[1:] - 1] = False  # between the end of a mask and the start of the next one
    kept[(first + lengths)[(counts[first + lengths] == 0) & (lengths > 0)]] = False  # an empty last run
    return _encoded(counts[kept], np.add.reduceat(kept, first).astype(np.int64) if len(first) else lengths)


def _encoded(counts: Ints, lengths: Ints) -> list[bytes]:
    """Compressed strings of several masks, of which `lengths` gives the numbers of runs."""
    ends = np.cumsum(lengths)
    later = np.flatnonzero(_within(lengths) >= 3)
    rest = counts.copy()
    rest[later] -= counts[later - 2]
    columns: list[npt.NDArray[np.uint8]] = [np.zeros(len(rest), np.uint8)]
    unfinished: Bools = np.ones(len(rest), bool)
    while unfinished.any():
        group = rest & 31
        rest = rest >> 5
        more = cast(Bools, np.where(group & 16, rest != -1, rest != 0)) & unfinished
        columns.append(np.where(unfinished, (group | (more << 5)) + 48, 0).astype(np.uint8))
        unfinished = more
    text = np.stack(columns, 1)
    used = text > 0
    letters = text[used].tobytes()
    cuts: list[int] = np.concatenate([[0], np.cumsum(used.sum(1))])[np.concatenate([[0], ends])].tolist()
    return [letters[a:b] for a, b in pairwise(cuts)]


def from_crop(crop: Bools, x0: int, y0: int, size: tuple[int, int]) -> bytes:
    """Encode a mask that is zero outside of a crop.

    Args:
        crop: (h, w) bool.
        x0: x of its upper left corner in the image.
        y0: y of its upper left corner in the image.
        size: H, W of the image, to which the crop is clipped.

    Returns:
        The compressed string.
    """
    return from_edges([edges(crop, x0, y0, size)], size[0] * size[1])[0]


def edges(crop: Bools, x0: int, y0: int, size: tuple[int, int]) -> Ints:
    """Return starts and ends of the runs of such a mask, in column order, for `from_edges`; see `from_crop`."""
    height, width = size
    left, top = max(0, -x0), max(0, -y0)
    crop = crop[top : max(top, height - y0), left : max(left, width - x0)]
    if not crop.size:
        return np.zeros(0, np.int64)
    columns = np.zeros((crop.shape[1], crop.shape[0] + 2), bool)
    columns[:, 1:-1] = crop.T
    # Every column is padded with background, so that the changes alternate between starts and ends.
    x, y = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), columns.shape[1] - 1)
    return (x + x0 + left) * height + y + y0 + top


def frame(text: bytes, height: int) -> Frame:
    """Return the tightest pixel window around the foreground of a mask of `height` rows; zeros if it is empty."""
    starts, ends = runs(text)
    return _frames(starts, ends, np.zeros(len(starts), np.int64), 1, height)[0]


def frames(texts: Sequence[bytes], height: int) -> list[Frame]:
    """Return the tightest pixel windows of several masks; see `frame`."""
    return _frames(*runs_all(texts), len(texts), height)


def _frames(starts: Ints, ends: Ints, owner: Ints, count: int, height: int) -> list[Frame]:
    """The tightest pixel windows of `count` masks, of which `owner` gives the mask of each run."""
    result = np.zeros((count, 4), np.int64)
    if len(starts):
        begins = np.flatnonzero(np.diff(owner, prepend=-1))
        first, last = starts // height, (ends - 1) // height
        y0 = np.minimum.reduceat(starts % height, begins)
        y1 = np.maximum.reduceat((ends - 1) % height, begins) + 1
        # A run that continues in the next column touches the lower and the upper border.
        wraps = np.logical_or.reduceat(first != last, begins)
        y0, y1 = np.where(wraps, 0, y0), np.where(wraps, height, y1)
        x1 = last[np.append(begins[1:], len(owner)) - 1] + 1
        result[owner[begins]] = np.stack([first[begins], y0, x1, y1], 1)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in result.tolist()]


def to_crop(text: bytes, height: int) -> tuple[Frame, Bools]:
    """Decode a mask without making a plane.

    Args:
        text: The compressed string.
        height: H of the image.

    Returns:
        The tightest pixel window, and the bool mask inside it (a view with columns first in memory).
    """
    return next(to_crops([text], height))


def to_crops(texts: Sequence[bytes], height: int) -> Iterator[tuple[Frame, Bools]]:
    """Decode several masks without making planes; see `to_crop`."""
    starts, ends, owner = runs_all(texts)
    cuts: list[int] = np.searchsorted(owner, np.arange(len(texts) + 1)).tolist()
    for box, (a, b) in zip(_frames(starts, ends, owner, len(texts), height), pairwise(cuts), strict=True):
        x0, y0, x1, y1 = box
        rows = y1 - y0  # those of the image where a run continues in the next column
        line = np.zeros((x1 - x0) * rows + 1, np.int8)
        line[_in_window(starts[a:b], height, x0, y0, rows)] += 1
        line[_in_window(ends[a:b] - 1, height, x0, y0, rows) + 1] -= 1
        yield box, np.cumsum(line[:-1], dtype=np.int8).reshape(x1 - x0, rows).view(bool).T


def _in_window(pixels: Ints, height: int, x0: int, y0: int, rows: int) -> Ints:
    """Numbers of pixels, column by column, in a window instead of the image."""
    columns = pixels // height
    return pixels - columns * height - y0 + (columns - x0) * rows


def area(text: bytes) -> int:
    """Return the number of foreground pixels."""
    return int(decode_counts(text)[1::2].sum())

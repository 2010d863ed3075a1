"""COCO's run-length code, vectorised in numpy.

A mask is read column by column (top to bottom, then left to right) as alternating run lengths that start with
background. The compressed form writes each run, from the fourth on as its difference to the run before the last, in
groups of five bits: the sixth bit says that another group follows, and 48 is added so that the text is printable.

pycocotools holds the same code in C, but it trusts its input (a short or garbled string makes it read memory that is
not its own) and it only knows whole planes. Strings from outside therefore pass through `decode_counts`, and crops
are coded here without ever making the plane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

Frame = tuple[int, int, int, int]  # x0, y0, x1, y1: whole pixels, x1 and y1 exclusive


def decode_counts(text: bytes) -> np.ndarray:
    """Run lengths (int64) from COCO's compressed string. ValueError where the text is no such string."""
    return decode_all([text])[0]


def decode_all(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Run lengths (int64) of several strings, one mask after the other, and how many each has.

    All are read in one go: for a hundred small masks that is many times quicker than one by one.
    """
    groups = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
    if not len(groups):
        return np.zeros(0, np.int64), np.zeros(len(texts), np.int64)
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError("it holds characters that no run-length string has")
    last = (groups & 32) == 0
    if not last[stops[stops > 0] - 1].all():
        raise ValueError("it ends in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 11:
        raise ValueError("it holds a number too large for any image")
    values = np.add.reduceat((groups & 31) << (5 * place), starts)
    negative = (groups[ends] & 16) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    lengths = np.diff(np.searchsorted(ends, stops), prepend=0)
    if len(texts) == 1:  # a short string costs numpy's calls alone
        values[1::2] = np.cumsum(values[1::2])
        values[2::2] = np.cumsum(values[2::2])
    else:
        within = _within(lengths)
        for chain in (within % 2 == 1, (within % 2 == 0) & (within > 0)):
            rows = np.flatnonzero(chain)
            values[rows] = _sums(values[rows], within[rows] <= 2)
    if values.min() < 0:
        raise ValueError("it holds a negative run")
    return values, lengths


def _within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... inside each of several stretches."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _sums(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Cumulative sums that begin anew wherever `first` is set."""
    sums, begins = np.cumsum(values), np.flatnonzero(first)
    return sums - np.repeat(sums[begins] - values[begins], np.diff(begins, append=len(values)))


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


def runs_all(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for several masks, one after the other, and the number of the mask that each run belongs to."""
    counts, lengths = decode_all(texts)
    within = _within(lengths)
    edges = _sums(counts, within == 0) if len(counts) else counts
    ends = np.flatnonzero(within % 2 == 1)
    solid = ends[counts[ends] > 0]
    return edges[solid - 1], edges[solid], np.repeat(np.arange(len(texts)), lengths)[solid]


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
    later = np.flatnonzero(_within(lengths) >= 3)
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
    return _frames(starts, ends, np.zeros(len(starts), np.int64), 1, height)[0]


def frames(texts: Sequence[bytes], height: int) -> list[Frame]:
    """The same for several masks."""
    return _frames(*runs_all(texts), len(texts), height)


def _frames(starts: np.ndarray, ends: np.ndarray, owner: np.ndarray, count: int, height: int) -> list[Frame]:
    result = np.zeros((count, 4), np.int64)
    if len(starts):
        begins = np.flatnonzero(np.diff(owner, prepend=-1))
        first, last = starts // height, (ends - 1) // height
        y0 = np.minimum.reduceat(starts % height, begins)
        y1 = np.maximum.reduceat((ends - 1) % height, begins) + 1
        # A run that goes on in the next column touches both the lower and the upper border.
        wraps = np.logical_or.reduceat(first != last, begins)
        y0, y1 = np.where(wraps, 0, y0), np.where(wraps, height, y1)
        x1 = last[np.append(begins[1:], len(owner)) - 1] + 1
        result[owner[begins]] = np.stack([first[begins], y0, x1, y1], 1)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in result.tolist()]


def to_crop(text: bytes, height: int) -> tuple[Frame, np.ndarray]:
    """The tightest frame and the bool mask inside it (a view, columns first in memory), without making the plane."""
    return next(to_crops([text], height))


def to_crops(texts: Sequence[bytes], height: int) -> Iterator[tuple[Frame, np.ndarray]]:
    """The same for several masks, one after the other."""
    starts, ends, owner = runs_all(texts)
    cuts = np.searchsorted(owner, np.arange(len(texts) + 1)).tolist()
    for box, (a, b) in zip(_frames(starts, ends, owner, len(texts), height), pairwise(cuts), strict=True):
        x0, y0, x1, y1 = box
        line = np.zeros((x1 - x0) * height + 1, np.int8)
        line[starts[a:b] - x0 * height] += 1
        line[ends[a:b] - x0 * height] -= 1
        plane = np.cumsum(line[:-1], dtype=np.int8).reshape(x1 - x0, height)
        yield box, plane.view(bool)[:, y0:y1].T


def area(text: bytes) -> int:
    """Number of foreground pixels."""
    return int(decode_counts(text)[1::2].sum())

"""Metrics of tracking: HOTA, CLEAR (MOTA and its parts) and identity (IDF1), as TrackEval computes them.

The overlap of two objects is the IoU of their masks (MOTS; Voigtlaender et al., 2019, arXiv 1902.03604). All counts add
up over clips and classes; ratios are formed from the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask

from maskwright.errors import UsageError
from maskwright.ops.assignment import best_pairs
from maskwright.structures import Instances, Masks

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

EPSILON = float(np.finfo(float).eps)
ALPHAS: Floats = np.arange(0.05, 0.99, 0.05)  # thresholds of HOTA
_FORBIDDEN = 1e10


# ---- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The objects of a clip, annotated and predicted, with their overlaps.

    Attributes:
        truth: For each frame the number of the track of each annotated object, counted from 0.
        found: For each frame the number of the track of each prediction.
        overlaps: For each frame the IoU (n, m) of each annotated object with each prediction.
        truth_tracks: Number of annotated tracks.
        found_tracks: Number of predicted tracks.
    """

    truth: tuple[Ints, ...]
    found: tuple[Ints, ...]
    overlaps: tuple[Floats, ...]
    truth_tracks: int
    found_tracks: int

    @property
    def truth_objects(self) -> int:
        """Number of annotated objects in all frames."""
        return sum(map(len, self.truth))

    @property
    def found_objects(self) -> int:
        """Number of predictions in all frames."""
        return sum(map(len, self.found))


def mask_overlaps(masks: Masks, others: Masks, crowd: bool = False) -> Floats:
    """Return the IoU (n, m) of masks in double precision, as thresholds are compared with.

    Args:
        masks: N masks.
        others: M masks of the same size.
        crowd: Divide the intersection by the area of each of `masks` instead.
    """
    if not len(masks) or not len(others):
        return np.zeros((len(masks), len(others)))
    flags = [int(crowd)] * len(others)
    return np.asarray(coco_mask.iou(cast(Any, masks.rle()), cast(Any, others.rle()), flags), np.float64)


def pairs_of(truth: Sequence[Instances], found: Sequence[Instances], clip: str = "the clip") -> Pairs:
    """Return the pairs of annotated and predicted objects of a clip.

    Crowd regions are ignored as MOTSChallenge does: predictions that match no annotated object with an IoU of at least
    0.5, and of which more than half lies in the crowd regions of the frame, are left out.

    Args:
        truth: The annotated objects of each frame with masks and ids.
        found: The predictions of each frame with masks and ids.
        clip: Name of the clip, for messages.

    Returns:
        The pairs.

    Raises:
        UsageError: If masks or ids are missing, or two objects of a frame have the same id.
    """
    rows: list[tuple[Ints, Ints, Floats]] = []
    for frame, (one, two) in enumerate(zip(truth, found, strict=True)):
        ids = tuple(checked_ids(objects, clip, frame) for objects in (one, two))
        crowd = torch.zeros(len(one), dtype=torch.bool) if one.crowd is None else one.crowd.cpu()
        real = ~crowd.numpy()
        masks, others = cast(Masks, one.masks), cast(Masks, two.masks)
        overlaps = mask_overlaps(masks[real], others)
        kept = np.ones(len(two), bool)
        if not real.all() and len(two):
            free = np.setdiff1d(np.arange(len(two)), _matched(overlaps))
            region = masks[~real].union()
            inside = mask_overlaps(others[free], region, crowd=True)[:, 0] > 0.5 + EPSILON
            kept[free[inside]] = False
        rows.append((ids[0][real], ids[1][kept], overlaps[:, kept]))
    names = [np.unique(np.concatenate([np.zeros(0, np.int64), *(row[side] for row in rows)])) for side in (0, 1)]
    return Pairs(
        tuple(np.searchsorted(names[0], row[0]) for row in rows),
        tuple(np.searchsorted(names[1], row[1]) for row in rows),
        tuple(row[2] for row in rows),
        len(names[0]),
        len(names[1]),
    )


def checked_ids(objects: Instances, clip: str, frame: int) -> Ints:
    """Return the ids of objects.

    Raises:
        UsageError: If masks or ids are missing, or two objects have the same id.
    """
    if objects.ids is None or objects.masks is None:
        what = "ids" if objects.ids is None else "masks"
        raise UsageError(f"{clip}, frame {frame}: the objects have no {what}, which the metrics of tracking need")
    ids = objects.ids.cpu().numpy().astype(np.int64)
    if len(np.unique(ids)) < len(ids):
        numbers, counts = np.unique(ids, return_counts=True)
        raise UsageError(f"{clip}, frame {frame}: several objects have the id {numbers[counts > 1][0]}")
    return ids


def _matched(overlaps: Floats) -> Ints:
    """Columns that are assigned to a row with an IoU of at least 0.5."""
    if not overlaps.size:
        return np.zeros(0, np.int64)
    scores = np.where(overlaps < 0.5 - EPSILON, -10000.0, overlaps)
    rows, columns = best_pairs(scores)
    return columns[scores[rows, columns] > EPSILON]


# ---- counts that add up ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Numbers that add up over clips and classes."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Clear(Counts):
    """Counts of the CLEAR metrics (Bernardin and Stiefelhagen, 2008), at an IoU of at least 0.5.

    Attributes:
        matches: Predictions that are matched with an annotated object.
        missed: Annotated objects without a match (FN).
        extra: Predictions without a match (FP).
        switches: Matches of an object with another track than the last time it was matched (IDSW).
        fragments: Interruptions of matched objects (Frag).
        mostly_tracked: Tracks matched in more than 80 % of their frames (MT).
        partly_tracked: The others that are matched in at least 20 % (PT).
        mostly_lost: The rest (ML).
        overlap: Sum of the IoU of all matches.
    """

    matches: int = 0
    missed: int = 0
    extra: int = 0
    switches: int = 0
    fragments: int = 0
    mostly_tracked: int = 0
    partly_tracked: int = 0
    mostly_lost: int = 0
    overlap: float = 0.0

    def summary(self) -> dict[str, float]:
        """MOTA, MOTP, sMOTA (sMOTSA for masks) and the counts by their usual names."""
        objects = max(1, self.matches + self.missed)
        return {
            "MOTA": (self.matches - self.extra - self.switches) / objects,
            "MOTP": self.overlap / max(1, self.matches),
            "sMOTSA": (self.overlap - self.extra - self.switches) / objects,
            "IDSW": self.switches,
            "FP": self.extra,
            "FN": self.missed,
            "Frag": self.fragments,
            "MT": self.mostly_tracked,
            "PT": self.partly_tracked,
            "ML": self.mostly_lost,
        }


@dataclass(frozen=True)
class Identity(Counts):
    """Counts of the identity metrics (Ristani et al., 2016, arXiv 1609.01775), at an IoU of at least 0.5."""

    matches: int = 0
    missed: int = 0
    extra: int = 0

    def summary(self) -> dict[str, float]:
        """IDF1, IDP and IDR."""
        return {
            "IDF1": self.matches / max(1.0, self.matches + 0.5 * self.extra + 0.5 * self.missed),
            "IDP": self.matches / max(1, self.matches + self.extra),
            "IDR": self.matches / max(1, self.matches + self.missed),
        }


def _zeros() -> Floats:
    return np.zeros(len(ALPHAS))


@dataclass(frozen=True)
class Hota(Counts):
    """Sums of HOTA (Luiten et al., 2021, arXiv 2009.07736), one for each threshold in `ALPHAS`.

    Attributes:
        matches: Matches.
        missed: Annotated objects without a match.
        extra: Predictions without a match.
        association: Sum of the association IoU of the tracks of all matches.
        recall: Sum of their association recall.
        precision: Sum of their association precision.
        overlap: Sum of the IoU of all matches.
    """

    matches: Floats
    missed: Floats
    extra: Floats
    association: Floats
    recall: Floats
    precision: Floats
    overlap: Floats

    @classmethod
    def zero(cls) -> Hota:
        """The sums of nothing."""
        return cls(*(_zeros() for _ in fields(cls)))

    def curves(self) -> dict[str, Floats]:
        """HOTA, DetA, AssA and their parts at each threshold."""
        matches = np.maximum(1, self.matches)
        detection = self.matches / np.maximum(1, self.matches + self.missed + self.extra)
        association = self.association / matches
        return {
            "HOTA": np.sqrt(detection * association),
            "DetA": detection,
            "AssA": association,
            "DetRe": self.matches / np.maximum(1, self.matches + self.missed),
            "DetPr": self.matches / np.maximum(1, self.matches + self.extra),
            "AssRe": self.recall / matches,
            "AssPr": self.precision / matches,
            "LocA": np.maximum(1e-10, self.overlap) / np.maximum(1e-10, self.matches),
        }

    def summary(self) -> dict[str, float]:
        """The means over all thresholds."""
        return {name: float(values.mean()) for name, values in self.curves().items()}


# ---- counting --------------------------------------------------------------------------------------------------------


def clear(pairs: Pairs, threshold: float = 0.5) -> Clear:
    """Count the CLEAR metrics of a clip.

    Matches of the frame before are continued where the threshold allows it; the others maximize the sum of overlaps. A
    frame without annotated objects or without predictions interrupts nothing (as in TrackEval).

    Args:
        pairs: The objects of the clip.
        threshold: Smallest IoU of a match.
    """
    tracks = pairs.truth_tracks
    if not pairs.found_objects:
        return Clear(missed=pairs.truth_objects, mostly_lost=tracks)
    if not pairs.truth_objects:
        return Clear(extra=pairs.found_objects)
    matches = missed = extra = switches = 0
    overlap = 0.0
    present, matched, pieces = (np.zeros(tracks, np.int64) for _ in range(3))
    last, before = (np.full(tracks, -1, np.int64) for _ in range(2))  # of all frames, and of the last one
    for truth, found, overlaps in zip(pairs.truth, pairs.found, pairs.overlaps, strict=True):
        present[truth] += 1
        if not len(truth) or not len(found):
            missed += len(truth)
            extra += len(found)
            continue
        scores = 1000.0 * (found[None] == before[truth][:, None]) + overlaps
        scores[overlaps < threshold - EPSILON] = 0
        rows, columns = best_pairs(scores)
        good = scores[rows, columns] > EPSILON
        rows, columns = rows[good], columns[good]
        own, other = truth[rows], found[columns]
        switches += int(((last[own] >= 0) & (last[own] != other)).sum())
        matched[own] += 1
        untracked = before < 0
        last[own] = other
        before[:] = -1
        before[own] = other
        pieces += untracked & (before >= 0)
        matches += len(own)
        missed += len(truth) - len(own)
        extra += len(found) - len(own)
        overlap += float(overlaps[rows, columns].sum())
    share = matched[present > 0] / present[present > 0]
    mostly = int((share > 0.8).sum())
    partly = int((share >= 0.2).sum()) - mostly
    fragments = int((pieces[pieces > 0] - 1).sum())
    return Clear(matches, missed, extra, switches, fragments, mostly, partly, tracks - mostly - partly, overlap)


def identity(pairs: Pairs, threshold: float = 0.5) -> Identity:
    """Count the identity metrics of a clip: the assignment of whole tracks with the fewest errors.

    Args:
        pairs: The objects of the clip.
        threshold: Smallest IoU of a match.
    """
    if not pairs.found_objects or not pairs.truth_objects:
        return Identity(0, pairs.truth_objects, pairs.found_objects)
    tracks, others = pairs.truth_tracks, pairs.found_tracks
    common = np.zeros((tracks, others))
    for truth, found, overlaps in zip(pairs.truth, pairs.found, pairs.overlaps, strict=True):
        rows, columns = np.nonzero(overlaps >= threshold)
        common[truth[rows], found[columns]] += 1
    lengths = np.bincount(np.concatenate(pairs.truth), minlength=tracks).astype(float)
    others_lengths = np.bincount(np.concatenate(pairs.found), minlength=others).astype(float)
    # A track may also be assigned to nothing: the rows and columns that follow.
    missed, extra = (np.zeros((tracks + others, tracks + others)) for _ in range(2))
    missed[:tracks, :others] = lengths[:, None] - common
    extra[:tracks, :others] = others_lengths[None] - common
    missed[:tracks, others:] = _FORBIDDEN
    extra[tracks:, :others] = _FORBIDDEN
    missed[np.arange(tracks), others + np.arange(tracks)] = lengths
    extra[tracks + np.arange(others), np.arange(others)] = others_lengths
    rows, columns = best_pairs(-(missed + extra))
    lost = int(missed[rows, columns].sum())
    return Identity(int(lengths.sum()) - lost, lost, int(extra[rows, columns].sum()))


def hota(pairs: Pairs) -> Hota:
    """Count the sums of HOTA of a clip.

    Objects are matched once for all thresholds, by their overlap times the alignment of their tracks over the clip.

    Args:
        pairs: The objects of the clip.
    """
    total = Hota.zero()
    if not pairs.found_objects or not pairs.truth_objects:
        total.missed[:], total.extra[:] = pairs.truth_objects, pairs.found_objects
        return total
    possible = np.zeros((pairs.truth_tracks, pairs.found_tracks))
    for truth, found, overlaps in zip(pairs.truth, pairs.found, pairs.overlaps, strict=True):
        sums = overlaps.sum(0)[None] + overlaps.sum(1)[:, None] - overlaps
        share = np.divide(overlaps, sums, out=np.zeros_like(overlaps), where=sums > EPSILON)
        possible[truth[:, None], found[None]] += share
    lengths = np.bincount(np.concatenate(pairs.truth), minlength=pairs.truth_tracks)[:, None]
    others = np.bincount(np.concatenate(pairs.found), minlength=pairs.found_tracks)[None]
    alignment = possible / (lengths + others - possible)
    counts = np.zeros((len(ALPHAS), *possible.shape))
    for truth, found, overlaps in zip(pairs.truth, pairs.found, pairs.overlaps, strict=True):
        total.missed[:] += len(truth)
        total.extra[:] += len(found)
        if not len(truth) or not len(found):
            continue
        rows, columns = best_pairs(alignment[truth[:, None], found[None]] * overlaps)
        values = overlaps[rows, columns]
        good = values[None] >= ALPHAS[:, None] - EPSILON  # (thresholds, matches)
        total.matches[:] += good.sum(1)
        total.overlap[:] += (values * good).sum(1)
        counts[:, truth[rows], found[columns]] += good
    total.missed[:] -= total.matches
    total.extra[:] -= total.matches
    union = np.maximum(1, lengths + others - counts)
    total.association[:] = (counts * (counts / union)).sum((1, 2))
    total.recall[:] = (counts * (counts / np.maximum(1, lengths))).sum((1, 2))
    total.precision[:] = (counts * (counts / np.maximum(1, others))).sum((1, 2))
    return total

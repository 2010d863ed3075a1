"""Dividing a data set into training and validation, and finding near-duplicates across the two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from maskwright.data.dataset import Dataset, as_dataset
from maskwright.data.findings import DataWarning, first_few
from maskwright.data.images import MAX_PIXELS, opened
from maskwright.data.views import Subset
from maskwright.errors import UsageError

MOST_COMPARED = 20_000  # images of each side; of larger data sets an evenly spaced sample
_SIDE = 16  # pixels of the thumbnails that are compared
_DIFFERENT_BITS = 0.1  # share of the comparisons of neighboring pixels that may differ
_DIFFERENT_VALUES = 0.12  # mean difference of thumbnails, in standard deviations
_FLAT = 2.0  # standard deviation of grey values below which an image shows nothing to compare


def divided(dataset: Any, share: float, seed: int = 0, *, compare: bool = True) -> tuple[Subset, Subset]:
    """Divide a data set at random, so that each class has the same share of objects on both sides as far as possible.

    Images are assigned one by one, those with the rarest class first, to the side that lacks most objects of it
    (Sechidis et al., 2011, "On the Stratification of Multi-label Data").

    Args:
        dataset: The data set.
        share: Share of the images for validation, in (0, 1).
        seed: The same seed gives the same division.
        compare: Warn about near-duplicates across the two sides.

    Returns:
        The images for training and those for validation, each at least one, in the order of the data set.

    Raises:
        UsageError: If `share` is not in (0, 1), or the data set has fewer than two images.

    Warns:
        DataWarning: About near-duplicates.
    """
    data = as_dataset(dataset)
    if not 0 < share < 1:
        raise UsageError(f"the share of images for validation must be between 0 and 1, got {share:g}")
    if len(data) < 2:
        raise UsageError(f"{data.name} has {len(data)} image; at least 2 are needed to divide it")
    held_out = stratified([data.image_labels(index) for index in range(len(data))], len(data.classes), share, seed)
    chosen = set(held_out)
    sides = Subset(data, [i for i in range(len(data)) if i not in chosen]), Subset(data, held_out)
    if compare:
        warn_about_duplicates(*sides)
    return sides


def share_or_source(text: str) -> float | str:
    """Return "0.2" and "20%" as a share, anything else as the source of a data set."""
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        return text
    return text if Path(text).exists() else share


def stratified(labels: Sequence[npt.NDArray[np.int64]], classes: int, share: float, seed: int) -> list[int]:
    """Return the positions of the images for validation, ascending; see `divided`.

    Args:
        labels: The labels of the objects of each image.
        classes: Number of classes.
        share: Share of the images.
        seed: Seed.
    """
    total = len(labels)
    wanted = min(total - 1, max(1, round(share * total)))
    order = np.random.default_rng(seed).permutation(total)
    # The last column stands for images without objects, which are divided in the same ratio.
    counts = np.zeros((total, classes + 1), np.int64)
    for index, own in enumerate(labels):
        counts[index, :classes] = np.bincount(own, minlength=classes)[:classes]
        counts[index, classes] = not len(own)
    lacking = np.stack([counts.sum(0) * (1 - share), counts.sum(0) * share])  # objects of each class; train, val
    room = [total - wanted, wanted]
    side = np.full(total, -1, np.int64)
    frequency = (counts > 0).sum(0)
    for label in np.argsort(frequency, kind="stable").tolist():
        for index in order[(counts[order, label] > 0) & (side[order] < 0)].tolist():
            prefer = 1 if lacking[1, label] / share > lacking[0, label] / (1 - share) else 0
            if not room[prefer]:
                prefer = 1 - prefer
            side[index] = prefer
            room[prefer] -= 1
            lacking[prefer] -= counts[index]
    return np.flatnonzero(side == 1).tolist()


# ---- near-duplicates -----------------------------------------------------------------------------------------------


def warn_about_duplicates(train: Any, val: Any, most: int = MOST_COMPARED) -> int:
    """Warn about images of one data set that are nearly the same as images of another one.

    Args:
        train: The data set to train on.
        val: The data set to validate on.
        most: Number of images of each side that are compared, evenly spaced.

    Returns:
        Number of images of `val` with a near-duplicate in `train`.

    Warns:
        DataWarning: Naming the first pairs.
    """
    pairs = near_duplicates(as_dataset(train), as_dataset(val), most)
    if pairs:
        shown = "; ".join(f"{first_few([one.name])} and {first_few([two.name])}" for one, two in pairs[:3])
        count = len({two for _, two in pairs})
        warnings.warn(
            f"{count} images for validation are nearly the same as images for training: {shown}; "
            "results on them say little about new images, so keep such images on one side",
            DataWarning,
            stacklevel=3,
        )
    return len({two for _, two in pairs})


def near_duplicates(train: Dataset, val: Dataset, most: int = MOST_COMPARED) -> list[tuple[Path, Path]]:
    """Return pairs of image files that are nearly the same, one of each data set.

    Images are compared by grey thumbnails: by which of two neighboring pixels is brighter (a perceptual hash), and by
    their normalized values. Changes of size, compression and brightness do not matter. Up to `most` images of each side
    are compared.
    """
    sides = [[path for path in data.paths() if path is not None] for data in (train, val)]
    sides = [paths[:: max(1, math.ceil(len(paths) / most))] for paths in sides]
    (one, first, keys), (two, second, others) = (_thumbnails(paths) for paths in sides)
    pairs: list[tuple[Path, Path]] = []
    bits = keys.shape[1]
    for begin in range(0, len(two), 512):
        agree = keys @ others[begin : begin + 512].T  # number of equal bits minus number of different ones
        rows, columns = np.nonzero(agree >= bits * (1 - 2 * _DIFFERENT_BITS))
        for row, column in zip(rows.tolist(), (columns + begin).tolist(), strict=True):
            if float(np.abs(first[row] - second[column]).mean()) <= _DIFFERENT_VALUES:
                pairs.append((one[row], two[column]))
    return pairs


def _thumbnails(paths: Sequence[Path]) -> tuple[list[Path], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The files that can be compared, their normalized thumbnails (N, pixels), and hashes (N, bits) of -1 and 1."""
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as threads:
        found = [(p, t) for p, t in zip(paths, threads.map(_thumbnail, paths), strict=True) if t is not None]
    planes = np.array([thumbnail for _, thumbnail in found], np.float32).reshape(-1, _SIDE, _SIDE + 1)
    keys = np.where(planes[:, :, 1:] > planes[:, :, :-1], np.float32(1), np.float32(-1)).reshape(len(found), -1)
    flat = planes.reshape(len(found), -1)
    flat = (flat - flat.mean(1, keepdims=True)) / np.maximum(flat.std(1, keepdims=True), 1e-6)
    return [path for path, _ in found], flat.astype(np.float32), keys


def _thumbnail(path: Path) -> npt.NDArray[np.float32] | None:
    """The grey thumbnail of an image; None if it cannot be read or shows nothing."""
    from PIL import Image

    try:
        with path.open("rb") as file, opened(cast(Any, file), path, MAX_PIXELS) as image:
            image.draft("L", (4 * _SIDE, 4 * _SIDE))
            grey = image if image.mode in ("I;16", "I", "F") else image.convert("L")
            values = np.asarray(grey.convert("F").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), np.float32)
    except Exception:  # unreadable images are reported elsewhere
        return None
    return values if values.std() > _FLAT * max(1.0, float(values.max()) / 255) else None

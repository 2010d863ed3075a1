"""Which images of a comparison are trained on, and which are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskwright.data import Dataset, Subset, has_split, open_dataset, things_only
from maskwright.data.findings import first_few
from maskwright.data.splitting import warn_about_duplicates
from maskwright.errors import UsageError


def divided(data: Any, split: str, val: Any, val_split: str, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    """Return the images to train on, those to measure on, and what has to be said about the division.

    Args:
        data: A data set or its source.
        split: The split to train on.
        val: A data set to measure on, or its source; None: the split `val_split` of `data`, or a fifth of the images.
        val_split: The split to measure on.
        seed: Seed of the division.

    Raises:
        UsageError: If there is nothing to measure on.
    """
    if isinstance(data, Dataset):
        whole = data
        judged = val if isinstance(val, Dataset) else None if val is None else open_dataset(val, val_split)
    else:
        whole = open_dataset(data, split)
        source = data if val is None else val
        if isinstance(source, Dataset):
            judged = source
        else:
            there = has_split(source, val_split)
            if val is None and there and split == val_split:
                raise UsageError(
                    f"the split {split!r} is trained on; give another `val_split`, or `val`, to measure on"
                )
            if val is None and not there and val_split != "val":
                raise UsageError(
                    f"{source} has no split {val_split!r}; omit `val_split` to measure on a fifth of the images"
                )
            judged = open_dataset(source, val_split) if val is not None or there else None
    if judged is not None:
        judged = things_only(judged)
        if not any(_has_objects(judged, index) for index in range(len(judged))):
            raise UsageError(f"{judged.name}: {len(judged)} images to measure on have no objects; give another `val`")
        ours, theirs = things_only(whole).classes, judged.classes
        if not set(ours) & set(theirs):
            raise UsageError(
                f"the images to train on have the classes {first_few(ours, 8)}, those to measure on "
                f"{first_few(theirs, 8)}: none in common"
            )
        alike = warn_about_duplicates(whole, judged, 2_000) if isinstance(val, (str, Path)) else 0
        words = f"{alike} of the images that are measured on are nearly the same as images that are trained on"
        return whole, judged, [words] if alike else []
    if len(whole) < 5:
        number = "1 image" if len(whole) == 1 else f"{len(whole)} images"
        raise UsageError(f"{whole.name} has {number} and no split {val_split!r}; give `val`")
    order: list[int] = np.random.default_rng(seed).permutation(len(whole)).tolist()
    held = max(2, len(whole) // 5)
    there = next((place for place, index in enumerate(order) if _has_objects(whole, index)), 0)
    if there >= held:  # there must be something to measure on
        order[0], order[there] = order[there], order[0]
    parts = Subset(whole, sorted(order[held:])), Subset(whole, sorted(order[:held]))
    note = (
        f"there is no split {val_split!r}: {held} of {len(whole)} images, chosen at random with seed {seed}, are "
        "measured on"
    )
    return parts[0], things_only(parts[1]), [note]


def _has_objects(dataset: Dataset, index: int) -> bool:
    target = things_only(dataset).targets(index)
    return len(target) > 0 if target.crowd is None else not bool(target.crowd.all())

"""Names of splits: "val" also stands for "valid", "validation" and "val2017"."""

from __future__ import annotations

import re
from collections.abc import Iterable

KINDS = ("train", "val", "test")  # every split whose name begins with one of these belongs to that kind


def kind_of(split: str) -> str | None:
    """Return which of `KINDS` a split belongs to: "train" for "train2017", "val" for "valid"; None for others."""
    name = split.lower()
    return next((kind for kind in KINDS if name.startswith(kind)), None)


def is_usual(folder: str) -> bool:
    """Return whether a folder outside a data set that was named by the caller has the usual name of a split.

    That is "train", "training", "val", "valid", "validation", "test" or "testing", with or without digits. Other names
    that begin like those, such as "test_photos" or "training-data", are common for folders that are no splits.
    """
    return re.fullmatch(r"(train(ing)?|val(id|idation)?|test(ing)?)[-_]?\d*", folder.lower()) is not None


def fitting(wanted: str, splits: Iterable[str]) -> list[str]:
    """Return those of `splits` that `wanted` refers to.

    Args:
        wanted: The split that the caller names.
        splits: The names of all splits.

    Returns:
        The split of exactly this name; otherwise, if `wanted` is the name of a kind ("train", "training", "val",
        "valid", "validation", "test"), all splits of this kind. More than one is ambiguous.
    """
    splits = list(dict.fromkeys(splits))
    if wanted in splits:
        return [wanted]
    if wanted.lower() not in (*KINDS, "training", "valid", "validation", "testing"):
        return []
    return [split for split in splits if kind_of(split) == kind_of(wanted)]

"""Comparing class names: of splits, and of a system and a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from maskwright.data.findings import first_few


def folded(name: str) -> str:
    """Return a class name as names are compared: without regard to case, spaces, hyphens and underscores."""
    return "".join(c for c in name.casefold() if c not in " -_")


def label_counts(dataset: Any) -> dict[str, int]:
    """Return the number of objects of each class of a data set, crowd regions excluded, without decoding images."""
    counts = [0] * len(dataset.classes)
    for index in range(len(dataset)):
        target = dataset.targets(index)
        labels = target.labels if target.crowd is None else target.labels[~target.crowd]
        for label in labels.tolist():
            counts[label] += 1
    return dict(zip(dataset.classes, counts, strict=True))


def without_match(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return those of `names` that no name in `others` equals; see `folded`."""
    known = {folded(name) for name in others}
    return [name for name in names if folded(name) not in known]


def counted(names: Sequence[str], counts: Mapping[str, int]) -> str:
    """List class names with their numbers of objects: "'cup' (3 objects), 'fork' (1 object) and 2 more"."""
    shown = [f"{first_few([n])} ({counts[n]} object{'s' * (counts[n] != 1)})" for n in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def similar_words(names: Sequence[str], others: Sequence[str]) -> str:
    """Return a clause about a name that is probably a name in `others` in another spelling; may be empty."""
    for name in names:
        alike = get_close_matches(folded(name), [folded(o) for o in others], 1, cutoff=0.6)
        part = [o for o in others if alike and folded(o) == alike[0]]
        part = part or [
            o for o in others if min(len(o), len(name)) > 2 and (folded(o) in folded(name) or folded(name) in folded(o))
        ]
        if part:
            return f"; is {first_few([name])} the same as {first_few(part[:1])}?"
    return ""

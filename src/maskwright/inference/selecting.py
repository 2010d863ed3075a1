"""Which predicted objects are kept: a selection of classes, and score thresholds that differ by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar

import torch

from maskwright.errors import UsageError
from maskwright.evaluation.tasks import default_of
from maskwright.structures import Instances, Panoptic

Found = TypeVar("Found", Instances, Panoptic)
CANDIDATES = 10  # times as many objects are decoded when some classes are left out afterwards ...
MOST = 1000  # ... but not more than this many


@dataclass(frozen=True)
class ClassFilter:
    """Keeps objects of some classes that reach the score threshold of their class.

    A system's decoding takes one score threshold and limits the number of objects of all classes together. It is
    therefore called with the lowest of the thresholds and, if classes are left out, with a higher limit, which
    `__call__` then applies to the remaining objects.

    Attributes:
        labels: Labels to keep; None: all.
        thresholds: Score thresholds by label.
        other: Score threshold of the other labels; None: that of the decoding.
        detections: Maximum number of objects of an image; None: that of the decoding.
        options: Options for the decoding.
    """

    labels: tuple[int, ...] | None = None
    thresholds: Mapping[int, float] = field(default_factory=dict[int, float])
    other: float | None = None
    detections: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def create(
        cls,
        names: Sequence[str],
        decode: Callable[..., Any],
        options: Mapping[str, Any],
        classes: Sequence[str] | None = None,
        threshold: float | Mapping[str, float] | None = None,
    ) -> ClassFilter:
        """Make a filter.

        Args:
            names: The system's classes.
            decode: The system's decoding.
            options: Options for it.
            classes: Names of the classes to keep; None: all.
            threshold: A score threshold for all classes, or one for each of several classes by name. The other classes
                keep ``options["score_threshold"]``, or the default of `decode`.

        Returns:
            The filter.

        Raises:
            UsageError: If a name is unknown, no class is named, or a threshold is not a number in [0, 1].
        """
        if isinstance(classes, str):
            raise UsageError(f"`classes` must be a list of class names, got {classes!r}; write [{classes!r}]")
        labels = None if classes is None else tuple(sorted({_label(name, names) for name in classes}))
        if labels is not None and not labels:
            raise UsageError("`classes` must name at least one class; omit it to keep all")
        options = dict(options)
        if threshold is not None and not isinstance(threshold, Mapping):
            if options.get("score_threshold") is not None:
                raise UsageError("`threshold` and `score_threshold` are the same option; give one of them")
            options["score_threshold"] = _score(threshold, "`threshold`")
            threshold = None
        own = {
            _label(name, names): _score(value, f"threshold of {name!r}") for name, value in (threshold or {}).items()
        }
        default = default_of(decode, "score_threshold")
        other: float | None = options.get("score_threshold")
        other = default if other is None else other
        if own:
            if default is None:
                raise UsageError("this system has no score threshold; omit `threshold`")
            relevant = range(len(names)) if labels is None else labels
            options["score_threshold"] = min(own.get(label, other or 0.0) for label in relevant)
        limit: int | None = options.get("detections")
        limit = default_of(decode, "detections") if limit is None else limit
        if labels is not None and len(labels) < len(names) and limit is not None:
            options["detections"] = max(limit, min(CANDIDATES * limit, MOST))
        elif not own:
            limit = None
        return cls(labels, own, other, limit, options)

    @property
    def active(self) -> bool:
        """Whether any object can be removed."""
        return self.labels is not None or bool(self.thresholds)

    def __call__(self, objects: Found, limit: bool = True) -> Found:
        """Keep the selected objects, or the segments of selected classes.

        Args:
            objects: The objects, best first, or segments.
            limit: Whether to limit their number.

        Returns:
            Those that are kept, in order.
        """
        if not self.active or not len(objects):
            return objects
        if isinstance(objects, Panoptic):
            labels = objects.segments.labels
            return objects if self.labels is None else objects[torch.isin(labels, labels.new_tensor(self.labels))]
        keep = torch.ones(len(objects), dtype=torch.bool, device=objects.labels.device)
        if self.labels is not None:
            keep &= torch.isin(objects.labels, objects.labels.new_tensor(self.labels))
        if self.thresholds and objects.scores is not None:
            lowest = objects.scores.new_full(objects.labels.shape, self.other or 0.0)
            for label, value in self.thresholds.items():
                lowest[objects.labels == label] = value
            keep &= objects.scores >= lowest
        kept = objects[keep]
        return kept[: self.detections] if limit and self.detections is not None else kept


def parse_thresholds(texts: Sequence[str]) -> tuple[float | None, dict[str, float]]:
    """Read score thresholds from the command line.

    Args:
        texts: ``"person=0.7,car=0.3"``, ``"0.5"``, or ``"0.5,person=0.7"``; commas and several texts are equivalent.

    Returns:
        The threshold without a class name, None if there is none; and those of classes.

    Raises:
        UsageError: If a value is not a number, or is given twice.
    """
    everything: float | None = None
    own: dict[str, float] = {}
    for text in split_names(texts):
        name, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"--threshold {text}: expected CLASS=NUMBER or NUMBER, for example person=0.7") from None
        _score(number, f"--threshold {text}: the value")
        name = name.strip()
        if (equals and name in own) or (not equals and everything is not None):
            raise UsageError(f"--threshold {text}: there is another threshold for {name or 'all classes'}")
        if equals:
            own[name] = number
        else:
            everything = number
    return everything, own


def split_names(texts: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """Split lists of names at commas.

    Args:
        texts: The lists.
        known: Names that may contain commas themselves; a text that equals one of them is not split.

    Returns:
        The names, without surrounding spaces; empty ones are omitted.
    """
    parts = [part for text in texts for part in ([text] if text in known else text.split(","))]
    return [part.strip() for part in parts if part.strip()]


def class_labels(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """The labels of class names.

    Raises:
        UsageError: If a name is unknown.
    """
    return [_label(name, names) for name in wanted]


def _label(name: Any, names: Sequence[str]) -> int:
    """The label of a class."""
    if name in names:
        return list(names).index(name)
    folded = [k for k, known in enumerate(names) if isinstance(name, str) and known.casefold() == name.casefold()]
    similar = [names[folded[0]]] if folded else get_close_matches(str(name), names, 3, cutoff=0.5)
    if similar:
        hint = f"did you mean {' or '.join(map(repr, similar))}?"
    else:
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        hint = f"the system's classes are {shown}"
    raise UsageError(f"unknown class {name!r}; {hint}")


def _score(value: Any, what: str) -> float:
    """A valid score."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= 1:
        raise UsageError(f"{what} must be a number from 0 to 1, got {value!r}")
    return float(value)

"""Systems whose classes have no meaning for a person: their objects are reported as one class.

Weights trained on generated images distinguish outlines ("contour-017"). Used as they are, without fine-tuning, only
that there is an object is of interest.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.ops.boxes import pairwise_iou
from maskwright.structures import Instances, Placement
from maskwright.systems.system import System, Task

OBJECT = "object"
MERGED = 0.6  # IoU from which on two detections are the same object
LOWEST = 0.02  # score from which on detections contribute to the object that they are merged into
CANDIDATES, MOST = 5, 500  # times as many detections are decoded as objects are wanted, and at most this many


class Classless(System):
    """The part of a classless system that differs from its kind; see `classless`.

    Attributes:
        stored_classes: The class names of the heads' rows, which `save` writes.
    """

    shown_score: ClassVar[float] = 0.25  # many classes share an object's probability
    stored_classes: tuple[str, ...]

    @property
    def tasks(self) -> frozenset[Task]:
        return frozenset({"instances", "proposals"})

    def losses(self, raw: Any, targets: Sequence[Instances]) -> dict[str, Tensor]:
        raise UsageError(
            "the classes of these weights have no meaning, so that they cannot be trained on; give `train` their name "
            "or file, or load them with classes=, which gives the heads new rows"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made at run time: pickles name the kind
        made = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return (_restored, (type(self).__mro__[2], dict(self.options)), *made[2:])


def classless(system: System) -> System:
    """Makes a system report all its objects as the class "object"; in place.

    Detections of different classes that overlap are merged into one object, whose score is the probability that at
    least one of them is right, if they were independent: 1 - (1 - s_1) (1 - s_2) ...

    Args:
        system: The system. It is evaluated regardless of class (as systems that predict proposals), and cannot be
            trained.

    Returns:
        The same object.
    """
    stored = tuple(system.classes)
    system.__class__ = _classless_kind(type(system))
    assert isinstance(system, Classless)
    system.stored_classes, system.classes = stored, (OBJECT,)
    return system


@functools.cache
def _classless_kind(kind: type[System]) -> type[System]:
    """The classless variant of a class of systems. Its `decode` has the options of the original."""

    @functools.wraps(kind.decode)
    def decode(self: Any, raw: Any, placements: Sequence[Placement], **options: Any) -> list[Instances]:
        found = cast("Any", kind.decode)(self, raw, placements, **_wider(kind, options))
        threshold, limit = _limits(kind, options)
        return [merged(objects, threshold, limit) for objects in found]

    return type(f"Classless{kind.__name__}", (Classless, kind), {"decode": decode, "__module__": kind.__module__})


def _restored(kind: type[System], options: Mapping[str, Any]) -> System:
    """An instance without state, for copies."""
    made = _classless_kind(kind)
    return made.__new__(made, **options)


def _wider(kind: type[System], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with which the detections that will be merged are found too."""
    wider = dict(options)
    threshold, limit = _limits(kind, options)
    if threshold is not None:
        wider["score_threshold"] = min(threshold, LOWEST)
    if limit is not None:
        wider["detections"] = max(limit, min(CANDIDATES * limit, MOST))
    return wider


def _limits(kind: type[System], options: Mapping[str, Any]) -> tuple[float | None, int | None]:
    """Score threshold and number of objects that `decode` is asked for; None if it has no such option."""
    known = inspect.signature(kind.decode).parameters
    threshold, limit = (
        options.get(name, known[name].default if name in known else None) for name in ("score_threshold", "detections")
    )
    return threshold, limit


def merged(objects: Instances, threshold: float | None, limit: int | None) -> Instances:
    """Merges detections of the same object.

    Args:
        objects: Detections of any classes, best first.
        threshold: Objects that score less after merging are left out.
        limit: Maximum number of objects.

    Returns:
        Objects with label 0, best first. Each has the mask, box and keypoints of its best detection.
    """
    objects = replace(objects, labels=torch.zeros_like(objects.labels))
    if objects.scores is None or not len(objects):
        return objects[:limit]
    masks, boxes = objects.masks, objects.boxes
    overlap = pairwise_iou(boxes, boxes) if masks is None else masks.iou(masks)
    close: list[list[bool]] = cast("Any", overlap >= MERGED).tolist()
    chosen: list[int] = []
    owner: list[int] = []
    for index in range(len(objects)):
        leader = next((number for number, best in enumerate(chosen) if close[best][index]), len(chosen))
        if leader == len(chosen):
            chosen.append(index)
        owner.append(leader)
    doubt = (1 - objects.scores.double().clamp(0, 1)).log()
    total = doubt.new_zeros(len(chosen)).index_add(0, torch.tensor(owner, device=doubt.device), doubt)
    scores, order = (1 - total.exp()).to(objects.scores.dtype).sort(descending=True, stable=True)
    kept = replace(objects[torch.tensor(chosen, device=order.device)[order]], scores=scores)
    if threshold is not None:
        kept = kept[kept.scores >= threshold] if kept.scores is not None else kept
    return kept[:limit]

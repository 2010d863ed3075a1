"""The tasks that a system can be evaluated on: the method that answers, the evaluator, the file that is written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from maskwright.data import Dataset, OneClass, things_only
from maskwright.errors import UsageError
from maskwright.evaluation.evaluator import Evaluator
from maskwright.evaluation.panoptic import PanopticEvaluator, SemanticEvaluator
from maskwright.options import check_option
from maskwright.structures import Instances, Panoptic
from maskwright.systems import System

TaskName = Literal["instances", "panoptic", "semantic", "proposals"]
KINDS = {"masks": "segm", "boxes": "bbox", "keypoints": "keypoints"}  # what a system predicts -> what is measured


@dataclass(frozen=True)
class Task:
    """What a system is asked for, and how the answer is compared and written.

    Attributes:
        name: The name in `evaluate(..., task=)` and `System.tasks`.
        verb: The method of the system that answers.
        segments: Whether the answer covers whole images (`Panoptic`) instead of listing objects (`Instances`).
        detections: Default limit of objects per image; None where the answer is not limited.
        score_threshold: Default score threshold; None for the system's own.
        results: Name of the file that `predict` writes the answer to.
    """

    name: TaskName
    verb: str
    segments: bool = False
    detections: int | None = None
    score_threshold: float | None = None
    results: str = "results.json"

    def of(self, system: System) -> Callable[..., Any]:
        """The bound method of `system` that answers.

        Raises:
            UsageError: If the system does not support the task.
        """
        # Recall of proposals can be measured for every system that predicts objects.
        if self.name not in system.tasks and not (self.name == "proposals" and "instances" in system.tasks):
            supported = ", ".join(sorted(system.tasks))
            raise UsageError(f"{system.name} does not support task {self.name!r}; it supports {supported}")
        return getattr(system, self.verb)

    def view(self, dataset: Dataset, system: System) -> Dataset:
        """The data set as the task sees it: with its regions, with things only, or as a single class.

        Raises:
            UsageError: If whole images are to be compared and the data set has no regions.
        """
        if self.segments:
            if not dataset.stuff:
                raise UsageError(f"task {self.name!r} needs a data set with things and stuff (COCO panoptic)")
            return dataset
        dataset = things_only(dataset)
        return OneClass(dataset, system.classes[0]) if "proposals" in system.tasks else dataset

    def evaluator(
        self, dataset: Dataset, kinds: tuple[str, ...] = ("segm", "bbox"), boundary: bool = False,
        detections: int | None = None,
    ) -> Evaluator | PanopticEvaluator | SemanticEvaluator:  # fmt: skip
        """An evaluator for the view of a data set.

        Args:
            dataset: What `view` returned.
            kinds: What to measure of objects: "segm", "bbox", "keypoints".
            boundary: Whether to measure boundary AP too.
            detections: Limit of objects per image; default: the task's.
        """
        if self.name == "panoptic":
            return PanopticEvaluator(dataset)
        if self.name == "semantic":
            return SemanticEvaluator(dataset)
        return Evaluator(
            dataset, kinds=kinds, boundary=boundary, max_detections=detections or self.detections,
            task="proposals" if self.name == "proposals" else "instances",
        )  # fmt: skip


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("instances", "decode", detections=100),
        Task("proposals", "decode", detections=1000, score_threshold=0.0),
        Task("panoptic", "decode_panoptic", segments=True, results="panoptic.json"),
        Task("semantic", "decode_semantic", segments=True, results="panoptic.json"),
    )
}


def task_called(name: str) -> Task:
    """The task of this name; UsageError if there is none."""
    if name not in TASKS:
        raise UsageError(f"task must be one of {', '.join(map(repr, TASKS))}, got {name!r}")
    return TASKS[name]


def checked_options(verb: Callable[..., Any], system: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Checks options of a decoding method against its annotations.

    Args:
        verb: The method.
        system: Name of the system, for messages.
        options: Options by name; those that are None keep their default.

    Returns:
        The options that are not None.

    Raises:
        UsageError: If the method has no such option, or a value does not fit the annotation. Numbers must be finite,
            integers not negative, thresholds in 0 ... 1.
    """
    parameters = inspect.signature(verb).parameters
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY] or list(parameters)[2:]
    for name in options:
        if name not in known:
            raise UsageError(
                f"{system} has no option {name!r} for predicting; its options are {', '.join(known) or 'none'}"
            )
    hints = get_type_hints(verb)
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name in hints:
            check_option(name, _scalar(value), hints[name])
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} must be a finite number, got {value!r}")
        if name.endswith("threshold") and isinstance(_scalar(value), (int, float)) and not 0 <= value <= 1:
            raise UsageError(f"{name} must be between 0 and 1, got {value!r}")
        if _counts(hints.get(name)) and value < 0:
            raise UsageError(f"{name} must be an integer of at least 0, got {value!r}")
    return given


def default_of(verb: Callable[..., Any], name: str) -> Any:
    """The default of an option of a method; None if there is none."""
    parameter = inspect.signature(verb).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def on_host(found: Any) -> Instances | Panoptic:
    """Moves the answer for one image to the host, with masks in their smallest form; pixel labels become regions."""
    if isinstance(found, Instances):
        objects = found.to("cpu")
        if objects.masks is not None:
            objects.masks = objects.masks.pack()
        return objects
    if isinstance(found, Panoptic):
        segments = on_host(found.segments)
        assert isinstance(segments, Instances)
        return Panoptic(segments, found.things.cpu())
    return Panoptic.from_semantic(found.cpu())


def _scalar(value: Any) -> Any:
    """NumPy scalars as Python's."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _counts(hint: Any) -> bool:
    return hint is int or (get_origin(hint) is not Literal and int in get_args(hint) and float not in get_args(hint))

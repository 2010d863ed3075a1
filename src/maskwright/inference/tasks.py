"""What a system is asked for: objects, images divided among things and stuff, or a label for every pixel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal, get_args

from maskwright.errors import UsageError
from maskwright.structures import Instances, Panoptic
from maskwright.systems import PanopticSystem, System

Task = Literal["instances", "panoptic", "semantic"]
Measured = Literal["instances", "panoptic", "semantic", "proposals"]  # proposals are objects, measured by recall alone


def verb_of(system: System, task: str) -> Callable[..., Any]:
    """The system's verb for a task: `decode`, `decode_panoptic` or `decode_semantic`."""
    if task not in get_args(Measured):
        raise UsageError(f"task is {task!r}; expected {', '.join(get_args(Measured))}")
    if task in ("instances", "proposals"):
        return system.decode
    if not isinstance(system, PanopticSystem) or not system.can_divide:
        raise UsageError(f"{system.name} finds objects alone; task {task!r} needs a system that divides whole images")
    return system.decode_panoptic if task == "panoptic" else system.decode_semantic


def checked_thresholds(verb: Callable[..., Any], name: str, thresholds: dict[str, Any]) -> dict[str, Any]:
    """`thresholds` without those that are None; UsageError names one that the verb of the system `name` lacks, or whose
    value is of another kind than its default: numbers are finite, and whole ones count something."""
    parameters = inspect.signature(verb).parameters
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY] or list(parameters)[2:]
    for asked in thresholds:
        if asked not in known:
            raise UsageError(
                f"{name} has no option {asked!r} for predicting; its thresholds are {', '.join(known) or 'none'}"
            )
    given = {name: value for name, value in thresholds.items() if value is not None}
    for asked, value in given.items():
        kind = str(parameters[asked].annotation).removesuffix(" | None")
        truth = isinstance(value, bool)
        good, words = {
            "int": (isinstance(value, Integral) and not truth and int(value) >= 0, "a whole number from 0 on"),
            "float": (isinstance(value, Real) and not truth and math.isfinite(value), "a number"),
            "bool": (truth, "True or False"),
        }.get(kind, (True, ""))
        if not good:
            raise UsageError(f"{asked} is {value!r}; expected {words}")
    return given


def default_of(verb: Callable[..., Any], name: str) -> Any:
    """The default of an option of a verb; None where it has none."""
    parameter = inspect.signature(verb).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def on_host(found: Any) -> Any:
    """What a verb gave for one image, on the host, masks in the smallest form; labels of pixels as regions."""
    if isinstance(found, Instances):
        objects = found.to("cpu")
        if objects.masks is not None:
            objects.masks = objects.masks.pack()
        return objects
    if isinstance(found, Panoptic):
        return Panoptic(on_host(found.segments), found.things.cpu())
    return Panoptic.from_semantic(found.cpu())

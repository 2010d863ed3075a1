"""Options that make small presets narrower, so that they train in minutes on a CPU core."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from maskwright.options import OptionGroup, groups_of
from maskwright.systems import presets, system_class

NARROW: Mapping[str, Any] = {
    "backbone": {"width": 32}, "neck_width": 64, "head": {"width": 64}, "head_width": 64,
    "boxes": {"width": 256}, "masks": {"width": 64, "fc_width": 256}, "keypoints": {"width": 64},
    "points": {"width": 64}, "mask_width": 64,
}  # fmt: skip


def narrow(preset: str) -> dict[str, Any]:
    """The options of `NARROW` that a preset's system has. Groups that the preset does not use stay off."""
    kind = system_class(presets()[preset])
    given, groups = kind.presets[preset].options, groups_of(kind.__init__)
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        value = NARROW.get(name)
        if name not in groups:
            options |= {} if value is None or isinstance(value, Mapping) else {name: value}
        elif isinstance(value, Mapping) and (name in given or isinstance(parameter.default, OptionGroup)):
            known = {field.name for field in fields(groups[name])}
            options[name] = {field: own for field, own in value.items() if field in known}
    backbone = given.get("backbone", "")
    named = backbone.get("name", "") if isinstance(backbone, Mapping) else str(backbone)
    if "backbone" in options and not named.startswith("resnet"):
        del options["backbone"]
    return options

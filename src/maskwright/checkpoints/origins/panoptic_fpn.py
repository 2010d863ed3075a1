"""Layout of Panoptic FPN in detectron2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import segment_names
from maskwright.checkpoints.origins import Origin, Shapes
from maskwright.checkpoints.origins.mask_rcnn import (
    DENSE,
    DETECTRON2,
    DETECTRON2_IGNORE,
    deformable_weights,
    detectron2_options,
)

# Every second module of a level is an upsampling.
LEVEL = r"^sem_seg_head\.p(\d)\.(\d)\."


def _level(match: re.Match[str]) -> str:
    part = "norm." if match[3] else "conv."
    return f"semantic.levels.{int(match[1]) - 2}.{int(match[2]) // 2}.{part}"


RENAME = [
    (LEVEL + r"(norm\.)?", _level),
    (r"^sem_seg_head\.predictor\.", "semantic.output."),
    *DETECTRON2,
    DENSE,
]


def _recognise(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    output, first = shapes.get("sem_seg_head.predictor.weight"), shapes.get("sem_seg_head.p2.0.weight")
    own = re.compile(rf"{LEVEL}|^sem_seg_head\.predictor\.|^(?!sem_seg_head\.)")
    if output is None or first is None or not all(own.match(key) for key in shapes):
        return None
    options = detectron2_options({k: v for k, v in shapes.items() if not k.startswith("sem_seg_head.")}, "masks")
    if options is None or "neck_width" not in options:
        return None
    things, regions = len(options["classes"]), output[0] - 1
    classes, stuff = segment_names(things + regions)
    if len(stuff) != regions:
        stuff = tuple(f"class {things + k}" for k in range(regions))
        classes = (*options["classes"], *stuff)
    norm = "group" if "sem_seg_head.p2.0.norm.weight" in shapes else "none"
    return {
        **options, "classes": classes, "stuff": stuff,
        "semantic": {"width": first[0], "norm": norm},
    }  # fmt: skip


ORIGINS = [
    Origin(
        name="detectron2",
        system="panoptic-fpn",
        rename=RENAME,
        recognise=_recognise,
        finish=deformable_weights,
        ignore=DETECTRON2_IGNORE,
        code_licence="Apache-2.0",
        weights_licence="CC-BY-SA-3.0",
    )
]

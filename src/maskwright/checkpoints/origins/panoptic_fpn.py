"""Layouts of Panoptic FPN in detectron2, with one box stage and with a cascade."""

from __future__ import annotations

import re
from typing import Any

from maskwright.checkpoints.names import segment_names
from maskwright.checkpoints.origins import Origin, Shapes
from maskwright.checkpoints.origins import cascade_rcnn as cascade
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


SEMANTIC = [
    (LEVEL + r"(norm\.)?", _level),
    (r"^sem_seg_head\.predictor\.", "semantic.output."),
]


def _recognise(shapes: Shapes, system: str) -> dict[str, Any] | None:
    output, first = shapes.get("sem_seg_head.predictor.weight"), shapes.get("sem_seg_head.p2.0.weight")
    own = re.compile(rf"{LEVEL}|^sem_seg_head\.predictor\.|^(?!sem_seg_head\.)")
    if output is None or first is None or not all(own.match(key) for key in shapes):
        return None
    rest = {k: v for k, v in shapes.items() if not k.startswith("sem_seg_head.")}
    options = detectron2_options(rest, "masks") if system == "panoptic-fpn" else cascade.cascade_options(rest)
    if options is None or "neck_width" not in options or not options["masks"]:
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
        system=system,
        rename=[*SEMANTIC, *rename],
        recognise=lambda shapes, about, system=system: _recognise(shapes, system),
        finish=deformable_weights,
        ignore=DETECTRON2_IGNORE,
        code_licence="Apache-2.0",
        weights_licence="CC-BY-SA-3.0",
    )
    for system, rename in (("panoptic-fpn", [*DETECTRON2, DENSE]), ("cascade-panoptic-fpn", cascade.RENAME))
]

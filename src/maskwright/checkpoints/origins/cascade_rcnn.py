"""Layouts of Cascade (Mask) R-CNN in detectron2."""

from __future__ import annotations

import re
from typing import Any

from maskwright.checkpoints.origins import Origin, Shapes
from maskwright.checkpoints.origins.mask_rcnn import (
    DENSE,
    DETECTRON2,
    DETECTRON2_IGNORE,
    deformable_weights,
    detectron2_options,
)
from maskwright.systems.cascade_rcnn import DELTA_WEIGHTS

STAGE = re.compile(r"^roi_heads\.box_(?:head|predictor)\.(\d)\.")
# Keys of a later stage, without its number.
PARTS = [
    (r"^conv(\d)\.norm\.", lambda m: f"convs.{int(m[1]) - 1}.norm."),
    (r"^conv(\d)\.", lambda m: f"convs.{int(m[1]) - 1}.conv."),
    (r"^fc(\d)\.", lambda m: f"fcs.{int(m[1]) - 1}."),
    (r"^cls_score\.", "classes."),
    (r"^bbox_pred\.", "deltas."),
]


def _later_stage(match: re.Match[str]) -> str:
    rest = match[2]
    for pattern, replacement in PARTS:
        rest = re.sub(pattern, replacement, rest)
    return f"boxes_{int(match[1]) + 1}.{rest}"


RENAME = [
    (r"^(roi_heads\.box_(?:head|predictor))\.0\.", r"\1."),  # the first stage is named as Mask R-CNN's only one
    (r"^roi_heads\.box_(?:head|predictor)\.(\d)\.(.*)$", _later_stage),
    *DETECTRON2,
    DENSE,
]


def cascade_options(shapes: Shapes) -> dict[str, Any] | None:
    """Options of a two-stage system with several box stages; None for another layout."""
    stages = {int(m[1]) for k in shapes if (m := STAGE.match(k))}
    if not stages or stages != set(range(len(stages))):
        return None
    first = {
        re.sub(r"^(roi_heads\.box_(?:head|predictor))\.0\.", r"\1.", key): shape
        for key, shape in shapes.items()
        if (m := STAGE.match(key)) is None or m[1] == "0"
    }
    if first.get("roi_heads.box_predictor.bbox_pred.weight", (0,))[0] != 4:
        return None
    options = detectron2_options(first, "any")
    if options is None:
        return None
    options["boxes"]["agnostic"] = True
    if len(stages) != len(DELTA_WEIGHTS):
        weights = [(10.0 * n, 10.0 * n, 5.0 * n, 5.0 * n) for n in range(1, len(stages) + 1)]
        overlaps = [0.5 + 0.1 * n for n in range(len(stages))]
        options["cascade"] = {
            "overlaps": overlaps, "delta_weights": weights, "loss_weights": (1.0,) * len(stages),
        }  # fmt: skip
    return options


ORIGINS = [
    Origin(
        name="detectron2",
        system="cascade-mask-rcnn",
        rename=RENAME,
        recognise=lambda shapes, about: cascade_options(shapes),
        finish=deformable_weights,
        ignore=DETECTRON2_IGNORE,
        code_licence="Apache-2.0",
        weights_licence="CC-BY-SA-3.0",
    )
]

"""Layouts of RetinaNet in detectron2 and torchvision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.fcos import NECK, TORCHVISION_DENSE, torchvision_names
from maskwright.checkpoints.origins.mask_rcnn import (
    DETECTRON2,
    DETECTRON2_IGNORE,
    deformable_weights,
    detectron2_backbone,
    torchvision_backbone,
)

ANCHORS = 9
DENSE = (r"^(backbone|neck|class_tower|box_tower|logits|deltas)\.", r"dense.\1.")


def _detectron2(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    logits = shapes.get("head.cls_score.weight")
    if logits is None or "head.ctrness.weight" in shapes or "head.cls_subnet.0.weight" not in shapes:
        return None
    options = detectron2_backbone(shapes)
    if options is None or shapes["head.bbox_pred.weight"][0] != 4 * ANCHORS or logits[0] % ANCHORS:
        return None
    convs = [k for k in shapes if re.match(r"^head\.cls_subnet\.\d+\.weight$", k) and len(shapes[k]) == 4]
    options.pop("neck_norm", None)
    return {
        **options, "neck_width": shapes["backbone.fpn_output3.weight"][0], "convs": len(convs),
        "classes": class_names(logits[0] // ANCHORS),
    }  # fmt: skip


def _torchvision(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    logits, deltas = (
        shapes.get(f"head.{name}.weight")
        for name in ("classification_head.cls_logits", "regression_head.bbox_reg")
    )  # fmt: skip
    if logits is None or deltas is None or deltas[0] != 4 * ANCHORS or logits[0] % ANCHORS:
        return None
    backbone = torchvision_backbone(shapes)
    if backbone is None:
        return None
    group = "head.classification_head.conv.0.1.weight" in shapes
    convs = {m[1] for k in shapes if (m := re.match(r"^head\.classification_head\.conv\.(\d+)\.", k))}
    return {
        "backbone": backbone, "in_channels": shapes["backbone.body.conv1.weight"][1], "rules": "torchvision",
        "neck_width": deltas[1], "convs": len(convs), "norm": "group" if group else "none",
        "box_loss": "giou" if group else "l1", "classes": torchvision_names(logits[0] // ANCHORS),
    }  # fmt: skip


def _rows(state: State, options: Mapping[str, Any]) -> State:
    """Drops the first row of each anchor, COCO's unused category id 0."""
    result, kinds = dict(state), len(options["classes"])
    for kind in ("weight", "bias"):
        key = f"dense.logits.{kind}"
        result[key] = state[key].unflatten(0, (ANCHORS, -1))[:, -kinds:].flatten(0, 1)
    return result


ORIGINS = [
    Origin(
        name="detectron2",
        system="retinanet",
        rename=[
            *NECK,
            *DETECTRON2,
            (r"^head\.cls_subnet\.(\d+)\.", lambda m: f"class_tower.{int(m[1]) // 2}.conv."),
            (r"^head\.bbox_subnet\.(\d+)\.", lambda m: f"box_tower.{int(m[1]) // 2}.conv."),
            (r"^head\.cls_score\.", "logits."),
            (r"^head\.bbox_pred\.", "deltas."),
            DENSE,
        ],
        recognise=_detectron2,
        finish=deformable_weights,
        ignore=[*DETECTRON2_IGNORE, r"^anchor_generator\."],
        absent=[r"^normalizer$"],
        code_licence="Apache-2.0",
        weights_licence="CC-BY-SA-3.0",
    ),
    Origin(
        name="torchvision",
        system="retinanet",
        rename=[
            *TORCHVISION_DENSE,
            (r"^head\.classification_head\.conv\.", "class_tower."),
            (r"^head\.regression_head\.conv\.", "box_tower."),
            (r"^(\w+_tower)\.(\d+)\.0\.", r"\1.\2.conv."),
            (r"^(\w+_tower)\.(\d+)\.1\.", r"\1.\2.norm."),
            # Files of before torchvision 0.13 count the ReLUs too.
            (r"^(\w+_tower)\.(\d+)\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) // 2}.conv.{m[3]}"),
            (r"^head\.classification_head\.cls_logits\.", "logits."),
            (r"^head\.regression_head\.bbox_reg\.", "deltas."),
            DENSE,
        ],
        recognise=_torchvision,
        finish=_rows,
        code_licence="BSD-3-Clause",
        weights_licence="BSD-3-Clause",
    ),
]

"""Layouts on maskrcnn-benchmark: Mask Scoring R-CNN, and Mask R-CNN and Faster R-CNN of the code base itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.mask_rcnn import DENSE, DEPTHS, RESNET_BLOCKS, background_last, minus

RENAME = [
    (r"^module\.", ""),
    (r"^backbone\.body\.stem\.conv1\.", "backbone.stem.conv."),
    (r"^backbone\.body\.stem\.bn1\.", "backbone.stem.norm."),
    minus(r"^backbone\.body\.layer(\d)\.", "backbone.stages.{}.", 1),
    *RESNET_BLOCKS,
    minus(r"^backbone\.fpn\.fpn_inner(\d)\.", "neck.lateral.{}.conv.", 1),
    minus(r"^backbone\.fpn\.fpn_layer(\d)\.", "neck.output.{}.conv.", 1),
    (r"^rpn\.head\.conv\.", "rpn.convs.0."),
    (r"^rpn\.head\.cls_logits\.", "rpn.objectness."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.deltas."),
    minus(r"^roi_heads\.box\.feature_extractor\.fc(\d)\.", "boxes.fcs.{}.", 6),
    (r"^roi_heads\.box\.predictor\.cls_score\.", "boxes.classes."),
    (r"^roi_heads\.box\.predictor\.bbox_pred\.", "boxes.deltas."),
    minus(r"^roi_heads\.mask\.feature_extractor\.mask_fcn(\d)\.", "masks.convs.{}.conv.", 1),
    (r"^roi_heads\.mask\.predictor\.conv5_mask\.", "masks.upsample."),
    (r"^roi_heads\.mask\.predictor\.mask_fcn_logits\.", "masks.logits."),
    minus(r"^roi_heads\.maskiou\.feature_extractor\.maskiou_fcn(\d)\.", "mask_iou.convs.{}.", 1),
    minus(r"^roi_heads\.maskiou\.feature_extractor\.maskiou_fc(\d)\.", "mask_iou.fcs.{}.", 1),
    (r"^roi_heads\.maskiou\.predictor\.maskiou\.", "mask_iou.iou."),
    DENSE,
]


def options_of(shapes: Shapes, system: str) -> dict[str, Any] | None:
    """Options of a two-stage system of this code base; None for another layout."""
    shapes = {key.removeprefix("module."): shape for key, shape in shapes.items()}
    logits = shapes.get("roi_heads.box.predictor.cls_score.weight")
    if logits is None or "backbone.fpn.fpn_inner1.weight" not in shapes:
        return None
    masks = "roi_heads.mask.predictor.mask_fcn_logits.weight" in shapes
    scored = "roi_heads.maskiou.predictor.maskiou.weight" in shapes
    if system != ("mask-scoring-rcnn" if scored else "mask-rcnn" if masks else "faster-rcnn"):
        return None
    blocks = tuple(_count(shapes, rf"^backbone\.body\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    if blocks not in DEPTHS or "backbone.body.layer1.0.conv3.weight" not in shapes:
        return None
    stem, width = shapes["backbone.body.stem.conv1.weight"], shapes["backbone.body.layer1.0.conv2.weight"]
    grouped = width[1] != width[0]
    backbone: dict[str, Any] = {
        "name": f"resnet{DEPTHS[blocks]}", "width": stem[0], "norm": "frozen", "norm_eps": 0.0, "frozen": 2,
        "stride_in": "3x3" if grouped else "1x1",
    }  # fmt: skip
    if grouped:
        backbone |= {"groups": width[0] // width[1], "group_width": width[1] * 64 // stem[0]}
    options: dict[str, Any] = {
        "backbone": backbone, "in_channels": stem[1], "rules": "maskrcnn-benchmark",
        "neck_width": shapes["backbone.fpn.fpn_layer1.weight"][0], "classes": class_names(logits[0] - 1),
        "boxes": {"width": shapes["roi_heads.box.feature_extractor.fc6.weight"][0]},
    }  # fmt: skip
    if masks:
        options["masks"] = {
            "convs": _count(shapes, r"^roi_heads\.mask\.feature_extractor\.mask_fcn(\d)\."),
            "width": shapes["roi_heads.mask.predictor.conv5_mask.weight"][1],
        }
    if scored:
        options["mask_iou"] = {
            "convs": _count(shapes, r"^roi_heads\.maskiou\.feature_extractor\.maskiou_fcn(\d)\."),
            "width": shapes["roi_heads.maskiou.feature_extractor.maskiou_fcn1.weight"][0],
            "fc_width": shapes["roi_heads.maskiou.feature_extractor.maskiou_fc1.weight"][0],
        }
    return options


def _count(shapes: Shapes, pattern: str) -> int:
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


def _finish(state: State, options: Mapping[str, Any]) -> State:
    """Moves background from the first row to the last, and drops its unused rows."""
    result = background_last(state, options)
    for kind in ("weight", "bias"):
        if f"mask_iou.iou.{kind}" in result:
            result[f"mask_iou.iou.{kind}"] = state[f"mask_iou.iou.{kind}"][1:]
    return result


ORIGINS = [
    Origin(
        name="maskrcnn-benchmark",
        system=system,
        rename=RENAME,
        recognise=lambda shapes, about, system=system: options_of(shapes, system),
        finish=_finish,
        ignore=[r"^(module\.)?rpn\.anchor_generator\."],
        code_licence="MIT",
        weights_licence="MIT" if system == "mask-scoring-rcnn" else "",
    )
    for system in ("mask-scoring-rcnn", "mask-rcnn", "faster-rcnn")
]

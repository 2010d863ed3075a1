"""CenterMask and CenterMask-Lite in the layout of CenterMask2, on detectron2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes
from maskwright.checkpoints.origins.fcos import ADELAIDET, HEAD, head_options, numbered_towers
from maskwright.checkpoints.origins.mask_rcnn import DETECTRON2_IGNORE, detectron2_backbone, minus
from maskwright.checkpoints.origins.vovnet import vovnet_backbone

RENAME = [
    minus(r"^roi_heads\.mask_head\.mask_fcn(\d)\.", "masks.convs.{}.conv.", 1),
    (r"^roi_heads\.mask_head\.spatialAtt\.", "masks.attention."),
    (r"^roi_heads\.mask_head\.deconv\.", "masks.upsample."),
    (r"^roi_heads\.mask_head\.predictor\.", "masks.logits."),
    minus(r"^roi_heads\.maskiou_head\.maskiou_fcn(\d)\.", "mask_iou.convs.{}.", 1),
    minus(r"^roi_heads\.maskiou_head\.maskiou_fc(\d)\.", "mask_iou.fcs.{}.", 1),
    (r"^roi_heads\.maskiou_head\.maskiou\.", "mask_iou.iou."),
    *ADELAIDET,
]


def recognise(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of the constructor, if these are the keys of the original."""
    logits = shapes.get(f"{HEAD}cls_logits.weight")
    masks = shapes.get("roi_heads.mask_head.predictor.weight")
    own = re.compile(
        r"^(backbone\.|proposal_generator\.fcos_head\.|pixel_|roi_heads\.(mask|maskiou)_head\.)"
    )  # fmt: skip
    if logits is None or masks is None or not all(own.match(key) for key in shapes):
        return None
    backbone = vovnet_backbone(shapes) or detectron2_backbone(shapes)
    if backbone is None:
        return None
    head: dict[str, Any] = {
        "convs": len({m[1] for k in shapes if (m := re.match(r"^roi_heads\.mask_head\.mask_fcn(\d)\.", k))}),
        "width": masks[1],
        "attention": "roi_heads.mask_head.spatialAtt.conv.weight" in shapes,
        "scoring": "roi_heads.maskiou_head.maskiou.weight" in shapes,
    }
    if head["scoring"]:
        head["fc_width"] = shapes["roi_heads.maskiou_head.maskiou_fc1.weight"][0]
    options = {
        "backbone": backbone["backbone"], "in_channels": backbone["in_channels"],
        "neck_width": logits[1], "head": head_options(shapes), "masks": head,
        "classes": class_names(logits[0]),
    }  # fmt: skip
    if logits[1] == 128:
        options["resize"] = {"short": 600, "long": 1000}  # Lite
    return options


ORIGINS = [
    Origin(
        name="centermask2",
        system="centermask",
        rename=RENAME,
        recognise=recognise,
        finish=numbered_towers,
        ignore=DETECTRON2_IGNORE,
        code_licence="CC-BY-NC-4.0",
        weights_licence="CC-BY-NC-4.0",
    )
]

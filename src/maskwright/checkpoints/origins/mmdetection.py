"""Layout of Mask R-CNN in MMDetection, from version 2 on: background is the last class.

Version 1 had other names (no `roi_head.`), background first, and boxes that include their last pixel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.solo import BACKBONE, resnet_of

LICENCE = "Apache-2.0"
X101_STD = (57.375, 57.12, 58.395)  # of the ResNeXt models that were taken from detectron2

MASK_RCNN = [
    *BACKBONE,
    (r"\.conv\.offset\.", ".offset."),
    (r"^rpn_head\.rpn_conv\.(\d)\.conv\.", r"dense.rpn.convs.\1."),  # several convolutions
    (r"^rpn_head\.rpn_conv\.", "dense.rpn.convs.0."),
    (r"^rpn_head\.rpn_cls\.", "dense.rpn.objectness."),
    (r"^rpn_head\.rpn_reg\.", "dense.rpn.deltas."),
    (r"^roi_head\.bbox_head\.shared_fcs\.", "boxes.fcs."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "boxes.classes."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "boxes.deltas."),
    (r"^roi_head\.mask_head\.convs\.", "masks.convs."),
    (r"^roi_head\.mask_head\.upsample\.", "masks.upsample."),
    (r"^roi_head\.mask_head\.conv_logits\.", "masks.logits."),
]
# Other systems of the code base have these keys and further ones.
_OWN = re.compile(
    r"^(backbone\.(conv1|bn1|layer\d)\.|neck\.(lateral|fpn)_convs\.\d\.conv\.|rpn_head\.rpn_(conv|cls|reg)\."
    r"|roi_head\.bbox_head\.(shared_fcs\.\d|fc_cls|fc_reg)\.|roi_head\.mask_head\.(convs\.\d\.conv|upsample|conv_logits)\."
    r"|data_preprocessor\.)"
)


def _mask_rcnn(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    needed = ("roi_head.bbox_head.fc_cls.weight", "roi_head.mask_head.conv_logits.weight", "rpn_head.rpn_cls.weight")
    if not all(key in shapes for key in needed) or not all(_OWN.match(key) for key in shapes):
        return None
    offsets = "conv2.conv_offset conv2_offset"
    options = resnet_of(shapes, "backbone.", "layer", 1, "backbone.conv1.weight", offsets)
    if options is None or "backbone.bn1.running_mean" not in shapes:
        return None
    backbone = options["backbone"]
    # detectron2's ResNeXt-101 32x8d is normalised as in Caffe, but strides in the 3 x 3 convolution.
    ported = backbone.get("groups") == 32 and backbone.get("group_width") == 8
    caffe = not ported and _is_caffe(about)
    # Statistics are fixed in both styles; Caffe's scale and shift too.
    backbone |= {"norm": "frozen" if caffe or ported else "still"}
    if "layer1.0.conv3" in " ".join(shapes):
        backbone |= {"stride_in": "1x1" if caffe else "3x3"}
    if ported:
        options["resize"] = {"std": X101_STD}
    count = shapes[needed[0]][0] - 1
    boxes, masks = shapes["roi_head.bbox_head.fc_reg.weight"][0], shapes[needed[1]][0]
    return options | {
        "rules": "mmdetection-caffe" if caffe or ported else "mmdetection",
        "neck_width": shapes["neck.fpn_convs.0.conv.weight"][0],
        "proposals": {"convs": max(1, _count(shapes, r"rpn_head\.rpn_conv\.(\d)\."))},
        "boxes": {
            "fcs": _count(shapes, r"roi_head\.bbox_head\.shared_fcs\.(\d)\."),
            "width": shapes[needed[0]][1], "agnostic": boxes == 4 and count > 1,
        },
        "masks": {
            "convs": _count(shapes, r"roi_head\.mask_head\.convs\.(\d)\."),
            "width": shapes["roi_head.mask_head.upsample.weight"][1], "agnostic": masks == 1 and count > 1,
        },
        "classes": class_names(count),
    }  # fmt: skip


def _is_caffe(about: Mapping[str, Any]) -> bool:
    """Whether the backbone is of Caffe's style, which names and shapes do not tell.

    It is stated in the configuration that MMDetection stores beside the weights, in the names of published files, and
    by the statistics: those of Caffe's models are merged into scale and shift, which leaves means of 0 and variances
    of 1, and they are never updated.
    """
    meta = about.get("container", {}).get("meta")
    for key in ("config", "cfg"):
        text = meta.get(key) if isinstance(meta, Mapping) else None
        style = re.search(r"""style['"]?\s*[=:]\s*['"](caffe|pytorch)""", text) if isinstance(text, str) else None
        if style is not None:
            return style[1] == "caffe"
    name = Path(about.get("path", "")).name.lower()
    if re.match(r"mask[-_]rcnn[-_][rx]\d+", name):
        return "caffe" in name
    tensors = about.get("tensors", {})
    means = [value for key, value in tensors.items() if key.startswith("backbone.") and key.endswith("running_mean")]
    return bool(means) and not any(bool(mean.any()) for mean in means)


def _count(shapes: Shapes, pattern: str) -> int:
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


def _deformable_weights(state: State, options: Mapping[str, Any]) -> State:
    """Moves the weight of a deformable convolution beside its offsets, one level above that of a plain one."""
    deformable = {k.removesuffix("offset.weight") for k in state if k.endswith(".conv2.offset.weight")}
    moved = {f"{prefix}conv.weight": f"{prefix}weight" for prefix in deformable}
    return {moved.get(k, k): v for k, v in state.items()}


ORIGINS = [
    Origin(
        name="mmdetection",
        system="mask-rcnn",
        rename=MASK_RCNN,
        recognise=_mask_rcnn,
        finish=_deformable_weights,
        ignore=(r"\.num_batches_tracked$", r"^data_preprocessor\."),
        code_licence=LICENCE,
        weights_licence=LICENCE,
    )
]

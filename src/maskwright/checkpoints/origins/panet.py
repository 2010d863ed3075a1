"""Layout of PANet in its authors' code, on Detectron.pytorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.detectron import with_statistics
from maskwright.checkpoints.origins.mask_rcnn import DENSE, DEPTHS, RESNET_BLOCKS, background_last, minus


def _reversed(pattern: str, target: str, last: int) -> tuple[str, Callable[[re.Match[str]], str]]:
    """A rule for modules that are numbered from the coarsest level on, here from the finest."""
    return pattern, lambda m: target.format(last - int(m[1]))


RENAME = [
    (r"^module\.", ""),
    (r"^Conv_Body\.conv_body\.res1\.conv1\.", "backbone.stem.conv."),
    (r"^Conv_Body\.conv_body\.res1\.bn1\.", "backbone.stem.norm."),
    minus(r"^Conv_Body\.conv_body\.res(\d)\.", "backbone.stages.{}.", 2),
    *RESNET_BLOCKS,
    (r"^Conv_Body\.conv_top\.", "neck.pyramid.lateral.3."),
    _reversed(r"^Conv_Body\.topdown_lateral_modules\.(\d)\.conv_lateral\.", "neck.pyramid.lateral.{}.", 2),
    _reversed(r"^Conv_Body\.posthoc_modules\.(\d)\.", "neck.pyramid.output.{}.", 3),
    (r"^Conv_Body\.panet_buttomup_conv1_modules\.", "neck.reduce."),
    (r"^Conv_Body\.panet_buttomup_conv2_modules\.", "neck.output."),
    (r"^RPN\.FPN_RPN_conv\.", "rpn.convs.0."),
    (r"^RPN\.FPN_RPN_cls_score\.", "rpn.objectness."),
    (r"^RPN\.FPN_RPN_bbox_pred\.", "rpn.deltas."),
    (r"^Box_Head\.conv1_head\.", "boxes.first."),
    # The numbers count normalisations and ReLUs too.
    (r"^Box_Head\.convs\.(\d+)\.", lambda m: f"boxes.convs.{int(m[1]) // 3}.{int(m[1]) % 3}."),
    (r"^Box_Head\.fc\.", "boxes.fcs.0."),
    (r"^Box_Outs\.cls_score\.", "boxes.classes."),
    (r"^Box_Outs\.bbox_pred\.", "boxes.deltas."),
    (r"^Mask_Head\.mask_conv1\.", "masks.first."),
    (r"^Mask_Head\.conv_fcn\.(\d+)\.", lambda m: f"masks.convs.{int(m[1]) // 3}.{int(m[1]) % 3}."),
    (r"^Mask_Head\.mask_conv4\.", "masks.convs.2."),
    (r"^Mask_Head\.mask_conv4_fc\.", "masks.fc_convs.0."),
    (r"^Mask_Head\.mask_conv5_fc\.", "masks.fc_convs.1."),
    (r"^Mask_Head\.mask_fc\.0\.", "masks.fc."),
    (r"^Mask_Head\.upconv\.", "masks.upsample."),
    (r"^Mask_Outs\.classify\.", "masks.logits."),
    (r"^((?:neck|boxes|masks)\..*\.\d)\.0\.(weight|bias)$", r"\1.conv.\2"),
    (r"^((?:neck|boxes|masks)\..*\.\d)\.1\.(weight|bias)$", r"\1.norm.\2"),
    DENSE,
]


def _recognise(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    shapes = {key.removeprefix("module."): shape for key, shape in shapes.items()}
    logits = shapes.get("Box_Outs.cls_score.weight")
    if logits is None or "Conv_Body.panet_buttomup_conv1_modules.0.0.weight" not in shapes:
        return None
    if "Box_Head.conv1_head.0.0.weight" not in shapes:
        return None
    blocks = tuple(_count(shapes, rf"^Conv_Body\.conv_body\.res{n}\.(\d+)\.") for n in (2, 3, 4, 5))
    if blocks not in DEPTHS or "Conv_Body.conv_body.res2.0.conv3.weight" not in shapes:
        return None
    stem, width = shapes["Conv_Body.conv_body.res1.conv1.weight"], shapes["Conv_Body.conv_body.res2.0.conv2.weight"]
    grouped = width[1] != width[0]
    backbone: dict[str, Any] = {
        "name": f"resnet{DEPTHS[blocks]}", "width": stem[0], "norm": "frozen", "norm_eps": 0.0, "frozen": 2,
        "stride_in": "3x3" if grouped else "1x1",
    }  # fmt: skip
    if grouped:
        backbone |= {"groups": width[0] // width[1], "group_width": width[1] * 64 // stem[0]}
    masks: Any = False
    if "Mask_Outs.classify.weight" in shapes:
        masks = {
            "convs": 2 + _count(shapes, r"^Mask_Head\.conv_fcn\.(\d+)\.") // 2,
            "width": shapes["Mask_Head.upconv.weight"][1],
        }
    return {
        "backbone": backbone, "in_channels": stem[1], "rules": "detectron", "classes": class_names(logits[0] - 1),
        "resize": {"short": 1000, "long": 1400}, "neck_width": shapes["Conv_Body.conv_top.0.weight"][0], "masks": masks,
        "boxes": {
            "convs": 1 + _count(shapes, r"^Box_Head\.convs\.(\d+)\.") // 2, "fcs": 1,
            "width": shapes["Box_Head.fc.weight"][0],
        },
    }  # fmt: skip


def _count(shapes: Shapes, pattern: str) -> int:
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


def _finish(state: State, options: Mapping[str, Any]) -> State:
    return with_statistics(background_last(state, options))


ORIGINS = [
    Origin(
        name="detectron",
        system="panet",
        rename=RENAME,
        recognise=_recognise,
        finish=_finish,
        code_licence="MIT",
        weights_licence="MIT",
    )
]

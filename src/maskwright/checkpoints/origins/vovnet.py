"""VoVNet and MobileNetV2 as CenterMask2 and AdelaiDet name their layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.blocks.vovnet import BODIES
from maskwright.checkpoints.origins import Shapes, State
from maskwright.checkpoints.origins.mask_rcnn import minus

BODY = "backbone.bottom_up."


def _module(match: re.Match[str]) -> str:
    """The position of an OSA module: behind the pooling, except in the first stage."""
    stage, number = int(match[1]) - 2, int(match[2])
    return f"backbone.stages.{stage}.{number if stage else number - 1}."


def _mobile(match: re.Match[str]) -> str:
    """A layer of a block of MobileNetV2; the first block has no expansion."""
    block, layer = int(match[1]), int(match[2])
    parts = ("depthwise", "reduce") if block == 1 else ("expand", "depthwise", "reduce")
    return f"backbone.blocks.{block - 1}.{parts[layer // 3]}.{'conv' if layer % 3 == 0 else 'norm'}."


VOVNET = [
    # VoVNet: names of layers contain a slash.
    minus(r"^backbone\.bottom_up\.stem\.stem_(\d)/", "backbone.stem.{}.", 1),
    (r"^backbone\.bottom_up\.stage(\d)\.OSA\d_(\d+)\.", _module),
    (r"^(backbone\.stages\.\d\.\d+)\.layers\.(\d)\.[^/]*/", r"\1.convs.\2."),
    (r"^(backbone\.stages\.\d\.\d+)\.concat\.[^/]*/", r"\1.concat."),
    (r"^(backbone\.stages\.\d\.\d+)\.conv_reduction\.[^/]*/", r"\1.reduction."),
    (r"^(backbone\.stages\.\d\.\d+)\.ese\.fc\.", r"\1.attention."),
    (r"^(backbone\.(?:stem|stages)\..*)\.dw_conv3x3\.", r"\1.depthwise."),
    (r"^(backbone\.(?:stem|stages)\..*)\.pw_conv1x1\.", r"\1.pointwise.conv."),
    (r"^(backbone\.(?:stem|stages)\..*)\.pw_norm\.", r"\1.pointwise.norm."),
    (r"^(backbone\.stages\..*)\.conv_offset\.", r"\1.offset."),
    # MobileNetV2
    (r"^backbone\.bottom_up\.features\.0\.0\.", "backbone.stem.conv."),
    (r"^backbone\.bottom_up\.features\.0\.1\.", "backbone.stem.norm."),
    (r"^backbone\.bottom_up\.features\.(\d+)\.conv\.(\d)\.", _mobile),
]


def _vovnet(shapes: Shapes) -> dict[str, Any] | None:
    depthwise = f"{BODY}stem.stem_2/dw_conv3x3.weight" in shapes
    modules = tuple(
        len({m[1] for k in shapes if (m := re.match(rf"^backbone\.bottom_up\.stage{n}\.OSA{n}_(\d+)\.", k))})
        for n in (2, 3, 4, 5)
    )
    convs = len({m[1] for k in shapes if (m := re.match(r"^backbone\.bottom_up\.stage2\.OSA2_1\.layers\.(\d)\.", k))})
    stem = shapes[f"{BODY}stem.stem_1/conv.weight"]
    outputs = shapes.get(f"{BODY}stage2.OSA2_1.concat.OSA2_1_concat/conv.weight", (0,))[0]
    for name, body in BODIES.items():
        fits = (body.depthwise, body.modules, body.convs) == (depthwise, modules, convs)
        if fits and body.channels[0] * stem[0] // 64 == outputs:
            backbone: dict[str, Any] = {"name": name, "width": stem[0], "norm": "frozen"}
            deform = [
                n - 2 for n in (3, 4, 5)
                if f"{BODY}stage{n}.OSA{n}_1.layers.0.OSA{n}_1_0/conv_offset.weight" in shapes
            ]  # fmt: skip
            if deform:
                offset = shapes[f"{BODY}stage{deform[0] + 2}.OSA{deform[0] + 2}_1.layers.0."
                                f"OSA{deform[0] + 2}_1_0/conv_offset.weight"][0]  # fmt: skip
                backbone |= {"deform_stages": deform, "deform_modulated": offset == 27}
            return {"backbone": backbone, "in_channels": stem[1]}
    return None


def vovnet_backbone(shapes: Shapes) -> dict[str, Any] | None:
    """Options `backbone` and `in_channels` of VoVNet or MobileNetV2; None for another backbone."""
    if f"{BODY}stem.stem_1/conv.weight" in shapes:
        return _vovnet(shapes)
    if f"{BODY}features.0.0.weight" in shapes:
        stem = shapes[f"{BODY}features.0.0.weight"]
        backbone = {"name": "mobilenet-v2", "width": stem[0], "norm": "frozen"}
        return {"backbone": backbone, "in_channels": stem[1]}
    return None


def deformable_layers(state: State, options: Mapping[str, Any]) -> State:
    """Moves the weight of a deformable convolution beside its offsets."""
    result = {}
    for key, value in state.items():
        deformable = re.match(r"^(dense\.backbone\.stages\..*\.convs\.\d)\.conv\.weight$", key)
        if deformable and f"{deformable[1]}.offset.weight" in state:
            key = f"{deformable[1]}.weight"
        result[key] = value
    return result

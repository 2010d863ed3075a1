"""SOLO, Decoupled SOLO and SOLOv2 in the layout of the authors' fork of MMDetection, and SOLOv2 in AdelaiDet's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.blocks.backbones import options_of
from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State

BLOCKS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
LICENCE = "BSD-2-Clause text, titled non-commercial"
# Ranges of the light models.
LIGHT_448 = ((1, 56), (28, 112), (56, 224), (112, 448), (224, 896))
LIGHT_512 = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))

# ---- names -----------------------------------------------------------------------------------------------------------

BACKBONE = [
    (r"^backbone\.conv1\.", "dense.backbone.stem.conv."),
    (r"^backbone\.bn1\.", "dense.backbone.stem.norm."),
    (r"^backbone\.layer(\d)\.", lambda m: f"dense.backbone.stages.{int(m[1]) - 1}."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"(\.stages\..*)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"\.conv(\d)_offset\.", r".conv\1.conv_offset."),  # very old files keep a deformable 3 x 3's offsets beside it
    (r"(\.stages\..*\.conv\d)\.(weight|bias)$", r"\1.conv.\2"),
    (r"\.conv_offset\.", ".offset."),
    (r"^neck\.lateral_convs\.", "dense.neck.lateral."),
    (r"^neck\.fpn_convs\.", "dense.neck.output."),
]
# Convolutions of the heads are `N.conv.weight`, `N.gn.weight`; deformable ones have `N.conv.conv_offset.weight` too.
TOWERS = [
    (r"\.conv\.offset\.", ".offset."),
    (r"^(bbox_head|mask_feat_head)(\..*)\.gn\.", r"\1\2.norm."),
    (r"^bbox_head\.cate_convs\.", "dense.category.convs."),
    (r"^bbox_head\.d?solo_cate\.", "dense.category.output."),
]
SOLO = [
    *BACKBONE,
    *TOWERS,
    (r"^bbox_head\.ins_convs\.", "dense.mask_tower."),
    (r"^bbox_head\.solo_ins_list\.", "masks.outputs."),
]
DECOUPLED = [
    *BACKBONE,
    *TOWERS,
    (r"^bbox_head\.ins_convs_x\.", "dense.across."),
    (r"^bbox_head\.ins_convs_y\.", "dense.down."),
    (r"^bbox_head\.ins_convs\.", "dense.both."),
    (r"^bbox_head\.dsolo_ins_list_x\.", "dense.across_output."),
    (r"^bbox_head\.dsolo_ins_list_y\.", "dense.down_output."),
]
SOLOV2 = [
    *BACKBONE,
    *TOWERS,
    (r"^bbox_head\.kernel_convs\.", "dense.kernel.convs."),
    (r"^bbox_head\.solo_kernel\.", "dense.kernel.output."),
    (r"^mask_feat_head\.convs_all_levels\.(\d)\.conv(\d)\.", r"dense.mask_feature.levels.\1.\2."),
    (r"^mask_feat_head\.conv_pred\.0\.", "dense.mask_feature.output."),
]
ADELAIDET = [
    (r"^backbone\.bottom_up\.", "dense.backbone."),
    (r"\.stem\.conv1\.norm\.", ".stem.norm."),
    (r"\.stem\.conv1\.", ".stem.conv."),
    (r"^dense\.backbone\.res(\d)\.", lambda m: f"dense.backbone.stages.{int(m[1]) - 2}."),
    (r"\.conv2_offset\.", ".conv2.offset."),
    (r"(\.stages\..*\.(?:conv\d|shortcut))\.weight$", r"\1.conv.weight"),
    (r"^backbone\.fpn_lateral(\d)\.", lambda m: f"dense.neck.lateral.{int(m[1]) - 2}.conv."),
    (r"^backbone\.fpn_output(\d)\.", lambda m: f"dense.neck.output.{int(m[1]) - 2}.conv."),
    # Convolution, norm and ReLU are numbered together.
    (r"^ins_head\.cate_tower\.(\d+)\.", lambda m: f"dense.category.convs.{_part(m)}."),
    (r"^ins_head\.kernel_tower\.(\d+)\.", lambda m: f"dense.kernel.convs.{_part(m)}."),
    (r"^ins_head\.cate_pred\.", "dense.category.output."),
    (r"^ins_head\.kernel_pred\.", "dense.kernel.output."),
    (r"^mask_head\.convs_all_levels\.(\d)\.conv(\d)\.0\.", r"dense.mask_feature.levels.\1.\2.conv."),
    (r"^mask_head\.convs_all_levels\.(\d)\.conv(\d)\.1\.", r"dense.mask_feature.levels.\1.\2.norm."),
    (r"^mask_head\.conv_pred\.0\.", "dense.mask_feature.output.conv."),
    (r"^mask_head\.conv_pred\.1\.", "dense.mask_feature.output.norm."),
]


def _part(match: re.Match[str]) -> str:
    number = int(match[1])
    return f"{number // 3}.{'norm' if number % 3 else 'conv'}"


def _deformable_weights(state: State, options: Mapping[str, Any]) -> State:
    """A deformable convolution has a `weight` of its own; a plain one has a `conv` inside."""
    deformable = {k.removesuffix("offset.weight") for k in state if k.endswith(".offset.weight")}
    moved = {f"{prefix}conv.{kind}": f"{prefix}{kind}" for prefix in deformable for kind in ("weight", "bias")}
    return {moved.get(k, k): v for k, v in state.items()}


# ---- options ---------------------------------------------------------------------------------------------------------


def _count(shapes: Shapes, pattern: str) -> int:
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


def resnet_of(shapes: Shapes, prefix: str, stage: str, first: int, stem: str, offset: str) -> dict[str, Any] | None:
    """The options of a ResNet, from the names and shapes of its weights; None if they are not a ResNet's."""
    stages = [f"{prefix}{stage}{first + n}." for n in range(4)]
    depth = BLOCKS.get(tuple(_count(shapes, rf"^{re.escape(s)}(\d+)\.") for s in stages))
    if depth is None or stem not in shapes or f"{stages[0]}0.conv2.weight" not in shapes:
        return None
    bottleneck = f"{stages[0]}0.conv3.weight" in shapes
    if not bottleneck:
        depth = {50: 34}.get(depth, depth)
    width = shapes[f"{stages[0]}0.conv2.weight"]
    base = shapes[stem][0]
    backbone: dict[str, Any] = {"name": f"resnet{depth}", "width": base, "frozen": 2}
    if bottleneck and (width[0] != width[1] or width[0] != base):  # ResNeXt, wide ResNet
        backbone |= {"groups": width[0] // width[1], "group_width": width[1] * 64 // base}
    names = [next((k for k in (f"{s}0.{o}.weight" for o in offset.split()) if k in shapes), None) for s in stages]
    deform = [n for n, name in enumerate(names) if name]
    if deform:
        backbone |= {"deform_stages": deform, "deform_modulated": shapes[str(names[deform[0]])][0] == 27}
    return {"backbone": backbone, "in_channels": shapes[stem][1]}


def _mmdet(shapes: Shapes) -> dict[str, Any] | None:
    """Backbone, neck and category branch, which all layouts of the fork have in common."""
    last = next((k for k in ("bbox_head.solo_cate.weight", "bbox_head.dsolo_cate.weight") if k in shapes), None)
    if last is None or "neck.fpn_convs.0.conv.weight" not in shapes:
        return None
    options = resnet_of(shapes, "backbone.", "layer", 1, "backbone.conv1.weight", "conv2.conv_offset conv2_offset")
    if options is None:
        return None
    convs = _count(shapes, r"^bbox_head\.cate_convs\.(\d+)\.")
    head: dict[str, Any] = {"width": shapes[last][1], "convs": convs}
    offsets = [n for n in range(convs) if f"bbox_head.cate_convs.{n}.conv.conv_offset.weight" in shapes]
    if offsets:
        values = shapes[f"bbox_head.cate_convs.{offsets[-1]}.conv.conv_offset.weight"][0]
        head |= {"deform": "last" if offsets == [convs - 1] and convs > 1 else "all", "modulated": values == 27}
    # The fork's norms keep their statistics and train scale and shift. Files do not say so.
    options["backbone"]["norm"] = "still" if "backbone.bn1.running_mean" in shapes else "group"
    return options | {
        "neck_width": shapes["neck.fpn_convs.0.conv.weight"][0], "head": head,
        "classes": class_names(shapes[last][0]),
    }  # fmt: skip


def _solo(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    outputs = [shapes.get(f"bbox_head.solo_ins_list.{n}.weight") for n in range(5)]
    options = _mmdet(shapes)
    if options is None or any(s is None for s in outputs) or "bbox_head.ins_convs.0.conv.weight" not in shapes:
        return None
    read = shapes["bbox_head.ins_convs.0.conv.weight"][1]
    return options | {
        "cells": {"grids": tuple(round(s[0] ** 0.5) for s in outputs if s)},
        "coordinates": read == options["neck_width"] + 2,
    }


def _decoupled(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    outputs = [shapes.get(f"bbox_head.dsolo_ins_list_x.{n}.weight") for n in range(5)]
    options = _mmdet(shapes)
    if options is None or any(s is None for s in outputs):
        return None
    shared = "bbox_head.ins_convs.0.conv.weight" in shapes
    first = "bbox_head.ins_convs.0.conv.weight" if shared else "bbox_head.ins_convs_x.0.conv.weight"
    if first not in shapes:
        return None
    options |= {
        "cells": {"grids": tuple(s[0] for s in outputs if s)}, "shared_tower": shared,
        "coordinates": shapes[first][1] != options["neck_width"],
    }  # fmt: skip
    if shared:  # the light models, for smaller images and with smaller ranges
        options["cells"]["ranges"] = LIGHT_512
        options["resize"] = {"short": 512, "long": 852}
    return options


def _solov2(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    options = _mmdet(shapes)
    if options is None or "bbox_head.solo_kernel.weight" not in shapes:
        return None
    return _dynamic(
        options, shapes, "bbox_head.solo_kernel", "bbox_head.kernel_convs.0.conv", "mask_feat_head.conv_pred.0.conv"
    )


def _adelaidet(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    if "ins_head.kernel_pred.weight" not in shapes or "backbone.fpn_output2.weight" not in shapes:
        return None
    prefix = "backbone.bottom_up."
    options = resnet_of(shapes, prefix, "res", 2, f"{prefix}stem.conv1.weight", "conv2_offset")
    if options is None:
        return None
    # detectron2's own backbones stride in the first 1 x 1; ResNeXt strides in the 3 x 3.
    options["backbone"]["norm"] = "frozen"
    if "stride_in" in options_of(options["backbone"]["name"]):
        options["backbone"]["stride_in"] = "3x3" if "groups" in options["backbone"] else "1x1"
    last = shapes["ins_head.cate_pred.weight"]
    options |= {
        "rules": "adelaidet", "neck_width": shapes["backbone.fpn_output2.weight"][0],
        "head": {"width": last[1], "convs": (_count(shapes, r"^ins_head\.cate_tower\.(\d+)\.") + 1) // 2},
        "classes": class_names(last[0]),
    }  # fmt: skip
    return _dynamic(options, shapes, "ins_head.kernel_pred", "ins_head.kernel_tower.0", "mask_head.conv_pred.0")


def _dynamic(options: dict[str, Any], shapes: Shapes, kernel: str, first: str, feature: str) -> dict[str, Any] | None:
    """Completes the options of SOLOv2 from the kernel branch and the output of the mask feature branch."""
    output, values = shapes.get(f"{feature}.weight"), shapes[f"{kernel}.weight"][0]
    if output is None or values not in (output[0], 9 * output[0]):
        return None
    options |= {
        "mask_width": output[1], "mask_channels": output[0], "kernel_size": 1 if values == output[0] else 3,
        "coordinates": shapes[f"{first}.weight"][1] != options["neck_width"],
    }  # fmt: skip
    # The image size and the ranges of the light models are not in the files; the depth of the heads identifies them.
    if options["mask_channels"] == 128 and options["head"]["convs"] == 2:
        options |= {"resize": {"short": 448, "long": 768}, "cells": {"ranges": LIGHT_448}}
    elif options["mask_channels"] == 128 and options["head"]["convs"] == 3:
        options |= {"resize": {"short": 512, "long": 852}, "cells": {"ranges": LIGHT_512}}
    return options


ORIGINS = [
    Origin(
        name=name,
        system=system,
        rename=rename,
        recognise=recognise,
        finish=_deformable_weights,
        ignore=(r"\.num_batches_tracked$", r"^pixel_(mean|std)$"),
        code_licence=LICENCE,
        weights_licence=LICENCE,
    )
    for name, system, rename, recognise in (
        ("WXinlong/SOLO", "solo", SOLO, _solo),
        ("WXinlong/SOLO", "decoupled-solo", DECOUPLED, _decoupled),
        ("WXinlong/SOLO", "solov2", SOLOV2, _solov2),
        ("AdelaiDet", "solov2", ADELAIDET, _adelaidet),
    )
]

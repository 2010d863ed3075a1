"""PolarMask and FourierNet in the layout of their authors' copies of MMDetection 1.0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State

DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}

RENAME = [
    (r"^backbone\.conv1\.", "dense.backbone.stem.conv."),
    (r"^backbone\.bn1\.", "dense.backbone.stem.norm."),
    (r"^backbone\.layer(\d)\.", lambda m: f"dense.backbone.stages.{int(m[1]) - 1}."),
    (r"\.conv(\d)\.(?=weight)", r".conv\1.conv."),
    (r"\.conv2_offset\.", ".conv2.offset."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^neck\.lateral_convs\.", "dense.neck.lateral."),
    (r"^neck\.fpn_convs\.([012])\.", r"dense.neck.output.\1."),
    (r"^neck\.fpn_convs\.(\d)\.", lambda m: f"dense.neck.coarser.{int(m[1]) - 3}."),
    (r"^bbox_head\.cls_convs\.", "dense.head.class_tower."),
    (r"^bbox_head\.reg_convs\.", "dense.head.box_tower."),
    (r"^bbox_head\.mask_convs\.", "dense.head.code_tower."),
    (r"^(dense\.head\.\w+_tower\.\d+)\.gn\.", r"\1.norm."),
    (r"^bbox_head\.polar_cls\.", "dense.head.classes."),
    (r"^bbox_head\.polar_reg\.", "dense.head.boxes."),
    (r"^bbox_head\.polar_mask\.", "dense.head.codes."),
    (r"^bbox_head\.polar_centerness\.", "dense.head.centerness."),
    (r"^bbox_head\.scales_bbox\.", "dense.head.box_scales."),
    (r"^bbox_head\.scales_mask\.", "dense.head.code_scales."),
]
OWN = re.compile(
    r"^(backbone\.(conv1|bn1|layer\d)\.|neck\.(lateral|fpn)_convs\.|bbox_head\.(cls|reg|mask)_convs\."
    r"|bbox_head\.polar_(cls|reg|mask|centerness)\.|bbox_head\.scales_(bbox|mask)\.)"
)


def _common(shapes: Shapes) -> dict[str, Any] | None:
    """The options that both systems read in the same way; None if the file is of neither."""
    needed = ("bbox_head.polar_cls.weight", "bbox_head.polar_mask.weight", "bbox_head.polar_centerness.weight")
    if not all(k in shapes for k in (*needed, "neck.fpn_convs.4.conv.weight", "backbone.conv1.weight")):
        return None
    if not all(OWN.match(k) for k in shapes):
        return None
    blocks = tuple(_count(shapes, rf"^backbone\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    depth = DEPTHS.get(blocks)
    if depth is None:
        return None
    if "backbone.layer1.0.conv3.weight" not in shapes:
        depth = {50: 34}.get(depth, depth)
    stem, width = shapes["backbone.conv1.weight"], shapes["backbone.layer1.0.conv2.weight"]
    grouped = width[1] != width[0]
    deform = "bbox_head.cls_convs.0.conv_offset_mask.weight" in shapes
    backbone: dict[str, Any] = {
        "name": f"resnet{depth}", "norm": "frozen", "frozen": 2,
        # Files do not contain which convolution strides: the 1 x 1 in Caffe's models, the 3 x 3 in ResNeXt.
        "stride_in": "3x3" if grouped or depth < 50 else "1x1",
        "deform_stages": [n - 1 for n in (1, 2, 3, 4) if f"backbone.layer{n}.0.conv2_offset.weight" in shapes],
    }  # fmt: skip
    if stem[0] != 64:
        backbone["width"] = stem[0]
    if grouped:
        backbone |= {"groups": width[0] // width[1], "group_width": width[1] * 64 // stem[0]}
    head = {
        "width": shapes["neck.fpn_convs.0.conv.weight"][0],
        "convs": _count(shapes, rf"^bbox_head\.cls_convs\.(\d+)\.{'conv_offset_mask' if deform else 'conv'}\."),
        "deformable": deform,
        "boxes": any(k.startswith("bbox_head.reg_convs.") for k in shapes),
    }
    options = {"backbone": backbone, "in_channels": stem[1], "head": head, "rules": {"border": "pixels"}}
    return options | {"classes": class_names(shapes["bbox_head.polar_cls.weight"][0])}


def _polarmask(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    options = _common(shapes)
    if options is None or _is_fourier(shapes, about):
        return None
    config = _config(about)
    canvas = re.search(r"test=dict\(.*?img_scale=\((\d+),\s*(\d+)\)", config, re.DOTALL)
    resize: dict[str, Any] = {"canvas": [int(canvas[2]), int(canvas[1])] if canvas else [768, 1280]}
    if re.search(r"size_divisor=128", config):
        resize["multiple"] = 128
    options["resize"] = resize
    options["normalization"] = "imagenet" if "groups" in options["backbone"] else "caffe"
    return options | {"rays": shapes["bbox_head.polar_mask.weight"][0]}


def _fouriernet(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    options = _common(shapes)
    if options is None or not _is_fourier(shapes, about):
        return None
    config = _config(about)
    rays = re.search(r"contour_points\s*=\s*(\d+)", config)
    # The weights do not contain the number of rays: 60 in the published R-50, 90 in the ResNeXt.
    options["rays"] = int(rays[1]) if rays else 90 if "groups" in options["backbone"] else 60
    if re.search(r"normalized_centerness\s*=\s*True", config):
        options["rules"]["centerness"] = "normalised"
    return options | {"coefficients": shapes["bbox_head.polar_mask.weight"][0] // 2}


def _is_fourier(shapes: Shapes, about: Mapping[str, Any]) -> bool:
    """Keys and shapes differ only in the channels of the shape: 36 rays, or 36 coefficients in 72 channels. The
    configuration that MMDetection stores in its files takes precedence."""
    config = _config(about)
    if "FourierNet" in config or "PolarMask" in config:
        return "FourierNet" in config
    return shapes["bbox_head.polar_mask.weight"][0] == 72


def _config(about: Mapping[str, Any]) -> str:
    meta = about.get("container", {}).get("meta", {})
    config = meta.get("config", "") if isinstance(meta, Mapping) else ""
    return config if isinstance(config, str) else ""


def _finish(state: State, options: Mapping[str, Any]) -> State:
    """Renames deformable convolutions, whose weight is a parameter of their own beside that of their offsets; in towers
    such a convolution, its norm and its ReLU are numbered consecutively."""
    plain = {k.removesuffix("offset.weight") for k in state if k.endswith(".conv2.offset.weight")}
    moved = {f"{prefix}conv.weight": f"{prefix}weight" for prefix in plain}
    deformable = options.get("head", {}).get("deformable", False)
    result: State = {}
    for key, value in state.items():
        name = moved.get(key, key)
        layer = re.match(r"^(dense\.head\.\w+_tower)\.(\d+)\.(.*)$", name)
        if deformable and layer is not None:
            number, part = divmod(int(layer[2]), 3)
            rest = f"norm.{layer[3]}" if part else layer[3].replace("conv_offset_mask.", "offset.")
            name = f"{layer[1]}.{number}.{rest}"
        result[name] = value
    return result


def _count(shapes: Shapes, pattern: str) -> int:
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


ORIGINS = [
    Origin(
        name=name,
        system=system,
        rename=RENAME,
        recognise=read,
        finish=_finish,
        ignore=(r"num_batches_tracked$",),
        code_licence="Apache-2.0 (LICENSE); 2-clause BSD for academic use (README)",
        weights_licence="not stated; the code's README allows academic use, others contact the authors",
    )
    for name, system, read in (("xieenze", "polarmask", _polarmask), ("cogsys-tuebingen", "fouriernet", _fouriernet))
]

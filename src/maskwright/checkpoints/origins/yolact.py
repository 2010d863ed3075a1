"""YOLACT and YOLACT++ in their authors' layout: the flat state of the whole network.

Older files also hold the backbone's stages under torchvision's names, and strided convolutions that are not used; the
authors' loader drops both, and so does this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from maskwright.blocks.backbones import options_of
from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Candidate, Origin, Shapes, State

BOTTLENECKS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
BASIC: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
DARKNET53 = (2, 3, 9, 9, 5)  # entries of each stage, its strided convolution among them

RENAME = [
    (r"^backbone\.(conv1|_preconv\.0)\.", "dense.backbone.stem.conv."),
    (r"^backbone\.(bn1|_preconv\.1)\.", "dense.backbone.stem.norm."),
    (r"^backbone\.layers\.", "dense.backbone.stages."),
    (r"^(dense\.backbone\.stages\.\d\.0)\.0\.", r"\1.conv."),  # Darknet: the strided convolution
    (r"^(dense\.backbone\.stages\.\d\.0)\.1\.", r"\1.norm."),
    (r"^(dense\.backbone\.stages\..*\.conv\d)\.0\.", r"\1.conv."),  # Darknet: the residual blocks
    (r"^(dense\.backbone\.stages\..*\.conv\d)\.1\.", r"\1.norm."),
    (r"^(dense\.backbone\.stages\..*)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"^(dense\.backbone\.stages\..*\.conv\d)\.weight$", r"\1.conv.weight"),
    (r"\.conv_offset_mask\.", ".offset."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    # The coarsest level comes first.
    (r"^fpn\.lat_layers\.(\d)\.", lambda m: f"dense.neck.lateral.{2 - int(m[1])}.conv."),
    (r"^fpn\.pred_layers\.(\d)\.", lambda m: f"dense.neck.output.{2 - int(m[1])}.conv."),
    (r"^fpn\.downsample_layers\.(\d)\.", r"dense.neck.coarser.\1.conv."),
    # Layers without weights are counted too.
    (r"^proto_net\.([024])\.", lambda m: f"dense.prototypes.before.{int(m[1]) // 2}.conv."),
    (r"^proto_net\.8\.", "dense.prototypes.after.conv."),
    (r"^proto_net\.10\.", "dense.prototypes.output."),
    (r"^prediction_layers\.0\.upfeature\.0\.", "dense.head.tower.conv."),
    (r"^prediction_layers\.0\.bbox_layer\.", "dense.head.boxes."),
    (r"^prediction_layers\.0\.conf_layer\.", "dense.head.classes."),
    (r"^prediction_layers\.0\.mask_layer\.", "dense.head.coefficients."),
    (r"^semantic_seg_conv\.", "dense.semantic."),
    (r"^maskiou_net\.maskiou_net\.10\.", "rescoring.output."),
    (r"^maskiou_net\.maskiou_net\.(\d)\.", lambda m: f"rescoring.convs.{int(m[1]) // 2}."),
]
IGNORE = [r"^backbone\.layer\d", r"^fpn\.downsample_layers\.([2-9]|\d\d)\."]

_OWN = re.compile(
    r"^(backbone\.(conv1|bn1|_preconv|layers?)|fpn\.(lat|pred|downsample)_layers|proto_net|semantic_seg_conv"
    r"|prediction_layers\.0\.(upfeature|bbox_layer|conf_layer|mask_layer)|maskiou_net\.maskiou_net)"
)


def _options(shapes: Shapes, plus: bool) -> dict[str, Any] | None:
    head = "prediction_layers.0."
    wanted = ("proto_net.10.weight", f"{head}bbox_layer.weight", f"{head}conf_layer.weight", "semantic_seg_conv.weight")
    if any(k not in shapes for k in wanted) or not all(_OWN.match(k) for k in shapes):
        return None
    if plus != ("maskiou_net.maskiou_net.0.weight" in shapes):
        return None
    prototypes, boxes, logits, semantic = (shapes[k][0] for k in wanted)
    anchors = boxes // 4
    if boxes % 12 or logits != anchors * (semantic + 1):
        return None
    backbone = _backbone(shapes)
    if backbone is None:
        return None
    if "deform_stages" in options_of(backbone["name"]):
        backbone |= _deformable(shapes)
    in_channels = next(v[1] for k, v in shapes.items() if re.match(r"^backbone\.(conv1|_preconv\.0)\.weight$", k))
    return {
        "classes": class_names(semantic), "backbone": {**backbone, "norm": "batch"}, "in_channels": in_channels,
        "prototypes": prototypes, "neck_width": shapes["fpn.lat_layers.0.weight"][0],
        # The published configurations with several sizes per level are those with real aspect ratios.
        "anchors": {"octaves": anchors // 3, "square": anchors == 3},
    }  # fmt: skip


def _backbone(shapes: Shapes) -> dict[str, Any] | None:
    """Name and width of the backbone."""
    counts = tuple(len(blocks) for blocks in _blocks(shapes, r"^backbone\.layers\.(\d+)\.(\d+)\."))
    if "backbone._preconv.0.weight" in shapes:
        width = shapes["backbone._preconv.0.weight"][0]
        return {"name": "darknet53", "width": width} if counts == DARKNET53 else None
    if "backbone.conv1.weight" not in shapes:
        return None
    depth = (BOTTLENECKS if "backbone.layers.0.0.conv3.weight" in shapes else BASIC).get(counts)
    return None if depth is None else {"name": f"resnet{depth}", "width": shapes["backbone.conv1.weight"][0]}


def _deformable(shapes: Shapes) -> dict[str, Any]:
    """Which stages have deformable convolutions, and in every how many-th block, counted from the first."""
    stages = _blocks(shapes, r"^backbone\.layers\.(\d+)\.(\d+)\.conv2\.conv_offset_mask\.")
    gaps = [blocks[1] - blocks[0] for blocks in stages if len(blocks) > 1]
    every = (
        min(gaps) if gaps else max((len(b) for b in _blocks(shapes, r"^backbone\.layers\.(\d+)\.(\d+)\.")), default=1)
    )
    deformed = [number for number, blocks in enumerate(stages) if blocks]
    return {"deform_stages": deformed, "deform_every": every if deformed else 1}


def _blocks(shapes: Shapes, pattern: str) -> list[list[int]]:
    """Numbers of the blocks of each stage with a key like this."""
    found = {(int(m[1]), int(m[2])) for k in shapes if (m := re.match(pattern, k))}
    return [sorted(b for s, b in found if s == stage) for stage in range(1 + max((s for s, _ in found), default=-1))]


def _yolact(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | Sequence[Candidate] | None:
    options = _options(shapes, plus=False)
    if options is None:
        return None
    name, count = options["backbone"]["name"], len(options["classes"])
    # Keys and shapes do not determine the size of the input, and with it the anchors.
    if name == "resnet101" and count == 80:
        sizes = {"yolact-r101": 550, "yolact-r101-im400": 400, "yolact-r101-im700": 700}
        return [Candidate(variant, {**options, "resize": {"short": size}}) for variant, size in sizes.items()]
    if name == "resnet50" and count == 20:
        pascal = {**options["anchors"], "square": False, "sides": (32, 64, 128, 256, 512)}
        return [Candidate("yolact-r50-pascal", {**options, "anchors": pascal}), Candidate("yolact-r50", options)]
    return options


def _yolact_plus(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    return _options(shapes, plus=True)


def _finish(state: State, options: Mapping[str, Any]) -> State:
    """Moves background from the first class to the last; and the weights of deformable convolutions, which are beside
    their offset branch, see `DeformConvNorm`."""
    state = dict(state)
    for kind in ("weight", "bias"):
        rows = state[f"dense.head.classes.{kind}"]
        each = rows.unflatten(0, (-1, len(options["classes"]) + 1))
        state[f"dense.head.classes.{kind}"] = each.roll(-1, 1).flatten(0, 1)
    moved = {
        k.replace("offset.weight", "conv.weight"): k.replace("offset.", "") for k in state if ".offset.weight" in k
    }
    return {moved.get(k, k): v for k, v in state.items()}


ORIGINS = [
    Origin("yolact", "yolact", RENAME, _yolact, _finish, IGNORE, code_licence="MIT"),
    Origin("yolact", "yolact-plus", RENAME, _yolact_plus, _finish, IGNORE, code_licence="MIT"),
]

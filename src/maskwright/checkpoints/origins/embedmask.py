"""EmbedMask in the layout of its authors' code, a fork of FCOS on maskrcnn-benchmark, in three generations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State

DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}

RENAME = [
    (r"^backbone\.body\.stem\.conv1\.", "dense.backbone.stem.conv."),
    (r"^backbone\.body\.stem\.bn1\.", "dense.backbone.stem.norm."),
    (r"^backbone\.body\.layer(\d)\.", lambda m: f"dense.backbone.stages.{int(m[1]) - 1}."),
    (r"^(dense\.backbone\.stages\..*)\.conv(\d)\.", r"\1.conv\2.conv."),
    (r"^(dense\.backbone\.stages\..*)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^backbone\.fpn\.fpn_inner(\d)\.", lambda m: f"dense.neck.lateral.{int(m[1]) - 2}.conv."),
    (r"^backbone\.fpn\.fpn_layer(\d)\.", lambda m: f"dense.neck.output.{int(m[1]) - 2}.conv."),
    (r"^backbone\.fpn\.top_blocks\.p(\d)\.", lambda m: f"dense.neck.coarser.{int(m[1]) - 6}.conv."),
    (r"^rpn\.head\.cls_tower\.", "dense.class_tower."),
    (r"^rpn\.head\.bbox_tower\.", "dense.box_tower."),
    (r"^rpn\.head\.mask_tower\.", "dense.mask_tower."),
    # Convolution, norm and ReLU are counted separately.
    (r"^(dense\.\w+_tower)\.(\d+)\.", lambda m: f"{m[1]}.{int(m[2]) // 3}.{('conv', 'norm', 'relu')[int(m[2]) % 3]}."),
    (r"^rpn\.head\.cls_logits\.", "dense.class_logits."),
    (r"^rpn\.head\.bbox_pred\.", "dense.distances."),
    (r"^rpn\.head\.scales\.", "dense.distance_scales."),
    (r"^rpn\.head\.position_scale\.", "dense.place_scale."),
    (r"^rpn\.head\.margin_scales\.", "dense.margin_scales."),
    (r"^rpn\.head\.proposal_margin_pred\.", "dense.margin."),
    (r"^rpn\.head\.(proposal|pixel)_embed_pred\.", r"dense.\1_embedding."),
    (r"^rpn\.head\.(proposal|pixel)_(spatial|other)_embed_pred\.", r"dense.\1_embedding.\2."),
    (r"^rpn\.head\.", "dense."),
]


def options_of(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of the constructor, if these are the keys of one of the three generations."""
    margin = shapes.get("rpn.head.proposal_margin_pred.weight")
    whole, part = "rpn.head.pixel_embed_pred.weight", "rpn.head.pixel_other_embed_pred.weight"
    if margin is None or (whole not in shapes and part not in shapes):
        return None
    if whole in shapes:
        generation, dimensions = 1, shapes[whole][0]
    else:
        dimensions = shapes[part][0] + 2
        generation = 3 if "rpn.head.margin_scales.0.scale" in shapes else 2
    blocks = tuple(_count(shapes, rf"^backbone\.body\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    if blocks not in DEPTHS or "backbone.body.layer1.0.conv2.weight" not in shapes:
        return None
    depth, bottlenecks = DEPTHS[blocks], "backbone.body.layer1.0.conv3.weight" in shapes
    if not bottlenecks:
        depth = {50: 34}.get(depth, depth)
    stem = shapes["backbone.body.stem.conv1.weight"]
    backbone = {"name": f"resnet{depth}", "width": stem[0], "norm": "frozen", "norm_eps": 0.0, "frozen": 2}
    if bottlenecks:
        backbone["stride_in"] = "1x1"
    convs = len([k for k in shapes if re.match(r"^rpn\.head\.cls_tower\.\d+\.bias$", k)]) // 2
    return {
        "classes": class_names(shapes["rpn.head.cls_logits.weight"][0]), "generation": generation,
        "backbone": backbone, "in_channels": stem[1], "neck_width": shapes["rpn.head.cls_logits.weight"][1],
        "convs": convs, "mask_convs": _count(shapes, r"^rpn\.head\.mask_tower\.(\d+)\.bias$") // 2,
        "dimensions": dimensions, "inclusive": True,
    }  # fmt: skip


def _count(shapes: Shapes, pattern: str) -> int:
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


def joined(state: State, options: Mapping[str, Any]) -> State:
    """Joins the convolution of the two dimensions that carry the location with that of the others, and converts learned
    factors from vectors of one entry to scalars."""
    result = {}
    for key, value in state.items():
        if key.endswith(".scale"):
            result[key] = value.reshape(())
        elif ".spatial." in key:
            result[key.replace(".spatial.", ".")] = torch.cat([value, state[key.replace(".spatial.", ".other.")]])
        elif ".other." not in key:
            result[key] = value
    return result


ORIGINS = [
    Origin(
        name="embedmask",
        system="embedmask",
        rename=RENAME,
        recognise=options_of,
        finish=joined,
        code_licence="MIT",
    )
]

"""Layouts of FCOS in AdelaiDet, detectron2 and torchvision; the parts also serve systems on top of AdelaiDet's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import class_names, coco_by_id
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.deepsnake import TREES
from maskwright.checkpoints.origins.mask_rcnn import (
    DETECTRON2,
    DETECTRON2_IGNORE,
    TORCHVISION,
    deformable_weights,
    detectron2_backbone,
    minus,
    torchvision_backbone,
)
from maskwright.checkpoints.origins.vovnet import VOVNET, deformable_layers, vovnet_backbone

# Shortcuts of the trees of DLA whose first half is a tree with a shortcut of its own: computed and not used.
ADELAIDET_IGNORE = [*DETECTRON2_IGNORE, r"^backbone\.bottom_up\.level[34]\.project\."]
DENSE = (r"^(backbone|neck|head)\.", r"dense.\1.")
HEAD = "proposal_generator.fcos_head."
# A pyramid that begins at stride 8, and the levels after it; before the rules of a pyramid that begins at stride 4.
NECK = [
    minus(r"^backbone\.fpn_lateral(\d)\.", "neck.lateral.{}.conv.", 3),
    minus(r"^backbone\.fpn_output(\d)\.", "neck.output.{}.conv.", 3),
    minus(r"^backbone\.top_block\.p(\d)\.", "neck.coarser.{}.conv.", 6),
]
# A pyramid with two more levels in torchvision.
TORCHVISION_DENSE = [minus(r"^backbone\.fpn\.extra_blocks\.p(\d)\.", "neck.coarser.{}.conv.", 6), *TORCHVISION]
# Layers of towers keep the original's numbers until `numbered_towers`.
ADELAIDET = [
    (r"^backbone\.bottom_up\.base_layer\.0\.", "backbone.stem.conv."),  # DLA
    (r"^backbone\.bottom_up\.base_layer\.1\.", "backbone.stem.norm."),
    (r"^backbone\.bottom_up\.level([01])\.(\d+)\.", lambda m: _dla(int(m[1]), int(m[2]))),
    (r"^backbone\.bottom_up\.level(\d)\.", r"backbone.levels.\1."),
    *TREES,
    *VOVNET,
    *NECK,
    *DETECTRON2,
    (r"^proposal_generator\.fcos_head\.share_tower\.", "head.shared."),
    (r"^proposal_generator\.fcos_head\.cls_tower\.", "head.class_tower."),
    (r"^proposal_generator\.fcos_head\.bbox_tower\.", "head.box_tower."),
    (r"^proposal_generator\.fcos_head\.cls_logits\.", "head.logits."),
    (r"^proposal_generator\.fcos_head\.bbox_pred\.", "head.distances."),
    (r"^proposal_generator\.fcos_head\.ctrness\.", "head.centerness."),
    (r"^proposal_generator\.fcos_head\.scales\.", "head.scales."),
    DENSE,
]


def _dla(level: int, position: int) -> str:
    return f"backbone.levels.{level}.0.{'conv' if position % 3 == 0 else 'norm'}."


def head_options(shapes: Shapes, prefix: str = HEAD) -> dict[str, Any]:
    """Options of the heads, from the keys of an AdelaiDet file."""
    towers = {name: _tower(shapes, f"{prefix}{name}_tower.") for name in ("share", "cls", "bbox")}
    norm = next((own[1] for own in towers.values() if own[0]), "none")
    deformable = [f"{prefix}{name}_tower." for name in towers]
    offsets = {p: [k for k in shapes if k.startswith(p) and k.endswith(".offset.weight")] for p in deformable}
    kind = "none"
    if any(offsets.values()):
        kind = "all" if len(offsets[f"{prefix}bbox_tower."]) > 1 else "last"
    return {
        "shared": towers["share"][0], "classes": towers["cls"][0], "boxes": towers["bbox"][0], "norm": norm,
        "deformable": kind, "scales": f"{prefix}scales.0.scale" in shapes,
    }  # fmt: skip


def _tower(shapes: Shapes, prefix: str) -> tuple[int, str]:
    """Number of convolutions and normalisation of a tower."""
    convs = [k for k in shapes if re.match(rf"^{re.escape(prefix)}\d+\.(conv\.)?weight$", k) and len(shapes[k]) == 4]
    if f"{prefix}1.0.running_mean" in shapes:
        return len(convs), "batch"
    return len(convs), "group" if len(shapes.get(f"{prefix}1.weight", ())) == 1 else "none"


def numbered_towers(state: State, options: Mapping[str, Any]) -> State:
    """Converts the numbers of layers in towers, where convolution, norm and ReLU are counted separately, and learned
    factors from vectors of one entry to scalars."""
    norm, result = options["head"]["norm"], {}
    step = 2 if norm == "none" else 3
    for key, value in deformable_layers(deformable_weights(state, options), options).items():
        found = re.match(r"^(.*head\.(?:shared|\w+_tower))\.(\d+)\.(.*)$", key)
        if found:
            tower, number, rest = found[1], int(found[2]), found[3]
            kind = "norm" if number % step == 1 and norm != "none" else "conv"
            if norm == "batch":
                key = f"{tower}.{kind}s.{number // step}.{rest}"
            elif rest.startswith(("offset.", "conv.")):  # a deformable convolution
                key = f"{tower}.{number // step}.{rest.removeprefix('conv.')}"
            else:
                key = f"{tower}.{number // step}.{kind}.{rest}"
        result[key] = value.reshape(()) if key.endswith(".scale") else value
    return result


def adelaidet_options(shapes: Shapes) -> dict[str, Any] | None:
    """Options that all systems on FCOS in AdelaiDet share; None for another layout."""
    if f"{HEAD}cls_logits.weight" not in shapes or "backbone.fpn_output3.weight" not in shapes:
        return None
    options = _dla_backbone(shapes) or vovnet_backbone(shapes) or detectron2_backbone(shapes)
    if options is None:
        return None
    if options["backbone"].get("norm") == "batch":
        options["backbone"]["frozen"] = 0
    options.pop("neck_norm", None)
    levels = 3 + sum(f"backbone.top_block.p{n}.weight" in shapes for n in (6, 7))
    return {
        **options, "rules": "adelaidet", "neck_width": shapes["backbone.fpn_output3.weight"][0], "levels": levels,
        "head": head_options(shapes), "classes": class_names(shapes[f"{HEAD}cls_logits.weight"][0]),
    }  # fmt: skip


def _dla_backbone(shapes: Shapes) -> dict[str, Any] | None:
    stem = shapes.get("backbone.bottom_up.base_layer.0.weight")
    if stem is None:
        return None
    return {"backbone": {"name": "dla34", "width": stem[0], "norm": "batch"}, "in_channels": stem[1]}


def _adelaidet(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    own = re.compile(r"^(backbone\.|proposal_generator\.fcos_head\.|pixel_(mean|std)$)")
    return adelaidet_options(shapes) if all(own.match(k) for k in shapes) else None


def _detectron2(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    if "head.ctrness.weight" not in shapes or "head.cls_score.weight" not in shapes:
        return None
    options = detectron2_backbone(shapes)
    if options is None:
        return None
    convs = [k for k in shapes if re.match(r"^head\.cls_subnet\.\d+\.weight$", k) and len(shapes[k]) == 4]
    norm = "group" if len(shapes.get("head.cls_subnet.1.weight", ())) == 1 else "none"
    options.pop("neck_norm", None)
    return {
        **options, "rules": "detectron2", "neck_width": shapes["backbone.fpn_output3.weight"][0],
        "head": {"classes": len(convs), "boxes": len(convs), "norm": norm, "scales": False},
        "classes": class_names(shapes["head.cls_score.weight"][0]),
    }  # fmt: skip


def _torchvision(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    if "head.regression_head.bbox_ctrness.weight" not in shapes:
        return None
    backbone = torchvision_backbone(shapes)
    if backbone is None:
        return None
    convs = [
        k for k in shapes if re.match(r"^head\.classification_head\.conv\.\d+\.weight$", k) and len(shapes[k]) == 4
    ]
    rows = shapes["head.classification_head.cls_logits.weight"][0]
    return {
        "backbone": backbone, "in_channels": shapes["backbone.body.conv1.weight"][1], "rules": "torchvision",
        "neck_width": shapes["backbone.fpn.extra_blocks.p6.weight"][0], "classes": torchvision_names(rows),
        "head": {"classes": len(convs), "boxes": len(convs), "norm": "group", "scales": False},
    }  # fmt: skip


def torchvision_names(rows: int) -> tuple[str, ...]:
    """Class names of torchvision's one-stage detectors, whose rows for COCO are category ids, of which 0 is unused."""
    return coco_by_id() if rows == 91 else tuple(f"class {k}" for k in range(rows))


def _torchvision_rows(state: State, options: Mapping[str, Any]) -> State:
    result = numbered_towers(state, options)
    for kind in ("weight", "bias"):
        key = f"dense.head.logits.{kind}"
        result[key] = result[key][-len(options["classes"]) :]
    return result


ORIGINS = [
    Origin(
        name="adelaidet",
        system="fcos",
        rename=ADELAIDET,
        recognise=_adelaidet,
        finish=numbered_towers,
        ignore=ADELAIDET_IGNORE,
        code_licence="non-commercial",
        weights_licence="non-commercial",
    ),
    Origin(
        name="detectron2",
        system="fcos",
        rename=[
            *NECK,
            *DETECTRON2,
            (r"^head\.cls_subnet\.", "head.class_tower."),
            (r"^head\.bbox_subnet\.", "head.box_tower."),
            (r"^head\.cls_score\.", "head.logits."),
            (r"^head\.bbox_pred\.", "head.distances."),
            (r"^head\.ctrness\.", "head.centerness."),
            DENSE,
        ],
        recognise=_detectron2,
        finish=numbered_towers,
        ignore=[*DETECTRON2_IGNORE, r"^anchor_generator\."],
        absent=[r"^normalizer$"],
        code_licence="Apache-2.0",
        weights_licence="CC-BY-SA-3.0",
    ),
    Origin(
        name="torchvision",
        system="fcos",
        rename=[
            *TORCHVISION_DENSE,
            (r"^head\.classification_head\.conv\.", "head.class_tower."),
            (r"^head\.regression_head\.conv\.", "head.box_tower."),
            (r"^head\.classification_head\.cls_logits\.", "head.logits."),
            (r"^head\.regression_head\.bbox_reg\.", "head.distances."),
            (r"^head\.regression_head\.bbox_ctrness\.", "head.centerness."),
            DENSE,
        ],
        recognise=_torchvision,
        finish=_torchvision_rows,
        code_licence="BSD-3-Clause",
        weights_licence="BSD-3-Clause",
    ),
]

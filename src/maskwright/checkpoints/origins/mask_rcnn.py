"""Layouts of Mask R-CNN, Keypoint R-CNN and Faster R-CNN in detectron2 and torchvision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch

from maskwright.checkpoints.names import class_names, coco_by_id
from maskwright.checkpoints.origins import Origin, Shapes, State

DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
X101_STD = (57.375, 57.12, 58.395)  # of detectron2's models, only ResNeXt-101 divides by it
Head = Literal["masks", "keypoints", "none", "any"]
DENSE = (r"^(backbone|neck|rpn)\.", r"dense.\1.")  # parts of the dense network


def minus(pattern: str, target: str, start: int) -> tuple[str, Any]:
    """A rule that renames `pattern`, whose group 1 is a number, to `target` with that number less `start`."""
    return pattern, lambda m: target.format(int(m[1]) - start)


# ---- detectron2 --------------------------------------------------------------------------------------------------

DETECTRON2 = [
    (r"^backbone\.bottom_up\.", "backbone."),
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.stem.norm."),
    (r"^backbone\.stem\.conv1\.", "backbone.stem.conv."),
    minus(r"^backbone\.res(\d)\.", "backbone.stages.{}.", 2),
    (r"^roi_heads\.res5\.", "roi_stage."),
    # The offsets of a deformable convolution are beside it in detectron2, inside it here.
    (r"\.conv2_offset\.", ".conv2.offset."),
    (r"^((?:backbone\.stages|roi_stage)\..*\.(?:conv\d|shortcut))\.weight$", r"\1.conv.weight"),
    minus(r"^backbone\.fpn_lateral(\d)\.(?=norm)", "neck.lateral.{}.", 2),
    minus(r"^backbone\.fpn_lateral(\d)\.", "neck.lateral.{}.conv.", 2),
    minus(r"^backbone\.fpn_output(\d)\.(?=norm)", "neck.output.{}.", 2),
    minus(r"^backbone\.fpn_output(\d)\.", "neck.output.{}.conv.", 2),
    (r"^proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"rpn.convs.\1."),
    (r"^proposal_generator\.rpn_head\.conv\.", "rpn.convs.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.objectness."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.deltas."),
    minus(r"^roi_heads\.box_head\.conv(\d)\.(?=norm)", "boxes.convs.{}.", 1),
    minus(r"^roi_heads\.box_head\.conv(\d)\.", "boxes.convs.{}.conv.", 1),
    minus(r"^roi_heads\.box_head\.fc(\d)\.", "boxes.fcs.{}.", 1),
    (r"^roi_heads\.box_predictor\.cls_score\.", "boxes.classes."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "boxes.deltas."),
    minus(r"^roi_heads\.mask_head\.mask_fcn(\d)\.(?=norm)", "masks.convs.{}.", 1),
    minus(r"^roi_heads\.mask_head\.mask_fcn(\d)\.", "masks.convs.{}.conv.", 1),
    (r"^roi_heads\.mask_head\.deconv\.", "masks.upsample."),
    (r"^roi_heads\.mask_head\.predictor\.", "masks.logits."),
    minus(r"^roi_heads\.keypoint_head\.conv_fcn(\d)\.", "keypoints.convs.{}.conv.", 1),
    (r"^roi_heads\.keypoint_head\.score_lowres\.", "keypoints.logits."),
]
DETECTRON2_IGNORE = [r"^proposal_generator\.anchor_generator\.", r"^pixel_(mean|std)$"]


def detectron2_options(shapes: Shapes, head: Head) -> dict[str, Any] | None:
    """Options of a two-stage system, by the head besides that of the boxes; None for another layout.

    Args:
        shapes: Shapes of the file's tensors.
        head: The required head; "any": masks or none.
    """
    keypoints = head == "keypoints"
    # Other systems of the same code base have these keys and further ones.
    own = re.compile(
        r"^(backbone\.(bottom_up\.)?(stem|res\d)\.|backbone\.fpn_|proposal_generator\.|pixel_|roi_heads\.res5\."
        r"|roi_heads\.box_head\.(conv\d|fc\d)\.|roi_heads\.box_predictor\.(cls_score|bbox_pred)\."
        r"|roi_heads\.mask_head\.(mask_fcn\d|deconv|predictor)\.|roi_heads\.keypoint_head\.)"
    )
    if "roi_heads.box_predictor.cls_score.weight" not in shapes or not all(own.match(k) for k in shapes):
        return None
    if "proposal_generator.rpn_head.objectness_logits.weight" not in shapes:
        return None
    if keypoints != any(k.startswith("roi_heads.keypoint_head.") for k in shapes):
        return None
    mask = "roi_heads.mask_head.predictor.weight" in shapes
    if head != "any" and mask != (head == "masks"):
        return None
    options = detectron2_backbone(shapes)
    if options is None:
        return None
    if "neck_width" not in options:
        if keypoints:
            return None
        options |= {"neck": "c4" if any(k.startswith("roi_heads.res5.") for k in shapes) else "dc5"}
    count = shapes["roi_heads.box_predictor.cls_score.weight"][0] - 1
    boxes = shapes["roi_heads.box_predictor.bbox_pred.weight"][0]
    fcs = _count(shapes, r"^roi_heads\.box_head\.fc(\d)\.")
    box: dict[str, Any] = {"width": shapes["roi_heads.box_head.fc1.weight"][0]} if fcs else {}
    if keypoints:
        options["keypoints"] = {
            "count": shapes["roi_heads.keypoint_head.score_lowres.weight"][1],
            "convs": _count(shapes, r"^roi_heads\.keypoint_head\.conv_fcn(\d)\."),
            "width": shapes["roi_heads.keypoint_head.conv_fcn1.weight"][0],
        }
        options |= {"boxes": {**box, "beta": 0.5}, "proposals": {"after": (1500, 1000)}}
    else:
        convs = max(1, _count(shapes, r"^proposal_generator\.rpn_head\.conv\.conv(\d)\."))
        options["proposals"] = {"convs": convs}
        options["boxes"] = {
            **box, "convs": _count(shapes, r"^roi_heads\.box_head\.conv(\d)\."), "fcs": fcs,
            "norm": _norm(shapes, "roi_heads.box_head.conv1.norm."), "agnostic": boxes == 4 and count > 1,
        }  # fmt: skip
        if head == "any":
            options["masks"] = False
    if mask and not keypoints:
        options["masks"] = {
            "convs": _count(shapes, r"^roi_heads\.mask_head\.mask_fcn(\d)\."),
            "width": shapes["roi_heads.mask_head.deconv.weight"][1],
            "norm": _norm(shapes, "roi_heads.mask_head.mask_fcn1.norm."),
            "agnostic": shapes["roi_heads.mask_head.predictor.weight"][0] == 1 and count > 1,
        }
    return options | {"classes": _keypoint_names(count, options) if keypoints else class_names(count)}


def _keypoint_names(count: int, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names of a keypoint head: with COCO's 17 keypoints, one class is a person."""
    return ("person",) if count == 1 and options["keypoints"]["count"] == 17 else class_names(count)


def explain_detectron2(shapes: Shapes, about: Mapping[str, Any]) -> str:
    """Why a file of detectron2 matches no supported system; "" for files of other code bases."""
    if not any(key.startswith(("proposal_generator.rpn_head.", "backbone.bottom_up.")) for key in shapes):
        return ""
    if any(re.match(r"backbone\.bottom_up\.s1\.b1\.", key) for key in shapes):
        return "holds a detector of detectron2 with a RegNet, which is not among the supported backbones"
    heads = any(key.startswith("roi_heads.") for key in shapes)
    if not heads and any(key.startswith("proposal_generator.rpn_head.") for key in shapes):
        return "holds a proposal network of detectron2 alone, which detects no classes, and matches no supported system"
    if not heads and "sem_seg_head.predictor.weight" in shapes:
        return "holds a network of detectron2 for semantic segmentation alone and matches no supported system"
    if heads and not any(key.startswith("proposal_generator.") for key in shapes):
        return (
            "holds Fast R-CNN of detectron2, whose proposals come from another network, and matches no supported system"
        )
    return ""


def _prefix(shapes: Shapes) -> str:
    """The prefix of the backbone's keys: with a pyramid they are one level deeper."""
    return "backbone.bottom_up." if any(k.startswith("backbone.bottom_up.") for k in shapes) else "backbone."


def detectron2_backbone(shapes: Shapes) -> dict[str, Any] | None:
    """Options of a ResNet, and of the pyramid on it, that all systems of this code base share; None for another
    backbone."""
    prefix = _prefix(shapes)
    c4 = any(k.startswith("roi_heads.res5.") for k in shapes)
    last = "roi_heads.res5." if c4 else f"{prefix}res5."
    stages = [*(f"{prefix}res{n}." for n in (2, 3, 4)), last]
    depth = DEPTHS.get(tuple(_count(shapes, rf"^{re.escape(stage)}(\d+)\.") for stage in stages))
    if depth is None:
        return None
    if f"{prefix}res2.0.conv3.weight" not in shapes:
        depth = {50: 34}.get(depth, depth)
    stem = shapes[f"{prefix}stem.conv1.weight"]
    width = shapes[f"{prefix}res2.0.conv2.weight"]
    norm = _norm(shapes, f"{prefix}res3.0.conv1.norm.")
    grouped = width[1] != width[0]
    # Files do not say what was trained. Batch norm and a proposal head of two layers is the large-scale-jitter recipe,
    # which starts from random weights; the others freeze the stem and the first stage of an ImageNet model.
    scratch = norm == "batch" and "proposal_generator.rpn_head.conv.conv1.weight" in shapes
    backbone = {"name": f"resnet{depth}", "width": stem[0], "norm": norm, "frozen": 0 if scratch else 2}
    if depth >= 50:
        backbone["stride_in"] = "3x3" if grouped or norm == "group" else "1x1"
    options: dict[str, Any] = {"backbone": backbone, "rules": "detectron2", "in_channels": stem[1]}
    if grouped:
        backbone |= {"groups": width[0] // width[1], "group_width": width[1] * 64 // stem[0]}
        if depth == 101:
            options["resize"] = {"std": X101_STD}
    offsets = {n: _count(shapes, rf"^{re.escape(prefix)}res{n + 2}\.(\d+)\.conv2_offset\.weight$") for n in range(4)}
    deform = [n for n, count in offsets.items() if count]
    if deform:
        channels = shapes[f"{prefix}res{deform[0] + 2}.0.conv2_offset.weight"][0]
        backbone |= {"deform_stages": deform, "deform_modulated": channels == 27}
        later = [
            int(m[2]) for k in shapes
            if (m := re.match(rf"^{re.escape(prefix)}res(\d)\.(\d+)\.conv2_offset\.weight$", k)) and int(m[2])
        ]  # fmt: skip
        every = min(later, default=1)
        if every > 1:
            backbone["deform_every"] = every
    if "backbone.fpn_lateral2.weight" in shapes:
        options["neck_width"] = shapes["backbone.fpn_output2.weight"][0]
        options["neck_norm"] = _norm(shapes, "backbone.fpn_output2.norm.")
    return options


def deformable_weights(state: State, options: Mapping[str, Any]) -> State:
    """Moves the weight of a deformable convolution beside its offsets, one level above that of a plain one."""
    deformable = {k.removesuffix("offset.weight") for k in state if k.endswith(".conv2.offset.weight")}
    moved = {f"{prefix}conv.weight": f"{prefix}weight" for prefix in deformable}
    return {moved.get(k, k): v for k, v in state.items()}


def _norm(shapes: Shapes, prefix: str) -> str:
    if f"{prefix}weight" not in shapes:
        return "none"
    if f"{prefix}running_mean" not in shapes:
        return "group"
    return "batch" if f"{prefix}num_batches_tracked" in shapes else "frozen"


def _count(shapes: Shapes, pattern: str) -> int:
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


# ---- torchvision -------------------------------------------------------------------------------------------------

# Layers of a block in torchvision's ResNet, and in code bases that took their names from it.
RESNET_BLOCKS = [
    (r"^(backbone\.stages\..*)\.conv(\d)\.", r"\1.conv\2.conv."),
    (r"^(backbone\.stages\..*)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
]
TORCHVISION = [
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.conv1\.", "backbone.stem.conv."),
    (r"^backbone\.bn1\.", "backbone.stem.norm."),
    minus(r"^backbone\.layer(\d)\.", "backbone.stages.{}.", 1),
    *RESNET_BLOCKS,
    (r"^backbone\.fpn\.inner_blocks\.", "neck.lateral."),
    (r"^backbone\.fpn\.layer_blocks\.", "neck.output."),
    (r"^(neck\.\w+\.\d)\.0\.", r"\1.conv."),
    (r"^(neck\.\w+\.\d)\.1\.", r"\1.norm."),
    (r"^(neck\.\w+\.\d)\.(weight|bias)$", r"\1.conv.\2"),  # published v1 files lack these numbers
    (r"^rpn\.head\.conv\.(\d)\.0\.", r"rpn.convs.\1."),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.convs.0.\1"),
    (r"^rpn\.head\.cls_logits\.", "rpn.objectness."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.deltas."),
    (r"^roi_heads\.box_head\.fc6\.", "boxes.fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "boxes.fcs.1."),
    (r"^roi_heads\.box_head\.(\d)\.0\.", r"boxes.convs.\1.conv."),
    (r"^roi_heads\.box_head\.(\d)\.1\.", r"boxes.convs.\1.norm."),
    (r"^roi_heads\.box_head\.\d\.(weight|bias)$", r"boxes.fcs.0.\1"),
    (r"^roi_heads\.box_predictor\.cls_score\.", "boxes.classes."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "boxes.deltas."),
    minus(r"^roi_heads\.mask_head\.mask_fcn(\d)\.", "masks.convs.{}.conv.", 1),
    (r"^roi_heads\.mask_head\.(\d)\.0\.", r"masks.convs.\1.conv."),
    (r"^roi_heads\.mask_head\.(\d)\.1\.", r"masks.convs.\1.norm."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "masks.upsample."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "masks.logits."),
    # The numbers count the ReLUs too.
    (r"^roi_heads\.keypoint_head\.(\d+)\.", lambda m: f"keypoints.convs.{int(m[1]) // 2}.conv."),
    (r"^roi_heads\.keypoint_predictor\.kps_score_lowres\.", "keypoints.logits."),
]


def torchvision_backbone(shapes: Shapes) -> dict[str, Any] | None:
    """Options of a ResNet in torchvision's detectors; None for another backbone."""
    blocks = tuple(_count(shapes, rf"^backbone\.body\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    if blocks not in DEPTHS:
        return None
    depth = DEPTHS[blocks]
    if "backbone.body.layer1.0.conv3.weight" not in shapes:
        depth = {50: 34}.get(depth, depth)
    stem = shapes["backbone.body.conv1.weight"]
    width = shapes["backbone.body.layer1.0.conv2.weight"]
    grouped = depth >= 50 and (width[1] != width[0] or width[0] != stem[0])  # ResNeXt and wide ResNet
    tracked = "backbone.body.bn1.num_batches_tracked" in shapes
    backbone: dict[str, Any] = {
        "name": f"resnet{depth}", "width": stem[0], "norm": "batch" if tracked else "frozen",
        # torchvision sets the epsilon of its published v1 weights, all of depth 50, to 0 after loading them. v2 has the
        # default of batch norm, as have frozen norms elsewhere.
        "norm_eps": 0.0 if depth == 50 and not grouped and not tracked else 1e-5,
        "frozen": 0 if tracked else 2,
    }  # fmt: skip
    if grouped:
        backbone |= {"groups": width[0] // width[1], "group_width": width[1] * 64 // stem[0]}
    return backbone


def torchvision_options(shapes: Shapes, head: Head) -> dict[str, Any] | None:
    """Options of a two-stage system, by the head besides that of the boxes; None for another layout."""
    kinds: dict[str, str] = {
        "masks": "mask_predictor.mask_fcn_logits",
        "keypoints": "keypoint_predictor.kps_score_lowres",
    }
    if any((f"roi_heads.{kind}.weight" in shapes) != (head == name) for name, kind in kinds.items()):
        return None
    if "rpn.head.cls_logits.weight" not in shapes or "roi_heads.box_predictor.cls_score.weight" not in shapes:
        return None
    keypoints = head == "keypoints"
    backbone = torchvision_backbone(shapes)
    if backbone is None:
        return None
    stem = shapes["backbone.body.conv1.weight"]
    fpn = "backbone.fpn.inner_blocks.0.1.weight" in shapes
    merged = next(v for k, v in shapes.items() if k.startswith("backbone.fpn.inner_blocks.0.") and len(v) == 4)
    options: dict[str, Any] = {
        "backbone": backbone, "rules": "torchvision", "in_channels": stem[1],
        "neck_norm": "batch" if fpn else "none", "neck_width": merged[0],
    }  # fmt: skip
    count = shapes["roi_heads.box_predictor.cls_score.weight"][0] - 1
    if keypoints:
        options["boxes"] = {"width": shapes["roi_heads.box_head.fc7.weight"][0]}
        options["keypoints"] = {
            "count": shapes["roi_heads.keypoint_predictor.kps_score_lowres.weight"][1],
            "convs": _count(shapes, r"^roi_heads\.keypoint_head\.(\d+)\."),
            "width": shapes["roi_heads.keypoint_head.0.weight"][0],
        }
        return options | {"classes": _keypoint_names(count, options)}
    convs = _count(shapes, r"^roi_heads\.box_head\.(\d)\.0\.")
    last = f"roi_heads.box_head.{convs + 1}.weight" if convs else "roi_heads.box_head.fc7.weight"
    numbered = any(k.startswith("roi_heads.mask_head.0.") for k in shapes)
    options["proposals"] = {"convs": max(1, _count(shapes, r"^rpn\.head\.conv\.(\d)\.0\."))}
    options["boxes"] = {
        "convs": convs, "fcs": 1 if convs else 2, "width": shapes[last][0], "norm": "batch" if convs else "none",
    }  # fmt: skip
    if head == "none":
        return options | {"classes": _named(count)}
    options["masks"] = {
        "convs": _count(shapes, rf"^roi_heads\.mask_head\.{'' if numbered else 'mask_fcn'}(\d)\."),
        "width": shapes["roi_heads.mask_predictor.conv5_mask.weight"][1],
        "norm": "batch" if "roi_heads.mask_head.0.1.weight" in shapes else "none",
    }
    return options | {"classes": _named(count)}


def _named(count: int) -> tuple[str, ...]:
    return coco_by_id() if count == 90 else tuple(f"class {k + 1}" for k in range(count))


def background_last(state: State, options: Mapping[str, Any]) -> State:
    """Moves background from torchvision's first row to the last, and drops its unused box and mask rows."""
    result = dict(state)
    for kind in ("weight", "bias"):
        result[f"boxes.classes.{kind}"] = torch.roll(state[f"boxes.classes.{kind}"], -1, 0)
        result[f"boxes.deltas.{kind}"] = state[f"boxes.deltas.{kind}"][4:]
        if f"masks.logits.{kind}" in state:
            result[f"masks.logits.{kind}"] = state[f"masks.logits.{kind}"][1:]
    return result


HEADS: dict[str, Head] = {"mask-rcnn": "masks", "keypoint-rcnn": "keypoints", "faster-rcnn": "none"}
ORIGINS = [
    Origin(
        name=name,
        system=system,
        rename=rename,
        recognise=lambda shapes, about, read=read, head=head: read(shapes, head),
        finish=finish,
        ignore=ignore,
        code_licence=code,
        weights_licence=weights,
        explain=explain_detectron2,
    )
    for system, head in HEADS.items()
    for name, rename, read, finish, ignore, code, weights in (
        (
            "detectron2", [*DETECTRON2, DENSE], detectron2_options, deformable_weights, DETECTRON2_IGNORE, "Apache-2.0",
            "CC-BY-SA-3.0",
        ),
        (
            "torchvision", [*TORCHVISION, DENSE], torchvision_options, background_last, [], "BSD-3-Clause",
            "BSD-3-Clause",
        ),
    )
]  # fmt: skip

"""Layout of Detectron's model zoo (Caffe2): pickles of blobs, for Faster, Mask and Keypoint R-CNN with a pyramid.

Cascade (Mask) R-CNN in its authors' code, which is based on Detectron, has more blobs, for the later stages. Blobs are
renamed to the keys of detectron2 first. Normalisation layers of the backbone are a scale and a shift; the first row of
each head is background.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins import cascade_rcnn as cascade
from maskwright.checkpoints.origins.mask_rcnn import (
    DENSE,
    DETECTRON2,
    HEADS,
    Head,
    background_last,
    detectron2_options,
)
from maskwright.systems.cascade_rcnn import DELTA_WEIGHTS

BODY, HEAD = "backbone.bottom_up.", "roi_heads."


def _stage(number: str | None) -> str:
    """The part of a key that names a later stage of a cascade."""
    return "" if number is None else f"{int(number) - 1}."


LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
ALIASES = [
    (r"_w$", ".weight"),
    (r"_bn_s$", ".norm.scale"),
    (r"_bn_b$", ".norm.shift"),
    (r"_gn_s$", ".norm.weight"),
    (r"_gn_b$", ".norm.bias"),
    (r"_b$", ".bias"),
    (r"^(?:res_)?conv1\.", f"{BODY}stem.conv1."),
    (r"^res(\d)_(\d+)_branch(1|2[abc])\.", lambda m: f"{BODY}res{m[1]}.{m[2]}.{LAYERS[m[3]]}."),
    (r"^fpn_inner_res(\d)_\d+_sum(?:_lateral)?\.", r"backbone.fpn_lateral\1."),
    (r"^fpn_res(\d)_\d+_sum\.", r"backbone.fpn_output\1."),
    (r"^conv_rpn_fpn2\.", "proposal_generator.rpn_head.conv."),  # one head for all levels, named after the finest
    (r"^rpn_cls_logits_fpn2\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn_bbox_pred_fpn2\.", "proposal_generator.rpn_head.anchor_deltas."),
    # Later stages of a cascade have a number at the end.
    (r"^fc([67])(?:_([23]))?\.", lambda m: f"{HEAD}box_head.{_stage(m[2])}fc{int(m[1]) - 5}."),
    (r"^head_conv(\d)(?:_([23]))?\.", lambda m: f"{HEAD}box_head.{_stage(m[2])}conv{m[1]}."),
    (r"^(cls_score|bbox_pred)(?:_([23]))?\.", lambda m: f"{HEAD}box_predictor.{_stage(m[2])}{m[1]}."),
    (r"^_(?:\[mask\]|mask)_fcn(\d)\.", rf"{HEAD}mask_head.mask_fcn\1."),
    (r"^conv5_mask\.", f"{HEAD}mask_head.deconv."),
    (r"^mask_fcn_logits\.", f"{HEAD}mask_head.predictor."),
    (r"^conv_fcn(\d)\.", rf"{HEAD}keypoint_head.conv_fcn\1."),
    (r"^kps_score_lowres\.", f"{HEAD}keypoint_head.score_lowres."),
]
# A bias that the normalisation replaces, and a fixed bilinear interpolation.
IGNORE = [rf"^{re.escape(BODY)}stem\.conv1\.bias$", r"^kps_score\."]


def _recognise(shapes: Shapes, about: Mapping[str, Any], head: Head, cascaded: bool) -> dict[str, Any] | None:
    if about.get("layout") != "caffe2" or "backbone.fpn_lateral2.weight" not in shapes:
        return None
    known: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        if any(re.search(pattern, key) for pattern in IGNORE):
            continue
        rows = 4 if ".bbox_pred." in key else 1 if ".mask_head.predictor." in key else 0  # of background
        known[key.replace(".norm.scale", ".norm.weight").replace(".norm.shift", ".norm.bias")] = (
            (shape[0] - rows, *shape[1:]) if rows else shape
        )
        if key.endswith(".norm.scale"):
            prefix = key.removesuffix("scale")
            known |= {f"{prefix}running_mean": shape, f"{prefix}running_var": shape}
    if cascaded:
        first = re.compile(r"^(roi_heads\.box_(?:head|predictor))\.(?=[a-z])")
        options = cascade.cascade_options({first.sub(r"\1.0.", key): shape for key, shape in known.items()})
    else:
        options = detectron2_options(known, head)
    if options is None:
        return None
    options.pop("resize", None)  # no model of this code base divides by standard deviations
    backbone = dict(options["backbone"])
    if backbone["norm"] == "frozen":
        backbone["norm_eps"] = 0.0
    if cascaded:
        stages = len(options.get("cascade", {}).get("overlaps", DELTA_WEIGHTS))
        gradients = tuple(0.5**stage for stage in range(stages))
        options["cascade"] = {
            **options.get("cascade", {}), "gradients": gradients, "resample": True, "mask_stage": "last",
        }  # fmt: skip
    return {**options, "backbone": backbone, "rules": "detectron", "boxes": {**options["boxes"], "beta": 1.0}}


def with_statistics(state: State) -> State:
    """Adds the statistics of frozen norms to a file that has scale and shift only."""
    result = dict(state)
    for key, value in state.items():
        prefix = key.removesuffix("weight")
        if key.startswith("dense.backbone.") and key.endswith(".norm.weight"):
            result[f"{prefix}running_mean"] = torch.zeros_like(value)
            result[f"{prefix}running_var"] = torch.ones_like(value)
    return result


def _finish(state: State, options: Mapping[str, Any]) -> State:
    result = background_last(state, options)
    for stage in range(2, 4):
        for kind in ("weight", "bias"):
            if f"boxes_{stage}.classes.{kind}" in state:
                result[f"boxes_{stage}.classes.{kind}"] = torch.roll(state[f"boxes_{stage}.classes.{kind}"], -1, 0)
                result[f"boxes_{stage}.deltas.{kind}"] = state[f"boxes_{stage}.deltas.{kind}"][4:]
    return with_statistics(result) if options["backbone"]["norm"] == "frozen" else result


def explain(shapes: Shapes, about: Mapping[str, Any]) -> str:
    """Why a file of Detectron matches no supported system; "" for files of other code bases."""
    if about.get("layout") != "caffe2":
        return ""
    if any(key.startswith("retnet_") for key in shapes):
        kind = "RetinaNet"
    elif "cls_score_w" not in shapes:
        kind = "a proposal network" if any("rpn" in key for key in shapes) else "a backbone"
    else:
        kind = "a detector without a feature pyramid" if "conv_rpn_w" in shapes else "a detector"
    return (
        f"holds {kind} of Detectron (Caffe2) that matches no supported system; supported are its Faster, Mask and "
        "Keypoint R-CNN, and Cascade (Mask) R-CNN, with a ResNet or ResNeXt and a feature pyramid"
    )


SYSTEMS: dict[str, Head] = {**HEADS, "cascade-mask-rcnn": "any"}
ORIGINS = [
    Origin(
        name="detectron",
        system=system,
        rename=[
            (r"\.norm\.scale$", ".norm.weight"), (r"\.norm\.shift$", ".norm.bias"),
            *(cascade.RENAME if system.startswith("cascade") else (*DETECTRON2, DENSE)),
        ],
        recognise=lambda shapes, about, head=head, system=system: _recognise(
            shapes, about, head, system.startswith("cascade")
        ),
        finish=_finish,
        ignore=IGNORE,
        code_licence="Apache-2.0",
        weights_licence="" if system.startswith("cascade") else "CC-BY-SA-3.0",
        explain=explain,
        aliases=ALIASES,
    )
    for system, head in SYSTEMS.items()
]  # fmt: skip

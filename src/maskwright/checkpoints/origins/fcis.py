"""Layout of FCIS and R-FCN in the MXNet code of their authors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.mask_rcnn import DEPTHS

PREFIX = r"^(?:arg|aux):"
CONVS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
VALUES = {
    "weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
    "moving_var": "running_var",
}  # fmt: skip
STDS = (0.2, 0.2, 0.5, 0.5)  # of the deltas, which the copies for testing are multiplied by


def _block(stage: str, letter: str, number: str) -> str:
    """A block of the backbone: those of a stage are a, b, c ... or a, b1, b2 ..."""
    return f"dense.backbone.stages.{int(stage) - 2}.{int(number) if number else ord(letter) - ord('a')}"


def _layer(match: re.Match[str]) -> str:
    kind, stage, letter, number, branch, value = match.groups()
    part = "conv" if kind == "res" else "norm"
    return f"{_block(stage, letter, number)}.{CONVS[branch]}.{part}.{VALUES[value]}"


RENAME = [
    (PREFIX, ""),
    (r"^conv1_weight$", "dense.backbone.stem.conv.weight"),
    (r"^bn_conv1_(gamma|beta|moving_mean|moving_var)$", lambda m: f"dense.backbone.stem.norm.{VALUES[m[1]]}"),
    (r"^(res|bn)([2-5])([a-z])(\d*)_branch(1|2[abc])_(weight|gamma|beta|moving_mean|moving_var)$", _layer),
    (r"^rpn_conv_3x3_", "dense.rpn.convs.0."),
    (r"^rpn_cls_score_", "dense.rpn.objectness."),
    (r"^rpn_bbox_pred_", "dense.rpn.deltas."),
    (r"^conv_new_1_", "dense.reduce.conv."),
    (r"^(?:fcis_cls_seg|rfcn_cls)_", "dense.scores."),
    (r"^(?:fcis|rfcn)_bbox_", "dense.boxes."),
]


def _recognise(shapes: Shapes, about: Mapping[str, Any], maps: str, boxes: str, kinds: int) -> dict[str, Any] | None:
    shapes = {re.sub(PREFIX, "", key): shape for key, shape in shapes.items()}
    scores, deltas = shapes.get(f"{maps}_weight"), shapes.get(f"{boxes}_weight", shapes.get(f"{boxes}_weight_test"))
    needed = ("conv1_weight", "rpn_cls_score_weight", "rpn_conv_3x3_weight", "conv_new_1_weight")
    if scores is None or deltas is None or any(key not in shapes for key in needed):
        return None
    parts = math.isqrt(deltas[0] // 8)
    classes = scores[0] // (kinds * parts**2) - 1 if parts else 0
    blocks = tuple(
        len({m[1] for k in shapes if (m := re.match(rf"res{n}([a-z]\d*)_branch2c_weight$", k))}) for n in (2, 3, 4, 5)
    )
    if blocks not in DEPTHS or (classes + 1) * kinds * parts**2 != scores[0] or classes < 1:
        return None
    if deltas[0] != 8 * parts**2:
        return None
    scales = shapes["rpn_cls_score_weight"][0] // 6
    stem = shapes["conv1_weight"]
    return {
        "classes": class_names(classes), "in_channels": stem[1],
        "backbone": {
            "name": f"resnet{DEPTHS[blocks]}", "width": stem[0], "norm": "frozen", "frozen": 2, "stride_in": "1x1",
        },
        # Three scales are those for VOC, which drops small proposals and does not mine.
        "proposals": {"anchor_sizes": [512 // 2**n for n in reversed(range(scales))]},
        "smallest_side": 16.0 if scales == 3 else 2.0, "mining": scales != 3, "parts": parts,
        "rpn_width": shapes["rpn_conv_3x3_weight"][0], "head_width": shapes["conv_new_1_weight"][0],
    }  # fmt: skip


def _finish(state: State, options: Mapping[str, Any]) -> State:
    """Moves background from the first class to the last, and keeps the deltas of the foreground alone.

    Training writes copies of the deltas' layer for testing, multiplied by their standard deviations. They are used only
    where the layer itself is missing.
    """
    result = dict(state)
    maps = len(state["dense.scores.bias"]) // (len(options["classes"]) + 1)
    for kind in ("weight", "bias"):
        result[f"dense.scores.{kind}"] = state[f"dense.scores.{kind}"].roll(-maps, 0)
        key, copy = f"dense.boxes.{kind}", result.pop(f"dense.boxes.{kind}_test", None)
        value = state.get(key)
        if value is None and copy is not None:
            stds = torch.tensor(STDS, dtype=copy.dtype).repeat(2).repeat_interleave(len(copy) // 8)
            value = copy / stds.reshape(-1, *[1] * (copy.ndim - 1))
        if value is not None:
            result[key] = value[len(value) // 2 :].clone()
    return result


ORIGINS = [
    Origin(
        name="mxnet",
        system=system,
        rename=RENAME,
        recognise=partial(_recognise, maps=maps, boxes=boxes, kinds=kinds),
        finish=_finish,
        code_licence="MIT",
        weights_licence="MIT",
    )
    for system, maps, boxes, kinds in (("fcis", "fcis_cls_seg", "fcis_bbox", 2), ("rfcn", "rfcn_cls", "rfcn_bbox", 1))
]

"""ESE-Seg with the names of its MXNet network; batch norms have gamma and beta, or weight and bias."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State

STAGES = (1, 2, 8)  # residual blocks of Darknet-53 in the first of the three parts of the original
PLAIN_YOLO = 85  # values per anchor of YOLOv3 for COCO, which has the same names and no shapes


def _darknet(match: re.Match[str]) -> str:
    """From part and position in it to stage and position: every stage is a convolution and residual blocks."""
    part, position = int(match[1]), int(match[2])
    if part:
        return f"dense.backbone.stages.{part + 2}.{position}."
    if position == 0:
        return "dense.backbone.stem."
    position -= 1
    for stage, count in enumerate(STAGES):
        if position <= count:
            return f"dense.backbone.stages.{stage}.{position}."
        position -= count + 1
    return match[0]


# In every block the convolution is at 0 and its norm at 1.
PARTS = [(r"\.0\.weight$", ".conv.weight"), (r"\.1\.(\w+)$", r".norm.\1"), (r"norm\.gamma$", "norm.weight"),
         (r"norm\.beta$", "norm.bias")]  # fmt: skip
HEADS = [
    (r"^yolo_blocks\.", "dense.blocks."),
    (r"^transitions\.", "dense.transitions."),
    (r"^yolo_outputs\.(\d+)\.prediction\.", r"dense.outputs.\1."),
]
DARKNET = [
    (r"^stages\.(\d)\.(\d+)\.", _darknet),
    *PARTS,
    (r"^(dense\.backbone\.stages\.\d\.\d)\.body\.0\.", r"\1.conv1."),
    (r"^(dense\.backbone\.stages\.\d\.\d)\.body\.1\.", r"\1.conv2."),
    *HEADS,
]
TINY = [(r"^stages\.", "dense.backbone.stages."), *PARTS, *HEADS]
IGNORE = [r"^yolo_outputs\.\d+\.(anchors|offsets)$"]


def _options(shapes: Shapes, tiny: bool) -> dict[str, Any] | None:
    needed = ("stages.0.0.0.weight", "yolo_blocks.0.body.0.0.weight", "yolo_outputs.0.prediction.weight")
    if not all(k in shapes for k in needed) or tiny == any(k.startswith("stages.2.") for k in shapes):
        return None
    if not tiny and _blocks(shapes) != [*STAGES, 8, 4]:
        return None
    values, rest = divmod(shapes["yolo_outputs.0.prediction.weight"][0], 3)
    # 7 + coefficients + classes: a file does not contain how many are coefficients; 18 are assumed, as published.
    count = values - 25
    if rest or count < 1 or values == PLAIN_YOLO:
        return None
    stem = shapes["stages.0.0.0.weight"]
    return {
        "backbone": {"name": "darknet-tiny" if tiny else "darknet53", "width": stem[0], "norm": "batch"},
        "in_channels": stem[1], "head_width": shapes["yolo_blocks.0.body.0.0.weight"][0], "coefficients": 18,
        "classes": class_names(count),
    }  # fmt: skip


def _blocks(shapes: Shapes) -> list[int]:
    """Number of residual blocks of each of Darknet's five stages."""
    counts = []
    for part in range(3):
        positions = {int(m[1]) for k in shapes if (m := re.match(rf"^stages\.{part}\.(\d+)\.", k))}
        for position in sorted(positions):
            if f"stages.{part}.{position}.0.weight" in shapes:
                counts.append(0)
            elif counts:
                counts[-1] += 1
    return counts[1:]


def _split(state: State, options: Mapping[str, Any]) -> State:
    """Splits their output, one convolution ordered by anchor, into shapes and classes."""
    result = {}
    values = 7 + options["coefficients"]
    for key, value in state.items():
        if (found := re.match(r"^(dense\.outputs\.\d+)\.(weight|bias)$", key)) is None:
            result[key] = value
            continue
        each = value.unflatten(0, (-1, values + len(options["classes"])))
        result[f"{found[1]}.shapes.{found[2]}"] = each[:, :values].flatten(0, 1).contiguous()
        result[f"{found[1]}.classes.{found[2]}"] = each[:, values:].flatten(0, 1).contiguous()
    return result


ORIGINS = [
    Origin(
        name="ese_seg",
        system="ese-seg",
        rename=rename,
        recognise=lambda shapes, about, tiny=tiny: _options(shapes, tiny),
        finish=_split,
        ignore=IGNORE,
        code_licence="none stated; parts from GluonCV, Apache-2.0",
    )
    for rename, tiny in ((DARKNET, False), (TINY, True))
]

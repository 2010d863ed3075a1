"""TensorMask in the layout of detectron2's project."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Candidate, Origin, Shapes
from maskwright.checkpoints.origins.mask_rcnn import DEPTHS, DETECTRON2


def _halved(pattern: str, target: str) -> tuple[str, Any]:
    """A rule for a tower, whose numbers count the ReLUs between the convolutions too."""
    return pattern, lambda m: target.format(int(m[1]) // 2)


RENAME = [
    (r"^backbone\.top_block\.p6\.", "dense.neck.coarser.0.conv."),
    (r"^backbone\.top_block\.p7\.", "dense.neck.coarser.1.conv."),
    *DETECTRON2,
    (r"^(backbone|neck)\.", r"dense.\1."),
    _halved(r"^head\.cls_subnet\.(\d)\.", "dense.class_tower.{}.conv."),
    _halved(r"^head\.bbox_subnet\.(\d)\.", "dense.box_tower.{}.conv."),
    _halved(r"^head\.mask_subnet\.(\d)\.", "dense.mask_tower.{}.conv."),
    (r"^head\.cls_score\.", "dense.logits."),
    (r"^head\.bbox_pred\.", "dense.deltas."),
    (r"^head\.mask_fuse\.0\.", "masks.fuse.conv."),
]


def _options(shapes: Shapes, about: Mapping[str, Any]) -> Mapping[str, Any] | Sequence[Candidate] | None:
    windows = sorted(int(m[1]) for k in shapes if (m := re.fullmatch(r"head\.mask_pred_(\d+)\.weight", k)))
    if not windows or "head.cls_score.weight" not in shapes or "backbone.top_block.p6.weight" not in shapes:
        return None
    blocks = [
        len({k.split(".")[3] for k in shapes if k.startswith(f"backbone.bottom_up.res{n}.")}) for n in (2, 3, 4, 5)
    ]
    depth = DEPTHS.get(tuple(blocks))
    if depth is None:
        return None
    if "backbone.bottom_up.res2.0.conv3.weight" not in shapes:
        depth = {50: 34}.get(depth, depth)
    stem = shapes["backbone.bottom_up.stem.conv1.weight"]
    options: dict[str, Any] = {
        "backbone": {
            "name": f"resnet{depth}", "width": stem[0], "norm": "frozen", "frozen": 2,
            **({"stride_in": "1x1"} if depth >= 50 else {}),
        },
        "in_channels": stem[1], "neck_width": shapes["backbone.fpn_output2.weight"][0],
        "convs": sum(bool(re.fullmatch(r"head\.cls_subnet\.\d\.weight", k)) for k in shapes),
        "class_width": shapes["head.cls_score.weight"][1],
        "mask_width": shapes[f"head.mask_pred_{windows[0]}.weight"][1],
        "boxes": "head.bbox_pred.weight" in shapes, "windows": windows,
        "classes": class_names(shapes["head.cls_score.weight"][0] // len(windows)),
    }  # fmt: skip
    if options["boxes"]:
        options["box_width"] = shapes["head.bbox_pred.weight"][1]
    if "head.mask_fuse.0.weight" in shapes:
        return options
    # The two simple heads have the same tensors with different meanings.
    return [
        Candidate("simple-aligned", {**options, "bipyramid": False, "aligned": True}),
        Candidate("simple-natural", {**options, "bipyramid": False, "aligned": False}),
    ]


def _outputs(state: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Output layers are named by window size in the file, by position here."""
    moved = {f"head.mask_pred_{side}.": f"masks.outputs.{n}." for n, side in enumerate(options["windows"])}
    result = {}
    for key, value in state.items():
        for theirs, ours in moved.items():
            key = key.replace(theirs, ours)
        result[key] = value
    return result


ORIGINS = [
    Origin(
        name="detectron2",
        system="tensormask",
        rename=RENAME,
        recognise=_options,
        finish=_outputs,
        ignore=(r"^anchor_generator\.", r"^pixel_(mean|std)$"),
        code_licence="Apache-2.0",
    )
]

"""Layouts of PointRend, for instance and semantic segmentation, in detectron2's project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import CITYSCAPES_REGIONS, class_names
from maskwright.checkpoints.origins import Origin, Shapes
from maskwright.checkpoints.origins.mask_rcnn import DENSE, DETECTRON2, DETECTRON2_IGNORE, detectron2_backbone

# Older files: the heads are beside each other, and the layers of the coarse one have longer names.
AGE = [
    (r"^roi_heads\.mask_coarse_head\.", "roi_heads.mask_head.coarse_head."),
    (r"^roi_heads\.mask_point_head\.", "roi_heads.mask_head.point_head."),
    (r"\.coarse_head\.coarse_mask_fc(\d)\.", r".coarse_head.fc\1."),
]
RENAME = [
    *AGE,
    (r"^roi_heads\.mask_head\.(?:coarse|parameter)_head\.reduce_channel_dim_conv\.", "masks.reduce."),
    (r"^roi_heads\.mask_head\.(?:coarse|parameter)_head\.reduce_spatial_dim_conv\.", "masks.halve."),
    (
        r"^roi_heads\.mask_head\.(?:coarse|parameter)_head\.fc(\d)\.",
        lambda m: f"masks.fcs.{int(m[1]) - 1}.",
    ),
    (r"^roi_heads\.mask_head\.(?:coarse|parameter)_head\.prediction\.", "masks.logits."),
    (r"^roi_heads\.mask_head\.point_head\.fc(\d)\.", lambda m: f"points.fcs.{int(m[1]) - 1}."),
    (r"^roi_heads\.mask_head\.point_head\.predictor\.", "points.logits."),
    (r"^roi_heads\.mask_head\.point_head\.positional_encoding_gaussian_matrix$", "points.waves"),
    *DETECTRON2,
    DENSE,
]
SEMANTIC = [
    (r"^sem_seg_head\.point_head\.fc(\d)\.", lambda m: f"points.fcs.{int(m[1]) - 1}."),
    (r"^sem_seg_head\.point_head\.predictor\.", "points.logits."),
    (r"^sem_seg_head\.coarse_sem_seg_head\.predictor\.", "dense.coarse.output."),
    # Every second module of a level upsamples and has no weights.
    (
        r"^sem_seg_head\.coarse_sem_seg_head\.p(\d)\.(\d)\.(norm\.)?",
        lambda m: f"dense.coarse.levels.{int(m[1]) - 2}.{int(m[2]) // 2}.{m[3] or 'conv.'}",
    ),
    *DETECTRON2,
    DENSE,
]


def _box_points(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    named = {}
    for key, shape in shapes.items():
        for pattern, replacement in AGE:
            key = re.sub(pattern, replacement, key)
        named[key] = shape
    implicit = "roi_heads.mask_head.parameter_head.prediction.weight" in named
    head = f"roi_heads.mask_head.{'parameter' if implicit else 'coarse'}_head."
    point = "roi_heads.mask_head.point_head."
    wanted = (
        f"{head}prediction.weight", f"{head}reduce_spatial_dim_conv.weight", f"{head}fc1.weight",
        "roi_heads.box_predictor.cls_score.weight", "backbone.fpn_output2.weight", "roi_heads.box_head.fc1.weight",
        f"{point}positional_encoding_gaussian_matrix" if implicit else f"{point}predictor.weight",
    )  # fmt: skip
    if any(key not in named for key in wanted):
        return None
    options = detectron2_backbone(named)
    if options is None:
        return None
    count = named["roi_heads.box_predictor.cls_score.weight"][0] - 1
    width, fc_width = named[f"{head}reduce_spatial_dim_conv.weight"][0], named[f"{head}prediction.weight"][1]
    inputs = named[f"{head}fc1.weight"][1] // width  # a quarter of the sampled points
    side = round(inputs**0.5)
    options = {k: v for k, v in options.items() if k != "rules"} | {
        "boxes": {"width": named["roi_heads.box_head.fc1.weight"][0]},
        "masks": {"width": width, "fc_width": fc_width, "side": side},
    }  # fmt: skip
    if implicit:
        points = _width(named[f"{head}prediction.weight"][0], options, count)
        options |= {"implicit": True, "points": {"width": points}}
    else:
        options |= {"points": {"width": named[f"{point}fc1.weight"][0]}}
    return options | {"classes": class_names(count)}


def _width(numbers: int, options: Mapping[str, Any], count: int) -> int:
    """The width of an implicit network from its number of parameters, which is w (i + 2 w + 3 + k) + k."""
    first = options["neck_width"] + 256 + 3 + count
    return round((-first + (first * first + 8 * (numbers - count)) ** 0.5) / 4)


def _semantic(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    coarse = "sem_seg_head.coarse_sem_seg_head."
    if f"{coarse}predictor.weight" not in shapes or "sem_seg_head.point_head.predictor.weight" not in shapes:
        return None
    options = detectron2_backbone(shapes)
    if options is None or "neck_width" not in options:
        return None
    count, width = shapes[f"{coarse}predictor.weight"][:2]
    points = {"width": shapes["sem_seg_head.point_head.fc1.weight"][0]}
    options = {k: v for k, v in options.items() if k != "rules"} | {
        "background": False, "backbone": {**options["backbone"], "frozen": 0}, "coarse_width": width, "points": points,
    }  # fmt: skip
    if count == len(CITYSCAPES_REGIONS):
        return options | {"classes": CITYSCAPES_REGIONS}
    # The base configuration has half as many points.
    points["count"] = 1024
    return options | {"classes": tuple(f"class {k}" for k in range(count))}


ORIGINS = [
    Origin(
        name="detectron2", system=system, rename=rename, recognise=recognise,
        ignore=DETECTRON2_IGNORE, code_licence="Apache-2.0", weights_licence="CC-BY-SA-3.0",
    )
    for system, rename, recognise in (
        ("pointrend", RENAME, _box_points), ("pointrend-semantic", SEMANTIC, _semantic),
    )
]  # fmt: skip

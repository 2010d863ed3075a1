"""Which systems can be one graph, and what decodes their output in it."""

from __future__ import annotations

from collections.abc import Mapping

from maskwright.inference.exporting import contours, dense, panoptic, queries, two_stage
from maskwright.inference.exporting.fixed import Decoder
from maskwright.inference.exporting.panoptic import Segmenter

_TWO_STAGE = (
    "faster-rcnn", "mask-rcnn", "keypoint-rcnn", "panet", "cascade-mask-rcnn", "htc", "mask-scoring-rcnn", "pointrend",
    "panoptic-fpn", "cascade-panoptic-fpn",
)  # fmt: skip
_LOCATED = ("fcos", "centermask", "blendmask", "panoptic-centermask", "panoptic-blendmask")
_QUERIES = ("maskformer", "mask2former", "eomt")

DECODERS: Mapping[str, Decoder] = {
    **dict.fromkeys(_TWO_STAGE, two_stage.two_stage),
    "rfcn": two_stage.rfcn,
    "fcis": two_stage.fcis,
    **dict.fromkeys(_LOCATED, dense.located),
    "retinanet": dense.anchored,
    "embedmask": dense.embedded,
    **dict.fromkeys(("yolact", "yolact-plus"), dense.prototypes),
    **dict.fromkeys(("solo", "decoupled-solo", "solov2"), dense.cells),
    "tensormask": dense.tensors,
    **dict.fromkeys(("deepmask", "instancefcn"), dense.sliding),
    **dict.fromkeys(("polarmask", "fouriernet"), contours.polar),
    "ese-seg": contours.chebyshev,
    "deepsnake": contours.snakes,
    **dict.fromkeys(_QUERIES, queries.queries),
    "detr": queries.detr,
    "h-detr": queries.boxes_of_queries,
    "mask-frozen-detr": queries.masks_of_queries,
    "pointrend-semantic": queries.regions,
}

SEGMENTERS: Mapping[str, Segmenter] = {
    **dict.fromkeys(_QUERIES, panoptic.queries),
    "detr": panoptic.detr,
    "pointrend-semantic": panoptic.regions,
    **dict.fromkeys(("htc", "panoptic-fpn", "cascade-panoptic-fpn"), panoptic.merged_with(two_stage.two_stage)),
    **dict.fromkeys(("panoptic-centermask", "panoptic-blendmask"), panoptic.merged_with(dense.located)),
}

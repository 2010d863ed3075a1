"""Every system of the registry, small enough to train for a moment, and objects to train it on.

A system is derived from its preset `NAME-small`; a new one needs no entry here. `SIZES` has what the tests of single
systems rely on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskwright.structures import Instances, Masks
from maskwright.systems import System, create, describe

SIZE = (96, 128)
TRUNK = {"backbone": "resnet18", "stem_width": 16, "norm": "group", "frozen": 0}
BACKBONE = {"backbone": {"name": "resnet18", "width": 16}}
BOXES = {
    **BACKBONE,
    "neck_width": 32,
    "boxes": {"width": 64},
    "proposals": {"before": (200, 100), "after": (100, 50)},
}
CELLS = {"neck_width": 32, "head": {"width": 32, "convs": 2}, "cells": {"grids": (16, 12, 8, 6, 4)}}
QUERIES = {"width": 64, "heads": 4, "queries": 12, "hidden": 64}
# Sizes that the tests of single systems rely on. A system without an entry gets those of `tiny_options`.
SIZES: dict[str, dict[str, Any]] = {
    "deepmask": {
        **BACKBONE,
        "classes": ("object",),
        "stride": 16,
        "window": 64,
        "neck_width": 16,
        "feature_width": 64,
        "mask_side": 14,
        "label_side": 28,
        "score_width": 32,
        "score_weight": 1.0,
        "dropout": 0.0,
        "scales": (0.5, 1.0),
    },
    "instancefcn": {
        "classes": ("object",),
        "backbone": {"name": "vgg11", "width": 8},
        "head_width": 32,
        "parts": 3,
        "side": 9,
        "scales": (0.5, 1.0),
        "resize": {"short": 96},
    },
    "mask-rcnn": {**BOXES, "masks": {"width": 32}},
    "keypoint-rcnn": {**BOXES, "keypoints": {"width": 32, "convs": 2}},
    "tensormask": {**BACKBONE, "neck_width": 32, "convs": 1, "class_width": 32, "box_width": 32, "mask_width": 32},
    # Anchors in a crowd region are ignored, which changes what is trained beside it; here they are not.
    "yolact": {**BACKBONE, "neck_width": 32, "prototypes": 8, "loss": {"crowd_overlap": 1.0}},
    "yolact-plus": {
        "backbone": {"name": "resnet50", "width": 16, "deform_stages": (3,)},
        "neck_width": 32,
        "prototypes": 8,
        "loss": {"crowd_overlap": 1.0},
    },
    "polarmask": {**BACKBONE, "head": {"width": 64, "convs": 1}},
    "fouriernet": {**BACKBONE, "head": {"width": 64, "convs": 1}, "coefficients": 18, "rays": 60},
    "solo": {**BACKBONE, **CELLS, "head": {"width": 128, "convs": 1}},
    "decoupled-solo": {**BACKBONE, **CELLS},
    "solov2": {**BACKBONE, **CELLS, "mask_width": 32},
    "deepsnake": {
        **BACKBONE,
        "neck_width": 16,
        "head_width": 32,
        "contours": {"points": 32, "start_points": 16, "width": 64},
        "resize": {"canvas": SIZE},
    },
    "pointrend": {**BOXES, "masks": {"width": 32, "fc_width": 64}, "points": {"width": 32}},
    # As published, so that a crowd region is left out like what nothing covers.
    "pointrend-semantic": {
        **BACKBONE,
        "neck_width": 32,
        "coarse_width": 32,
        "points": {"width": 32},
        "background": False,
    },
    "detr": {
        **BACKBONE,
        "transformer": {
            "width": 128,
            "hidden": 128,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "queries": 12,
            "dropout": 0.0,
        },
    },
    "h-detr": {
        **BACKBONE,
        "transformer": {
            "width": 96,
            "heads": 6,
            "hidden": 64,
            "levels": 3,
            "points": 2,
            "queries": 12,
            "encoder_layers": 2,
            "decoder_layers": 3,
        },
        "many_queries": 24,
        "repeats": 2,
    },
    "mask-frozen-detr": {
        "detector_options": {
            **BACKBONE,
            "transformer": {
                "width": 64,
                "heads": 4,
                "hidden": 64,
                "levels": 3,
                "points": 2,
                "queries": 12,
                "encoder_layers": 2,
                "decoder_layers": 4,
            },
            "many_queries": 0,
        },
        "width": 32,
        "image_layers": 1,
        "box_layers": 1,
        "hidden": 64,
        "heads": 4,
        "sampled": 2,
        "side": 16,
        "score_width": 32,
        "loss": {"points": 128},
    },
    "embedmask": {**BACKBONE, "neck_width": 64, "convs": 1},
    "eomt": {
        "backbone": {"name": "vit_tiny_patch16_224", "width": 32, "depth": 3, "heads": 2},
        "resize": {"canvas": (128, 128)},
        "queries": 30,
        "last_blocks": 2,
        "loss": {"points": 256},
    },
    "ese-seg": {**BACKBONE, "head_width": 64, "resize": {"short": 128}},
    "maskformer": {**BACKBONE, "decoder": {**QUERIES, "layers": 2, "dropout": 0.0}},
    "mask2former": {
        **BACKBONE,
        "decoder": {**QUERIES, "layers": 3},
        "encoder_layers": 1,
        "encoder_hidden": 64,
        "loss": {"points": 256},
    },
}


@cache
def _described(name: str) -> System:
    return describe(f"{name}-small")


def tiny_options(name: str) -> dict[str, Any]:
    """The sizes of `SIZES`, or the options of the preset `NAME-small` with smaller widths, fewer layers and queries."""
    if name in SIZES:
        return SIZES[name]
    return {key: _shrunk(key, value) for key, value in _described(name).options.items() if key != "classes"}


def _shrunk(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if key == "backbone":
            return {**{k: _shrunk(k, v) for k, v in value.items()}, **_small_backbone(value)}
        if key in ("transformer", "decoder"):  # attention needs some channels for each head
            return {k: max(64, v // 2) if k == "width" else _shrunk(k, v) for k, v in value.items()}
        return {k: _shrunk(k, v) for k, v in value.items()}
    if key == "dropout":
        return 0.0  # comparisons of two runs in training mode
    if key in ("before", "after") and value:
        return [max(50, v // 3) for v in value]
    if key == "canvas" and value:
        return [128, 128]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if key.endswith(("width", "hidden", "_channels")):
        return min(value, max(32, value // 4))
    if key.endswith(("convs", "layers")):
        return min(value, 2)
    if key.endswith("queries"):
        return min(value, 12 if key == "queries" else 24)
    if key in ("points", "count", "per_step") and value > 64:
        return max(32, value // 8)
    return min(value, 96) if key == "short" else min(value, 160) if key == "long" else value


def _small_backbone(options: Mapping[str, Any]) -> dict[str, Any]:
    if "depth" in options:  # a plain vision transformer
        return {"width": 48, "depth": 3}
    return {"width": 16}


def build(name: str, **options: Any) -> System:
    """The tiny system called `name` with random weights (always the same) and the classes "a" and "b"."""
    torch.manual_seed(0)
    described = _described(name)
    classes = {} if "proposals" in described.tasks else {"classes": ("a", "b")}
    return create(name, **described.with_options({**classes, **tiny_options(name)}, options))


def objects(
    count: int, size: tuple[int, int] = SIZE, side: tuple[int, int] = (40, 30), count_keypoints: int = 17
) -> Instances:
    """`count` upright boxes of `side` (h, w), placed one after the other, with keypoints inside them."""
    generator = torch.Generator().manual_seed(count)
    room = torch.tensor([size[1] - side[1], size[0] - side[0]])
    corners = (torch.rand(count, 2, generator=generator) * room).floor()
    boxes = torch.cat([corners, corners + torch.tensor([side[1], side[0]])], 1)
    crops = [torch.ones(side, dtype=torch.bool)] * count
    points = (
        torch.rand(count, count_keypoints, 2, generator=generator) * torch.tensor([side[1], side[0]]) + corners[:, None]
    )
    keypoints = torch.cat([points, torch.full((count, count_keypoints, 1), 2.0)], 2)
    masks = Masks.from_crops(crops, corners.long(), size)
    return Instances(size, boxes, torch.arange(count) % 2, masks, keypoints=keypoints)


@contextmanager
def first_in_order() -> Iterator[None]:
    """Samples are the first in order, and random points those of one row for all: drawn ones would differ between one
    process and two, and between devices."""
    permuted, drawn = torch.randperm, torch.rand

    def one_row(rows: int, *shape: int, device: torch.device | None = None) -> Tensor:
        return drawn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device or "cpu").expand(rows, *shape)

    torch.randperm = lambda n, **keywords: torch.arange(n, device=keywords.get("device"))
    torch.rand = one_row
    try:
        yield
    finally:
        torch.randperm, torch.rand = permuted, drawn

"""Layouts of FCOS and RetinaNet in MMDetection, from version 2 on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints import mmcv_config
from maskwright.checkpoints.mmcv_config import look
from maskwright.checkpoints.names import class_names
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.mmdetection import (
    DENSE,
    DENSE_KEYS,
    IGNORE,
    LICENCE,
    count,
    deformable_weights,
    dense_options,
    norm_of,
    standardised,
    usual_ratios,
)

ANCHORS = 9
DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)  # of the backbone that the first FCOS models start from
_TOWERS = r"bbox_head\.(cls|reg)_convs\.\d\.(conv\.(weight|bias|conv_offset\.\w+)|[bg]n\.\w+)$"


def _coarser(state: State, options: Mapping[str, Any]) -> State:
    """The convolutions of a pyramid after the first three are those of the coarser levels."""
    result: State = {}
    for key, value in deformable_weights(state, options).items():
        level = re.match(r"^dense\.neck\.output\.(\d)\.(.*)$", key)
        if level and int(level[1]) > 2:
            key = f"dense.neck.coarser.{int(level[1]) - 3}.{level[2]}"
        result[key] = value
    return result


# ---- FCOS ------------------------------------------------------------------------------------------------------------

FCOS = [
    *DENSE,
    (r"^bbox_head\.cls_convs\.", "dense.head.class_tower."),
    (r"^bbox_head\.reg_convs\.", "dense.head.box_tower."),
    (r"^(dense\.head\.\w+_tower\.\d)\.gn\.", r"\1.norm."),
    (r"^(dense\.head\.\w+_tower\.\d)\.conv\.conv_offset\.", r"\1.offset."),
    (r"^bbox_head\.conv_cls\.", "dense.head.logits."),
    (r"^bbox_head\.conv_reg\.", "dense.head.distances."),
    (r"^bbox_head\.conv_centerness\.", "dense.head.centerness."),
    (r"^bbox_head\.scales\.", "dense.head.scales."),
]
_FCOS_OWN = re.compile(
    rf"^({DENSE_KEYS}|{_TOWERS}|bbox_head\.conv_(cls|reg|centerness)\.(weight|bias)$|bbox_head\.scales\.\d\.scale$)"
)


def _fcos(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    levels = count(shapes, r"^bbox_head\.scales\.(\d)\.")
    if "bbox_head.conv_centerness.weight" not in shapes or not all(_FCOS_OWN.match(k) for k in shapes):
        return None
    config = mmcv_config.read_config(about)
    head, biased = look(config, "model", "bbox_head"), "bbox_head.cls_convs.0.conv.bias" in shapes
    norm = norm_of(shapes, "bbox_head.cls_convs.0")
    # Published models with the later improvements have a bias in the towers, others do not.
    improved = biased and norm != "none"
    options = dense_options(shapes, about, config, DETECTRON_MEAN if not improved else (103.53, 116.28, 123.675))
    if options is None or norm == "batch" or not 3 <= levels <= 5 or standardised(about, config):
        return None
    names = mmcv_config.file_names(about)
    stated = {
        "norm_on_bbox": improved, "centerness_on_reg": improved,
        "center_sampling": improved or "head-center" in names or "fcos-center" in names,
    }  # fmt: skip
    if isinstance(head, Mapping):  # what a configuration does not mention is off
        stated = {key: look(head, key) is True for key in stated}
    radius = look(head, "center_sample_radius")
    loss, mode = look(head, "loss_bbox", "type"), look(head, "loss_bbox", "mode")
    kinds = {"GIoULoss": "giou", "IoULoss": "linear_iou" if mode == "linear" else "iou"}
    last = count(shapes, r"^bbox_head\.cls_convs\.(\d)\.") - 1
    deformable = f"bbox_head.cls_convs.{last}.conv.conv_offset.weight" in shapes
    return {
        **options, "levels": levels, "classes": class_names(shapes["bbox_head.conv_cls.weight"][0]),
        "radius": (radius if isinstance(radius, int | float) else 1.5) if stated["center_sampling"] else None,
        "box_loss": kinds.get(str(loss), "giou" if improved else "iou"),
        "head": {
            "classes": last + 1, "boxes": count(shapes, r"^bbox_head\.reg_convs\.(\d)\."), "norm": norm, "bias": biased,
            "deformable": "last" if deformable else "none",
            "distances": "relu" if stated["norm_on_bbox"] else "exp",
            "centerness_of": "boxes" if stated["centerness_on_reg"] else "classes",
        },
    }  # fmt: skip


# ---- RetinaNet -------------------------------------------------------------------------------------------------------

RETINANET = [
    *DENSE,
    (r"^bbox_head\.cls_convs\.", "dense.class_tower."),
    (r"^bbox_head\.reg_convs\.", "dense.box_tower."),
    (r"^(dense\.\w+_tower\.\d)\.gn\.", r"\1.norm."),
    (r"^bbox_head\.retina_cls\.", "dense.logits."),
    (r"^bbox_head\.retina_reg\.", "dense.deltas."),
]
_RETINANET_OWN = re.compile(rf"^({DENSE_KEYS}|{_TOWERS}|bbox_head\.retina_(cls|reg)\.(weight|bias)$)")


def _retinanet(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    logits, deltas = (shapes.get(f"bbox_head.retina_{kind}.weight") for kind in ("cls", "reg"))
    if logits is None or deltas is None or not all(_RETINANET_OWN.match(k) for k in shapes):
        return None
    config = mmcv_config.read_config(about)
    norm, options = norm_of(shapes, "bbox_head.cls_convs.0"), dense_options(shapes, about, config)
    if options is None or norm == "batch" or norm_of(shapes, "neck.fpn_convs.0") != "none":
        return None
    if deltas[0] != 4 * ANCHORS or logits[0] % ANCHORS or standardised(about, config):
        return None
    found: dict[str, Any] = {}
    generator = look(config, "model", "bbox_head", "anchor_generator")
    if not usual_ratios(config, "bbox_head") or look(generator, "scales_per_octave") not in (None, 3):
        return None
    strides, scale = mmcv_config.numbers(look(generator, "strides"), 5), look(generator, "octave_base_scale")
    if strides is not None and isinstance(scale, int | float) and scale > 0 and (strides[0], scale) != (8, 4):
        found["anchor_sizes"] = tuple(stride * scale for stride in strides)
    return {
        **options, **found, "norm": norm, "convs": count(shapes, r"^bbox_head\.cls_convs\.(\d)\."),
        "classes": class_names(logits[0] // ANCHORS),
    }  # fmt: skip


def _anchors(state: State, options: Mapping[str, Any]) -> State:
    """Reorders the anchors of a cell, which are sorted by ratio first, by size first."""
    result = _coarser(state, options)
    for kind in ("weight", "bias"):
        for key in (f"dense.logits.{kind}", f"dense.deltas.{kind}"):
            result[key] = result[key].unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)
    return result


ORIGINS = [
    Origin(
        name="mmdetection",
        system=system,
        rename=rename,
        recognise=recognise,
        finish=finish,
        ignore=IGNORE,
        code_licence=LICENCE,
        weights_licence=LICENCE,
    )
    for system, rename, recognise, finish in (
        ("fcos", FCOS, _fcos, _coarser),
        ("retinanet", RETINANET, _retinanet, _anchors),
    )
]

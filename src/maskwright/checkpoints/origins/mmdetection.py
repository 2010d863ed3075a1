"""Layouts of two-stage systems in MMDetection, from version 2 on: background is the last class.

Version 1 had other names (no `roi_head.`), background first, and boxes that include their last pixel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from maskwright.checkpoints import mmcv_config
from maskwright.checkpoints.mmcv_config import look
from maskwright.checkpoints.names import class_names, segment_names, stored_names
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.solo import BACKBONE, resnet_of

LICENCE = "Apache-2.0"
IGNORE = (r"\.num_batches_tracked$", r"^data_preprocessor\.")
X101_STD = (57.375, 57.12, 58.395)  # of the ResNeXt models that were taken from detectron2
PYTORCH = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), True)
CAFFE = ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False)

# ---- names -----------------------------------------------------------------------------------------------------------

# What all detectors have. Norms are "bn" or "gn", with a number in blocks of the backbone.
DENSE = [
    (r"^backbone\.gn1\.", "backbone.bn1."),
    (r"(\.layer\d\..*)\.gn(\d)\.", r"\1.bn\2."),
    *BACKBONE,
    (r"\.conv\.offset\.", ".offset."),
    (r"^dense\.neck\.(\w+\.\d)\.(bn|gn)\.", r"dense.neck.\1.norm."),
]
_ENDS = [
    (r"^((?:boxes|masks)\w*\.convs\.\d+)\.(?:bn|gn)\.", r"\1.norm."),
    (r"^(boxes\w*)\.fc_cls\.", r"\1.classes."),
    (r"^(boxes\w*)\.fc_reg\.", r"\1.deltas."),
    (r"^(masks\w*)\.conv_logits\.", r"\1.logits."),
]


def _stage(part: str) -> Callable[[re.Match[str]], str]:
    """The name of a head of a cascade: without a number for the first stage."""
    return lambda m: f"{part}." if m[1] == "0" else f"{part}_{int(m[1]) + 1}."


TWO_STAGE = [
    *DENSE,
    (r"^rpn_head\.rpn_conv\.(\d)\.conv\.", r"dense.rpn.convs.\1."),  # several convolutions
    (r"^rpn_head\.rpn_conv\.", "dense.rpn.convs.0."),
    (r"^rpn_head\.rpn_cls\.", "dense.rpn.objectness."),
    (r"^rpn_head\.rpn_reg\.", "dense.rpn.deltas."),
    (r"^roi_head\.bbox_head\.(\d)\.", _stage("boxes")),
    (r"^roi_head\.mask_head\.(\d)\.", _stage("masks")),
    (r"^roi_head\.bbox_head\.", "boxes."),
    (r"^roi_head\.mask_head\.", "masks."),
    (r"^(boxes\w*)\.shared_", r"\1."),
    *_ENDS,
    (r"^roi_head\.mask_iou_head\.fc_mask_iou\.", "mask_iou.iou."),
    (r"^roi_head\.mask_iou_head\.", "mask_iou."),
    (r"^semantic_head\.conv_upsample_layers\.(\d)\.conv\.(\d)\.(?:bn|gn)\.", r"semantic.levels.\1.\2.norm."),
    (r"^semantic_head\.conv_upsample_layers\.(\d)\.conv\.", r"semantic.levels.\1."),
    (r"^semantic_head\.conv_logits\.", "semantic.output."),
]
AGGREGATED = [
    (r"^dense\.neck\.(lateral|output)\.", r"dense.neck.pyramid.\1."),
    (r"^neck\.downsample_convs\.(\d)\.(?:(conv)|bn|gn)\.", lambda m: f"dense.neck.reduce.{m[1]}.{m[2] or 'norm'}."),
    (r"^neck\.pafpn_convs\.(\d)\.(?:(conv)|bn|gn)\.", lambda m: f"dense.neck.output.{m[1]}.{m[2] or 'norm'}."),
]
_CONV = r"(conv\.(weight|bias|conv_offset\.\w+)|[bg]n\.\w+)$"
DENSE_KEYS = (
    r"backbone\.(conv1|[bg]n1|layer\d)\.|data_preprocessor\.|"
    r"neck\.(lateral_convs|fpn_convs|downsample_convs|pafpn_convs)\.\d\." + _CONV
)
_BOX = r"(shared_convs\.\d\." + _CONV + r"|(shared_fcs\.\d|fc_cls|fc_reg)\.(weight|bias)$)"
_MASK = r"(convs\.\d\." + _CONV + r"|(upsample|conv_logits)\.(weight|bias)$)"
# Other systems of the code base have these keys and further ones.
_OWN = re.compile(
    rf"^({DENSE_KEYS}|rpn_head\.rpn_(conv|cls|reg)\.|roi_head\.bbox_head\.(\d\.)?{_BOX}"
    rf"|roi_head\.mask_head\.(\d\.)?{_MASK}|roi_head\.mask_iou_head\.((convs|fcs)\.\d|fc_mask_iou)\."
    rf"|semantic_head\.(conv_upsample_layers\.\d\.conv\.\d\.{_CONV}|conv_logits\.))"
)

# ---- options of all detectors ----------------------------------------------------------------------------------------


def count(shapes: Shapes, pattern: str) -> int:
    """Number of different values of a pattern's first group among the keys."""
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


def norm_of(shapes: Shapes, layer: str) -> str:
    """Normalisation of a convolution: "batch", "group" or "none"."""
    return "batch" if f"{layer}.bn.weight" in shapes else "group" if f"{layer}.gn.weight" in shapes else "none"


def dense_options(
    shapes: Shapes, about: Mapping[str, Any], config: Mapping[str, Any], caffe_mean: tuple[float, ...] = CAFFE[0]
) -> dict[str, Any] | None:
    """Backbone, neck, rules and preprocessing; None if they are not of this code base.

    Style, trained parts and preprocessing are not in the weights. They are those of the configuration that MMDetection
    stores, otherwise those that files of this name were published with.

    Args:
        shapes: Shapes of the tensors by key.
        about: What `read_state` returned about the file.
        config: What `read_config` returned.
        caffe_mean: Mean of models in Caffe's style that have no configuration.
    """
    offsets = "conv2.conv_offset conv2_offset"
    options = resnet_of(shapes, "backbone.", "layer", 1, "backbone.conv1.weight", offsets)
    if options is None or "neck.fpn_convs.0.conv.weight" not in shapes:
        return None
    backbone, own = options["backbone"], look(config, "model", "backbone")
    # detectron2's ResNeXt-101 32x8d is normalised as in Caffe, but strides in the 3 x 3 convolution.
    ported = backbone.get("groups") == 32 and backbone.get("group_width") == 8
    caffe = _is_caffe(about) and not ported
    group = "backbone.gn1.weight" in shapes
    # Statistics are fixed in both styles; Caffe's scale and shift too.
    fixed = caffe or ported if (trained := look(own, "norm_cfg", "requires_grad")) is None else trained is False
    moving = look(own, "norm_eval") is False
    backbone["norm"] = "group" if group else "frozen" if fixed else "batch" if moving else "still"
    stages = look(own, "frozen_stages")
    if isinstance(stages, int) and -1 <= stages <= 4:
        backbone["frozen"] = stages + 1
    if "backbone.layer1.0.conv3.weight" in shapes:
        backbone["stride_in"] = "1x1" if caffe else "3x3"
    if deformed := next((k for k in shapes if re.search(r"conv2(\.conv)?_offset\.weight$", k)), None):
        # 18 values for each group, or 27 with modulation; groups are powers of two.
        values = shapes[deformed][0]
        plain = values % 18 == 0 and (values // 18).bit_count() == 1
        backbone |= {"deform_modulated": not plain, "deform_groups": values // (18 if plain else 27)}
    usual = (caffe_mean, *CAFFE[1:]) if caffe or ported else PYTORCH
    mean, std, rgb = mmcv_config.normalisation(config) or (usual[0], X101_STD if ported else usual[1], usual[2])
    rules_mean, rules_std, _ = PYTORCH if rgb else CAFFE
    resize: dict[str, Any] = {}
    if mean != rules_mean:
        resize["mean"] = mean
    if std != rules_std:
        resize["std"] = std
    size = mmcv_config.input_size(config)
    if size not in (None, (800, 1333)):
        resize |= {"short": size[0], "long": size[1]}
    return {
        **options, **({"resize": resize} if resize else {}), "rules": "mmdetection" if rgb else "mmdetection-caffe",
        "neck_width": shapes["neck.fpn_convs.0.conv.weight"][0],
    }  # fmt: skip


def _is_caffe(about: Mapping[str, Any]) -> bool:
    """Whether the backbone is of Caffe's style, which names and shapes do not tell.

    It is stated in the configuration that MMDetection stores beside the weights, in the names of published files, and
    by the statistics: those of Caffe's models are merged into scale and shift, which leaves means of 0 and variances
    of 1, and they are never updated.
    """
    stated = mmcv_config.is_caffe_text(about)
    if stated is not None:
        return stated
    name = mmcv_config.file_names(about)
    if re.search(r"(rcnn|fcos|retinanet|fpn|htc)[-\w]*?-[rx]\d+[-\w]*-(pa)?fpn", name):
        return "caffe" in name
    tensors = about.get("tensors", {})
    means = [value for key, value in tensors.items() if key.startswith("backbone.") and key.endswith("running_mean")]
    return bool(means) and not any(bool(mean.any()) for mean in means)


def standardised(about: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the convolutions standardise their weights (ConvWS), which names and shapes do not tell."""
    kinds = [look(config, "model", *part, "conv_cfg", "type") for part in (("backbone",), ("neck",))]
    return "ConvWS" in kinds or re.search(r"gn[-+]ws", mmcv_config.file_names(about)) is not None


def deformable_weights(state: State, options: Mapping[str, Any]) -> State:
    """Moves the weight of a deformable convolution beside its offsets, one level above that of a plain one."""
    deformable = {k.removesuffix("offset.weight") for k in state if k.endswith(".offset.weight")}
    moved = {f"{prefix}conv.{kind}": f"{prefix}{kind}" for prefix in deformable for kind in ("weight", "bias")}
    return {moved.get(k, k): v for k, v in state.items()}


# ---- two-stage systems -----------------------------------------------------------------------------------------------


def two_stage(shapes: Shapes, about: Mapping[str, Any], system: str, weighted: bool = False) -> dict[str, Any] | None:
    """Options of a two-stage system; None if the file holds another one.

    Args:
        shapes: Shapes of the tensors by key.
        about: What `read_state` returned about the file.
        system: Its name.
        weighted: Whether its convolutions standardise their weights.
    """
    if "rpn_head.rpn_cls.weight" not in shapes or not all(_OWN.match(key) for key in shapes):
        return None
    config = mmcv_config.read_config(about)
    stages = count(shapes, r"roi_head\.bbox_head\.(\d)\.")
    box = "roi_head.bbox_head.0" if stages else "roi_head.bbox_head"
    mask = "roi_head.mask_head.0" if stages else "roi_head.mask_head"
    masks, scored = f"{mask}.conv_logits.weight" in shapes, any("mask_iou_head" in k for k in shapes)
    panoptic = "semantic_head.conv_logits.weight" in shapes
    kind = "cascade-mask-rcnn" if stages else "mask-scoring-rcnn" if scored else "panoptic-fpn" if panoptic else ""
    if system != (kind or ("mask-rcnn" if masks else "faster-rcnn")) or weighted != standardised(about, config):
        return None
    if f"{box}.fc_reg.weight" not in shapes or shapes["rpn_head.rpn_cls.weight"][0] != 3:
        return None
    options = dense_options(shapes, about, config)
    things, deltas = shapes[f"{box}.fc_cls.weight"][0] - 1, shapes[f"{box}.fc_reg.weight"][0]
    if options is None or deltas not in ((4,) if stages else (4, 4 * things)) or not _usual(config, bool(stages)):
        return None
    options |= {
        "neck_norm": norm_of(shapes, "neck.fpn_convs.0"), "proposals": _proposals(shapes, config),
        "boxes": {
            "convs": count(shapes, rf"{re.escape(box)}\.shared_convs\.(\d)\."),
            "fcs": count(shapes, rf"{re.escape(box)}\.shared_fcs\.(\d)\."), "width": shapes[f"{box}.fc_cls.weight"][1],
            "norm": norm_of(shapes, f"{box}.shared_convs.0"),
            "agnostic": deltas == 4 and (things > 1 or bool(stages)),
        },
        "classes": class_names(things),
    }  # fmt: skip
    if "neck.pafpn_convs.0.conv.weight" in shapes:
        options["neck"] = "pafpn"
    if masks:
        options["masks"] = {
            "convs": count(shapes, rf"{re.escape(mask)}\.convs\.(\d)\."),
            "width": shapes[f"{mask}.upsample.weight"][1], "norm": norm_of(shapes, f"{mask}.convs.0"),
            "agnostic": shapes[f"{mask}.conv_logits.weight"][0] == 1 and things > 1,
        }  # fmt: skip
    elif stages:
        options["masks"] = False
    if scored:
        first = "roi_head.mask_iou_head.convs.0.weight"
        options["mask_iou"] = {
            "convs": count(shapes, r"roi_head\.mask_iou_head\.convs\.(\d)\."), "width": shapes[first][0],
            "fc_width": shapes["roi_head.mask_iou_head.fcs.0.weight"][0],
        }  # fmt: skip
    if stages:
        options["cascade"] = _cascade(stages, config)
    return options | _semantic(shapes, about, things) if panoptic else options


def _usual(config: Mapping[str, Any], cascade: bool) -> bool:
    """Whether what neither names nor options express is as in published files: anchors, coding of boxes, classifiers.

    Args:
        config: What `read_config` returned.
        cascade: Whether the coding of boxes is an option.
    """
    if not usual_ratios(config, "rpn_head"):
        return False
    heads = look(config, "model", "roi_head", "bbox_head")
    for head in heads if isinstance(heads, list) else [heads]:
        stds = mmcv_config.numbers(look(head, "bbox_coder", "target_stds"), 4)
        if not cascade and stds not in (None, (0.1, 0.1, 0.2, 0.2)):
            return False
        if look(head, "cls_predictor_cfg") is not None or look(head, "loss_cls", "use_sigmoid") is True:
            return False
        if look(head, "loss_cls", "type") == "SeesawLoss":
            return False
    return True


def usual_ratios(config: Mapping[str, Any], head: str) -> bool:
    """Whether the anchors of a head have the usual ratios, or none are stated."""
    ratios = look(config, "model", head, "anchor_generator", "ratios")
    return ratios is None or mmcv_config.numbers(ratios, 3) == (0.5, 1.0, 2.0)


def _proposals(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"convs": max(1, count(shapes, r"rpn_head\.rpn_conv\.(\d)\."))}
    generator = look(config, "model", "rpn_head", "anchor_generator")
    strides, scales = (mmcv_config.numbers(look(generator, key), n) for key, n in (("strides", 5), ("scales", 1)))
    if strides is not None and scales is not None and scales[0] > 0:
        sizes = tuple(stride * scales[0] for stride in strides)
        if sizes != (32, 64, 128, 256, 512):
            found["anchor_sizes"] = sizes
    return found


def _cascade(stages: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a cascade, whose numbers are not in the weights: those of the configuration, or the published."""
    roi, train = look(config, "model", "roi_head"), look(config, "model", "train_cfg", "rcnn")
    published = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    overlaps, weights = [], []
    for stage in range(stages):
        overlap = look(train, stage, "assigner", "pos_iou_thr")
        overlaps.append(overlap if isinstance(overlap, float) and 0 < overlap < 1 else min(0.95, 0.5 + 0.1 * stage))
        stds = mmcv_config.numbers(look(roi, "bbox_head", stage, "bbox_coder", "target_stds"), 4)
        if stds is None or min(stds) <= 0:
            stds = published[min(stage, 2)]
        weights.append(tuple(1 / std for std in stds))
    losses = mmcv_config.numbers(look(roi, "stage_loss_weights"), stages)
    return {
        "overlaps": overlaps, "delta_weights": weights, "loss_weights": losses or [0.5**n for n in range(stages)],
        "gradients": [1.0] * stages, "resample": True, "mask_stage": "every",
    }  # fmt: skip


def _semantic(shapes: Shapes, about: Mapping[str, Any], things: int) -> dict[str, Any]:
    """Classes and the semantic branch of Panoptic FPN, whose classes are the things, then the stuff."""
    regions = shapes["semantic_head.conv_logits.weight"][0] - 1
    names = stored_names(about)
    if len(names) != things + regions:
        names, stuff = segment_names(things + regions)
        if len(stuff) != regions:
            names = (*class_names(things), *(f"class {things + k}" for k in range(regions)))
    return {
        "classes": tuple(names), "stuff": tuple(names[things:]),
        "semantic": {
            "width": shapes["semantic_head.conv_logits.weight"][1],
            "norm": norm_of(shapes, "semantic_head.conv_upsample_layers.0.conv.0"),
        },
    }  # fmt: skip


def finish_two_stage(state: State, options: Mapping[str, Any]) -> State:
    """Tensors of a two-stage system that are moved or permuted after renaming; see `Origin.finish`."""
    result = deformable_weights(state, options)
    if options.get("neck") == "pafpn":
        for pattern, new in AGGREGATED:
            result = {re.sub(pattern, new, k): v for k, v in result.items()}
    for kind in ("weight", "bias"):  # things are its last output
        if f"semantic.output.{kind}" in result:
            result[f"semantic.output.{kind}"] = result[f"semantic.output.{kind}"].roll(1, 0)
    return result


def _finish_standardised(state: State, options: Mapping[str, Any]) -> State:
    """Standardises the weights of convolutions once, instead of in every pass (arXiv 1903.10520)."""
    return {k: _standardise(v) if _STANDARDISED.match(k) else v for k, v in finish_two_stage(state, options).items()}


_STANDARDISED = re.compile(r"^(dense\.(backbone|neck)\..*conv|(boxes|masks)\w*\.convs\.\d\.conv)\.weight$")


def _standardise(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    scaled = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
    return scaled.view_as(weight)


# ---- files of other systems ------------------------------------------------------------------------------------------

SUPPORTED = (
    "Faster, Mask, Mask Scoring and Cascade (Mask) R-CNN and Hybrid Task Cascade with a ResNet or ResNeXt and FPN or "
    "PAFPN, Panoptic FPN, FCOS and RetinaNet"
)


def explain(shapes: Shapes, about: Mapping[str, Any]) -> str:
    """Why a file of MMDetection matches no supported system; "" for files of other code bases."""
    meta = about.get("container", {}).get("meta")
    detectors = ("rpn_head.rpn_cls.weight", "neck.fpn_convs.0.conv.weight", "neck.lateral_convs.0.conv.weight")
    if not any(key in shapes for key in detectors) and look(meta, "mmdet_version") is None:
        return ""
    if "bbox_head.fc_cls.weight" in shapes or "bbox_head.0.fc_cls.weight" in shapes:
        return (
            "a two-stage detector of MMDetection 1, whose names and boxes differ, matches no supported system; convert "
            "it with tools/model_converters/upgrade_model_version.py of MMDetection 2"
        )
    if all(key.startswith(("backbone.", "conv1.", "layer", "bn1.")) for key in shapes):
        return "holds the backbone of a detector of MMDetection alone and matches no supported system"
    kind = look(mmcv_config.read_config(about), "model", "type")
    named = f" ({kind})" if isinstance(kind, str) and re.fullmatch(r"\w{1,40}", kind) else ""
    own = re.compile(rf"{_OWN.pattern}|^bbox_head\.(cls_convs|reg_convs|retina_\w+|conv_\w+|scales)\.")
    other = next((key for key in shapes if not own.match(key)), None)
    reason = (
        f"it has keys such as {other!r}"
        if other is not None and len(other) < 120
        else "its shapes or its configuration do not fit"
    )
    return f"a detector of MMDetection{named} that matches no supported system: {reason}; supported are {SUPPORTED}"


SYSTEMS = ("faster-rcnn", "mask-rcnn", "mask-scoring-rcnn", "cascade-mask-rcnn", "panoptic-fpn")
ORIGINS = [
    Origin(
        name="mmdetection",
        system=system,
        rename=TWO_STAGE,
        recognise=lambda shapes, about, system=system, weighted=weighted: two_stage(shapes, about, system, weighted),
        finish=_finish_standardised if weighted else finish_two_stage,
        ignore=IGNORE,
        code_licence=LICENCE,
        weights_licence=LICENCE,
        explain=explain,
    )
    for system in SYSTEMS
    for weighted in (False, True)
]

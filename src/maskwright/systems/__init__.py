"""The registry: which systems there are. Nothing is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from maskwright.errors import UnknownSystemError
from maskwright.systems.base import (
    Ablation,
    Card,
    ClassRows,
    FrozenFeatures,
    FrozenLayout,
    PanopticSystem,
    Preset,
    ProposalSystem,
    QueryDetector,
    QuerySystem,
    Score,
    System,
)

# name: "module:class", in the order of publication
REGISTRY = {
    "deepmask": "deepmask:DeepMask",
    "instancefcn": "instancefcn:InstanceFCN",
    "mask-rcnn": "mask_rcnn:MaskRCNN",
    "keypoint-rcnn": "keypoint_rcnn:KeypointRCNN",
    "tensormask": "tensormask:TensorMask",
    "yolact": "yolact:YOLACT",
    "yolact-plus": "yolact_plus:YOLACTPlus",
    "ese-seg": "ese_seg:ESESeg",
    "polarmask": "polarmask:PolarMask",
    "embedmask": "embedmask:EmbedMask",
    "pointrend": "pointrend:PointRend",
    "pointrend-semantic": "pointrend:PointRendSemantic",
    "deepsnake": "deepsnake:DeepSnake",
    "solo": "solo:SOLO",
    "decoupled-solo": "solo:DecoupledSOLO",
    "fouriernet": "fouriernet:FourierNet",
    "solov2": "solov2:SOLOv2",
    "detr": "detr:DETR",
    "maskformer": "maskformer:MaskFormer",
    "mask2former": "mask2former:Mask2Former",
    "h-detr": "h_detr:HDETR",
    "mask-frozen-detr": "mask_frozen_detr:MaskFrozenDETR",
    "eomt": "eomt:EoMT",
}

__all__ = [
    "REGISTRY",
    "Ablation",
    "Card",
    "ClassRows",
    "FrozenFeatures",
    "FrozenLayout",
    "PanopticSystem",
    "Preset",
    "ProposalSystem",
    "QueryDetector",
    "QuerySystem",
    "Score",
    "System",
    "create",
    "names",
    "presets",
    "system_class",
]


def names() -> list[str]:
    """The systems' names."""
    return list(REGISTRY)


def system_class(name: str) -> type[System]:
    """The class of the system called `name`."""
    if name not in REGISTRY:
        raise UnknownSystemError(f"there is no system {name!r}; known are {', '.join(REGISTRY)}")
    module, attribute = REGISTRY[name].split(":")
    return getattr(import_module(f"maskwright.systems.{module}"), attribute)


def presets() -> dict[str, str]:
    """Every preset's name -> its system's name."""
    return {preset: name for name in REGISTRY for preset in system_class(name).presets}


def create(name: str, **options: Any) -> System:
    """A system with random weights, by its name or a preset's; `options` override the preset's."""
    if name in REGISTRY:
        return system_class(name)(**options)
    owner = presets().get(name)
    if owner is None:
        raise UnknownSystemError(
            f"there is no system or preset {name!r}; systems: {', '.join(REGISTRY)}; presets: {', '.join(presets())}"
        )
    kind = system_class(owner)
    return kind(**{**kind.presets[name].options, **options})

"""The registry of systems. A system's module is imported when it is first used."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from maskwright.errors import UnknownSystemError, UsageError
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.kinds.detectors import FrozenFeatures, FrozenLayout, QueryDetector
from maskwright.systems.kinds.panoptic import PanopticSystem
from maskwright.systems.kinds.proposals import ProposalSystem
from maskwright.systems.kinds.queries import QuerySystem
from maskwright.systems.system import ClassRows, System

# name: "module:class", in the order of publication
REGISTRY = {
    "deepmask": "deepmask:DeepMask",
    "instancefcn": "instancefcn:InstanceFCN",
    "faster-rcnn": "faster_rcnn:FasterRCNN",
    "rfcn": "fcis:RFCN",
    "fcis": "fcis:FCIS",
    "mask-rcnn": "mask_rcnn:MaskRCNN",
    "retinanet": "retinanet:RetinaNet",
    "keypoint-rcnn": "keypoint_rcnn:KeypointRCNN",
    "panet": "panet:PANet",
    "cascade-mask-rcnn": "cascade_rcnn:CascadeMaskRCNN",
    "htc": "htc:HTC",
    "mask-scoring-rcnn": "mask_scoring_rcnn:MaskScoringRCNN",
    "panoptic-fpn": "panoptic_fpn:PanopticFPN",
    "cascade-panoptic-fpn": "panoptic_fpn:CascadePanopticFPN",
    "tensormask": "tensormask:TensorMask",
    "yolact": "yolact:YOLACT",
    "yolact-plus": "yolact_plus:YOLACTPlus",
    "ese-seg": "ese_seg:ESESeg",
    "polarmask": "polarmask:PolarMask",
    "embedmask": "embedmask:EmbedMask",
    "pointrend": "pointrend:PointRend",
    "pointrend-semantic": "pointrend_semantic:PointRendSemantic",
    "deepsnake": "deepsnake:DeepSnake",
    "fcos": "fcos:FCOS",
    "centermask": "centermask:CenterMask",
    "blendmask": "blendmask:BlendMask",
    "panoptic-centermask": "panoptic_fcos:PanopticCenterMask",
    "panoptic-blendmask": "panoptic_fcos:PanopticBlendMask",
    "solo": "solo:SOLO",
    "decoupled-solo": "solo:DecoupledSOLO",
    "fouriernet": "fouriernet:FourierNet",
    "solov2": "solov2:SOLOv2",
    "detr": "detr:DETR",
    "maskformer": "maskformer:MaskFormer",
    "mask2former": "mask2former:Mask2Former",
    "h-detr": "h_detr:HDETR",
    "mask-frozen-detr": "mask_frozen_detr:MaskFrozenDETR",
    "sam": "sam:SAM",
    "mobile-sam": "mobile_sam:MobileSAM",
    "efficient-sam": "efficient_sam:EfficientSAM",
    "edge-sam": "edge_sam:EdgeSAM",
    "sam2": "sam2:SAM2",
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
    "describe",
    "find",
    "names",
    "presets",
    "stuff_of",
    "suggestion",
    "system_class",
]


def names() -> list[str]:
    """The names of all systems, in the order of publication."""
    return list(REGISTRY)


def system_class(name: str) -> type[System]:
    """The class of the system called `name`.

    Raises:
        UnknownSystemError: If the registry has no such system.
    """
    if name not in REGISTRY:
        raise UnknownSystemError(f"there is no system {name!r}; {_hint(name, REGISTRY)}")
    module, attribute = REGISTRY[name].split(":")
    return getattr(import_module(f"maskwright.systems.{module}"), attribute)


def presets() -> dict[str, str]:
    """The names of all presets, each with the name of its system."""
    return {preset: name for name in REGISTRY for preset in system_class(name).presets}


def find(name: str) -> tuple[type[System], Mapping[str, Any]]:
    """The class and the options that a system's or preset's name stands for.

    Raises:
        UnknownSystemError: If there is neither a system nor a preset of this name.
    """
    if name in REGISTRY:
        return system_class(name), {}
    known = presets()
    owner = known.get(name)
    if owner is None:
        raise UnknownSystemError(f"there is no system or preset {name!r}; {suggestion(name)}")
    kind = system_class(owner)
    return kind, kind.presets[name].options


def suggestion(name: str) -> str:
    """The end of a message about a name that is neither a system nor a preset: the most similar one, and the command
    that lists all."""
    return _hint(name, [*REGISTRY, *presets()])


def _hint(name: str, known: Iterable[str]) -> str:
    """The end of the message about an unknown name."""
    similar = get_close_matches(name, known, 1)
    return (f"did you mean {similar[0]!r}? " if similar else "") + "`maskwright systems` lists all"


def create(name: str, **options: Any) -> System:
    """Constructs a system with random weights.

    Args:
        name: Name of a system or of a preset.
        **options: Arguments of the constructor; they take precedence over those of the preset. Option groups are merged
            field by field: `create("solo-r50", backbone={"norm": "group"})` keeps the preset's other choices.

    Raises:
        UnknownSystemError: If there is no such name.
        UsageError: If an option does not exist or has an invalid value, or no network can be built with the options.
    """
    kind, preset = find(name)
    final = kind.with_options(preset, options)
    with _explained(kind, options):
        return kind(**final)


@contextmanager
def _explained(kind: type[System], options: Mapping[str, Any]) -> Generator[None, None, None]:
    """Turn what torch raises for options of the caller that exclude one another into a UsageError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, MemoryError) as error:
        given = ", ".join(f"{name}={str(value)[:60]}" for name, value in options.items() if name != "classes")
        if not given:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{kind.name} cannot be built with {given} ({type(error).__name__}: {reason}); change these options"
        ) from error


def stuff_of(system: System) -> tuple[str, ...]:
    """Those of the system's classes that are regions; empty for systems of objects alone."""
    return tuple(system.stuff) if isinstance(system, PanopticSystem) else ()


def describe(name: str, **options: Any) -> System:
    """Constructs a system on the device "meta", without memory for its weights.

    It serves to read `outputs`, `needs` and `tasks`, which depend on options.

    Args:
        name: Name of a system or of a preset.
        **options: As for `create`. Without `classes`, two placeholder names are used where the system takes several.
    """
    import torch

    kind, preset = find(name)
    if not issubclass(kind, ProposalSystem):
        options = {"classes": preset.get("classes", ("first", "second")), **options}
    final = kind.with_options(preset, options)
    with torch.device("meta"), _explained(kind, options):
        return kind.rebuild(final)

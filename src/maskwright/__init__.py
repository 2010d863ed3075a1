"""maskwright: published instance segmentation systems behind one interface.

    import maskwright as mw

    system = mw.load("mask-rcnn-r50-fpn-3x.pkl")
    for prediction in mw.predict(system, "images/*.jpg"):
        print(prediction.path, prediction.instances.labels)

Submodules are imported when a name is first used, so that importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maskwright._version import __version__

_HOMES = {
    "Batch": "structures",
    "Instances": "structures",
    "Masks": "structures",
    "Panoptic": "structures",
    "Placement": "structures",
    "Preprocess": "structures",
    "System": "systems",
    "create": "systems",
    "load": "checkpoints",
    "save": "checkpoints",
    "convert": "checkpoints",
    "shipped": "checkpoints",
    "predict": "inference",
    "train": "training",
    "evaluate": "inference",
    "export": "inference",
    "report": "evaluation",
    "check": "data",
    "read_coco": "data",
    "MaskwrightError": "errors",
}

__all__ = [
    "Batch",
    "Instances",
    "Masks",
    "MaskwrightError",
    "Panoptic",
    "Placement",
    "Preprocess",
    "System",
    "__version__",
    "check",
    "convert",
    "create",
    "evaluate",
    "export",
    "load",
    "predict",
    "read_coco",
    "report",
    "save",
    "shipped",
    "train",
]

if TYPE_CHECKING:
    from maskwright.checkpoints import convert, load, save, shipped
    from maskwright.data import check, read_coco
    from maskwright.errors import MaskwrightError
    from maskwright.evaluation import report
    from maskwright.inference import evaluate, export, predict
    from maskwright.structures import Batch, Instances, Masks, Panoptic, Placement, Preprocess
    from maskwright.systems import System, create
    from maskwright.training import train


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"maskwright.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'maskwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

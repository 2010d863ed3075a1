"""Panoptic BlendMask in the layout of AdelaiDet, and Panoptic CenterMask in that of CenterMask2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from maskwright.checkpoints.names import segment_names
from maskwright.checkpoints.origins import Origin, Shapes
from maskwright.checkpoints.origins import blendmask as blend
from maskwright.checkpoints.origins import centermask as center
from maskwright.checkpoints.origins.fcos import ADELAIDET_IGNORE
from maskwright.checkpoints.origins.mask_rcnn import DETECTRON2_IGNORE, minus
from maskwright.checkpoints.origins.panoptic_fpn import SEMANTIC

# The pyramid begins at stride 4; the rules of FCOS, whose pyramids begin at stride 8, come after these.
NECK = [minus(rf"^backbone\.fpn_{part}(\d)\.", f"neck.{part}.{{}}.conv.", 2) for part in ("lateral", "output")]


def _rename(prefix: str, rules: list[Any]) -> list[Any]:
    """Names of the branch behind `prefix`, then those of the detector."""
    branch = [
        (SEMANTIC[0][0].replace("sem_seg_head", prefix), lambda m: SEMANTIC[0][1](m).replace("semantic.", "regions.")),
        (rf"^{prefix}\.predictor\.", "regions.output."),
    ]
    return [*branch, *NECK, *rules]


def _recognise(
    prefix: str, detector: Callable[[Shapes, Mapping[str, Any]], dict[str, Any] | None]
) -> Callable[[Shapes, Mapping[str, Any]], dict[str, Any] | None]:
    def recognise(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
        output, first = shapes.get(f"{prefix}.predictor.weight"), shapes.get(f"{prefix}.p2.0.weight")
        if output is None or first is None or "backbone.fpn_output2.weight" not in shapes:
            return None
        options = detector({k: v for k, v in shapes.items() if not k.startswith(f"{prefix}.")}, about)
        if options is None:
            return None
        things, count = len(options["classes"]), output[0] - 1
        classes, stuff = segment_names(things + count)
        if len(stuff) != count:
            stuff = tuple(f"class {things + k}" for k in range(count))
            classes = (*options["classes"], *stuff)
        norm = "group" if f"{prefix}.p2.0.norm.weight" in shapes else "none"
        return {**options, "classes": classes, "stuff": stuff, "regions": {"width": first[0], "norm": norm}}

    return recognise


ORIGINS = [
    Origin(
        name="adelaidet",
        system="panoptic-blendmask",
        rename=_rename("panoptic_module", blend.RENAME),
        recognise=_recognise("panoptic_module", blend.recognise),
        finish=blend.finish,
        ignore=ADELAIDET_IGNORE,
        code_licence="non-commercial",
        weights_licence="non-commercial",
    ),
    Origin(
        name="centermask2",
        system="panoptic-centermask",
        rename=_rename("sem_seg_head", center.RENAME),
        recognise=_recognise("sem_seg_head", center.recognise),
        finish=center.numbered_towers,
        ignore=DETECTRON2_IGNORE,
        code_licence="CC-BY-NC-4.0",
        weights_licence="CC-BY-NC-4.0",
    ),
]

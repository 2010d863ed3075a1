"""Layout of Hybrid Task Cascade in MMDetection: that of Cascade Mask R-CNN, with more keys of the RoI head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from maskwright.checkpoints.names import COCO, COCO_IDS, COCO_STUFF_ONLY, class_names, stored_names
from maskwright.checkpoints.origins import Origin, Shapes, State
from maskwright.checkpoints.origins.mmdetection import IGNORE, LICENCE, TWO_STAGE, count, finish_two_stage, two_stage

SEMANTIC = r"^roi_head\.semantic_head\."
LAYERS = re.compile(
    SEMANTIC + r"((lateral_convs|convs)\.\d\.conv|conv_embedding\.conv|conv_logits)\.(weight|bias)$"
    r"|^roi_head\.mask_head\.\d\.conv_res\.(conv\.(weight|bias)|[bg]n\.\w+)$"
)
OUTPUTS = 183  # of files trained on COCO-Stuff: category id - 1; the last one has no category


def _recognise(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    more = {key for key in shapes if LAYERS.match(key)}
    flow = "roi_head.mask_head.1.conv_res.conv.weight" in more
    outputs = shapes.get("roi_head.semantic_head.conv_logits.weight", (0,))[0]
    if not flow and not outputs:
        return None
    options = two_stage({k: v for k, v in shapes.items() if k not in more}, about, "cascade-mask-rcnn")
    if options is None or not options["masks"]:
        return None
    things = len(options["classes"])
    names, stuff = stored_names(about), ()
    if outputs == OUTPUTS and things == len(COCO):
        stuff = COCO_STUFF_ONLY
    elif outputs:
        if outputs < things:
            return None
        stuff = tuple(f"class {k}" for k in range(things, outputs))
    if len(names) not in (things, things + len(stuff)):
        names = class_names(things)
    if len(names) > things:
        stuff = names[things:]
    options |= {"classes": (*names[:things], *stuff), "stuff": stuff, "flow": flow}
    options["semantic"] = {"convs": count(shapes, SEMANTIC + r"convs\.(\d)\.")} if outputs else False
    return options


def _finish(state: State, options: Mapping[str, Any]) -> State:
    result = finish_two_stage(state, options)
    weight, bias = result.get("semantic.logits.weight"), result.get("semantic.logits.bias")
    if weight is None or bias is None:
        return result
    if len(weight) == OUTPUTS and len(options["classes"]) == len(COCO) + len(COCO_STUFF_ONLY):
        rows = torch.tensor([OUTPUTS - 1, *(number - 1 for number in COCO_IDS), *range(91, 182)])
        weight, bias = weight[rows], bias[rows]
    else:  # every pixel has a class: an output for none of them that is never the best
        weight = torch.cat([torch.zeros_like(weight[:1]), weight])
        bias = torch.cat([bias.min()[None] - 20, bias])
    return {**result, "semantic.logits.weight": weight, "semantic.logits.bias": bias}


ORIGINS = [
    Origin(
        name="mmdetection",
        system="htc",
        rename=[
            *TWO_STAGE,
            (r"^(masks\w*)\.conv_res\.(?:bn|gn)\.", r"\1.fuse.norm."),
            (r"^(masks\w*)\.conv_res\.", r"\1.fuse."),
            (SEMANTIC + r"lateral_convs\.", "semantic.laterals."),
            (SEMANTIC + r"conv_embedding\.", "semantic.embedding."),
            (SEMANTIC + r"conv_logits\.", "semantic.logits."),
            (SEMANTIC, "semantic."),
        ],
        recognise=_recognise,
        finish=_finish,
        ignore=IGNORE,
        code_licence=LICENCE,
        weights_licence=LICENCE,
    )
]
